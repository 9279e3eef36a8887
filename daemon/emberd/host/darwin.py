"""macOS: memory, power, kqueue, Metal's environment. Facts are cited where they are used."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import select
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import psutil

from emberd.core.engine_files import MappedFile, may_be_weights
from emberd.core.lock_limits import LockLimits, WireRefusals
from emberd.core.memory import EngineMemory, GpuLimits, Power, PowerSource, Pressure, SystemMemory
from emberd.core.residency import Paging
from emberd.host import darwin_sockets
from emberd.host.activation import from_launchd
from emberd.host.darwin_calls import DarwinCalls
from emberd.host.darwin_health import read_health
from emberd.host.log_sinks import SyslogSink, load_os_log
from emberd.host.posix import PosixHost, ReadableWatch, ask_program

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from emberd.core.host_health import HostHealth
    from emberd.core.ports import SystemLog
    from emberd.host.darwin_calls import ProcRegionWithPathInfo, RusageInfoV4, VmStatistics64, XswUsage

_kqueue: Any = select
"""typeshed knows kqueue on macOS only."""
_QUARANTINE = "com.apple.quarantine"
_PMSET = "/usr/bin/pmset"
_LOG = "/usr/bin/log"
_CAFFEINATE = "caffeinate"
"""In /usr/bin, which is on launchd's PATH."""
_PMSET_TIMEOUT_S = 5.0
"""It answers within some 10 ms; a hanging one must not hold up anything."""
_MIB = 1024**2
_PRESSURES = {1: Pressure.NORMAL, 2: Pressure.WARN, 4: Pressure.CRITICAL}
"""NOTE_MEMORYSTATUS_PRESSURE_NORMAL, _WARN and _CRITICAL (xnu, bsd/sys/event_private.h); the kernel's "urgent"
comes as a warning (bsd/kern/kern_memorystatus_notify.c)."""
_SOURCE = re.compile(r"^Now drawing from '([^']+)'", re.MULTILINE)
_SOURCES = {"AC Power": PowerSource.MAINS, "Battery Power": PowerSource.BATTERY, "UPS Power": PowerSource.BATTERY}
"""kIOPMACPowerKey, kIOPMBatteryPowerKey and kIOPMUPSPowerKey of <IOKit/pwr_mgt/IOPM.h>; on UPS power the mains are
gone."""
_CHARGE = re.compile(r"^\s*-InternalBattery\S*.*?\b(\d{1,3})%", re.MULTILINE)
"""Other lines are of an uninterruptible power supply."""
_MODE = re.compile(r"^\s*(lowpowermode|powermode)\s+(\d+)\b", re.MULTILINE)
"""Computers with a High Power Mode print powermode instead: 0 automatic, 1 low, 2 high."""
_LOW_POWER = 1
_F_PREALLOCATE = 42
_F_ALLOCATEALL = 4
_F_PEOFPOSMODE = 3
_FSTORE = struct.Struct("=Iiqqq")
"""fcntl(2), struct fstore: flags, position mode, offset, length, and room for the answer (xnu, bsd/sys/fcntl.h)."""
_BLOCK_BYTES = 512
"""Unit of st_blocks (stat(2))."""
_VM_PROT_EXECUTE = 4
"""xnu, osfmk/mach/vm_prot.h."""
_FULL_PERCENT = 100


class DarwinHost(PosixHost):
    """Readings and watches of a macOS kernel.

    Args:
        calls: the C library; a stand-in in tests.
        pmset: path of pmset(1).
        log: path of log(1); a stand-in in tests.
    """

    name = "darwin"
    paging = Paging(
        checks_owner=False,  # xnu looks pages up for any reader (bsd/kern/kern_mman.c)
        cachestat=None,
        populate=None,
        touches_twice=True,
        keeps_executable=False,
    )

    def __init__(self, calls: DarwinCalls | None = None, pmset: str = _PMSET, log: str = _LOG) -> None:
        self._calls = DarwinCalls() if calls is None else calls
        self._pmset = pmset
        self._log = log

    def system_log(self) -> SystemLog | None:
        """Return the unified log, by pyoslog; without it syslog(3), whose lines get there without a subsystem."""
        return load_os_log() or SyslogSink()

    def log_program(self) -> str | None:
        """Return log(1), which every macOS has."""
        return self._log

    def stderr_is_launchds(self) -> bool:
        """Return True if this process is a job of launchd: its child, with the label in XPC_SERVICE_NAME.

        In a terminal the variable is "0", or the terminal's own `application.` and so on.
        """
        label = os.environ.get("XPC_SERVICE_NAME", "")
        return (
            os.getppid() == 1
            and label not in {"", "0"}
            and not label.startswith("application.")
            and not os.isatty(2)
        )

    def given_sockets(self) -> list[socket.socket]:
        """Return the sockets of the environment, else launchd's.

        Raises:
            ConfigError: something else was given, or launchd refused.
        """
        return super().given_sockets() or from_launchd(self._calls.library)

    def reserve_room(self, descriptor: int, size_bytes: int) -> None:
        """Reserve what the file lacks behind its last block: F_PREALLOCATE counts from there (fcntl(2)).

        Raises:
            OSError: the disk is full, or its file system cannot reserve.
        """
        missing = size_bytes - os.fstat(descriptor).st_blocks * _BLOCK_BYTES
        if missing > 0:
            asked = _FSTORE.pack(_F_ALLOCATEALL, _F_PEOFPOSMODE, 0, missing, 0)
            fcntl.fcntl(descriptor, _F_PREALLOCATE, asked)

    def watch_exit(self, pid: int) -> ReadableWatch:
        """Watch a process through EVFILT_PROC with NOTE_EXIT, which needs no parenthood (kqueue(2)).

        Raises:
            ProcessLookupError: the process has ended already.
        """
        return self._watch(
            _kqueue.kevent(
                pid, _kqueue.KQ_FILTER_PROC, _kqueue.KQ_EV_ADD | _kqueue.KQ_EV_ONESHOT, _kqueue.KQ_NOTE_EXIT
            )
        )

    def watch_file(self, path: Path) -> ReadableWatch:
        """Watch a file for writes through EVFILT_VNODE with NOTE_WRITE and NOTE_EXTEND (kqueue(2)).

        Raises:
            OSError: the file cannot be opened.
        """
        file = path.open("rb")
        try:
            return self._watch(
                _kqueue.kevent(
                    file.fileno(),
                    _kqueue.KQ_FILTER_VNODE,
                    _kqueue.KQ_EV_ADD | _kqueue.KQ_EV_CLEAR,
                    _kqueue.KQ_NOTE_WRITE | _kqueue.KQ_NOTE_EXTEND,
                ),
                file.close,
            )
        except OSError:
            file.close()
            raise

    def watch_stalls(self, longest_s: int) -> None:  # the Host protocol
        """Return None: the kernel tells of memory pressure by libdispatch alone."""

    def _watch(self, event: Any, also_close: Callable[[], None] | None = None) -> ReadableWatch:
        queue = _kqueue.kqueue()
        try:
            queue.control([event], 0, 0)
        except OSError:
            queue.close()
            raise

        def close() -> None:
            queue.close()
            if also_close is not None:
                also_close()

        # A kqueue is itself readable when an event is pending (kqueue(2)), so the loop can wait for it.
        return ReadableWatch(queue.fileno(), close, lambda: queue.control(None, 16, 0))

    def is_held(self, local: tuple[str, int], remote: tuple[str, int]) -> bool | None:
        """Ask the kernel's list of connections: see `darwin_sockets.is_held`."""
        return darwin_sockets.is_held(local, remote, self._calls.value)

    def start_token(self, pid: int) -> str | None:
        """Return the start time that the kernel noted at fork (`p_starttime`); it is not moved by clock changes."""
        try:
            return f"{psutil.Process(pid).create_time():.6f}"
        except (psutil.Error, OSError, RuntimeError):
            return None

    def recall_own_memory(self) -> None:
        """Do nothing: macOS has no call that faults memory in without writing to it."""

    def engine_memory(self, pids: Sequence[int]) -> EngineMemory:
        """Read proc_pid_rusage of each process: of this user, or as root of any (xnu, bsd/kern/proc_info.c).

        Swapped memory is an estimate: footprint less resident size, and no more than the compressor and swap hold
        of all processes.
        """
        usages = [usage for usage in map(self._calls.process_usage, pids) if usage is not None]
        return engine_memory(usages, compressor_bytes(self._calls.vm_statistics(), self._page_bytes()))

    def mapped_files(self, pids: Sequence[int], *, with_locks: bool = False) -> tuple[MappedFile, ...] | None:  # noqa: ARG002  # both are told at once
        """Ask proc_pidinfo for each process: of this user, or as root of any (xnu, bsd/kern/proc_info.c)."""
        found = [region for pid in pids for region in self._calls.mapped_regions(pid)]
        return tuple(filter(None, map(mapped_file, found))) if found else None

    def proportional_bytes(self, pids: Sequence[int]) -> int | None:  # noqa: ARG002  # the Host protocol
        """Return None: macOS does not divide shared pages among their users."""
        return None

    def system_memory(self) -> SystemMemory:
        """Read host_statistics64, vm.swapusage, hw.memsize and the kernel's pressure level.

        kern.memorystatus_vm_pressure_level is not in the list of `sysctl -a`, but anyone may read it by name (xnu,
        bsd/kern/kern_memorystatus_notify.c).
        """
        return system_memory(
            self._calls.vm_statistics(),
            self._calls.swap_usage(),
            total_bytes=self._calls.number("hw.memsize"),
            page_bytes=self._page_bytes(),
            pressure_level=self._calls.number("kern.memorystatus_vm_pressure_level"),
        )

    def _page_bytes(self) -> int | None:
        # vm.pagesize is the kernel's page_size (xnu, bsd/vm/vm_unix.c), in which it counts. hw.pagesize and sysconf
        # are those of the calling process (bsd/kern/kern_mib.c): 4 KiB for an x86-64 Python on Apple silicon, where
        # the kernel has 16 KiB.
        return self._calls.number("vm.pagesize") or None

    def power(self) -> Power:
        """Ask pmset(1) twice; what it does not tell is unknown. Some 10 ms for each."""
        return read_power(self._ask_pmset("-g", "batt"), self._ask_pmset("-g"))

    def sleep_blockers(self) -> Sequence[tuple[str, ...]]:
        """Return caffeinate(8): -i against idle sleep, -w until this process ends; a closed lid still sleeps."""
        return ((_CAFFEINATE, "-i", "-w", str(os.getpid())),)

    def _ask_pmset(self, *arguments: str) -> str | None:
        try:
            asked = ask_program((self._pmset, *arguments), _PMSET_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError):
            return None
        return asked.stdout if asked.returncode == 0 else None

    def gpu_limits(self) -> GpuLimits | None:
        """Read the sysctls of the GPU's driver, None where it has none (Intel)."""
        return gpu_limits(
            self._calls.number("iogpu.wired_limit_mb"),
            self._calls.number("debug.iogpu.wired_limit"),
            self._calls.number("iogpu.disable_wired_collector"),
        )

    def lock_limits(self, pid: int | None) -> LockLimits:  # noqa: ARG002  # a child has the limits of this process
        """Return RLIMIT_MEMLOCK and the two wire limits, which anyone may read (xnu, bsd/kern/kern_sysctl.c)."""
        return LockLimits(
            "darwin",
            memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            user_wire_bytes=self._calls.number("vm.user_wire_limit"),
            global_wire_bytes=self._calls.number("vm.global_user_wire_limit"),
        )

    def wire_refusals(self) -> WireRefusals | None:
        """Return vm.add_wire_count_over_user_limit and _global_limit (xnu, bsd/kern/kern_sysctl.c)."""
        over_user = self._calls.number("vm.add_wire_count_over_user_limit")
        over_global = self._calls.number("vm.add_wire_count_over_global_limit")
        return None if over_user is None or over_global is None else WireRefusals(over_user, over_global)

    def health(self, pid: int) -> HostHealth:
        """Return whether Rosetta and the scheduler stand in the way."""
        return read_health(pid, self._calls)

    def quarantine(self, path: Path) -> str | None:
        """Return the value of com.apple.quarantine, None if the file has none or cannot be asked (getxattr(2))."""
        mark = self._calls.extended_attribute(path, _QUARANTINE)
        return None if mark is None else mark.decode(errors="replace").strip() or None

    def engine_environment(self, metal_keep_alive_s: int) -> Mapping[str, str]:
        """Return the keep-alive of Metal's residency sets.

        llama.cpp requests residency again for so many seconds after the last computation, 180 by default
        (llama.cpp PR 17766, ggml/src/ggml-metal/ggml-metal-device.m).
        """
        return {"GGML_METAL_RESIDENCY_KEEP_ALIVE_S": str(metal_keep_alive_s)}


# --- what the counters and pmset(1) mean; nothing is asked here ------------------------------------------------


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


def mapped_file(region: ProcRegionWithPathInfo) -> MappedFile | None:
    """Return a mapped region, None for a program or library; locking with mlock(2) raises its wired count."""
    path = os.fsdecode(region.vip_path)
    if not may_be_weights(path) or region.prp_prinfo.pri_protection & _VM_PROT_EXECUTE:
        return None
    info, size_bytes = region.prp_prinfo, int(region.prp_prinfo.pri_size)
    identity = (int(region.vi_stat.vst_dev), int(region.vi_stat.vst_ino))
    return MappedFile(path, identity, size_bytes, size_bytes if info.pri_user_wired_count else 0)


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


def read_power(battery_text: str | None, settings_text: str | None) -> Power:
    """Recognise where power comes from.

    Args:
        battery_text: what `pmset -g batt` printed, None if it could not be run.
        settings_text: what `pmset -g` printed, None if it could not be run.
    """
    source = _SOURCE.search(battery_text or "")
    charge = _CHARGE.search(battery_text or "")
    mode = _MODE.search(settings_text or "")
    return Power(
        source=PowerSource.UNKNOWN if source is None else _SOURCES.get(source[1], PowerSource.UNKNOWN),
        battery_share=None if charge is None else min(int(charge[1]) / _FULL_PERCENT, 1.0),
        is_low_power=None if mode is None else int(mode[2]) == _LOW_POWER,
    )
