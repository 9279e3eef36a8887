"""The arrows of the engine's life, each named as one."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core import lifecycle
from emberd.core.causes import FIRST_RETRY_S, LONGEST_RETRY_S, Cause, Kind, retry_after_s
from emberd.core.lifecycle import AT_REST, Effect, Event, Lifecycle, State, backoff_s, step
from emberd.core.settings import LifecycleSettings

SETTINGS = LifecycleSettings()
STARTED = Lifecycle(State.STARTING, is_wanted=True)
LOADING = Lifecycle(State.LOADING, is_wanted=True, deadline_s=1800.0)
READY = Lifecycle(State.READY, is_wanted=True, deadline_s=60.0)


def after(now: Lifecycle, event: Event, now_s: float = 10.0) -> tuple[Lifecycle, tuple[Effect, ...]]:
    return step(now, event, now_s, SETTINGS)


def test_stopped_to_starting_when_somebody_wants_an_engine():
    now, effects = after(Lifecycle(), lifecycle.Start())
    assert (now.state, effects) == (State.STARTING, (Effect.LAUNCH,))
    assert now.is_wanted


def test_starting_to_loading_when_the_process_exists():
    now, effects = after(STARTED, lifecycle.Launched())
    assert (now.state, effects) == (State.LOADING, (Effect.WATCH,))
    assert now.deadline_s == 10 + SETTINGS.load_timeout_s


def test_loading_to_ready_only_by_an_answered_probe():
    assert after(LOADING, lifecycle.BecameReady())[0].state is State.READY
    assert after(STARTED, lifecycle.BecameReady())[0].state is State.STARTING


def test_an_adopted_engine_must_earn_ready_again():
    now, effects = after(Lifecycle(), lifecycle.Adopted())
    assert (now.state, now.is_wanted, effects) == (State.LOADING, True, (Effect.WATCH,))


def test_the_first_crash_is_restarted_at_once():
    now, effects = after(READY, lifecycle.Exited("SIGKILL"))
    assert (now.state, now.crashes, effects) == (State.STARTING, 1, (Effect.LAUNCH,))


def test_the_second_crash_in_a_row_waits():
    now, effects = after(dataclasses.replace(LOADING, crashes=1), lifecycle.Exited("SIGSEGV"))
    assert (now.state, now.crashes, effects) == (State.BACKOFF, 2, (Effect.SWEEP,))
    assert now.deadline_s == 10 + SETTINGS.backoff_initial_s
    again, effects = step(now, lifecycle.DeadlinePassed(), 10 + SETTINGS.backoff_initial_s, SETTINGS)
    assert (again.state, effects) == (State.STARTING, (Effect.LAUNCH,))


def test_backoff_does_not_end_before_its_time():
    waiting = Lifecycle(State.BACKOFF, is_wanted=True, crashes=3, deadline_s=50.0)
    assert after(waiting, lifecycle.DeadlinePassed(), 49.9)[0] == waiting


def test_a_crash_loop_ends_in_failed_with_the_reason():
    now, effects = after(
        dataclasses.replace(LOADING, crashes=SETTINGS.crash_limit - 1), lifecycle.Exited("why it died")
    )
    assert (now.state, now.reason, effects) == (State.FAILED, "why it died", (Effect.SWEEP,))


def test_a_stable_spell_forgets_crashes():
    calm, effects = after(dataclasses.replace(READY, crashes=4), lifecycle.DeadlinePassed(), 60.0)
    assert (calm.state, calm.crashes, calm.deadline_s, effects) == (State.READY, 0, None, ())


def test_failed_is_left_only_by_a_person():
    failed = Lifecycle(State.FAILED, is_wanted=True, crashes=6, reason="crash loop")
    for event in (lifecycle.Exited("echo"), lifecycle.DeadlinePassed(), lifecycle.BecameReady(), lifecycle.Gone()):
        assert after(failed, event)[0] == failed
    for wish in (lifecycle.Start(), lifecycle.Restart("mended")):
        now, effects = after(failed, wish)
        assert (now.state, now.crashes, effects) == (State.STARTING, 0, (Effect.LAUNCH,))


FULL = Cause(Kind.DISK, "the disk of /state has no room", "Make room; emberd tries again at once.")


def test_failed_is_left_when_its_cause_has_gone_and_one_more_crash_leads_back():
    last = SETTINGS.crash_limit - 1
    failed, _ = after(dataclasses.replace(LOADING, crashes=last), lifecycle.Exited("exit code 1", FULL))
    assert (failed.state, failed.cause, failed.deadline_s) == (State.FAILED, FULL, 10 + FIRST_RETRY_S)
    again, effects = after(failed, lifecycle.CauseGone())
    assert (again.state, again.cause, effects) == (State.STARTING, None, (Effect.LAUNCH,))
    loading, _ = after(again, lifecycle.Launched())
    failed, _ = after(loading, lifecycle.Exited("exit code 1", FULL))
    assert (failed.state, failed.deadline_s) == (State.FAILED, 10 + 2 * FIRST_RETRY_S)


def test_failed_is_tried_again_by_and_by_although_its_cause_seems_to_be_there():
    failed, _ = after(STARTED, lifecycle.LaunchFailed("model not found", is_permanent=True, cause=FULL))
    assert step(failed, lifecycle.DeadlinePassed(), 10.0, SETTINGS)[0] == failed
    again, effects = step(failed, lifecycle.DeadlinePassed(), 10 + FIRST_RETRY_S, SETTINGS)
    assert (again.state, again.retries, effects) == (State.STARTING, 1, (Effect.LAUNCH,))


def test_the_waits_between_tries_out_of_failed_double_to_their_limit_and_a_stable_spell_forgets_them():
    assert [retry_after_s(retries) for retries in (0, 1, 2, 50)] == [15.0, 30.0, 60.0, LONGEST_RETRY_S]
    ready = dataclasses.replace(READY, retries=7)
    assert step(ready, lifecycle.DeadlinePassed(), 60.0, SETTINGS)[0].retries == 0


def test_backoff_ends_early_when_its_cause_has_gone():
    waiting, _ = after(dataclasses.replace(LOADING, crashes=1), lifecycle.Exited("exit code 1", FULL))
    assert after(waiting, lifecycle.CauseGone())[0].state is State.STARTING
    assert after(dataclasses.replace(waiting, cause=None), lifecycle.CauseGone())[0].state is State.BACKOFF


def test_a_refused_argument_is_not_tried_again():
    now, _ = after(STARTED, lifecycle.LaunchFailed("unknown flag", is_permanent=True))
    assert (now.state, now.reason) == (State.FAILED, "unknown flag")


def test_a_passing_launch_failure_is_tried_again():
    now, effects = after(STARTED, lifecycle.LaunchFailed("disk full", is_permanent=False))
    assert (now.state, effects) == (State.STARTING, (Effect.LAUNCH,))


def test_ready_to_draining_to_stopping_to_stopped():
    draining, effects = after(READY, lifecycle.Stop())
    assert (draining.state, effects) == (State.DRAINING, (Effect.DRAIN,))
    stopping, effects = after(draining, lifecycle.Drained())
    assert (stopping.state, effects) == (State.STOPPING, (Effect.TERMINATE,))
    stopped, effects = after(stopping, lifecycle.Gone())
    assert (stopped.state, effects) == (State.STOPPED, ())


def test_draining_ends_at_its_deadline():
    draining, _ = after(READY, lifecycle.Stop())
    now, effects = step(draining, lifecycle.DeadlinePassed(), 10 + SETTINGS.drain_timeout_s, SETTINGS)
    assert (now.state, effects) == (State.STOPPING, (Effect.TERMINATE,))


def test_an_engine_that_loads_has_nothing_to_drain():
    now, effects = after(LOADING, lifecycle.Stop())
    assert (now.state, effects) == (State.STOPPING, (Effect.TERMINATE,))


def test_a_restart_ends_in_a_new_start():
    draining, _ = after(READY, lifecycle.Restart("settings changed"))
    stopping, _ = after(draining, lifecycle.Drained())
    now, effects = after(stopping, lifecycle.Gone())
    assert (now.state, now.crashes, effects) == (State.STARTING, 0, (Effect.LAUNCH,))
    assert now.reason == "settings changed"


def test_an_exit_while_draining_is_what_was_wanted():
    draining, _ = after(READY, lifecycle.Stop())
    now, effects = after(draining, lifecycle.Exited("it went by itself"))
    assert (now.state, effects) == (State.STOPPED, (Effect.SWEEP,))


def test_a_stop_during_the_start_waits_for_the_process_and_ends_it():
    unwanted, effects = after(STARTED, lifecycle.Stop())
    assert (unwanted.state, effects) == (State.STARTING, ())
    now, effects = after(unwanted, lifecycle.Launched())
    assert (now.state, effects) == (State.STOPPING, (Effect.TERMINATE,))


def test_a_hang_counts_as_a_crash_after_the_tree_is_gone():
    stopping, effects = after(READY, lifecycle.Stuck("hung"))
    assert (stopping.state, effects) == (State.STOPPING, (Effect.TERMINATE,))
    now, effects = after(stopping, lifecycle.Gone())
    assert (now.state, now.crashes, effects) == (State.STARTING, 1, (Effect.LAUNCH,))


def test_a_load_that_never_ends_is_a_hang():
    now, effects = after(LOADING, lifecycle.DeadlinePassed(), 1800.0)
    assert (now.state, now.is_stuck, effects) == (State.STOPPING, True, (Effect.TERMINATE,))


def test_a_closed_port_sends_a_living_engine_back_to_loading():
    now, effects = after(READY, lifecycle.LostReadiness())
    assert (now.state, effects) == (State.LOADING, (Effect.WATCH,))


def test_backoff_doubles_to_its_limit():
    waits = [backoff_s(crashes, SETTINGS, 0.5) for crashes in range(1, 10)]
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]


@given(crashes=st.integers(2, 10_000), random_unit=st.floats(0, 1, exclude_max=True))
def test_backoff_stays_within_its_jitter(crashes: int, random_unit: float):
    middle = backoff_s(crashes, SETTINGS, 0.5)
    wait = backoff_s(crashes, SETTINGS, random_unit)
    assert middle * (1 - SETTINGS.backoff_jitter) <= wait <= middle * (1 + SETTINGS.backoff_jitter)


EVENTS = st.sampled_from(
    [
        lifecycle.Start(),
        lifecycle.Stop(),
        lifecycle.Restart("r"),
        lifecycle.Cool("c"),
        lifecycle.Wake(),
        lifecycle.Launched(),
        lifecycle.Adopted(),
        lifecycle.LaunchFailed("f", is_permanent=True),
        lifecycle.LaunchFailed("f", is_permanent=False),
        lifecycle.BecameReady(),
        lifecycle.LostReadiness(),
        lifecycle.Exited("e"),
        lifecycle.Stuck("s"),
        lifecycle.Drained(),
        lifecycle.Gone(),
        lifecycle.DeadlinePassed(),
    ]
)
ANSWERS = {
    State.STARTING: lifecycle.Launched(),
    State.LOADING: lifecycle.BecameReady(),
    State.DRAINING: lifecycle.Drained(),
    State.STOPPING: lifecycle.Gone(),
    State.BACKOFF: lifecycle.DeadlinePassed(),
}
"""What the world answers in each state that waits for it."""


@given(events=st.lists(st.tuples(EVENTS, st.floats(0, 100))))
def test_no_sequence_of_events_strands_the_engine(events: list[tuple[Event, float]]):
    """From wherever any history leads, a Stop ends in STOPPED and a Start in READY, if the world answers."""
    now, clock_s = Lifecycle(), 0.0
    for event, pause_s in events:
        clock_s += pause_s
        now, _ = step(now, event, clock_s, SETTINGS)
    for wish, end in ((lifecycle.Stop(), State.STOPPED), (lifecycle.Start(), State.READY)):
        now, _ = step(now, wish, clock_s, SETTINGS)
        for _ in range(10):
            if now.state is end or now.state not in ANSWERS:
                break
            clock_s = max(clock_s, now.deadline_s or 0)
            now, _ = step(now, ANSWERS[now.state], clock_s, SETTINGS)
        assert now.state is end


@given(events=st.lists(st.tuples(EVENTS, st.floats(0, 100))))
def test_every_waiting_state_was_given_something_to_wait_for(events: list[tuple[Event, float]]):
    """A state that waits was entered with the effect that ends the wait, or with a deadline."""
    now, clock_s = Lifecycle(), 0.0
    for event, pause_s in events:
        clock_s += pause_s
        before = now
        now, effects = step(before, event, clock_s, SETTINGS)
        if now.state is before.state:
            assert effects == () or (now.state, effects) == (State.STARTING, (Effect.LAUNCH,))
            continue
        needed = {
            State.STARTING: Effect.LAUNCH,
            State.LOADING: Effect.WATCH,
            State.DRAINING: Effect.DRAIN,
            State.STOPPING: Effect.TERMINATE,
        }.get(now.state)
        assert needed is None or needed in effects
        assert now.state is not State.BACKOFF or now.deadline_s is not None
        assert now.state in AT_REST | {State.DRAINING, State.STOPPING} or now.is_wanted


def test_ready_to_cool_and_back_when_somebody_needs_it():
    stopping, effects = after(READY, lifecycle.Cool("for other work"))
    assert (stopping.state, effects) == (State.STOPPING, (Effect.TERMINATE,))
    cool, effects = after(stopping, lifecycle.Gone())
    assert (cool.state, cool.reason, effects) == (State.COOL, "for other work", ())
    for need in (lifecycle.Wake(), lifecycle.Start(), lifecycle.Restart("asked")):
        now, effects = after(cool, need)
        assert (now.state, now.is_cool, effects) == (State.STARTING, False, (Effect.LAUNCH,))
    assert after(cool, lifecycle.Stop())[0] == Lifecycle(State.STOPPED, since_s=10.0)


def test_whoever_comes_while_it_stops_for_other_work_gets_a_new_engine():
    stopping, _ = after(READY, lifecycle.Cool("for other work"))
    for need in (lifecycle.Wake(), lifecycle.Start(), lifecycle.Restart("asked")):
        needed, effects = after(stopping, need)
        assert (needed.state, effects) == (State.STOPPING, ())
        assert after(needed, lifecycle.Gone())[0].state is State.STARTING
    unwanted, _ = after(stopping, lifecycle.Stop())
    assert after(unwanted, lifecycle.Gone())[0].state is State.STOPPED


def test_only_a_ready_engine_is_stopped_for_other_work_and_only_a_cool_one_is_woken():
    for state in set(State) - {State.READY}:
        now = Lifecycle(state, is_wanted=True)
        assert after(now, lifecycle.Cool("for other work")) == (now, ())
    for state in set(State) - {State.COOL}:
        now = Lifecycle(state, is_wanted=True)
        assert after(now, lifecycle.Wake()) == (now, ())


@pytest.mark.parametrize("state", [state for state in State if state not in AT_REST])
def test_every_state_has_a_way_out_without_a_person(state: State):
    """Only STOPPED, COOL and FAILED rest; everything else moves on when the world answers."""
    answer = ANSWERS.get(state, lifecycle.Exited("dead"))
    now = Lifecycle(state, is_wanted=True, deadline_s=0.0)
    assert after(now, answer)[0].state is not state
