"""What /proc tells of memory. Sizes are bytes; what cannot be read is None."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from emberd.core.memory import EngineMemory, SystemMemory
from emberd.core.pressure import judge_pressure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_KIB = 1024
_MAJOR_FAULTS_FIELD = 12
"""proc_pid_stat(5): majflt; fields count from 1."""
_FIELDS_BEFORE_STATE = 2
"""pid and (comm) come before the state; comm may hold spaces, so fields are counted after its ')'."""
_PERCENT = 100
_READ_BYTES = 64 * 1024
_STATUS_NAMES = ("VmRSS", "RssAnon", "RssFile", "RssShmem", "VmLck", "VmSwap")
_MEMINFO_NAMES = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree", "Mlocked", "Zswap")


def engine_memory(proc: Path, pids: Sequence[int]) -> EngineMemory:
    """Sum the memory of processes.

    From status (proc_pid_status(5)): the kernel keeps these counters, so that reading them costs the same for any
    size of model. They lag behind by some 64 pages for each thread (SPLIT_RSS_COUNTING in mm/memory.c, until Linux
    6.2; a per-CPU counter since). io can be read by the process's owner only (proc_pid_io(5)).
    """
    status = [numbers(proc / str(pid) / "status", *_STATUS_NAMES) for pid in pids]

    def size(*names: str) -> int | None:
        return _sum([_sum([one.get(name) for name in names]) for one in status if names[0] in one])

    return EngineMemory(
        resident_bytes=size("VmRSS"),
        anonymous_bytes=size("RssAnon"),
        file_bytes=size("RssFile", "RssShmem"),
        locked_bytes=size("VmLck"),
        swapped_bytes=size("VmSwap"),
        footprint_bytes=size("RssAnon", "VmSwap"),
        major_faults=_sum([stat_field(proc, pid, _MAJOR_FAULTS_FIELD) for pid in pids]),
        read_bytes=_sum([numbers(proc / str(pid) / "io", "read_bytes").get("read_bytes") for pid in pids]),
    )


def proportional_bytes(proc: Path, pids: Sequence[int]) -> int | None:
    """Sum Pss of smaps_rollup (proc_pid_smaps(5)), for which the kernel walks the page tables."""
    return _sum([numbers(proc / str(pid) / "smaps_rollup", "Pss").get("Pss") for pid in pids])


def system_memory(proc: Path) -> SystemMemory:
    """Read meminfo (proc_meminfo(5)), vmstat (proc_vmstat(5)) and pressure/memory (psi.rst)."""
    info, events, stalls = (
        numbers(proc / "meminfo", *_MEMINFO_NAMES),
        numbers(proc / "vmstat", "pswpin", "pswpout"),
        _stalls(proc / "pressure/memory"),
    )
    total, available = info.get("MemTotal"), info.get("MemAvailable")
    swap_total, swap_free = info.get("SwapTotal"), info.get("SwapFree")
    page_bytes = os.sysconf("SC_PAGESIZE")

    def pages(name: str) -> int | None:
        return events[name] * page_bytes if name in events else None

    some, full = stalls.get("some"), stalls.get("full")
    return SystemMemory(
        total_bytes=total,
        available_bytes=available,
        wired_bytes=info.get("Mlocked"),
        compressed_bytes=info.get("Zswap"),
        swap_total_bytes=swap_total,
        swap_used_bytes=None if swap_total is None or swap_free is None else swap_total - swap_free,
        swapped_in_bytes=pages("pswpin"),
        swapped_out_bytes=pages("pswpout"),
        pressure=judge_pressure(available / total if available is not None and total else None, some, full),
        stall_some_share=some,
        stall_full_share=full,
    )


def numbers(path: Path, *names: str) -> dict[str, int]:
    """Read some of the lines `name: number [kB]` or `name number`; sizes in bytes. Empty if it cannot be read.

    These files are read every two seconds: parsing all 190 lines of vmstat took 120 to 350 µs, two of them 20.
    """
    pattern = rb"^(%s):?[ \t]+(\d+)( kB)?$" % "|".join(names).encode()
    return {
        name.decode(): int(number) * (_KIB if unit else 1)
        for name, number, unit in re.findall(pattern, _read(path), re.MULTILINE)
    }


def _read(path: Path) -> bytes:
    """Read a file of /proc, without the buffers of a Python file; empty if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return b"".join(iter(lambda: os.read(descriptor, _READ_BYTES), b""))
    except OSError:  # the process has ended meanwhile
        return b""
    finally:
        os.close(descriptor)


def stat_field(proc: Path, pid: int, number: int) -> int | None:
    """Return a number of proc_pid_stat(5), where fields count from 1; None if the process is gone."""
    fields = _read(proc / str(pid) / "stat").rpartition(b")")[2].split()
    index = number - _FIELDS_BEFORE_STATE - 1
    return int(fields[index]) if index < len(fields) else None


def _stalls(path: Path) -> dict[str, float]:
    """Return avg10 of each line as a share: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`."""
    found: dict[str, float] = {}
    for line in _read(path).decode().splitlines():  # none if built without CONFIG_PSI, or psi=0
        kind, _, average = line.partition(" avg10=")
        if average:
            found[kind] = float(average.split()[0]) / _PERCENT
    return found


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
