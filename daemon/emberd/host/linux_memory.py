"""Memory on Linux: what /proc tells, waking when programs wait for it, and keeping one's own in memory.

Sizes are bytes; what cannot be read is None.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import select
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emberd.core.engine_files import MappedFile, may_be_weights
from emberd.core.memory import EngineMemory, SystemMemory, judge_pressure
from emberd.host.posix import ReadableWatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
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
_linux_select: Any = select
"""typeshed knows epoll on Linux only."""
_TRIGGER = b"some 10000 2000000\0"
"""10 ms of waiting within 2 s, in µs (psi.rst); without CAP_SYS_RESOURCE the window must be a multiple of 2 s."""
_CLOCK_BOOTTIME = 7
"""<linux/time.h>: goes on while the computer sleeps (clock_gettime(2))."""
_TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
"""TFD_NONBLOCK and TFD_CLOEXEC, <sys/timerfd.h>"""
_COUNTER_BYTES = 8
MADV_POPULATE_READ = 22
"""Linux 5.14 (<asm-generic/mman-common.h>): faults a range in, and marks what is there as used."""
_PROGRAM = re.compile(rb"^\S+ ..x. \S+ \S+ \S+ +(/.*)$", re.MULTILINE)
"""A line of maps with code in it."""
_IN_USE = 3 << 62
"""Bits 63, present, and 62, swapped (proc_pid_pagemap(5)). What was never used has neither, and is left alone."""
_ENTRY_BYTES = 8


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


def mapped_files(proc: Path, pids: Sequence[int], *, with_locks: bool) -> tuple[MappedFile, ...] | None:
    """Return the files that processes map, None if none of them can be read (proc_pid_maps(5)).

    Args:
        proc: root of the proc file system.
        pids: the processes.
        with_locks: ask how much is locked, for which the kernel walks page tables (proc_pid_smaps(5)). VmFlags tell
            which mapping is locked; `Locked` counts only a share of pages that other processes map, too.
    """
    found, is_read = list[MappedFile](), False
    for pid in pids:
        maps = _read(proc / str(pid) / "maps")
        is_read = is_read or bool(maps)
        programs = set(_PROGRAM.findall(maps))
        mapped = [each for line in maps.splitlines() if (each := _mapping(line)) is not None]
        if mapped and with_locks:
            mapped = list(_with_locks(_read(proc / str(pid) / "smaps")))
        found += (each for each in mapped if os.fsencode(each.path) not in programs)
    return tuple(found) if is_read else None


def _mapping(line: bytes) -> MappedFile | None:
    """Read a line of maps: addresses, permissions, offset, device, inode and path."""
    words = line.split(maxsplit=5)
    if len(words) < 6 or not may_be_weights(path := os.fsdecode(words[5])):  # noqa: PLR2004  # proc_pid_maps(5)
        return None
    first, _, last = words[0].partition(b"-")
    major, _, minor = words[3].partition(b":")
    device = os.makedev(int(major, 16), int(minor, 16))
    return MappedFile(path, (device, int(words[4])), int(last, 16) - int(first, 16))


def _with_locks(smaps: bytes) -> Iterator[MappedFile]:
    mapped, resident = None, 0
    for line in smaps.splitlines():
        name, _, rest = line.partition(b":")
        if name == b"Rss":
            resident = int(rest.split()[0]) * _KIB
        elif name == b"VmFlags":
            if mapped is not None:
                yield replace(mapped, locked_bytes=resident if b"lo" in rest.split() else 0)
            mapped = None
        elif b"-" in name:
            mapped = _mapping(line)


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


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    """timerfd_create(2)."""

    _fields_ = (("interval", _Timespec), ("value", _Timespec))


def watch_stalls(proc: Path, longest_s: int) -> ReadableWatch:
    """Return a watch that wakes when tasks wait for memory, every `longest_s`, and when the computer wakes.

    So nobody has to look every two seconds whether they do. The trigger tells of itself by
    POLLPRI, for which asyncio cannot wait: an epoll of its own stands between.

    Raises:
        OSError: the kernel has no PSI, or does not let this user ask for it.
    """
    with contextlib.ExitStack() as opened:
        poll = opened.enter_context(_linux_select.epoll())
        trigger = os.open(proc / "pressure/memory", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        opened.callback(os.close, trigger)
        os.write(trigger, _TRIGGER)
        timer = _timer(longest_s)
        opened.callback(os.close, timer)
        poll.register(trigger, _linux_select.EPOLLPRI)
        poll.register(timer, _linux_select.EPOLLIN)

        def consume() -> None:
            poll.poll(0)
            with contextlib.suppress(BlockingIOError):
                os.read(timer, _COUNTER_BYTES)

        return ReadableWatch(poll.fileno(), opened.pop_all().close, consume)


def _timer(every_s: int) -> int:
    """Return a descriptor that becomes readable every so often."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.timerfd_create(_CLOCK_BOOTTIME, _TFD_FLAGS)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    every = _Timespec(every_s, 0)
    libc.timerfd_settime(descriptor, 0, ctypes.byref(_Itimerspec(every, every)), None)
    return descriptor


def private_ranges(maps: str) -> Iterator[tuple[int, int]]:
    """Yield first and last address (exclusive) of what can hold pages of one's own (proc_pid_maps(5))."""
    for line in maps.splitlines():
        words = line.split(maxsplit=2)
        if words[1].startswith("r") and words[1].endswith("p"):
            first, _, last = words[0].partition("-")
            yield int(first, 16), int(last, 16)


def runs_in_use(entries: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last index (exclusive) of each run of pages that are present or swapped."""
    begin = None
    number = -1
    for number, entry in enumerate(entries):
        if entry & _IN_USE:
            begin = number if begin is None else begin
        elif begin is not None:
            yield begin, number
            begin = None
    if begin is not None:
        yield begin, number + 1


class OwnMemory:
    """This process's own memory, which `recall` keeps in memory.

    Under pressure an idle daemon is swapped out before the engine is: 18 of its 35 MB were, and the first request
    after 30 s met some 100 major faults in emberd itself, measured in a group that was 0.3 GiB short.

    Made before PR_SET_DUMPABLE is taken away: from then on pagemap belongs to root, and only who has it open may
    read it (proc_pid(5)).

    Args:
        proc: root of the proc file system.

    Raises:
        OSError: /proc cannot be read.
    """

    def __init__(self, proc: Path) -> None:
        self._maps = proc / "self" / "maps"
        self._pagemap = os.open(proc / "self" / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def recall(self) -> None:
        """Bring this process's own memory back from swap, and mark it as used.

        Raises:
            OSError: /proc cannot be read.
        """
        page_bytes = mmap.PAGESIZE
        for first, last in private_ranges(self._maps.read_text()):
            pages = (last - first) // page_bytes
            told = os.pread(self._pagemap, pages * _ENTRY_BYTES, first // page_bytes * _ENTRY_BYTES)
            entries = array("Q", told[: len(told) // _ENTRY_BYTES * _ENTRY_BYTES])
            for begin, end in runs_in_use(entries):
                # Fails on kernels before 5.14, and for what was unmapped meanwhile: both harmless.
                self._libc.madvise(first + begin * page_bytes, (end - begin) * page_bytes, MADV_POPULATE_READ)
