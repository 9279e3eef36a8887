"""The thrash guard: lets go of the model when that keeps the computer from swapping. Pure.

Measured on a computer that was 0.7 GiB short (KoboldCPP, 2 GiB of weights, 0.8 GiB of KV cache and buffers): a
locked and replayed model made the rest write 6.4 GB to swap in 30 s; left alone, 0.7 GB. That is the wear that
the owner wants to avoid. These can be let go, with their relief and their cost (the next first token against a
hot one):

- the weights (no lock, or the outside lock): the computer wrote 0.1 GB instead of 3 to 7; 7 to 8 times a hot one,
  because the weights are read again, but never written;
- the KV cache and the buffers, while a lock keeps the weights: 2.6 GB instead of 6.4; 5 times a hot one, for a
  little more than a third of the memory, of which each byte is written first.

So the weights go first, and the replays end with them, because a replay would bring them back. While the engine's
own lock keeps the weights, which only a restart ends, the replays go on: holding gigabytes without what every
reply needs serves nobody. If the computer still swaps as before, it was not the model, which is then held again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.lock import LockState
from emberd.core.memory import STORM_BYTES_PER_S, Pressure

if TYPE_CHECKING:
    from emberd.core.settings import Priority

MIB = 1 << 20
WINDOW_S = 60.0
"""Writes to swap in this time are compared with the budget."""
STEP_S = 5.0
"""Letting go takes this long to show; writes meanwhile do not count."""
FIRST_CALM_S = 60.0
LONGEST_CALM_S = 3600.0
"""The computer must be quiet for so long before the model is held again; each relapse doubles it."""
RATE_S = 10.0
"""Writes to swap before and after letting go are compared over this time."""
RELIEF_SHARE = 0.75
"""Letting go is a relief if the computer writes less than this share of what it wrote before."""
SETTLED_S = 900.0
"""Earlier relapses are forgotten after so long without one."""
BUDGET_BYTES: dict[str, float] = {"machine-first": 64 * MIB, "auto": 512 * MIB, "model-first": float("inf")}
"""The budget: writes to swap within WINDOW_S that holding the model may cost. 512 MiB a minute would use up the
rated 600 TB of a 1 TB drive in 2.1 years."""


class HoldLevel(Enum):
    """How much of the model emberd holds."""

    ALL = "all"
    """Weights and cache are held."""
    NO_WARMING = "no_warming"
    """Nothing is brought back."""
    NO_OUTSIDE_LOCK = "no_outside_lock"
    """The outside lock is let go too."""
    NOTHING = "nothing"
    """The engine's own lock is let go as well, by a restart."""

    @property
    def lets_go(self) -> bool:
        """Whether the outside lock is let go."""
        return self in {HoldLevel.NO_OUTSIDE_LOCK, HoldLevel.NOTHING}


def what_frees(
    lock: LockState, priority: Priority, *, is_locked_outside: bool, may_restart: bool
) -> HoldLevel | None:
    """Return the hold level at which memory is given back, None if nothing may be let go.

    Args:
        lock: the verdict about the engine's own lock.
        priority: warmth.priority; `machine-first` lets go of the cache even beside locked weights.
        is_locked_outside: the outside lock holds.
        may_restart: warmth.may_restart.
    """
    if is_locked_outside:
        return HoldLevel.NO_OUTSIDE_LOCK
    if lock in {LockState.HELD, LockState.PARTIAL} and may_restart:
        return HoldLevel.NOTHING
    if lock is LockState.HELD and priority != "machine-first":
        return None
    return HoldLevel.NO_WARMING


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading of the computer.

    Attributes:
        now_s: monotonic.
        swapped_out_bytes: written to swap since boot, by everybody; None if unknown.
        pressure: memory pressure.
        is_evicting: memory of the idle engine is being taken, and no lock keeps its weights.
        has_let_go: what was let go has left memory, and nobody uses it: a restart is over, no request runs.
    """

    now_s: float
    swapped_out_bytes: int | None
    pressure: Pressure
    is_evicting: bool = False
    has_let_go: bool = True


@dataclass(frozen=True, slots=True)
class ThrashGuard:
    """The thrash guard's memory.

    Attributes:
        hold: the hold level.
        since_s: when that changed last.
        calm_s: how long it must be quiet before more is held.
        quiet_since_s: since when the budget has been kept, None if it is exceeded.
        readings: time and counter of the last WINDOW_S, oldest first.
        rate_before: bytes written to swap in a second before something was let go, None before that.
        rate_after: the same afterwards, None until it is known.
        is_helpless: the computer swaps, and nothing that may be let go would help or has helped.
    """

    hold: HoldLevel = HoldLevel.ALL
    since_s: float = float("-inf")
    calm_s: float = FIRST_CALM_S
    quiet_since_s: float | None = None
    readings: tuple[tuple[float, int], ...] = ()
    rate_before: float | None = None
    rate_after: float | None = None
    is_helpless: bool = False

    @property
    def written_bytes(self) -> int:
        """Written to swap within the window."""
        return self.readings[-1][1] - self.readings[0][1] if self.readings else 0


def step(
    guard: ThrashGuard, seen: Reading, priority: Priority, *, is_holding: bool, frees: HoldLevel | None
) -> ThrashGuard:
    """Return the guard after a reading.

    With `machine-first`, emberd yields as soon as memory of the idle engine is taken, without waiting for the
    budget: to bring 0.7 GiB back doubled the swap writes before the budget was exceeded. A lock is let go only when
    the budget is exceeded.

    Args:
        guard: before the reading.
        seen: the reading.
        priority: warmth.priority.
        is_holding: the model is warmed or locked; otherwise emberd does not cause the writes.
        frees: the hold level at which memory is given back (`what_frees`).
    """
    if guard.hold is not HoldLevel.ALL and guard.rate_after is None and not seen.has_let_go:
        guard = replace(guard, since_s=seen.now_s, quiet_since_s=None)  # relief does not show yet
    guard = _measured(replace(guard, readings=_within_window(guard, seen)))
    is_over = guard.written_bytes > BUDGET_BYTES[priority]
    yields = priority == "machine-first" and seen.is_evicting and frees is HoldLevel.NO_WARMING
    if guard.hold is HoldLevel.ALL:
        if (is_over and is_holding) or yields:
            guard = replace(guard, quiet_since_s=None)
            if frees is None or _is_in_vain(guard):
                return replace(guard, is_helpless=True)
            return _let_go(guard, seen.now_s, frees)
    elif frees is None or (_is_in_vain(guard) and priority != "machine-first"):
        # A lock that cannot be ended has come since, or the computer swaps as before.
        return ThrashGuard(
            HoldLevel.ALL,
            seen.now_s,
            guard.calm_s,
            rate_before=guard.rate_before,
            rate_after=guard.rate_after,
            is_helpless=True,
        )
    if is_over or yields or seen.pressure is Pressure.CRITICAL:
        return replace(guard, quiet_since_s=None)
    guard = guard if guard.quiet_since_s is not None else replace(guard, quiet_since_s=seen.now_s)
    return _take_hold(guard, seen.now_s)


def _measured(guard: ThrashGuard) -> ThrashGuard:
    """Note how much is written to swap after something was let go, once that is known."""
    if guard.hold is HoldLevel.ALL or guard.rate_after is not None:
        return guard
    return replace(guard, rate_after=_rate(guard.readings))


def _is_in_vain(guard: ThrashGuard) -> bool:
    before, after = guard.rate_before, guard.rate_after
    return before is not None and after is not None and after > RELIEF_SHARE * before


def _rate(readings: tuple[tuple[float, int], ...]) -> float | None:
    """Return the bytes written in a second, over RATE_S or a little more; None for less."""
    if not readings:
        return None
    ended_s, written = readings[-1]
    began = [each for each in readings if ended_s - each[0] >= RATE_S]
    return (written - began[-1][1]) / (ended_s - began[-1][0]) if began else None


def _within_window(guard: ThrashGuard, seen: Reading) -> tuple[tuple[float, int], ...]:
    """Append the reading; drop readings older than the window, except the one at its beginning."""
    if seen.swapped_out_bytes is None:
        return ()
    readings = guard.readings
    if readings and seen.swapped_out_bytes < readings[-1][1]:
        readings = ()  # a counter that went back says nothing
    if guard.hold is not HoldLevel.ALL and seen.now_s - guard.since_s < STEP_S:
        readings = ()
    while len(readings) > 1 and seen.now_s - readings[1][0] >= WINDOW_S:
        readings = readings[1:]
    return (*readings, (seen.now_s, seen.swapped_out_bytes))


def _let_go(guard: ThrashGuard, now_s: float, frees: HoldLevel) -> ThrashGuard:
    """Let go; a new budget begins."""
    # Everything was held before, so this is a relapse.
    relapsed = guard.since_s > float("-inf") and now_s - guard.since_s < SETTLED_S
    calm_s = min(guard.calm_s * 2, LONGEST_CALM_S) if relapsed else guard.calm_s
    return ThrashGuard(frees, now_s, calm_s, rate_before=_rate_of_storm(guard.readings))


def _is_quiet(before: tuple[float, int], after: tuple[float, int]) -> bool:
    return after[1] - before[1] <= STORM_BYTES_PER_S * (after[0] - before[0])


def _rate_of_storm(readings: tuple[tuple[float, int], ...]) -> float | None:
    """Return the bytes written in a second, over RATE_S or since the storm began, without the quiet before."""
    while len(readings) > 1 and _is_quiet(*readings[:2]):
        readings = readings[1:]
    if len(readings) < 2:  # noqa: PLR2004  # no time between them
        return None
    seconds = readings[-1][0] - readings[0][0]
    return _rate(readings) or ((readings[-1][1] - readings[0][1]) / seconds if seconds else None)


def _take_hold(guard: ThrashGuard, now_s: float) -> ThrashGuard:
    """Hold everything again when the computer has been quiet for long enough."""
    has_settled = now_s - guard.since_s >= SETTLED_S
    is_quiet = guard.quiet_since_s is not None and now_s - guard.quiet_since_s >= guard.calm_s
    if guard.hold is HoldLevel.ALL:
        guard = replace(guard, calm_s=FIRST_CALM_S) if has_settled else guard
        return replace(guard, rate_before=None, rate_after=None, is_helpless=False) if is_quiet else guard
    return (
        ThrashGuard(HoldLevel.ALL, now_s, guard.calm_s, guard.quiet_since_s, guard.readings[-1:])
        if is_quiet
        else guard
    )
