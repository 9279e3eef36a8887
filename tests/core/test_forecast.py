"""The forecast of the next first token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.forecast import KEPT, Condition, Experience, Forecast, Temperature, forecast, temperature_of

GIB = 1 << 30
HOT, WARM, COLD, UNKNOWN = Temperature.HOT, Temperature.WARM, Temperature.COLD, Temperature.UNKNOWN


@pytest.mark.parametrize(
    ("missing", "swapped", "temperature"),
    [
        (0, 0, HOT),
        (4 << 20, 0, HOT),
        (0, 5 << 20, WARM),
        (GIB // 2, 0, WARM),
        (GIB // 2, 1 << 20, COLD),
        (2 * GIB, None, COLD),
        (None, 0, UNKNOWN),
    ],
)
def test_what_is_missing_tells_the_temperature(missing: int | None, swapped: int | None, temperature: Temperature):
    assert temperature_of(Condition(2 * GIB, missing, swapped)) is temperature


def test_nothing_measured_is_nothing_foretold():
    assert forecast(Condition(2 * GIB, 0, 0), Experience()) == Forecast(HOT, None)
    assert forecast(Condition(), Experience(hot_replay_s=0.1)) == Forecast(UNKNOWN, None)


def test_a_hot_one_takes_what_a_replay_takes_and_a_cold_one_the_reading_too():
    known = Experience(hot_replay_s=0.1, read_bytes_per_s=GIB)
    assert forecast(Condition(2 * GIB, 0, 0), known) == Forecast(HOT, 0.1)
    assert forecast(Condition(2 * GIB, GIB, GIB), known) == Forecast(COLD, pytest.approx(2.1))
    assert forecast(Condition(2 * GIB, GIB, 0), Experience(hot_replay_s=0.1)) == Forecast(COLD, None)


def test_what_users_saw_counts_for_more_than_what_is_computed():
    known = Experience(hot_replay_s=0.1, read_bytes_per_s=GIB)
    for seconds in (3.0, 5.0, 4.0):
        known = known.with_first_token(COLD, seconds)
    assert forecast(Condition(2 * GIB, 2 * GIB, 0), known) == Forecast(COLD, 4.0)
    known = known.with_first_token(HOT, 0.2)
    assert forecast(Condition(2 * GIB, 0, 0), known) == Forecast(HOT, 0.2)
    assert forecast(Condition(2 * GIB, GIB // 4, 0), known) == Forecast(WARM, pytest.approx(0.45))


@given(st.lists(st.tuples(st.sampled_from(Temperature), st.floats(0, 100)), max_size=60))
def test_only_the_latest_of_each_state_are_kept(seen: list[tuple[Temperature, float]]):
    known = Experience()
    for temperature, seconds in seen:
        known = known.with_first_token(temperature, seconds)
    for temperature in Temperature:
        assert known.of(temperature) == [seconds for each, seconds in seen if each is temperature][-KEPT:]
