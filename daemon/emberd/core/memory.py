"""What readings of memory and power mean. Unknown is None, never zero. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emberd.core.types import EngineSample

_WARN_STALL_SOME = 0.07
"""low-memory-monitor's first warning: some task waits for 70 ms of a second (src/lmm-main.c)."""
_CRITICAL_STALL_FULL = 0.10
"""The same program's critical level: all tasks wait for 100 ms of a second."""
_WARN_AVAILABLE = 0.10
"""earlyoom asks the largest program to end below this share of the memory (its default, -m 10)."""
_CRITICAL_AVAILABLE = 0.05
"""earlyoom kills it below this one (half of -m)."""
STORM_BYTES_PER_S = 1024 * 1024
"""A computer that writes this much to swap takes memory from idle programs; below that it only tidies up."""
STORM_LASTS_S = 10.0
"""A storm lasts this long after its last sign: a program that uses its memory once a second pauses, too."""
_RATE_LEAST_S = 1.0
"""Counters move in bursts: a rate needs this much time."""
LEAST_HELD_BYTES = 64 * 1024 * 1024
"""A smaller change is lost among other programs' locks."""
_RELEASED_SHARE = 0.5
"""Other programs' memory changes too; if half of what the engine added is gone, that cannot be chance."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Memory of the engine's processes, summed over those that could be read.

    Attributes:
        resident_bytes: mapped and in memory (Linux VmRSS, macOS ri_resident_size), without pages that only a GPU
            uses.
        anonymous_bytes: the resident part without a file behind it (Linux RssAnon); macOS does not tell.
        file_bytes: the resident part that belongs to files (Linux RssFile); macOS does not tell.
        locked_bytes: locked by mlock (Linux VmLck, macOS ri_wired_size).
        swapped_bytes: in swap (Linux VmSwap); on macOS an estimate of what is compressed or in swap: footprint
            less resident size.
        is_swap_estimated: `swapped_bytes` may contain a GPU's buffers, and change when other programs are
            compressed.
        footprint_bytes: what can leave memory only through swap, in memory or not (Linux RssAnon and VmSwap,
            macOS ri_phys_footprint).
        major_faults: page-ins from a disk since the processes began (Linux majflt, macOS ri_pageins).
        read_bytes: read from disks since the processes began.
    """

    resident_bytes: int | None = None
    anonymous_bytes: int | None = None
    file_bytes: int | None = None
    locked_bytes: int | None = None
    swapped_bytes: int | None = None
    is_swap_estimated: bool = False
    footprint_bytes: int | None = None
    major_faults: int | None = None
    read_bytes: int | None = None


class Pressure(Enum):
    """How short of memory the computer is."""

    NORMAL = "normal"
    WARN = "warn"
    CRITICAL = "critical"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class SystemMemory:
    """The whole computer's memory.

    Attributes:
        total_bytes: RAM.
        available_bytes: memory that programs can get without swapping.
        wired_bytes: kept in memory by locks and the kernel (Linux Mlocked, macOS wired).
        compressed_bytes: RAM that holds compressed pages (macOS compressor, Linux zswap).
        swap_total_bytes: size of the swap space.
        swap_used_bytes: used of it.
        swapped_in_bytes: read from swap since boot.
        swapped_out_bytes: written to swap since boot.
        pressure: the kernel's own level on macOS, judged from PSI and available memory on Linux.
        stall_some_share: share of the last 10 s in which some task waited for memory (Linux PSI); 1 is all.
        stall_full_share: the same for all tasks together.
    """

    total_bytes: int | None = None
    available_bytes: int | None = None
    wired_bytes: int | None = None
    compressed_bytes: int | None = None
    swap_total_bytes: int | None = None
    swap_used_bytes: int | None = None
    swapped_in_bytes: int | None = None
    swapped_out_bytes: int | None = None
    pressure: Pressure = Pressure.UNKNOWN
    stall_some_share: float | None = None
    stall_full_share: float | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything that was read at one moment; decision, forecast and accounts share it.

    Attributes:
        at_s: that moment, on the monotonic clock.
        engine: the engine at that moment.
        memory: the memory of its processes.
        system: the computer's memory.
    """

    at_s: float
    engine: EngineSample
    memory: EngineMemory
    system: SystemMemory


class PowerSource(Enum):
    """Where the computer's power comes from."""

    MAINS = "mains"
    BATTERY = "battery"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Power:
    """Power of the computer.

    Attributes:
        source: mains, battery or unknown. A desktop without a battery is on mains.
        battery_share: charge from 0 to 1, None without a battery or if unknown.
        is_low_power: Low Power Mode is on (macOS), None if unknown.
    """

    source: PowerSource = PowerSource.UNKNOWN
    battery_share: float | None = None
    is_low_power: bool | None = None


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """How much macOS lets the GPU hold wired.

    Attributes:
        wired_limit_bytes: iogpu.wired_limit_mb in bytes; 0 is the system's default.
        is_collector_off: the GPU's idle memory stays wired (iogpu.disable_wired_collector is 1).
    """

    wired_limit_bytes: int | None = None
    is_collector_off: bool | None = None


def judge_pressure(
    available_share: float | None, stall_some_share: float | None, stall_full_share: float | None
) -> Pressure:
    """Return how short of memory a Linux computer is: the worse of two levels, by stalls and by available memory.

    Linux tells how long tasks waited (pressure stall information, Documentation/accounting/psi.rst) and what is
    available (MemAvailable, proc_meminfo(5)); macOS tells a level. Stalls alone are only a warning: a container
    at its limit stalls while the computer has memory to spare.

    Args:
        available_share: available memory divided by all memory, None if unknown.
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


def worse_of(one: SystemMemory, other: SystemMemory) -> SystemMemory:
    """Return the worse of two readings: least available, highest pressure, longest stall. The rest is unknown."""
    levels = {one.pressure, other.pressure}
    available = [each.available_bytes for each in (one, other) if each.available_bytes is not None]
    stalls = [each.stall_some_share for each in (one, other) if each.stall_some_share is not None]
    order = (Pressure.CRITICAL, Pressure.WARN, Pressure.NORMAL)
    return SystemMemory(
        pressure=next((level for level in order if level in levels), Pressure.UNKNOWN),
        available_bytes=min(available, default=None),
        stall_some_share=max(stalls, default=None),
    )


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
    """Return the swap traffic between two readings, unknown if they are less than a second apart.

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

    The level of memory pressure is no sign, because available memory can be low for weeks while nothing is taken.
    """
    return (now.stall_some_share or 0.0) >= _WARN_STALL_SOME or is_swapping(before, now, seconds)


def is_swapping(before: SystemMemory | None, now: SystemMemory, seconds: float) -> bool:
    """Return True if the computer has written STORM_BYTES_PER_S or more to swap between two readings."""
    if before is None or seconds <= 0:
        return False
    return (_rate(before.swapped_out_bytes, now.swapped_out_bytes, seconds) or 0.0) >= STORM_BYTES_PER_S


def is_released(before_load: int | None, loaded: int | None, now: int | None) -> bool | None:
    """Return True if the memory that a dead engine had locked has come back, None if unknown.

    Args:
        before_load: bytes wired by the whole system before the engine started.
        loaded: the same when it was ready.
        now: the same now, after its end.
    """
    if before_load is None or loaded is None or now is None:
        return None
    held = loaded - before_load
    if held < LEAST_HELD_BYTES:
        return True
    return loaded - now >= held * _RELEASED_SHARE


def must_stay_awake(power: Power, *, is_wanted: bool, is_ready: bool) -> bool:
    """Return True if the computer is to be kept from going to sleep by itself.

    Only on known mains, never in low power mode, and only while there is a model to ask: a failed engine is not
    worth a night's energy.
    """
    return is_wanted and is_ready and power.source is PowerSource.MAINS and power.is_low_power is not True
