"""The thrash guard: what holding the model may cost the rest of the computer."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.memory import Pressure
from emberd.core.thrash import (
    FIRST_CALM_S,
    MIB,
    SETTLED_S,
    STEP_S,
    WINDOW_S,
    Guard,
    Hold,
    Reading,
    step,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emberd.core.settings import Priority


class Run:
    """The guard over time, a reading every two seconds."""

    def __init__(self, priority: Priority = "auto", *, is_holding: bool = True) -> None:
        self.guard = Guard()
        self.now_s = 1000.0
        self.counter = 123 * MIB
        self.priority: Priority = priority
        self.is_holding = is_holding

    def go(self, seconds: float, mib_per_s: float = 0.0, pressure: Pressure = Pressure.NORMAL) -> list[Hold]:
        """Let time pass; return the stages that were entered."""
        entered = []
        for _ in range(int(seconds / 2)):
            self.now_s += 2
            self.counter += int(mib_per_s * 2 * MIB)
            before = self.guard.hold
            reading = Reading(self.now_s, self.counter, pressure)
            self.guard = step(self.guard, reading, self.priority, is_holding=self.is_holding)
            if self.guard.hold is not before:
                entered.append(self.guard.hold)
        return entered


def test_a_storm_makes_it_let_go_step_by_step_and_quiet_makes_it_take_hold_again():
    run = Run()
    assert run.go(60) == []
    assert run.go(40, mib_per_s=200) == [Hold.NO_WARMING, Hold.NO_OUTSIDE_LOCK, Hold.NOTHING]
    assert run.go(FIRST_CALM_S) == []
    assert run.go(WINDOW_S) == [Hold.ALL]


def test_the_first_step_comes_with_the_budget_and_the_next_only_if_it_goes_on():
    run = Run("machine-first")
    run.go(10)
    assert run.go(4, mib_per_s=40) == [Hold.NO_WARMING]
    assert run.go(30, mib_per_s=0) == []


@pytest.mark.parametrize(
    ("priority", "lets_go"), [("machine-first", True), ("auto", False), ("model-first", False)]
)
def test_two_mib_a_second_are_too_much_for_the_machine_first_only(priority: Priority, lets_go: bool):
    assert bool(Run(priority).go(180, mib_per_s=2)) is lets_go


def test_model_first_never_lets_go():
    assert Run("model-first").go(600, mib_per_s=500) == []


def test_what_is_written_while_nothing_is_held_is_not_emberds_doing():
    assert Run(is_holding=False).go(300, mib_per_s=500) == []


def test_swapping_that_goes_on_without_the_model_keeps_it_from_taking_hold():
    run = Run()
    run.go(60, mib_per_s=100)
    run.is_holding = False
    assert run.guard.hold is Hold.NOTHING
    assert run.go(900, mib_per_s=20) == []
    assert run.go(WINDOW_S + FIRST_CALM_S + 4) == [Hold.ALL]


def test_a_relapse_doubles_the_calm_and_a_settled_hold_forgets_it():
    run = Run()
    run.go(40, mib_per_s=200)
    run.go(FIRST_CALM_S + WINDOW_S)
    assert run.guard.hold is Hold.ALL
    run.go(40, mib_per_s=200)
    assert run.guard.calm_s == 2 * FIRST_CALM_S
    run.go(WINDOW_S + 2 * FIRST_CALM_S + 4)
    assert run.guard.hold is Hold.ALL
    run.go(SETTLED_S + 4)
    assert run.guard.calm_s == FIRST_CALM_S


def test_critical_pressure_keeps_it_from_taking_hold():
    run = Run()
    run.go(40, mib_per_s=200)
    assert run.go(600, pressure=Pressure.CRITICAL) == []
    assert run.go(FIRST_CALM_S + 4) == [Hold.ALL]


def test_a_counter_that_is_unknown_or_went_back_lets_nothing_go():
    guard = Guard()
    for number, counter in enumerate([0, 1 << 40, None, 2 << 40, 5, 10]):
        reading = Reading(1000.0 + number, counter, Pressure.NORMAL)
        guard = step(guard, reading, "auto", is_holding=number != 1)
    assert guard.hold is Hold.ALL


def test_one_burst_that_was_over_before_the_window_is_forgotten():
    run = Run()
    run.is_holding = False
    run.go(10, mib_per_s=500)
    run.go(WINDOW_S + 4)
    run.is_holding = True
    assert run.go(60) == []


@given(
    st.lists(st.tuples(st.floats(0.1, 30), st.integers(0, 400)), max_size=60),
    st.sampled_from(["auto", "machine-first"]),
)
def test_it_lets_go_one_step_at_a_time_and_never_faster_than_its_step(
    course: Iterable[tuple[float, int]], priority: Priority
):
    guard, now_s, counter = Guard(), 0.0, 0
    stages = [(guard.hold, now_s)]
    for seconds, mib in course:
        now_s, counter = now_s + seconds, counter + mib * MIB
        guard = step(guard, Reading(now_s, counter, Pressure.NORMAL), priority, is_holding=True)
        if guard.hold is not stages[-1][0]:
            stages.append((guard.hold, now_s))
    order = list(Hold)
    for (before, then_s), (after, at_s) in itertools.pairwise(stages):
        assert after is Hold.ALL or order.index(after) == order.index(before) + 1
        if before is not Hold.ALL:
            assert at_s - then_s >= STEP_S


@pytest.mark.parametrize("frees", Hold)
def test_steps_that_give_nothing_back_are_skipped(frees: Hold):
    guard = Guard()
    for second in (0, 2):
        reading = Reading(second, second * 512 * MIB, Pressure.NORMAL)
        guard = step(guard, reading, "machine-first", is_holding=True, frees=frees)
    assert guard.hold is (Hold.NO_WARMING if frees is Hold.ALL else frees)


@pytest.mark.parametrize("priority", ["auto", "machine-first", "model-first"])
@pytest.mark.parametrize("frees", [Hold.NO_WARMING, Hold.NO_OUTSIDE_LOCK, Hold.NOTHING])
@pytest.mark.parametrize("is_holding", [True, False], ids=["holding", "before the first pass"])
def test_what_the_machine_takes_is_its_own_where_it_comes_first_and_nothing_is_locked(
    priority: Priority, frees: Hold, *, is_holding: bool
):
    reading = Reading(1000.0, 0, Pressure.NORMAL, is_losing=True)
    yields = priority == "machine-first" and frees is Hold.NO_WARMING
    taken = step(Guard(), reading, priority, is_holding=is_holding, frees=frees)
    assert taken.hold is (Hold.NO_WARMING if yields else Hold.ALL)


def test_as_long_as_the_machine_takes_the_model_is_not_taken_hold_of_and_nothing_more_is_let_go():
    guard = Guard()
    for second in range(200):
        reading = Reading(1000.0 + second, 0, Pressure.NORMAL, is_losing=second % 30 == 0)
        guard = step(guard, reading, "machine-first", is_holding=True)
        assert guard.hold is Hold.NO_WARMING
    for second in range(200, 200 + int(FIRST_CALM_S) + 1):
        guard = step(guard, Reading(1000.0 + second, 0, Pressure.NORMAL), "machine-first", is_holding=True)
    assert guard.hold is Hold.ALL
