"""What macOS' counters mean: decided from what darwin_calls has read, without asking anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.memory import EngineMemory, GpuLimits, Pressure, SystemMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emberd.host.darwin_calls import RusageInfoV4, VmStatistics64, XswUsage

_MIB = 1024**2
_PRESSURES = {1: Pressure.NORMAL, 2: Pressure.WARN, 4: Pressure.CRITICAL}
"""NOTE_MEMORYSTATUS_PRESSURE_NORMAL, _WARN and _CRITICAL (xnu, bsd/sys/event_private.h); the kernel's "urgent"
comes as a warning (bsd/kern/kern_memorystatus_notify.c)."""


def engine_memory(usages: Sequence[RusageInfoV4], compressor_bytes: int | None) -> EngineMemory:
    """Sum the memory of processes; all None without one.

    Args:
        usages: what the kernel counts of each process.
        compressor_bytes: what all processes together have compressed or in swap, as large as it was before; None if
            unknown. No process has more there. Without this bound, buffers of the GPU, which are footprint
            but not resident, would pass for swapped.
    """
    if not usages:
        return EngineMemory()
    resident_bytes = sum(usage.ri_resident_size for usage in usages)
    missing_bytes = sum(max(usage.ri_phys_footprint - usage.ri_resident_size, 0) for usage in usages)
    return EngineMemory(
        resident_bytes=resident_bytes,
        locked_bytes=sum(usage.ri_wired_size for usage in usages),
        swapped_bytes=missing_bytes if compressor_bytes is None else min(missing_bytes, compressor_bytes),
        is_swap_estimated=True,
        footprint_bytes=sum(usage.ri_phys_footprint for usage in usages),
        major_faults=sum(usage.ri_pageins for usage in usages),
        read_bytes=sum(usage.ri_diskio_bytesread for usage in usages),
    )


def compressor_bytes(statistics: VmStatistics64 | None, page_bytes: int | None) -> int | None:
    """Return what all processes have compressed, in memory or in swap, as large as it was before, None if unknown.

    total_uncompressed_pages_in_compressor is c_segment_pages_compressed: pages fed into the compressor and not
    freed, those swapped out included (xnu, osfmk/kern/host.c, osfmk/vm/vm_compressor.c).
    """
    if statistics is None or page_bytes is None:
        return None
    return int(statistics.total_uncompressed_pages_in_compressor) * page_bytes


def system_memory(
    statistics: VmStatistics64 | None,
    swap: XswUsage | None,
    *,
    total_bytes: int | None,
    page_bytes: int | None,
    pressure_level: int | None,
) -> SystemMemory:
    """Put the computer's memory together; what could not be read is None.

    Available is free (with speculative) and inactive pages, as in psutil, so that the figure compares with what
    other programs show. Inactive pages of files are dropped, anonymous ones are compressed before they are swapped.

    Args:
        statistics: page counters.
        swap: vm.swapusage.
        total_bytes: hw.memsize.
        page_bytes: the kernel's page size.
        pressure_level: kern.memorystatus_vm_pressure_level.
    """

    def pages(*names: str) -> int | None:
        if statistics is None or page_bytes is None:
            return None
        return sum(int(getattr(statistics, name)) for name in names) * page_bytes

    return SystemMemory(
        total_bytes=total_bytes,
        available_bytes=pages("free_count", "inactive_count"),
        wired_bytes=pages("wire_count"),
        compressed_bytes=pages("compressor_page_count"),
        swap_total_bytes=None if swap is None else swap.xsu_total,
        swap_used_bytes=None if swap is None else swap.xsu_used,
        swapped_in_bytes=pages("swapins"),
        swapped_out_bytes=pages("swapouts"),
        pressure=Pressure.UNKNOWN if pressure_level is None else _PRESSURES.get(pressure_level, Pressure.UNKNOWN),
    )


def gpu_limits(limit_mib: int | None, old_limit_bytes: int | None, collector: int | None) -> GpuLimits | None:
    """Put the GPU's limits together, None where the system has none of them.

    They are not in Apple's sources; names and units are those of llama.cpp discussion 2182.

    Args:
        limit_mib: iogpu.wired_limit_mb, since macOS 14.
        old_limit_bytes: debug.iogpu.wired_limit, before; in bytes.
        collector: iogpu.disable_wired_collector.
    """
    if limit_mib is None and old_limit_bytes is None and collector is None:
        return None
    return GpuLimits(
        wired_limit_bytes=old_limit_bytes if limit_mib is None else limit_mib * _MIB,
        is_collector_off=None if collector is None else collector == 1,
    )
