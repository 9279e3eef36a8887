"""The thrash guard: lets go of the model when holding it makes everything else swap. Pure.

Measured on a computer that was 0.7 GiB short: a locked and replayed model made the rest write 6.6 GB to swap in
30 s; left alone, 0.7 GB. That is the wear that the owner wants to avoid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.memory import Pressure

if TYPE_CHECKING:
    from emberd.core.settings import Priority

MIB = 1 << 20
WINDOW_S = 60.0
"""Writes to swap are held against the budget over this time."""
STEP_S = 5.0
"""Time that letting go gets to show; what is written in it does not count."""
FIRST_CALM_S = 60.0
LONGEST_CALM_S = 3600.0
"""The rest must be quiet for so long before the model is taken hold of again; each relapse doubles it."""
SETTLED_S = 900.0
"""Holding for so long without a relapse forgets earlier ones."""
BUDGET_BYTES: dict[str, float] = {"machine-first": 64 * MIB, "auto": 512 * MIB, "model-first": float("inf")}
"""Writes to swap within WINDOW_S that holding the model may cost. 512 MiB a minute, if it went on, would be the
rated 600 TB of a 1 TB drive in 2.1 years."""


class Hold(Enum):
    """How much of the model emberd holds."""

    ALL = "all"
    """Weights and cache are kept."""
    NO_WARMING = "no_warming"
    """Nothing is brought back; locks stay."""
    NO_OUTSIDE_LOCK = "no_outside_lock"
    """The toucher has let go too."""
    NOTHING = "nothing"
    """The engine's own lock is to go as well, which takes a restart."""

    @property
    def lets_go(self) -> bool:
        """Whether the toucher's lock is given up."""
        return self in {Hold.NO_OUTSIDE_LOCK, Hold.NOTHING}


_ORDER = tuple(Hold)


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the computer.

    Attributes:
        now_s: monotonic.
        swapped_out_bytes: written to swap since boot, by everybody; None if unknown.
        pressure: memory pressure.
        is_losing: memory of the idle engine is being taken.
    """

    now_s: float
    swapped_out_bytes: int | None
    pressure: Pressure
    is_losing: bool = False


@dataclass(frozen=True, slots=True)
class Guard:
    """The guard's memory.

    Attributes:
        hold: how much may be held.
        since_s: when that changed last.
        calm_s: how long it must be quiet before more is held.
        quiet_since_s: since when the budget has been kept, None if it is not.
        readings: time and counter of the last WINDOW_S, oldest first.
    """

    hold: Hold = Hold.ALL
    since_s: float = float("-inf")
    calm_s: float = FIRST_CALM_S
    quiet_since_s: float | None = None
    readings: tuple[tuple[float, int], ...] = ()

    @property
    def written_bytes(self) -> int:
        """Written to swap within the window."""
        return self.readings[-1][1] - self.readings[0][1] if self.readings else 0


def step(
    guard: Guard, seen: Reading, priority: Priority, *, is_holding: bool, frees: Hold = Hold.NO_WARMING
) -> Guard:
    """Return the guard after a reading.

    Where the machine comes first, what it takes is its own as well: bringing back 0.7 GiB cost twice the swap
    writes of an engine that nobody keeps warm, before the budget had been noticed. A lock is let go by the budget
    only.

    Args:
        guard: before.
        seen: the reading.
        priority: warmth.priority.
        is_holding: the model is warmed or locked at all; otherwise what is written is not emberd's doing.
        frees: the first step that gives memory back. Steps before it are skipped: they would cost 5 s each, in
            which a storm writes a gigabyte.
    """
    guard = replace(guard, readings=_within_window(guard, seen))
    is_over = guard.written_bytes > BUDGET_BYTES[priority]
    if is_over and (is_holding or guard.hold is not Hold.ALL):
        return _let_go(replace(guard, quiet_since_s=None), seen.now_s, frees)
    yields = priority == "machine-first" and seen.is_losing and frees is Hold.NO_WARMING
    if yields and guard.hold is Hold.ALL:
        return _let_go(replace(guard, quiet_since_s=None), seen.now_s, frees)
    if yields or seen.pressure is Pressure.CRITICAL:
        return replace(guard, quiet_since_s=None)
    guard = guard if guard.quiet_since_s is not None else replace(guard, quiet_since_s=seen.now_s)
    return _take_hold(guard, seen.now_s)


def _within_window(guard: Guard, seen: Reading) -> tuple[tuple[float, int], ...]:
    """Append the reading; what is older than the window goes, but for one that the window begins with."""
    if seen.swapped_out_bytes is None:
        return ()
    readings = guard.readings
    if readings and seen.swapped_out_bytes < readings[-1][1]:
        readings = ()  # a counter that went back says nothing
    if guard.hold is not Hold.ALL and seen.now_s - guard.since_s < STEP_S:
        readings = ()
    while len(readings) > 1 and seen.now_s - readings[1][0] >= WINDOW_S:
        readings = readings[1:]
    return (*readings, (seen.now_s, seen.swapped_out_bytes))


def _let_go(guard: Guard, now_s: float, frees: Hold) -> Guard:
    """Give up one thing more; a new budget begins."""
    if guard.hold is Hold.NOTHING:
        return guard
    # The engine reached Hold.ALL before: this is a relapse.
    relapsed = guard.hold is Hold.ALL and guard.since_s > float("-inf") and now_s - guard.since_s < SETTLED_S
    calm_s = min(guard.calm_s * 2, LONGEST_CALM_S) if relapsed else guard.calm_s
    return Guard(_ORDER[max(_ORDER.index(guard.hold) + 1, _ORDER.index(frees))], now_s, calm_s)


def _take_hold(guard: Guard, now_s: float) -> Guard:
    """Hold everything again when it has been quiet for long enough."""
    if guard.hold is Hold.ALL:
        settled = now_s - guard.since_s >= SETTLED_S
        return replace(guard, calm_s=FIRST_CALM_S) if settled else guard
    if guard.quiet_since_s is None or now_s - guard.quiet_since_s < guard.calm_s:
        return guard
    return Guard(Hold.ALL, now_s, guard.calm_s, guard.quiet_since_s, guard.readings[-1:])
