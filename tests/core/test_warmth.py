"""The policy of keeping warm: its promises for every situation, and the situations one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.lock import LockState
from emberd.core.memory import EngineMemory, Power, PowerSource, Pressure, SystemMemory
from emberd.core.settings import WarmthSettings
from emberd.core.thrash import HoldLevel, ThrashGuard
from emberd.core.warmth import (
    BATTERY_STRETCH,
    CALM_AFTER_CRITICAL_S,
    FRESH_S,
    Cache,
    Decision,
    Found,
    Reason,
    Snapshot,
    Step,
    Trigger,
    best_of,
    decide,
    is_calm,
    is_evicting,
)

NOW_S = 10_000.0
MIB = 1024 * 1024
AUTO = WarmthSettings()
GENERATIONS = {Step.REPLAY, Step.TINY}
WARMING = {Step.REPLAY, Step.TINY, Step.TOUCH, Step.LOCK}
times = st.none() | st.floats(NOW_S - 1000, NOW_S)
until = st.none() | st.floats(NOW_S - 100, NOW_S + 100)
powers = st.builds(
    Power, st.sampled_from(PowerSource), st.none() | st.floats(0, 1), st.sampled_from([None, True, False])
)
snapshots = st.builds(
    Snapshot,
    now_s=st.just(NOW_S),
    trigger=st.sampled_from(Trigger),
    is_ready=st.booleans(),
    is_stopped=st.booleans(),
    requests=st.integers(0, 2),
    lock=st.sampled_from(LockState),
    is_locked_outside=st.booleans(),
    can_lock_outside=st.sampled_from([None, True, False]),
    is_mapped=st.sampled_from([None, True, False]),
    cache=st.sampled_from(Cache),
    pressure=st.sampled_from(Pressure),
    last_critical_s=times,
    power=powers,
    paused_until_s=until,
    cool_until_s=until,
    hold=st.sampled_from(HoldLevel),
    last_use_s=times,
    last_pass_s=times,
    interval_s=st.floats(0.1, 10_000),
    is_storming=st.booleans(),
    budget_wait_s=st.sampled_from([0.0, 10.0]),
)
settings = st.builds(
    WarmthSettings,
    mode=st.sampled_from(["auto", "off"]),
    replay=st.booleans(),
    lock_outside=st.booleans(),
    may_restart=st.booleans(),
    priority=st.sampled_from(["auto", "machine-first", "model-first"]),
    on_battery=st.sampled_from(["stretch", "off", "same"]),
    min_interval_s=st.floats(1, 60),
    max_interval_s=st.floats(60, 3600),
)


def after(found: Found, wish: WarmthSettings, **seen: Any) -> Decision:
    """Return the decision behind a pass."""
    return decide(Snapshot(NOW_S, last_pass_s=NOW_S, found=found, **seen), wish)


# --- promises -----------------------------------------------------------------------------------------------------


@given(snapshots, settings)
def test_a_foreign_prompt_is_never_sent_while_the_cache_may_hold_a_users(seen: Snapshot, wish: WarmthSettings):
    steps = decide(seen, wish).steps
    if seen.cache is not Cache.EMPTY:
        assert Step.TINY not in steps
    if seen.cache is not Cache.KNOWN:
        assert Step.REPLAY not in steps


@given(snapshots, settings)
def test_nothing_is_warmed_or_restarted_while_a_request_runs_or_waits(seen: Snapshot, wish: WarmthSettings):
    if seen.requests or not seen.is_ready:
        assert not set(decide(seen, wish).steps) & (WARMING | {Step.RESTART})


@given(snapshots, settings)
def test_nothing_is_warmed_under_critical_pressure_or_shortly_after(seen: Snapshot, wish: WarmthSettings):
    was_critical = seen.last_critical_s is not None and NOW_S - seen.last_critical_s < CALM_AFTER_CRITICAL_S
    if seen.pressure is Pressure.CRITICAL or was_critical:
        assert not set(decide(seen, wish).steps) & WARMING


@given(snapshots, settings)
def test_on_battery_it_is_off_or_stretched_as_its_owner_wishes(seen: Snapshot, wish: WarmthSettings):
    seen = replace(seen, power=Power(PowerSource.BATTERY, 0.5), trigger=Trigger.TIMER)
    steps = set(decide(seen, wish).steps) & WARMING
    if wish.on_battery == "off":
        assert not steps
    warmed = [when for when in (seen.last_use_s, seen.last_pass_s) if when is not None]
    interval_s = max(seen.interval_s, wish.min_interval_s)
    if seen.pressure is Pressure.WARN or seen.is_storming:
        interval_s = wish.min_interval_s
    if wish.on_battery == "stretch" and steps and warmed:
        longest_s = wish.max_interval_s * BATTERY_STRETCH
        assert NOW_S - max(warmed) >= min(interval_s * BATTERY_STRETCH, longest_s) - 1e-6


@given(snapshots, settings)
def test_what_a_user_or_a_pass_has_just_warmed_is_left_alone(seen: Snapshot, wish: WarmthSettings):
    warmed = [when for when in (seen.last_use_s, seen.last_pass_s) if when is not None]
    if (
        warmed
        and NOW_S - max(warmed) < FRESH_S
        and seen.trigger is not Trigger.ASKED
        and wish.min_interval_s >= FRESH_S
    ):
        assert not set(decide(seen, wish).steps) & WARMING


@given(snapshots, settings)
def test_the_next_look_is_within_bounds(seen: Snapshot, wish: WarmthSettings):
    decision = decide(seen, wish)
    is_urgent = (seen.trigger, decision.reason) == (Trigger.EVICTING, Reason.NOT_DUE)
    assert (0 if is_urgent else wish.min_interval_s) <= decision.look_again_s
    assert decision.look_again_s <= wish.max_interval_s * BATTERY_STRETCH


@given(snapshots, settings)
def test_what_is_held_is_let_go_when_the_guard_or_the_owner_says_so(seen: Snapshot, wish: WarmthSettings):
    is_cool = seen.cool_until_s is not None and seen.cool_until_s > NOW_S
    if seen.is_locked_outside and (wish.mode == "off" or is_cool or seen.hold.lets_go):
        assert Step.UNLOCK in decide(seen, wish).steps
    elif not seen.is_locked_outside:
        assert Step.UNLOCK not in decide(seen, wish).steps


@given(snapshots, settings)
def test_the_engine_is_restarted_only_if_allowed_and_only_for_its_lock(seen: Snapshot, wish: WarmthSettings):
    if Step.RESTART in decide(seen, wish).steps:
        assert wish.may_restart
        assert seen.lock is LockState.HELD
        assert seen.hold is HoldLevel.NOTHING


@given(snapshots, settings)
def test_the_engine_is_stopped_only_for_its_lock_while_it_is_cool_and_never_beside_a_request(
    seen: Snapshot, wish: WarmthSettings
):
    if Step.STOP in decide(seen, wish).steps:
        assert seen.cool_until_s is not None
        assert seen.cool_until_s > NOW_S
        assert seen.lock in {LockState.HELD, LockState.PARTIAL}
        assert seen.is_ready
        assert not seen.requests
    if Step.START in decide(seen, wish).steps:
        assert seen.is_stopped
        assert seen.cool_until_s is None or seen.cool_until_s <= NOW_S


@given(snapshots, settings)
def test_steps_and_reasons_agree(seen: Snapshot, wish: WarmthSettings):
    decision = decide(seen, wish)
    resting = {Reason.NOT_DUE, Reason.NOTHING_TO_DO, Reason.PAUSED, Reason.BUSY, Reason.PRESSURE, Reason.NOT_READY}
    assert not (decision.steps and decision.reason in resting)
    assert not (Step.LOCK in decision.steps and Step.TOUCH in decision.steps), "locking touches"


@given(
    st.floats(1, 3600),
    st.builds(Found, st.none() | st.floats(0, 1), st.none() | st.integers(0, 1 << 40)),
    settings,
    st.booleans(),
)
def test_intervals_stay_within_bounds(interval_s: float, found: Found, wish: WarmthSettings, is_storming: bool):
    next_s = after(found, wish, interval_s=interval_s, is_storming=is_storming).interval_s
    assert wish.min_interval_s <= next_s <= wish.max_interval_s


# --- situations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("situation", "steps"),
    [
        ({"lock": LockState.HELD, "cache": Cache.KNOWN}, [Step.REPLAY]),
        ({"lock": LockState.HELD, "cache": Cache.EMPTY}, [Step.TINY]),
        ({"lock": LockState.HELD, "cache": Cache.UNKNOWN}, []),
        ({"lock": LockState.PARTIAL, "can_lock_outside": True, "cache": Cache.KNOWN}, [Step.LOCK, Step.REPLAY]),
        ({"lock": LockState.UNKNOWN, "can_lock_outside": True, "cache": Cache.UNKNOWN}, [Step.LOCK]),
        ({"can_lock_outside": False, "cache": Cache.KNOWN}, [Step.TOUCH, Step.REPLAY]),
        ({"can_lock_outside": None, "cache": Cache.UNKNOWN}, [Step.TOUCH]),
        ({"is_locked_outside": True, "can_lock_outside": True, "cache": Cache.KNOWN}, [Step.REPLAY]),
        ({"is_mapped": False, "can_lock_outside": True, "cache": Cache.KNOWN}, [Step.REPLAY]),
        ({"is_mapped": False, "cache": Cache.UNKNOWN}, []),
        ({"is_mapped": None, "cache": Cache.KNOWN}, [Step.TOUCH, Step.REPLAY]),
    ],
)
def test_weights_and_cache_are_kept_by_the_means_of_the_situation(situation: dict[str, Any], steps: list[Step]):
    assert list(decide(Snapshot(NOW_S, **situation), AUTO).steps) == steps


def test_a_wish_to_lock_nothing_from_outside_and_to_replay_nothing_is_obeyed():
    wish = WarmthSettings(lock_outside=False, replay=False)
    assert decide(Snapshot(NOW_S, can_lock_outside=True, cache=Cache.KNOWN), wish).steps == (Step.TOUCH,)


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        ({"is_ready": False}, Reason.NOT_READY),
        ({"requests": 1}, Reason.BUSY),
        ({"pressure": Pressure.CRITICAL}, Reason.PRESSURE),
        ({"last_critical_s": NOW_S - CALM_AFTER_CRITICAL_S + 1}, Reason.PRESSURE),
        ({"paused_until_s": NOW_S + 1}, Reason.PAUSED),
        ({"cool_until_s": NOW_S + 1, "paused_until_s": NOW_S + 1}, Reason.COOL),
        ({"is_ready": False, "is_stopped": True, "cool_until_s": NOW_S + 1}, Reason.COOL),
        ({"is_ready": False, "is_stopped": True, "trigger": Trigger.ASKED}, Reason.ASKED),
        ({"hold": HoldLevel.NO_WARMING}, Reason.LETTING_GO),
        ({"last_pass_s": NOW_S - 9}, Reason.NOT_DUE),
        ({"last_use_s": NOW_S - 9, "last_pass_s": NOW_S - 500}, Reason.NOT_DUE),
        ({"lock": LockState.HELD, "cache": Cache.UNKNOWN}, Reason.NOTHING_TO_DO),
        ({"last_pass_s": NOW_S - 11}, Reason.DUE),
        ({"last_critical_s": NOW_S - CALM_AFTER_CRITICAL_S}, Reason.DUE),
        ({"last_pass_s": NOW_S - 3, "trigger": Trigger.WOKEN}, Reason.WOKEN),
        ({"last_pass_s": NOW_S - 3, "trigger": Trigger.KNOCK}, Reason.KNOCK),
        ({"last_pass_s": NOW_S - 1, "trigger": Trigger.KNOCK}, Reason.NOT_DUE),
        ({"last_pass_s": NOW_S, "trigger": Trigger.ASKED}, Reason.ASKED),
        ({"last_use_s": NOW_S - 3, "trigger": Trigger.EVICTING}, Reason.EVICTING),
        ({"last_use_s": NOW_S - 1, "trigger": Trigger.EVICTING}, Reason.NOT_DUE),
        ({"last_pass_s": NOW_S - 6, "trigger": Trigger.EVICTING}, Reason.EVICTING),
        ({"last_pass_s": NOW_S - 4, "trigger": Trigger.EVICTING}, Reason.NOT_DUE),
    ],
)
def test_every_rest_and_every_pass_has_its_reason(situation: dict[str, Any], reason: Reason):
    assert decide(Snapshot(NOW_S, **situation), AUTO).reason is reason


@pytest.mark.parametrize(("left_s", "look_again_s"), [(1.0, 5.0), (60.0, 60.0), (7200.0, 900.0)])
def test_the_end_of_a_rest_that_was_asked_for_is_not_slept_through(left_s: float, look_again_s: float):
    wish = WarmthSettings(min_interval_s=5.0, max_interval_s=900.0)
    for rest in ("paused_until_s", "cool_until_s"):
        assert decide(Snapshot(NOW_S, **{rest: NOW_S + left_s}), wish).look_again_s == look_again_s


def test_what_the_engine_has_locked_is_given_to_other_work_by_a_stop_and_brought_back_at_the_end():
    cool = Snapshot(NOW_S, lock=LockState.HELD, cool_until_s=NOW_S + 60)
    assert decide(cool, AUTO).steps == (Step.STOP,)
    assert decide(replace(cool, is_locked_outside=True), AUTO).steps == (Step.UNLOCK, Step.STOP)
    assert decide(replace(cool, lock=LockState.ABSENT), AUTO).steps == ()
    busy = decide(replace(cool, requests=1), AUTO)
    assert (busy.steps, busy.look_again_s) == ((), AUTO.min_interval_s)
    stopped = replace(cool, is_ready=False, is_stopped=True)
    assert decide(stopped, AUTO).steps == ()
    over = replace(stopped, cool_until_s=NOW_S - 1)
    for wish in (AUTO, WarmthSettings(mode="off")):
        assert decide(over, wish).steps == (Step.START,)


def test_on_battery_the_owner_can_still_ask_for_a_pass():
    wish = WarmthSettings(on_battery="off")
    unplugged = Snapshot(NOW_S, power=Power(PowerSource.BATTERY, 0.9))
    assert decide(unplugged, wish).reason is Reason.ON_BATTERY
    assert decide(replace(unplugged, trigger=Trigger.ASKED), wish).reason is Reason.ASKED
    assert decide(replace(unplugged, power=Power(PowerSource.MAINS, 0.9, is_low_power=True)), wish).steps == ()


def test_what_is_taken_on_battery_waits_for_the_interval():
    seen = Snapshot(NOW_S, trigger=Trigger.EVICTING, last_pass_s=NOW_S - 20, power=Power(PowerSource.BATTERY, 0.9))
    assert decide(seen, AUTO).reason is Reason.NOT_DUE
    assert decide(replace(seen, power=Power(PowerSource.MAINS)), AUTO).reason is Reason.EVICTING


def test_what_is_taken_too_soon_after_a_use_is_looked_after_as_soon_as_that_is_due():
    seen = Snapshot(NOW_S, trigger=Trigger.EVICTING, last_use_s=NOW_S - 0.5)
    assert decide(seen, AUTO).look_again_s == FRESH_S - 0.5


@pytest.mark.parametrize(
    ("before", "now", "is_taken"),
    [
        (None, EngineMemory(resident_bytes=0), False),
        (EngineMemory(), EngineMemory(), False),
        (EngineMemory(resident_bytes=9 * MIB), EngineMemory(resident_bytes=4 * MIB), True),
        (EngineMemory(resident_bytes=9 * MIB), EngineMemory(resident_bytes=8 * MIB), False),
        (EngineMemory(resident_bytes=4 * MIB), EngineMemory(resident_bytes=9 * MIB), False),
        (EngineMemory(swapped_bytes=0), EngineMemory(swapped_bytes=5 * MIB), True),
        (EngineMemory(swapped_bytes=5 * MIB), EngineMemory(swapped_bytes=0), False),
        (EngineMemory(resident_bytes=9 * MIB), EngineMemory(), False),
    ],
)
def test_memory_that_leaves_an_idle_engine_is_noticed(
    before: EngineMemory | None, now: EngineMemory, is_taken: bool
):
    assert is_evicting(before, now) is is_taken


def test_an_estimate_of_swap_is_no_proof_of_a_loss():
    best = EngineMemory(resident_bytes=9 * MIB, swapped_bytes=0, is_swap_estimated=True)
    assert not is_evicting(best, replace(best, swapped_bytes=500 * MIB))
    assert is_evicting(best, replace(best, resident_bytes=2 * MIB))


def test_passes_for_losses_that_find_nothing_missing_come_later_each_time():
    waits = [AUTO.min_interval_s]
    for _ in range(10):
        found = Found(cold_share=0.0, was_for_loss=True)
        waits.append(after(found, AUTO, loss_wait_s=waits[-1]).loss_wait_s)
    assert waits[1:4] == [10, 20, 40]
    assert waits[-1] == AUTO.max_interval_s
    for cold_share, is_storming in ((0.5, False), (0.0, True)):
        found = Found(cold_share=cold_share, was_for_loss=True)
        behind = after(found, AUTO, loss_wait_s=waits[-1], is_storming=is_storming)
        assert behind.loss_wait_s == AUTO.min_interval_s
    seen = Snapshot(NOW_S, trigger=Trigger.EVICTING, last_pass_s=NOW_S - 30, interval_s=300)
    assert decide(seen, AUTO).reason is Reason.EVICTING
    assert decide(replace(seen, loss_wait_s=40), AUTO).reason is Reason.NOT_DUE


QUIET = SystemMemory(swapped_out_bytes=MIB, pressure=Pressure.NORMAL)


@pytest.mark.parametrize(
    ("was", "now", "hold", "is_evicting", "is_quiet"),
    [
        (QUIET, QUIET, HoldLevel.ALL, False, True),
        (None, QUIET, HoldLevel.ALL, False, False),
        (QUIET, replace(QUIET, pressure=Pressure.UNKNOWN, swapped_out_bytes=None), HoldLevel.ALL, False, True),
        (QUIET, replace(QUIET, pressure=Pressure.WARN), HoldLevel.ALL, False, False),
        (QUIET, replace(QUIET, swapped_out_bytes=2 * MIB), HoldLevel.ALL, False, False),
        (QUIET, QUIET, HoldLevel.NO_WARMING, False, False),
        (QUIET, QUIET, HoldLevel.ALL, True, False),
    ],
)
def test_the_computer_is_looked_at_less_often_only_while_nothing_happens(
    was: SystemMemory | None, now: SystemMemory, hold: HoldLevel, is_evicting: bool, is_quiet: bool
):
    assert is_calm(was, now, ThrashGuard(hold=hold), is_evicting=is_evicting) is is_quiet


def test_what_is_taken_little_by_little_is_noticed_too():
    best, noticed = None, []
    for resident in range(100, 80, -1):
        now = EngineMemory(resident_bytes=resident * MIB, swapped_bytes=(100 - resident) * MIB)
        noticed.append(is_evicting(best, now))
        best = now if noticed[-1] else best_of(best, now)
    assert [100 - number for number, is_taken in enumerate(noticed) if is_taken] == [95, 90, 85]


def test_what_has_come_back_counts_as_there():
    best = best_of(EngineMemory(resident_bytes=5 * MIB), EngineMemory(resident_bytes=9 * MIB, swapped_bytes=0))
    assert is_evicting(best, EngineMemory(resident_bytes=4 * MIB))
    assert best_of(best, EngineMemory()) == best


def test_a_pass_that_was_not_for_a_loss_does_not_make_the_next_loss_wait():
    assert after(Found(cold_share=0.0), AUTO, loss_wait_s=7.0).loss_wait_s == 7


def test_a_new_engine_begins_with_the_shortest_interval():
    seen = Snapshot(NOW_S, trigger=Trigger.RESTARTED, is_ready=False, interval_s=300)
    assert decide(seen, AUTO).interval_s == AUTO.min_interval_s


@given(snapshots, settings, st.none() | st.builds(Found, st.none() | st.floats(0, 1)))
def test_what_forbids_a_pass_forbids_touching_but_for_a_user_and_the_interval(
    seen: Snapshot, wish: WarmthSettings, found: Found | None
):
    decision = decide(replace(seen, found=found), wish)
    beside_users = {Reason.BUSY, Reason.NOT_DUE, Reason.OVER_BUDGET, Reason.NOTHING_TO_DO}
    if decision.may_touch and not decision.steps:
        assert decision.reason in beside_users


def test_pressure_shortens_the_wait_for_the_next_pass():
    seen = Snapshot(NOW_S, last_pass_s=NOW_S - 20, interval_s=300)
    assert decide(seen, AUTO).reason is Reason.NOT_DUE
    assert decide(replace(seen, pressure=Pressure.WARN), AUTO).reason is Reason.DUE


@pytest.mark.parametrize(
    ("found", "interval_s"),
    [
        (Found(), 150),
        (Found(cold_share=0.0, swapped_bytes=0, engine_bytes=100, replay_ratio=1.1), 150),
        (Found(cold_share=0.001), 150),
        (Found(cold_share=0.01), 50),
        (Found(swapped_bytes=1, engine_bytes=100), 50),
        (Found(swapped_bytes=1), 150),
        (Found(replay_ratio=3.0), 50),
    ],
)
def test_the_interval_follows_what_was_taken(found: Found, interval_s: float):
    assert after(found, AUTO, interval_s=100).interval_s == interval_s


@given(st.floats(5, 900), st.builds(Found, cold_share=st.none() | st.floats(0, 1)))
def test_while_the_computer_swaps_the_interval_never_grows_whatever_a_pass_has_found(
    interval_s: float, found: Found
):
    assert after(found, AUTO, interval_s=interval_s, is_storming=True).interval_s <= interval_s
    seen = Snapshot(NOW_S, last_pass_s=NOW_S - AUTO.min_interval_s, interval_s=interval_s, is_storming=True)
    assert decide(seen, AUTO).reason is Reason.DUE


@given(snapshots, settings, st.booleans())
def test_the_weights_are_touched_without_a_pause_only_while_they_may_be_taken(
    seen: Snapshot, wish: WarmthSettings, has_lost: bool
):
    found = Found(cold_share=1.0) if has_lost else None
    decision = decide(replace(seen, found=found), wish)
    assert decision.may_touch or not decision.begins_touching
    if decision.begins_touching:
        assert has_lost or seen.is_storming
        assert seen.hold is HoldLevel.ALL
        assert seen.pressure is not Pressure.CRITICAL
        assert seen.lock is not LockState.HELD
        assert not seen.is_locked_outside
        assert seen.power.source is not PowerSource.BATTERY
        assert seen.power.is_low_power is not True


@pytest.mark.parametrize(
    ("priority", "is_storming", "has_lost", "touches"),
    [
        ("auto", False, False, False),
        ("auto", False, True, True),
        ("auto", True, False, True),
        ("model-first", True, False, True),
        ("machine-first", True, False, False),
        ("machine-first", True, True, True),
    ],
)
def test_the_computer_tells_that_the_weights_are_taken_before_a_pass_has_found_it(
    priority: Any, is_storming: bool, has_lost: bool, touches: bool
):
    seen = Snapshot(NOW_S, is_storming=is_storming, power=Power(PowerSource.MAINS))
    found = Found(cold_share=1.0) if has_lost else None
    assert decide(replace(seen, found=found), replace(AUTO, priority=priority)).begins_touching is touches


@pytest.mark.parametrize(
    ("trigger", "reason"),
    [
        (Trigger.TIMER, Reason.OVER_BUDGET),
        (Trigger.KNOCK, Reason.OVER_BUDGET),
        (Trigger.EVICTING, Reason.EVICTING),
        (Trigger.RESTARTED, Reason.RESTARTED),
        (Trigger.ASKED, Reason.ASKED),
    ],
)
def test_what_took_too_much_for_nothing_waits_unless_memory_is_missing(trigger: Trigger, reason: Reason):
    seen = Snapshot(NOW_S, trigger=trigger, budget_wait_s=30)
    decision = decide(seen, AUTO)
    assert decision.reason is reason
    if reason is Reason.OVER_BUDGET:
        assert (decision.steps, decision.look_again_s) == ((), 30)
