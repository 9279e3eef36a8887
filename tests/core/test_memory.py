"""What follows from readings: memory pressure, swap traffic, locked memory after an engine's end, staying awake."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.memory import (
    Power,
    PowerSource,
    Pressure,
    SwapRates,
    SystemMemory,
    is_released,
    is_sign_of_storm,
    judge_pressure,
    must_stay_awake,
    swap_rates,
)

NORMAL, WARN, CRITICAL, UNKNOWN = Pressure.NORMAL, Pressure.WARN, Pressure.CRITICAL, Pressure.UNKNOWN
ORDER = [NORMAL, WARN, CRITICAL]
shares = st.floats(0, 1)
maybe = st.none() | shares


@pytest.mark.parametrize(
    ("available", "some", "full", "level"),
    [
        (0.5, 0.0, 0.0, NORMAL),
        (0.10, 0.069, 0.0, NORMAL),
        (0.5, 0.07, 0.0, WARN),
        (0.099, 0.0, 0.0, WARN),
        (0.5, 0.2, 0.1, WARN),
        (0.099, 0.2, 0.1, CRITICAL),
        (None, 0.2, 0.1, CRITICAL),
        (0.049, 0.0, 0.0, CRITICAL),
        (0.5, None, None, NORMAL),
        (0.04, None, None, CRITICAL),
        (None, 0.08, 0.0, WARN),
        (None, None, None, UNKNOWN),
    ],
)
def test_the_worse_of_stalls_and_available_memory_decides(
    available: float | None, some: float | None, full: float | None, level: Pressure
):
    assert judge_pressure(available, some, full) is level


@given(maybe, maybe, maybe, shares, shares)
def test_less_memory_or_longer_stalls_never_lower_the_level(
    available: float | None, some: float | None, full: float | None, less: float, more: float
):
    level = judge_pressure(available, some, full)
    if available is not None:
        worse = judge_pressure(min(available, less), some, full)
        assert ORDER.index(worse) >= ORDER.index(level)
    if some is not None:
        worse = judge_pressure(available, max(some, more), full)
        assert ORDER.index(worse) >= ORDER.index(level)
    assert (level is UNKNOWN) == (available is None and some is None)


def memory(swapped_in: int | None, swapped_out: int | None) -> SystemMemory:
    return SystemMemory(swapped_in_bytes=swapped_in, swapped_out_bytes=swapped_out)


def test_rates_are_bytes_a_second():
    assert swap_rates(memory(100, 1000), memory(300, 1000), 4) == SwapRates(50, 0)


def test_a_rate_is_unknown_where_a_counter_is_missing_went_back_or_had_no_time():
    assert swap_rates(memory(None, 10), memory(10, 30), 10) == SwapRates(None, 2)
    assert swap_rates(memory(0, 100), memory(10, 30), 10) == SwapRates(1, None)
    assert swap_rates(memory(0, 0), memory(10, 30), 0.5) == SwapRates()


@pytest.mark.parametrize(
    ("was_bytes", "now", "is_sign"),
    [
        (0, SystemMemory(swapped_out_bytes=4 << 20), True),
        (0, SystemMemory(swapped_out_bytes=1 << 20), False),
        (0, SystemMemory(swapped_out_bytes=0, stall_some_share=0.07), True),
        (0, SystemMemory(swapped_out_bytes=0, stall_some_share=0.06), False),
        (0, SystemMemory(swapped_out_bytes=0, pressure=WARN), False),
        (9 << 20, SystemMemory(swapped_out_bytes=0), False),
        (None, SystemMemory(swapped_out_bytes=4 << 20), False),
        (0, SystemMemory(), False),
    ],
)
def test_a_storm_is_told_by_what_is_written_and_who_waits_and_not_by_a_level(
    was_bytes: int | None, now: SystemMemory, is_sign: bool
):
    assert is_sign_of_storm(SystemMemory(swapped_out_bytes=was_bytes), now, 2.0) is is_sign


def test_the_first_reading_is_a_sign_only_if_somebody_waits():
    assert not is_sign_of_storm(None, SystemMemory(swapped_out_bytes=1 << 40), 2.0)
    assert is_sign_of_storm(None, SystemMemory(stall_some_share=0.5), 2.0)


GIB = 1024**3


@pytest.mark.parametrize(
    ("before_load", "loaded", "now", "released"),
    [
        (2 * GIB, 10 * GIB, 10 * GIB, False),
        (2 * GIB, 10 * GIB, 9 * GIB, False),
        (2 * GIB, 10 * GIB, 3 * GIB, True),
        (2 * GIB, 2 * GIB, 5 * GIB, True),
        (None, 10 * GIB, 3 * GIB, None),
        (2 * GIB, None, 3 * GIB, None),
        (2 * GIB, 10 * GIB, None, None),
    ],
)
def test_release_is_seen_in_the_wired_memory_of_the_system(
    before_load: int | None, loaded: int | None, now: int | None, released: bool | None
):
    assert is_released(before_load, loaded, now) is released


def test_only_who_wants_it_on_mains_with_a_ready_model_and_without_low_power_mode_stays_awake():
    for source, saves, is_wanted, is_ready in itertools.product(
        PowerSource, (True, False, None), (True, False), (True, False)
    ):
        power = Power(source=source, is_low_power=saves)
        expected = source is PowerSource.MAINS and saves is not True and is_wanted and is_ready
        assert must_stay_awake(power, is_wanted=is_wanted, is_ready=is_ready) is expected
