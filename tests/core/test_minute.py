"""Rows of the history: how several become one, and what they say keeping warm has brought."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.memory import EngineMemory, Observation, SystemMemory
from emberd.core.minute import (
    COLUMNS,
    FirstToken,
    Minute,
    fold,
    lost_bytes,
    step_for,
    unique_words,
    what_it_brought,
    worth_keeping,
)
from emberd.core.spark import evenly, spark
from emberd.core.types import EngineSample

GIB = 1 << 30
number = st.none() | st.integers(0, 1 << 50)
reasons = st.none() | st.sampled_from(["timer", "evicting", "knock,timer"])
rows = st.lists(
    st.builds(
        Minute,
        st.integers(0, 500).map(lambda at: at * 60),
        **{name: reasons if how == "words" else number for name, how in COLUMNS.items() if how != "time"},
    ),
    max_size=40,
)


@given(rows, st.sampled_from([120, 300, 600]), st.integers(2, 6))
def test_rows_may_be_joined_in_any_number_of_goes(several: list[Minute], step_s: int, times: int):
    assert fold(fold(several, step_s), step_s * times) == fold(several, step_s * times)
    half = len(several) // 2
    assert fold([*fold(several[:half], step_s), *several[half:]], step_s * times) == fold(several, step_s * times)


def test_unknown_is_never_zero_and_each_column_has_its_own_way():
    joined = fold(
        [
            Minute(60, requests=2, resident_bytes=9, swapped_bytes=1, pass_reasons="timer"),
            Minute(120, requests=3, resident_bytes=7, swapped_bytes=4, pass_reasons="evicting,timer"),
            Minute(180),
        ],
        600,
    )
    expected = Minute(0, requests=5, resident_bytes=7, swapped_bytes=4, pass_reasons="evicting,timer")
    assert joined == [expected]
    assert unique_words(None) is None
    assert unique_words("") is None


@pytest.mark.parametrize(("hours", "step_s"), [(1, 60), (17, 60), (24, 120), (7 * 24, 600), (8784, 24 * 3600)])
def test_a_span_has_at_most_a_thousand_points(hours: int, step_s: int):
    assert step_for(hours * 3600) == step_s
    assert hours * 3600 / step_for(hours * 3600) <= 1024


def seen(resident_bytes: int | None, **engine: object) -> Observation:
    sample = replace(EngineSample("1:a", (1,), is_idle=True, requests=3), **engine)  # type: ignore[arg-type]
    return Observation(0.0, sample, EngineMemory(resident_bytes=resident_bytes), SystemMemory())


def test_only_an_engine_that_was_idle_all_the_time_can_lose_memory():
    assert lost_bytes(seen(5 * GIB), seen(3 * GIB)) == 2 * GIB
    assert lost_bytes(seen(3 * GIB), seen(5 * GIB)) == 0
    assert lost_bytes(seen(5 * GIB), seen(3 * GIB, requests=4)) == 0
    assert lost_bytes(seen(5 * GIB), seen(3 * GIB, is_idle=False)) == 0
    assert lost_bytes(seen(5 * GIB), seen(3 * GIB, key="2:b")) == 0
    assert lost_bytes(None, seen(3 * GIB)) is None
    assert lost_bytes(seen(None), seen(3 * GIB)) is None


def token(took_s: float, idle_s: float = 600.0, **more: object) -> FirstToken:
    return FirstToken(0.0, idle_s, **{"temperature": "hot", "took_s": took_s, **more})  # type: ignore[arg-type]


def test_what_it_has_spared_is_measured_against_this_computers_own_cold_first_tokens():
    cold = [
        token(9.0, temperature="cold", missing_bytes=4 * GIB),
        token(11.0, temperature="cold", missing_bytes=6 * GIB),
    ]
    day = [token(0.2, forecast_s=0.3), token(0.4, forecast_s=0.1), token(0.1, idle_s=10), cold[0]]
    row = Minute(0, observed_s=100, warm_s=75, pass_read_bytes=7)
    brought = what_it_brought([row, Minute(60)], day, cold)
    assert (brought.warm_share, brought.first_tokens, brought.median_s) == (0.75, 3, 0.4)
    assert brought.forecast_median_s == pytest.approx(0.2)
    assert (brought.cold_s, brought.spared_bytes, brought.read_bytes) == (10.0, 10 * GIB, 7)
    assert brought.spared_s == pytest.approx(9.8 + 9.6), "the one that was cold was not spared"


def test_without_a_cold_first_token_nothing_is_estimated():
    brought = what_it_brought([], [token(0.2)], [])
    assert (brought.spared_s, brought.spared_bytes, brought.warm_share) == (None, None, None)


def test_what_a_day_wrote_to_swap_is_all_that_is_known_and_unknown_is_not_zero():
    rows = [Minute(0, swap_engine_bytes=1, swap_other_bytes=2), Minute(60), Minute(120, swap_unknown_bytes=4)]
    assert what_it_brought(rows, [], []).swap_bytes == 7
    assert what_it_brought([Minute(0, swap_engine_bytes=0)], [], []).swap_bytes == 0
    assert what_it_brought([Minute(0)], [], []).swap_bytes is None


def test_programs_that_ask_without_a_pause_fill_no_disk():
    kept = worth_keeping([*(token(each / 10, idle_s=0) for each in range(50)), token(0.05)])
    assert sorted(each.took_s for each in kept) == [0.05, 4.9]


def test_a_chart_of_what_is_bad_when_little_shows_the_least():
    night = [4.5e9] * 1440
    night[700:720] = [0.1e9] * 20
    assert spark(night, 44, min).count("▁") == 1
    assert set(spark(night, 44)) == {"█"}


def test_the_time_without_emberd_has_its_place_in_a_chart():
    hour = evenly([3600, 3660, 7140], [1, 2, 3], 3610, 7200, 60)
    assert (len(hour), hour[:3], hour[-1]) == (60, [1, 2, None], 3)
    assert spark(hour, 6) == "▆····█"
    assert evenly([0, 9000], [1, 2], 3600, 3700, 60) == [None, None], "what lies outside is left out"


def test_a_chart_shows_the_largest_of_what_shares_a_place_and_dots_for_the_unknown():
    assert spark([0, None, 8], 3) == "▁·█"
    assert spark([0, 8, 0, 0], 2) == "█▁"
    assert spark([0, 0], 2) == "▁▁"
    assert spark([], 5) == ""
    assert len(spark(list(range(1000)), 44)) == 44
