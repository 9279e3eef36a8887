"""What to do now to keep the next reply fast, and when to look again. Pure.

Measured on KoboldCPP 1.104 under pressure: a lock alone leaves the first reply at 6 to 14 times a hot one, because
the KV cache and the compute buffers go to swap; a generation with another prompt makes it 81 to 89 times, because
it costs the prompt cache; the last prompt and reply once more, with one token, 0.8 to 1.4 times. So weights and
cache are kept by different means, and a foreign prompt is sent only where there is nothing to lose.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.lock import LockState
from emberd.core.memory import Power, PowerSource, Pressure
from emberd.core.thrash import HoldLevel

if TYPE_CHECKING:
    from emberd.core.memory import EngineMemory, SystemMemory
    from emberd.core.settings import WarmthSettings
    from emberd.core.thrash import ThrashGuard

CALM_AFTER_CRITICAL_S = 30.0
"""Pressure must have been below critical for so long before anything is brought back; otherwise emberd and the
pager fight."""
BATTERY_STRETCH = 6.0
"""On battery the interval is so many times longer, with warmth.on_battery = "stretch"."""
FRESH_S = 2.0
"""A model that was used or warmed less than this ago is warm, and a knock changes nothing."""
LOSS_BYTES = 4 * 1024 * 1024
"""If an idle engine shrinks by more than this, memory was taken from it."""
BUFFERS_BYTES = 2 * 1024 * 1024
"""Less than the 3 MiB that replays of one token leave in swap beyond longer ones (KoboldCPP, in a storm). With a
lock, 20 of 24 users waited at most 1.5 times as long as for a hot token at 16 MiB, 23 with this."""
SOON_S = 0.05
"""No look is planned sooner: the scheduler drops one that is due before the present one has ended."""
_LONGER, _SHORTER = 1.5, 0.5
"""A loss halves the interval, a clean pass makes it half as long again."""
_LOST_SHARE = 0.002
"""Cold pages beyond this share of the model are a loss; fewer are chance (a header that nobody reads)."""
_SLOW_REPLAY = 2.0
"""A replay that takes this many times a hot one met missing pages."""


class Step(Enum):
    """One thing to do."""

    LOCK = "lock"
    """The toucher brings the weights in and locks them: the outside lock."""
    UNLOCK = "unlock"
    """The outside lock is let go; the pages stay until the system wants them."""
    TOUCH = "touch"
    """The toucher brings the weights in and marks them as used."""
    REPLAY = "replay"
    """The last turn again, with one token: uses the KV cache and the compute buffers, and so keeps them."""
    TINY = "tiny"
    """A generation of one token with emberd's own prompt, if no user's prompt can be lost."""
    STOP = "stop"
    """The engine is stopped: only that frees its lock. Whoever needs it starts it again."""
    START = "start"
    """The engine that was stopped is started."""
    RESTART = "restart"
    """The engine is started anew without its lock: the last resort of the thrash guard."""


class Reason(Enum):
    """Why this was decided."""

    OFF = "off"
    PAUSED = "paused"
    COOL = "cool"
    NOT_READY = "not_ready"
    BUSY = "busy"
    PRESSURE = "pressure"
    LETTING_GO = "letting_go"
    ON_BATTERY = "on_battery"
    NOT_DUE = "not_due"
    NOTHING_TO_DO = "nothing_to_do"
    DUE = "due"
    ASKED = "asked"
    WOKEN = "woken"
    KNOCK = "knock"
    RESTARTED = "restarted"
    RELIEVED = "relieved"
    EVICTING = "losing"
    OVER_BUDGET = "over_budget"


class Trigger(Enum):
    """What made emberd look."""

    TIMER = "timer"
    ASKED = "asked"
    """`emberd warm`."""
    WOKEN = "woken"
    """The computer slept, or its power came back."""
    KNOCK = "knock"
    """A client has knocked, and not yet asked for a generation."""
    RESTARTED = "restarted"
    """The engine has just become ready."""
    RELIEVED = "relieved"
    """Memory pressure has fallen from critical."""
    EVICTING = "losing"
    """Memory has just been taken from the engine."""


_REASONS = {
    Trigger.TIMER: Reason.DUE,
    Trigger.ASKED: Reason.ASKED,
    Trigger.WOKEN: Reason.WOKEN,
    Trigger.KNOCK: Reason.KNOCK,
    Trigger.RESTARTED: Reason.RESTARTED,
    Trigger.RELIEVED: Reason.RELIEVED,
    Trigger.EVICTING: Reason.EVICTING,
}


_SPARES_NOTHING = frozenset({Trigger.ASKED, Trigger.RESTARTED, Trigger.EVICTING})
"""Reasons to warm beyond the budget: memory is missing, or the owner wants it."""


class Cache(Enum):
    """Whose prompt the engine's KV cache holds."""

    EMPTY = "empty"
    """No user's: none has generated since the engine's start."""
    KNOWN = "known"
    """The last user's; request and reply are remembered and can be replayed."""
    UNKNOWN = "unknown"
    """Perhaps a user's, which cannot be replayed; any generation would cost it."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a pass found. Unknown is None.

    Attributes:
        cold_share: share of the weights' pages that were cold.
        swapped_bytes: of the engine, written to swap since an earlier pass.
        buffers_bytes: the same since a replay that used the buffers for several tokens.
        engine_bytes: the engine's footprint, to compare that with.
        replay_ratio: time of the replay, divided by that of a hot one.
        major_faults: of the engine since the last pass; a slow replay without any met a busy processor.
        was_for_loss: the only reason for the pass was that memory seemed to be taken.
    """

    cold_share: float | None = None
    swapped_bytes: int | None = None
    buffers_bytes: int | None = None
    engine_bytes: int | None = None
    replay_ratio: float | None = None
    major_faults: int | None = None
    was_for_loss: bool = False

    @property
    def has_lost(self) -> bool:
        """Whether memory had been taken from the model."""
        swapped_share = (self.swapped_bytes or 0) / self.engine_bytes if self.engine_bytes else 0.0
        return (
            (self.cold_share or 0.0) > _LOST_SHARE
            or swapped_share > _LOST_SHARE
            or ((self.replay_ratio or 0.0) > _SLOW_REPLAY and self.major_faults != 0)
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything on which the decision rests. Times are of one monotonic clock.

    Attributes:
        now_s: the present.
        trigger: what made emberd look.
        is_ready: the engine serves.
        is_stopped: the engine was stopped to give its memory to other work.
        requests: users' requests that run or wait.
        lock: the verdict about the engine's own lock.
        is_locked_outside: the outside lock holds all of the weights.
        can_lock_outside: limits and room let the toucher lock, None if unknown.
        is_mapped: the weights are pages of the file; None if the engine does not tell.
        cache: whose prompt the KV cache holds.
        pressure: memory pressure of the computer.
        last_critical_s: when it was critical last, None for never.
        power: power of the computer.
        paused_until_s: warming is paused by its owner until then, None if it is not.
        cool_until_s: the memory is given to other work until then or the next request, None if it is not.
        hold: the hold level.
        last_use_s: when a user's generation ended last, None for never.
        last_pass_s: when a pass that warmed everything ended last, None for never.
        interval_s: the present interval.
        loss_wait_s: how soon after a pass a loss calls for the next one.
        is_storming: the computer swaps, or programs wait for memory.
        budget_wait_s: seconds until keep-warm is within its budget.
        taken: how much of the engine's own memory is missing.
        found: what the pass found that has just ended, None if none has.
    """

    now_s: float
    trigger: Trigger = Trigger.TIMER
    is_ready: bool = True
    is_stopped: bool = False
    requests: int = 0
    lock: LockState = LockState.ABSENT
    is_locked_outside: bool = False
    can_lock_outside: bool | None = None
    is_mapped: bool | None = True
    cache: Cache = Cache.EMPTY
    pressure: Pressure = Pressure.NORMAL
    last_critical_s: float | None = None
    power: Power = field(default_factory=Power)
    paused_until_s: float | None = None
    cool_until_s: float | None = None
    hold: HoldLevel = HoldLevel.ALL
    last_use_s: float | None = None
    last_pass_s: float | None = None
    interval_s: float = 10.0
    loss_wait_s: float = 0.0
    is_storming: bool = False
    budget_wait_s: float = 0.0
    taken: Found = field(default_factory=Found)
    found: Found | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now; without steps it is a rest.

    Attributes:
        steps: in order.
        reason: why.
        look_again_s: seconds until the next look, if nothing happens before.
        is_thorough: a replay is to use the buffers for several tokens, too.
        may_touch: the weights may be touched between two passes.
        begins_touching: memory is being taken, so touching between two passes begins.
        interval_s: the interval from now on.
        loss_wait_s: how soon after a pass a loss calls for the next one, from now on.
    """

    steps: tuple[Step, ...]
    reason: Reason
    look_again_s: float
    is_thorough: bool = False
    may_touch: bool = False
    begins_touching: bool = False
    interval_s: float = 0.0
    loss_wait_s: float = 0.0


def decide(seen: Snapshot, settings: WarmthSettings) -> Decision:
    """Decide from one snapshot; after a pass, from one with what the pass found."""
    seen = replace(seen, interval_s=_next_interval(seen, settings), loss_wait_s=_next_loss_wait(seen, settings))
    touches = may_touch(seen, settings)
    return replace(
        _obstacle(seen, settings) or _pass(seen, settings),
        is_thorough=_must_use_buffers(seen),
        may_touch=touches,
        begins_touching=touches and _is_taken(seen, settings),
        interval_s=seen.interval_s,
        loss_wait_s=seen.loss_wait_s,
    )


def _pass(seen: Snapshot, settings: WarmthSettings) -> Decision:
    """Return whether a pass is due, and its steps."""
    interval_s = effective_interval(seen, settings)
    due_in_s = _due_in(seen, interval_s, settings)
    if due_in_s > 0:
        is_urgent = seen.trigger is Trigger.EVICTING
        return Decision((), Reason.NOT_DUE, max(due_in_s, SOON_S) if is_urgent else _bounded(due_in_s, settings))
    if seen.budget_wait_s > 0 and seen.trigger not in _SPARES_NOTHING:
        return Decision((), Reason.OVER_BUDGET, _bounded(seen.budget_wait_s, settings))
    steps = (*_for_weights(seen, settings), *_for_cache(seen, settings))
    reason = _REASONS[seen.trigger] if steps else Reason.NOTHING_TO_DO
    return Decision(steps, reason, _bounded(interval_s, settings))


def _obstacle(seen: Snapshot, settings: WarmthSettings) -> Decision | None:
    """Return why nothing may be warmed now, None if it may."""
    unlock = (Step.UNLOCK,) if seen.is_locked_outside else ()
    is_locked = seen.lock in {LockState.HELD, LockState.PARTIAL} and seen.is_ready
    needs_restart = seen.hold is HoldLevel.NOTHING and is_locked and settings.may_restart
    is_free = seen.is_ready and not seen.requests
    soon_s, late_s = settings.min_interval_s, settings.max_interval_s
    cool_s, paused_s = (
        late_s if until_s is None else min(max(until_s - seen.now_s, soon_s), late_s)
        for until_s in (seen.cool_until_s, seen.paused_until_s)
    )
    # What the engine has locked is free only without the engine.
    let_go = (*unlock, Step.STOP) if is_locked and is_free else unlock
    spares_power = settings.on_battery == "off" and saves_power(seen.power) and seen.trigger is not Trigger.ASKED
    # The first that is true counts.
    obstacles: tuple[tuple[bool, tuple[Step, ...], Reason, float], ...] = (
        (_is_before(seen.now_s, seen.cool_until_s), let_go, Reason.COOL, soon_s if is_locked else cool_s),
        (seen.is_stopped, (*unlock, Step.START), _REASONS[seen.trigger], soon_s),
        (settings.mode == "off", unlock, Reason.OFF, late_s),
        (needs_restart and is_free, (*unlock, Step.RESTART), Reason.LETTING_GO, soon_s),
        (seen.hold.lets_go, unlock, Reason.LETTING_GO, soon_s),
        (seen.hold is not HoldLevel.ALL, (), Reason.LETTING_GO, soon_s),
        (_is_before(seen.now_s, seen.paused_until_s), (), Reason.PAUSED, paused_s),
        (not seen.is_ready, (), Reason.NOT_READY, soon_s),
        (seen.requests > 0, (), Reason.BUSY, soon_s),
        (is_too_tight(seen), (), Reason.PRESSURE, soon_s),
        (spares_power, (), Reason.ON_BATTERY, late_s),
    )
    found = next((each for each in obstacles if each[0]), None)
    return None if found is None else Decision(*found[1:])


def may_warm(seen: Snapshot, settings: WarmthSettings) -> bool:
    """Return True if neither the owner nor the computer forbids bringing memory back."""
    is_wanted = settings.mode != "off" and not any(
        _is_before(seen.now_s, until_s) for until_s in (seen.paused_until_s, seen.cool_until_s)
    )
    return is_wanted and seen.hold is HoldLevel.ALL and not is_too_tight(seen)


def is_too_tight(seen: Snapshot) -> bool:
    """Return True if memory pressure is, or recently was, critical."""
    if seen.pressure is Pressure.CRITICAL:
        return True
    return seen.last_critical_s is not None and seen.now_s - seen.last_critical_s < CALM_AFTER_CRITICAL_S


def effective_interval(seen: Snapshot, settings: WarmthSettings) -> float:
    """Return the seconds between two passes: short under pressure, long on battery, bounded."""
    is_tight = seen.is_storming or seen.pressure is Pressure.WARN
    interval_s = settings.min_interval_s if is_tight else seen.interval_s
    if saves_power(seen.power) and settings.on_battery == "stretch":
        interval_s *= BATTERY_STRETCH
    return _bounded(interval_s, settings)


def _due_in(seen: Snapshot, interval_s: float, settings: WarmthSettings) -> float:
    """Return the seconds until a pass is due; a user's generation counts as a pass."""
    if seen.trigger is Trigger.ASKED:
        return 0.0
    wait_after_use_s = wait_after_pass_s = interval_s if seen.trigger is Trigger.TIMER else FRESH_S
    if seen.trigger is Trigger.EVICTING:
        # This lasts as long as the pressure: it is not an occasion, but a shorter interval.
        wait_after_pass_s = (
            interval_s if saves_power(seen.power) else max(seen.loss_wait_s, settings.min_interval_s)
        )
    waits = ((seen.last_use_s, wait_after_use_s), (seen.last_pass_s, wait_after_pass_s))
    return max((when_s + wait_s - seen.now_s for when_s, wait_s in waits if when_s is not None), default=0.0)


def _for_weights(seen: Snapshot, settings: WarmthSettings) -> tuple[Step, ...]:
    if seen.is_mapped is False or seen.lock is LockState.HELD or seen.is_locked_outside:
        # Copied weights are not pages of the file: only a generation reaches them.
        return ()
    if settings.lock_outside and seen.can_lock_outside:
        return (Step.LOCK,)
    return (Step.TOUCH,)


def _for_cache(seen: Snapshot, settings: WarmthSettings) -> tuple[Step, ...]:
    if seen.cache is Cache.KNOWN and settings.replay:
        return (Step.REPLAY,)
    if seen.cache is Cache.EMPTY:
        return (Step.TINY,)
    return ()


def saves_power(power: Power) -> bool:
    """Return True if the computer runs on battery, or was told to save power."""
    return power.source is PowerSource.BATTERY or power.is_low_power is True


def _is_before(now_s: float, until_s: float | None) -> bool:
    return until_s is not None and now_s < until_s


def _bounded(seconds: float, settings: WarmthSettings) -> float:
    longest = settings.max_interval_s * (BATTERY_STRETCH if settings.on_battery == "stretch" else 1.0)
    return min(max(seconds, settings.min_interval_s), longest)


def _must_use_buffers(seen: Snapshot) -> bool:
    """Return True if a replay of one token is too little, because the engine's own memory was written to swap.

    A thorough replay takes twice as long, and a user who comes meanwhile waits for it. Sent every 5 s in a storm,
    it spared the next first token up to 350 major faults.
    """
    if seen.taken.buffers_bytes is None:
        return seen.pressure in {Pressure.WARN, Pressure.CRITICAL}
    return seen.taken.buffers_bytes > BUFFERS_BYTES


def may_touch(seen: Snapshot, settings: WarmthSettings) -> bool:
    """Return True if the weights may be touched between two passes, even beside users; never on battery."""
    is_touchable = seen.is_mapped is not False and seen.lock is not LockState.HELD and not seen.is_locked_outside
    return seen.is_ready and is_touchable and may_warm(seen, settings) and not saves_power(seen.power)


def _is_taken(seen: Snapshot, settings: WarmthSettings) -> bool:
    """Return True if the weights are being taken, so that passes alone do not keep them.

    The storm decides, not a loss: a pass at the beginning of a storm found nothing missing, and 5 s later a third
    of the model was gone; users waited 11 and 13 times as long as for a hot token. Touching costs up to a third
    of a core for 2 GiB. With `machine-first` it does not compete with the pager.
    """
    has_lost = seen.found is not None and seen.found.has_lost
    return has_lost or (seen.is_storming and settings.priority != "machine-first")


def is_calm(was: SystemMemory | None, now: SystemMemory, guard: ThrashGuard, *, is_evicting: bool) -> bool:
    """Return True if nothing happened between two readings that must be followed closely."""
    if was is None or guard.hold is not HoldLevel.ALL or is_evicting:
        return False
    has_swapped = _difference(now.swapped_out_bytes, was.swapped_out_bytes) > 0
    return now.pressure in {Pressure.NORMAL, Pressure.UNKNOWN} and not has_swapped


def is_evicting(best: EngineMemory | None, now: EngineMemory) -> bool:
    """Return True if memory of an idle engine was taken since it was at its best: dropped, or written to swap."""
    if best is None:
        return False
    evicted_bytes = _difference(best.resident_bytes, now.resident_bytes)
    swapped_bytes = 0 if now.is_swap_estimated else _difference(now.swapped_bytes, best.swapped_bytes)
    return max(evicted_bytes, swapped_bytes) > LOSS_BYTES


def best_of(best: EngineMemory | None, now: EngineMemory) -> EngineMemory:
    """Return the most resident and the least swapped memory of two readings, so that slow losses add up."""
    if best is None:
        return now
    resident = [each.resident_bytes for each in (best, now) if each.resident_bytes is not None]
    swapped = [each.swapped_bytes for each in (best, now) if each.swapped_bytes is not None]
    return replace(now, resident_bytes=max(resident, default=None), swapped_bytes=min(swapped, default=None))


def _difference(more: int | None, less: int | None) -> int:
    return 0 if more is None or less is None else more - less


def _next_loss_wait(seen: Snapshot, settings: WarmthSettings) -> float:
    """Return how soon after a pass for a loss the next one may come: later each time nothing was missing.

    Memory that an engine gives back by itself looks as if it was taken; while the computer swaps, it was.
    """
    if seen.found is None or not seen.found.was_for_loss:
        return seen.loss_wait_s
    is_real = seen.found.has_lost or seen.is_storming
    return settings.min_interval_s if is_real else min(seen.loss_wait_s * 2, settings.max_interval_s)


def _next_interval(seen: Snapshot, settings: WarmthSettings) -> float:
    """Return the interval after a pass: shorter if memory had been taken, otherwise longer, within the bounds.

    While the computer swaps it does not grow, whatever the pass found. A new engine begins with the shortest.
    """
    if seen.trigger is Trigger.RESTARTED:
        return settings.min_interval_s
    if seen.found is None:
        return seen.interval_s
    grows = 1.0 if seen.is_storming else _LONGER
    changed_s = seen.interval_s * (_SHORTER if seen.found.has_lost else grows)
    return min(max(changed_s, settings.min_interval_s), settings.max_interval_s)
