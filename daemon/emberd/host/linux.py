"""Linux: /proc, pidfd, inotify."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.core.lock_limits import LockLimits, WireRefusals
from emberd.core.residency import Paging
from emberd.host.posix import PosixHost, ReadableWatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_linux_os: Any = os
"""typeshed knows pidfd_open on Linux only."""
_IN_MODIFY = 0x00000002
"""inotify(7): file was modified. <sys/inotify.h>"""
_INOTIFY_BUFFER_BYTES = 4096
_START_TIME_FIELD = 22
"""proc_pid_stat(5): starttime, clock ticks after boot; fields count from 1."""
_CACHESTAT = 451
"""Number of the call on x86-64 and arm64 alike, Linux 6.5 (scripts/syscall.tbl)."""
_MADV_POPULATE_READ = 22
"""Linux 5.14 (<asm-generic/mman-common.h>)."""
_CAP_IPC_LOCK = 14
"""<linux/capability.h>"""
_MEMLOCK_LINE = "Max locked memory"
_KIB = 1024
_FIELDS_BEFORE_STATE = 2
"""pid and (comm) come before the state; comm may hold spaces, so fields are counted after its ')'."""


class LinuxHost(PosixHost):
    """Readings and watches of a Linux kernel.

    Args:
        proc: root of the proc file system; another folder in tests.
    """

    name = "linux"
    paging = Paging(
        checks_owner=True,  # since 5.2 (mincore(2))
        cachestat=_CACHESTAT,
        populate=_MADV_POPULATE_READ,
        touches_twice=False,
    )

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

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

    def start_token(self, pid: int) -> str | None:
        """Return boot id and start time in ticks: unlike a wall-clock time, it survives clock changes."""
        try:
            stat = (self._proc / str(pid) / "stat").read_text()
            boot_id = (self._proc / "sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()
        return f"{boot_id}:{fields[_START_TIME_FIELD - _FIELDS_BEFORE_STATE - 1]}"

    def wired_bytes(self) -> int | None:
        """Return `Mlocked` of /proc/meminfo (proc_meminfo(5)) in bytes, None if it cannot be read."""
        try:
            text = (self._proc / "meminfo").read_text()
        except OSError:
            return None
        for line in text.splitlines():
            if line.startswith("Mlocked:"):
                return int(line.split()[1]) * 1024
        return None

    def locked_bytes(self, pids: Sequence[int]) -> int | None:
        """Return the sum of `VmLck` (proc_pid_status(5)) in bytes, None if no process could be read."""
        return self._sum_of(pids, "VmLck:")

    def swapped_bytes(self, pids: Sequence[int]) -> int | None:
        """Return the sum of `VmSwap` (proc_pid_status(5)) in bytes, None if no process could be read."""
        return self._sum_of(pids, "VmSwap:")

    def swapped_out_bytes(self) -> int | None:
        """Return `pswpout` of /proc/vmstat, which counts pages (proc_vmstat(5)), in bytes."""
        try:
            text = (self._proc / "vmstat").read_text()
        except OSError:
            return None
        for line in text.splitlines():
            if line.startswith("pswpout "):
                return int(line.split()[1]) * os.sysconf("SC_PAGESIZE")
        return None

    def _sum_of(self, pids: Sequence[int], name: str) -> int | None:
        found = [self._status_number(pid, name, 10) for pid in pids]
        known = [kib * _KIB for kib in found if kib is not None]
        return sum(known) if known else None

    def lock_limits(self, pid: int | None) -> LockLimits:
        """Return RLIMIT_MEMLOCK (proc_pid_limits(5)) and whether CAP_IPC_LOCK lifts it (capabilities(7))."""
        pid = pid or os.getpid()
        capabilities = self._status_number(pid, "CapEff:", 16)
        return LockLimits(
            "linux",
            memlock_bytes=self._memlock(pid),
            can_ignore_memlock=None if capabilities is None else bool(capabilities >> _CAP_IPC_LOCK & 1),
        )

    def wire_refusals(self) -> WireRefusals | None:
        """Return None: Linux counts no refused locks."""
        return None

    def _status_number(self, pid: int, name: str, base: int) -> int | None:
        try:
            text = (self._proc / str(pid) / "status").read_text()
        except OSError:
            return None
        for line in text.splitlines():
            if line.startswith(name):
                return int(line.split()[1], base)
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

    def quarantine(self, path: Path) -> str | None:  # noqa: ARG002  # the Host protocol
        """Return None: Linux has no quarantine."""
        return None

    def engine_environment(self, metal_keep_alive_s: int) -> Mapping[str, str]:  # noqa: ARG002  # the Host protocol
        """Return nothing: there is no Metal here."""
        return {}
