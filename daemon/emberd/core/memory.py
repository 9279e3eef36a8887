"""What memory readings mean: the engine's processes, the whole computer, power. Unknown is None, never zero."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emberd.core.types import EngineSample


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Memory of the engine's processes, summed over those that could be read.

    Attributes:
        resident_bytes: mapped and in memory (Linux VmRSS, macOS ri_resident_size). Pages that only a GPU uses are
            not in it.
        anonymous_bytes: the resident part without a file behind it (Linux RssAnon); macOS does not tell.
        file_bytes: the resident part that belongs to files (Linux RssFile); macOS does not tell.
        locked_bytes: what mlock holds (Linux VmLck, macOS ri_wired_size).
        swapped_bytes: what is in swap (Linux VmSwap); on macOS footprint less resident size, the part that is
            compressed or in swap: an estimate.
        is_swap_estimated: buffers of a GPU may be in it, and then it follows what other programs have compressed.
        footprint_bytes: what can leave memory only through swap, whether it is there or not (Linux RssAnon and
            VmSwap, macOS ri_phys_footprint).
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
        available_bytes: what programs can get without swapping.
        wired_bytes: held in memory by locks and the kernel (Linux Mlocked, macOS wired).
        compressed_bytes: RAM that holds compressed pages (macOS compressor, Linux zswap).
        swap_total_bytes: size of the swap space.
        swap_used_bytes: what is in it.
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
    """Everything that was read at one moment; whoever decides, foretells or accounts for something shares it.

    Attributes:
        at_s: that moment, on the monotonic clock.
        engine: what the engine was.
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
    """What macOS lets the GPU hold wired.

    Attributes:
        wired_limit_bytes: iogpu.wired_limit_mb in bytes; 0 is the system's default.
        is_collector_off: iogpu.disable_wired_collector is 1: idle memory of the GPU stays wired.
    """

    wired_limit_bytes: int | None = None
    is_collector_off: bool | None = None
