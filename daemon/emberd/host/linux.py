"""Linux: /proc, /sys, pidfd, inotify."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.core.lock_limits import LockLimits, WireRefusals
from emberd.core.memory import Power, PowerSource
from emberd.core.residency import Paging
from emberd.host import linux_memory, linux_sockets, log_sinks
from emberd.host.linux_health import read_health
from emberd.host.linux_memory import MADV_POPULATE_READ, OwnMemory, watch_stalls
from emberd.host.posix import PosixHost, ReadableWatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emberd.core.engine_files import MappedFile
    from emberd.core.host_health import HostHealth
    from emberd.core.memory import EngineMemory, GpuLimits, SystemMemory
    from emberd.core.ports import SystemLog

_linux_os: Any = os
"""typeshed knows pidfd_open on Linux only."""
_IN_MODIFY = 0x00000002
"""inotify(7): file was modified. <sys/inotify.h>"""
_INOTIFY_BUFFER_BYTES = 4096
_FALLOC_FL_KEEP_SIZE = 1
"""<linux/falloc.h>; posix_fallocate(3) would change the size, and a writer in append mode would leave a gap."""
_START_TIME_FIELD = 22
"""proc_pid_stat(5): starttime, clock ticks after boot; fields count from 1."""
_CACHESTAT = 451
"""Number of the call on x86-64 and arm64 alike, Linux 6.5 (scripts/syscall.tbl)."""
_PR_SET_DUMPABLE = 4
"""<linux/prctl.h>; a program that is executed afterwards can be dumped again (prctl(2))."""
_M_ARENA_MAX = -8
"""<malloc.h> of glibc (mallopt(3))."""
_CAP_IPC_LOCK = 14
"""<linux/capability.h>"""
_SYSLOG_SOCKET = Path("/dev/log")
_MEMLOCK_LINE = "Max locked memory"
_EXTERNAL = frozenset({"Mains", "USB", "Wireless"})
_FULL_PERCENT = 100


class LinuxHost(PosixHost):
    """Readings and watches of a Linux kernel.

    Args:
        proc: root of the proc file system; another folder in tests.
        sys: root of the sys file system.
        journal: journald's socket.
    """

    name = "linux"
    paging = Paging(
        checks_owner=True,  # since 5.2 (mincore(2))
        cachestat=_CACHESTAT,
        populate=MADV_POPULATE_READ,
        touches_twice=False,
        keeps_executable=True,
    )

    def __init__(
        self, proc: Path = Path("/proc"), sys: Path = Path("/sys"), journal: str = log_sinks.SOCKET
    ) -> None:
        self._proc = proc
        self._sys = sys
        self._journal = journal
        self._own_memory: OwnMemory | None = None

    def system_log(self) -> SystemLog | None:
        """Return the journal, else syslog, else None: a container has neither."""
        if Path(self._journal).is_socket():
            return log_sinks.JournalSink(self._journal)
        if _SYSLOG_SOCKET.is_socket():
            return log_sinks.SyslogSink()
        return None

    def log_program(self) -> str | None:
        """Return journalctl, None where it is missing."""
        return shutil.which("journalctl")

    def stderr_is_journal(self) -> bool:
        """Compare standard error with $JOURNAL_STREAM (systemd.exec(5))."""
        return log_sinks.is_connected(2, os.environ.get("JOURNAL_STREAM", ""))

    def forbid_core_dumps(self) -> None:
        """Set the limit, and PR_SET_DUMPABLE too: a core_pattern that is a pipe ignores the limit (core(5))."""
        super().forbid_core_dumps()
        with contextlib.suppress(OSError):  # a container without /proc
            self._own_memory = OwnMemory(self._proc)
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)

    def share_heap(self) -> None:
        """Let all threads allocate from one heap: heaps of their own took 1.1 MiB of 40 after 20,000 requests."""
        with contextlib.suppress(AttributeError):  # musl has one anyway
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)

    def watch_exit(self, pid: int) -> ReadableWatch:
        """Watch a process through a pidfd, which becomes readable when it ends (pidfd_open(2), Linux 5.3).

        Raises:
            ProcessLookupError: the process has ended already.
        """
        descriptor: int = _linux_os.pidfd_open(pid)
        return ReadableWatch(descriptor, lambda: os.close(descriptor))

    def watch_file(self, path: Path) -> ReadableWatch:
        """Watch a file for writes through inotify(7).

        Raises:
            OSError: the file is missing, or the user's inotify instances are used up.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1", str(path))
        if libc.inotify_add_watch(descriptor, os.fsencode(path), _IN_MODIFY) < 0:
            error = ctypes.get_errno()
            os.close(descriptor)
            raise OSError(error, os.strerror(error), str(path))
        return ReadableWatch(
            descriptor, lambda: os.close(descriptor), lambda: os.read(descriptor, _INOTIFY_BUFFER_BYTES)
        )

    def reserve_room(self, descriptor: int, size_bytes: int) -> None:
        """Reserve blocks beyond the end of the file (fallocate(2)).

        Raises:
            OSError: the disk is full, or its file system cannot reserve.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        # The 64-bit call where off_t has 32 bits; both libraries know it by this name (feature_test_macros(7)).
        reserve = getattr(libc, "fallocate64", None) or libc.fallocate
        if reserve(descriptor, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size_bytes)) < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def watch_stalls(self, longest_s: int) -> ReadableWatch | None:
        """Watch /proc/pressure/memory; None without PSI, or where this user may not ask (a container)."""
        try:
            return watch_stalls(self._proc, longest_s)
        except OSError:
            return None

    def is_held(self, local: tuple[str, int], remote: tuple[str, int]) -> bool | None:
        """Ask the kernel's table of sockets: see `linux_sockets.is_held`."""
        return linux_sockets.is_held(local, remote)

    def start_token(self, pid: int) -> str | None:
        """Return boot id and start time in ticks: unlike a wall-clock time, it survives clock changes."""
        ticks = linux_memory.stat_field(self._proc, pid, _START_TIME_FIELD)
        try:
            boot_id = (self._proc / "sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if ticks is None else f"{boot_id}:{ticks}"

    def recall_own_memory(self) -> None:
        """Populate what this process has in swap; only after `forbid_core_dumps`, which comes first in a daemon."""
        if self._own_memory is not None:
            with contextlib.suppress(OSError):
                self._own_memory.recall()

    def engine_memory(self, pids: Sequence[int]) -> EngineMemory:
        """Sum the kernel's counters of these processes."""
        return linux_memory.engine_memory(self._proc, pids)

    def mapped_files(self, pids: Sequence[int], *, with_locks: bool = False) -> tuple[MappedFile, ...] | None:
        """Read maps, or smaps."""
        return linux_memory.mapped_files(self._proc, pids, with_locks=with_locks)

    def proportional_bytes(self, pids: Sequence[int]) -> int | None:
        """Return the sum of their Pss."""
        return linux_memory.proportional_bytes(self._proc, pids)

    def system_memory(self) -> SystemMemory:
        """Read /proc; the level of memory pressure is judged."""
        return linux_memory.system_memory(self._proc)

    def power(self) -> Power:
        """Read /sys."""
        return read_power(self._sys)

    def sleep_blockers(self) -> Sequence[tuple[str, ...]]:
        """Return systemd-inhibit(1), which holds its lock while its child reads a pipe of this process.

        Desktops suspend by themselves, for which they ask logind: "idle" alone would not stop them. Without a
        session polkit may refuse "sleep" and still grant "idle" (org.freedesktop.login1.policy).
        """
        words = ("--who=emberd", "--why=The model is kept ready", "--mode=block", "cat")
        return tuple(("systemd-inhibit", f"--what={what}", *words) for what in ("idle:sleep", "idle"))

    def gpu_limits(self) -> GpuLimits | None:
        """Return None: what a graphics card may hold is its driver's business here."""
        return None

    def lock_limits(self, pid: int | None) -> LockLimits:
        """Return RLIMIT_MEMLOCK (proc_pid_limits(5)) and whether CAP_IPC_LOCK lifts it (capabilities(7))."""
        pid = pid or os.getpid()
        capabilities = self._capabilities(pid)
        return LockLimits(
            "linux",
            memlock_bytes=self._memlock(pid),
            can_ignore_memlock=None if capabilities is None else bool(capabilities >> _CAP_IPC_LOCK & 1),
        )

    def wire_refusals(self) -> WireRefusals | None:
        """Return None: Linux counts no refused locks."""
        return None

    def _capabilities(self, pid: int) -> int | None:
        try:
            text = (self._proc / str(pid) / "status").read_text(errors="replace")
        except OSError:
            return None
        for line in text.splitlines():
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
        return None

    def _memlock(self, pid: int) -> int | None:
        try:
            text = (self._proc / str(pid) / "limits").read_text()
        except OSError:
            return None
        for line in text.splitlines():
            if line.startswith(_MEMLOCK_LINE):
                soft = line.removeprefix(_MEMLOCK_LINE).split()[0]
                return -1 if soft == "unlimited" else int(soft)
        return None

    def health(self, pid: int) -> HostHealth:
        """Return what systemd and the cgroups say."""
        return read_health(pid, self._proc)

    def quarantine(self, path: Path) -> str | None:  # noqa: ARG002  # the Host protocol
        """Return None: Linux has no quarantine."""
        return None

    def engine_environment(self, metal_keep_alive_s: int) -> Mapping[str, str]:  # noqa: ARG002  # the Host protocol
        """Return nothing: there is no Metal here."""
        return {}


def read_power(sys: Path) -> Power:
    """Read all supplies of the computer itself; those of a mouse or a headset have the scope "Device".

    In /sys/class/power_supply (Documentation/ABI/testing/sysfs-class-power). Not psutil.sensors_battery: it takes
    any supply with "battery" in its name: with a wireless mouse (hidpp_battery_0) a desktop would be on battery.
    """
    profile = _word(sys / "firmware/acpi/platform_profile")
    is_low_power = None if profile is None else profile == "low-power"
    try:
        folders = sorted((sys / "class/power_supply").iterdir())
    except OSError:
        return Power(is_low_power=is_low_power)
    supplies = [folder for folder in folders if _word(folder / "scope") != "Device"]
    batteries = [folder for folder in supplies if _word(folder / "type") == "Battery"]
    charges = [int(charge) for folder in batteries if (charge := _word(folder / "capacity") or "").isdecimal()]
    return Power(
        source=_source(supplies, batteries),
        battery_share=min(sum(charges) / len(charges) / _FULL_PERCENT, 1.0) if charges else None,
        is_low_power=is_low_power,
    )


def _source(supplies: list[Path], batteries: list[Path]) -> PowerSource:
    if any(_word(one / "type") in _EXTERNAL and _word(one / "online") not in {None, "0"} for one in supplies):
        return PowerSource.MAINS
    states = {_word(battery / "status") for battery in batteries}
    if "Discharging" in states:
        return PowerSource.BATTERY
    # No battery: a desktop. Charging, Full and Not charging need another source.
    return PowerSource.UNKNOWN if states & {"Unknown", None} else PowerSource.MAINS


def _word(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
