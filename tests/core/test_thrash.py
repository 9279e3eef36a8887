"""The thrash guard: what holding the model may cost the rest of the computer."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.lock import LockState
from emberd.core.memory import Pressure
from emberd.core.thrash import (
    FIRST_CALM_S,
    MIB,
    RATE_S,
    SETTLED_S,
    STEP_S,
    WINDOW_S,
    HoldLevel,
    Reading,
    ThrashGuard,
    step,
    what_frees,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emberd.core.settings import Priority


class Run:
    """The guard over time, a reading every two seconds."""

    def __init__(
        self,
        priority: Priority = "auto",
        *,
        is_holding: bool = True,
        frees: HoldLevel | None = HoldLevel.NO_WARMING,
    ) -> None:
        self.guard = ThrashGuard()
        self.now_s = 1000.0
        self.counter = 123 * MIB
        self.priority: Priority = priority
        self.is_holding = is_holding
        self.frees = frees
        self.has_let_go = True
        self.go(2)

    def go(self, seconds: float, mib_per_s: float = 0.0, pressure: Pressure = Pressure.NORMAL) -> list[HoldLevel]:
        """Let time pass; return the stages that were entered."""
        entered = []
        for _ in range(int(seconds / 2)):
            self.now_s += 2
            self.counter += int(mib_per_s * 2 * MIB)
            before = self.guard.hold
            reading = Reading(self.now_s, self.counter, pressure, has_let_go=self.has_let_go)
            self.guard = step(self.guard, reading, self.priority, is_holding=self.is_holding, frees=self.frees)
            if self.guard.hold is not before:
                entered.append(self.guard.hold)
        return entered


@pytest.mark.parametrize("frees", [HoldLevel.NO_WARMING, HoldLevel.NO_OUTSIDE_LOCK, HoldLevel.NOTHING])
def test_a_storm_makes_it_let_go_of_what_frees_memory_and_quiet_makes_it_take_hold_again(frees: HoldLevel):
    run = Run(frees=frees)
    assert run.go(60) == []
    assert run.go(4, mib_per_s=200) == [frees]
    run.frees = HoldLevel.NO_WARMING  # what was let go is let go
    assert run.go(40, mib_per_s=2) == []
    assert run.go(FIRST_CALM_S - 40) == []
    assert run.go(WINDOW_S) == [HoldLevel.ALL]


@pytest.mark.parametrize(
    ("priority", "lets_go"), [("machine-first", True), ("auto", False), ("model-first", False)]
)
def test_two_mib_a_second_are_too_much_for_the_machine_first_only(priority: Priority, lets_go: bool):
    assert bool(Run(priority).go(180, mib_per_s=2)) is lets_go


def test_model_first_never_lets_go():
    assert Run("model-first").go(600, mib_per_s=500) == []


def test_what_is_written_while_nothing_is_held_is_not_emberds_doing():
    assert Run(is_holding=False).go(300, mib_per_s=500) == []


def test_what_was_let_go_in_vain_is_taken_hold_of_again_and_said_and_not_tried_again_in_this_storm():
    run = Run()
    assert run.go(4, mib_per_s=200) == [HoldLevel.NO_WARMING]
    assert run.go(STEP_S + RATE_S + 4, mib_per_s=160) == [HoldLevel.ALL]
    assert run.guard.is_helpless
    assert run.guard.rate_before == pytest.approx(200 * MIB)
    assert run.guard.rate_after == pytest.approx(160 * MIB)
    assert run.go(600, mib_per_s=160) == []
    assert run.go(WINDOW_S + FIRST_CALM_S + 4) == []
    assert not run.guard.is_helpless, "the storm is over"
    assert run.go(4, mib_per_s=200) == [HoldLevel.NO_WARMING]


def test_what_has_relieved_the_computer_stays_let_go_while_it_still_swaps():
    run = Run()
    run.go(4, mib_per_s=200)
    assert run.go(600, mib_per_s=140) == []
    assert run.guard.rate_after == pytest.approx(140 * MIB)
    assert not run.guard.is_helpless


def test_the_quiet_before_a_storm_is_no_part_of_what_it_wrote():
    run = Run()
    run.go(40, mib_per_s=0.5)
    assert run.go(4, mib_per_s=200) == [HoldLevel.NO_WARMING]
    assert run.guard.rate_before == pytest.approx(200 * MIB)
    assert run.go(60, mib_per_s=140) == [], "it has relieved the computer"


def test_relief_is_measured_when_what_was_let_go_is_gone():
    run = Run(frees=HoldLevel.NOTHING)
    assert run.go(4, mib_per_s=200) == [HoldLevel.NOTHING]
    run.has_let_go = False  # a user's generation holds up the restart
    assert run.go(60, mib_per_s=200) == []
    run.has_let_go = True
    assert run.go(STEP_S + RATE_S + 4, mib_per_s=5) == []
    assert run.guard.rate_after == pytest.approx(5 * MIB)


def test_where_the_machine_comes_first_it_stays_let_go_even_in_vain():
    run = Run("machine-first")
    run.go(4, mib_per_s=200)
    assert run.go(600, mib_per_s=200) == []
    assert run.guard.hold is HoldLevel.NO_WARMING


def test_where_nothing_frees_memory_nothing_is_let_go_and_that_is_said():
    run = Run(frees=None)
    assert run.go(60, mib_per_s=200) == []
    assert run.guard.is_helpless
    run.frees = HoldLevel.NO_OUTSIDE_LOCK
    assert run.go(2, mib_per_s=200) == [HoldLevel.NO_OUTSIDE_LOCK], "now something does"


def test_a_lock_that_cannot_be_ended_brings_the_cache_back():
    run = Run()
    run.go(4, mib_per_s=200)
    run.frees = None  # the engine's lock is found to hold
    assert run.go(2) == [HoldLevel.ALL]
    assert run.guard.is_helpless


def test_swapping_that_goes_on_without_the_model_keeps_it_from_taking_hold():
    run = Run()
    run.go(10, mib_per_s=100)
    run.is_holding = False
    assert run.guard.hold is HoldLevel.NO_WARMING
    assert run.go(900, mib_per_s=20) == []
    assert run.go(WINDOW_S + FIRST_CALM_S + 4) == [HoldLevel.ALL]


def test_a_relapse_doubles_the_calm_and_a_settled_hold_forgets_it():
    run = Run()
    run.go(4, mib_per_s=200)
    run.go(FIRST_CALM_S + WINDOW_S)
    assert run.guard.hold is HoldLevel.ALL
    run.go(4, mib_per_s=200)
    assert run.guard.calm_s == 2 * FIRST_CALM_S
    run.go(WINDOW_S + 2 * FIRST_CALM_S + 4)
    assert run.guard.hold is HoldLevel.ALL
    run.go(SETTLED_S + 4)
    assert run.guard.calm_s == FIRST_CALM_S


def test_critical_pressure_keeps_it_from_taking_hold():
    run = Run()
    run.go(4, mib_per_s=200)
    assert run.go(600, pressure=Pressure.CRITICAL) == []
    assert run.go(FIRST_CALM_S + 4) == [HoldLevel.ALL]


def test_a_counter_that_is_unknown_or_went_back_lets_nothing_go():
    guard = ThrashGuard()
    for number, counter in enumerate([0, 1 << 40, None, 2 << 40, 5, 10]):
        reading = Reading(1000.0 + number, counter, Pressure.NORMAL)
        guard = step(guard, reading, "auto", is_holding=number != 1, frees=HoldLevel.NO_WARMING)
    assert guard.hold is HoldLevel.ALL


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
    st.sampled_from([*HoldLevel, None]),
)
def test_it_lets_go_of_one_thing_and_takes_hold_of_all_no_faster_than_relief_can_be_seen(
    course: Iterable[tuple[float, int]], priority: Priority, frees: HoldLevel | None
):
    guard, now_s, counter = ThrashGuard(), 0.0, 0
    stages = [(guard.hold, now_s)]
    for seconds, mib in course:
        now_s, counter = now_s + seconds, counter + mib * MIB
        reading = Reading(now_s, counter, Pressure.NORMAL)
        guard = step(guard, reading, priority, is_holding=True, frees=frees)
        if guard.hold is not stages[-1][0]:
            stages.append((guard.hold, now_s))
    for (before, then_s), (after, at_s) in itertools.pairwise(stages):
        assert {before, after} == {HoldLevel.ALL, frees}
        if before is not HoldLevel.ALL:
            assert at_s - then_s >= STEP_S


@pytest.mark.parametrize(
    ("lock", "is_outside", "may_restart", "priority", "frees"),
    [
        (LockState.ABSENT, False, False, "auto", HoldLevel.NO_WARMING),
        (LockState.ABSENT, True, False, "auto", HoldLevel.NO_OUTSIDE_LOCK),
        (LockState.HELD, False, False, "auto", None),
        (LockState.HELD, False, True, "auto", HoldLevel.NOTHING),
        (LockState.HELD, False, False, "machine-first", HoldLevel.NO_WARMING),
        (LockState.PARTIAL, False, True, "auto", HoldLevel.NOTHING),
        (LockState.PARTIAL, False, False, "auto", HoldLevel.NO_WARMING),
        (LockState.PARTIAL, True, True, "auto", HoldLevel.NO_OUTSIDE_LOCK),
        (LockState.UNKNOWN, False, True, "auto", HoldLevel.NO_WARMING),
    ],
)
def test_the_weights_go_first_and_the_cache_never_alone_beside_a_lock_that_stays(
    lock: LockState, is_outside: bool, may_restart: bool, priority: Priority, frees: HoldLevel | None
):
    assert what_frees(lock, priority, is_locked_outside=is_outside, may_restart=may_restart) is frees


@pytest.mark.parametrize("priority", ["auto", "machine-first", "model-first"])
@pytest.mark.parametrize("frees", [HoldLevel.NO_WARMING, HoldLevel.NO_OUTSIDE_LOCK, HoldLevel.NOTHING, None])
@pytest.mark.parametrize("is_holding", [True, False], ids=["holding", "before the first pass"])
def test_what_the_machine_takes_is_its_own_where_it_comes_first_and_nothing_is_locked(
    priority: Priority, frees: HoldLevel | None, *, is_holding: bool
):
    reading = Reading(1000.0, 0, Pressure.NORMAL, is_evicting=True)
    yields = priority == "machine-first" and frees is HoldLevel.NO_WARMING
    taken = step(ThrashGuard(), reading, priority, is_holding=is_holding, frees=frees)
    assert taken.hold is (HoldLevel.NO_WARMING if yields else HoldLevel.ALL)


def test_as_long_as_the_machine_takes_the_model_is_not_taken_hold_of_and_nothing_more_is_let_go():
    guard = ThrashGuard()
    for second in range(200):
        reading = Reading(1000.0 + second, 0, Pressure.NORMAL, is_evicting=second % 30 == 0)
        guard = step(guard, reading, "machine-first", is_holding=True, frees=HoldLevel.NO_WARMING)
        assert guard.hold is HoldLevel.NO_WARMING
    for second in range(200, 200 + int(FIRST_CALM_S) + 1):
        reading = Reading(1000.0 + second, 0, Pressure.NORMAL)
        guard = step(guard, reading, "machine-first", is_holding=True, frees=HoldLevel.NO_WARMING)
    assert guard.hold is HoldLevel.ALL
