"""How short of memory a Linux computer is, which has no level of its own: judged from stalls and available memory.

macOS tells a level (kern.memorystatus_vm_pressure_level); Linux tells how long tasks waited for memory (pressure
stall information, Documentation/accounting/psi.rst) and what is available (MemAvailable, proc_meminfo(5)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emberd.core.memory import Pressure

if TYPE_CHECKING:
    from emberd.core.memory import SystemMemory

_WARN_STALL_SOME = 0.07
"""low-memory-monitor's first warning: some task waits for 70 ms of a second (src/lmm-main.c)."""
_CRITICAL_STALL_FULL = 0.10
"""The same program's critical level: all tasks wait for 100 ms of a second."""
_WARN_AVAILABLE = 0.10
"""earlyoom asks the largest program to end below this share of the memory (its default, -m 10)."""
_CRITICAL_AVAILABLE = 0.05
"""earlyoom kills it below this one (half of -m)."""
STORM_BYTES_PER_S = 1024 * 1024
"""A computer that writes so much to swap takes memory from idle programs; below it, it tidies up."""
STORM_LASTS_S = 10.0
"""A storm goes on for so long after its last sign: a program that uses its memory once a second pauses, too."""
_RATE_LEAST_S = 1.0
"""Counters move in bursts: a shorter time makes no rate."""


def judge_pressure(
    available_share: float | None, stall_some_share: float | None, stall_full_share: float | None
) -> Pressure:
    """Return the level; the worse of what stalls and available memory say.

    Stalls alone are a warning: a container at its limit stalls for itself while the computer has memory to spare.

    Args:
        available_share: available memory divided by all of it, None if unknown.
        stall_some_share: share of the last 10 s in which some task waited for memory, None without PSI.
        stall_full_share: the same for all tasks together.
    """
    if available_share is None and stall_some_share is None:
        return Pressure.UNKNOWN
    available = 1.0 if available_share is None else available_share
    is_stalled = (stall_full_share or 0.0) >= _CRITICAL_STALL_FULL
    knows_room = available_share is not None
    if available < _CRITICAL_AVAILABLE or (is_stalled and (available < _WARN_AVAILABLE or not knows_room)):
        return Pressure.CRITICAL
    if is_stalled or (stall_some_share or 0.0) >= _WARN_STALL_SOME or available < _WARN_AVAILABLE:
        return Pressure.WARN
    return Pressure.NORMAL


@dataclass(frozen=True, slots=True)
class SwapRates:
    """Traffic with the swap space.

    Attributes:
        in_bytes_per_s: read from it, None if unknown.
        out_bytes_per_s: written to it, None if unknown.
    """

    in_bytes_per_s: float | None = None
    out_bytes_per_s: float | None = None


def swap_rates(before: SystemMemory, after: SystemMemory, seconds: float) -> SwapRates:
    """Return the swap traffic between two readings, unknown for less than a second.

    A counter that went backwards (a reboot between a saved reading and this one) is unknown.
    """
    if seconds < _RATE_LEAST_S:
        return SwapRates()
    return SwapRates(
        _rate(before.swapped_in_bytes, after.swapped_in_bytes, seconds),
        _rate(before.swapped_out_bytes, after.swapped_out_bytes, seconds),
    )


def _rate(before: int | None, after: int | None, seconds: float) -> float | None:
    return None if before is None or after is None or after < before else (after - before) / seconds


def is_sign_of_storm(before: SystemMemory | None, now: SystemMemory, seconds: float) -> bool:
    """Return True if a reading shows that memory is being taken: the computer swaps, or programs wait for memory.

    The level of memory pressure is no sign: available memory can be low for weeks while nothing is taken.
    """
    return (now.stall_some_share or 0.0) >= _WARN_STALL_SOME or is_swapping(before, now, seconds)


def is_swapping(before: SystemMemory | None, now: SystemMemory, seconds: float) -> bool:
    """Return True if the computer has written STORM_BYTES_PER_S or more to swap between two readings."""
    if before is None or seconds <= 0:
        return False
    return (_rate(before.swapped_out_bytes, now.swapped_out_bytes, seconds) or 0.0) >= STORM_BYTES_PER_S
