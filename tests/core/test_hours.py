"""Hours of the day."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from emberd.core.errors import ConfigError
from emberd.core.hours import left_of, read_hours
from emberd.core.settings import read


def at(hour: int, minute: int = 0) -> datetime:
    return datetime(2026, 11, 24, hour, minute, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "now", "hours_left"),
    [
        ("01:00-07:30", at(1), 6.5),
        ("01:00-07:30", at(7, 30), None),
        ("01:00-07:30", at(0, 59), None),
        ("23:00-07:00", at(23), 8),
        ("23:00-07:00", at(3), 4),
        ("23:00-07:00", at(12), None),
        ("9:00 - 24:00", at(23), 1),
        ("00:00-24:00", at(13), 11),
    ],
)
def test_a_span_holds_until_its_end_also_past_midnight(text: str, now: datetime, hours_left: float | None):
    left_s = read_hours(text).left_s(now)
    assert left_s == (None if hours_left is None else hours_left * 3600)


def test_of_several_spans_the_last_to_end_counts():
    assert left_of(("01:00-07:00", "05:00-08:00"), at(6)) == 2 * 3600
    assert left_of((), at(6)) is None


@pytest.mark.parametrize("text", ["", "1-2", "25:00-01:00", "01:00-24:30", "08:00-08:00", "night"])
def test_what_are_no_hours_is_refused_with_an_example(text: str):
    with pytest.raises(ConfigError) as caught:
        read({"warmth": {"cool_hours": [text]}}, "config.toml")
    assert "config.toml: warmth.cool_hours" in caught.value.message
