"""When a daemon that fails at its start waits, and for how long."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from emberd.core.start_limit import FIRST_WAIT_S, LONGEST_WAIT_S, End, Run, judge, waits_after


def failures(*began_s: float) -> tuple[Run, ...]:
    return tuple(Run(each, End.FAILED, "no model") for each in began_s)


def test_two_failures_are_left_to_the_service_manager():
    assert judge(failures(0, 10), 11) is None


def test_the_third_failure_within_five_minutes_waits_a_minute():
    assert judge(failures(0, 10, 20), 21) == FIRST_WAIT_S


def test_failures_that_are_far_apart_are_no_burst():
    assert judge(failures(0, 400, 800), 801) is None


def test_a_silent_end_counts_like_a_failure():
    assert judge((Run(0), Run(10), Run(20)), 30) == FIRST_WAIT_S


def test_a_run_that_was_of_use_begins_a_new_row():
    assert judge((*failures(0, 10), Run(20, End.READY), *failures(30, 40)), 41) is None
    assert judge((*failures(0, 10, 20), Run(30, End.READY)), 31) is None


def test_what_cannot_be_remembered_waits_at_once():
    assert judge(None, 0) == FIRST_WAIT_S


def test_who_has_waited_tries_and_does_not_wait_again_before_that():
    waited = replace(failures(20)[0], waits=1)
    assert judge((*failures(0, 10), waited), 90) is None


def test_a_try_that_fails_behind_a_wait_waits_twice_as_long_however_late_it_comes():
    runs = (*failures(0, 10), replace(failures(20)[0], waits=1))
    assert judge((*runs, *failures(5000)), 5001) == 2 * FIRST_WAIT_S


def test_a_persons_try_makes_the_next_wait_short_again():
    runs = (*failures(0, 10), replace(failures(20)[0], waits=5), replace(failures(900)[0], waits=0))
    assert judge((*runs, *failures(910)), 911) == FIRST_WAIT_S
    assert waits_after((*runs, *failures(910))) == 1


@given(st.integers(min_value=0, max_value=10_000))
def test_the_wait_grows_to_half_an_hour_and_no_further(waits: int):
    runs = (replace(failures(0)[0], waits=waits), *failures(1))
    wait_s = judge(runs, 2)
    assert wait_s is not None
    assert FIRST_WAIT_S <= wait_s <= LONGEST_WAIT_S
    assert waits_after(runs) == waits + 1
