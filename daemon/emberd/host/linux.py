"""Linux: /proc, pidfd, inotify."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.host.posix import PosixHost, ReadableWatch

if TYPE_CHECKING:
    from collections.abc import Mapping

_linux_os: Any = os
"""typeshed knows pidfd_open on Linux only."""
_IN_MODIFY = 0x00000002
"""inotify(7): file was modified. <sys/inotify.h>"""
_INOTIFY_BUFFER_BYTES = 4096
_START_TIME_FIELD = 22
"""proc_pid_stat(5): starttime, clock ticks after boot; fields count from 1."""
_FIELDS_BEFORE_STATE = 2
"""pid and (comm) come before the state; comm may hold spaces, so fields are counted after its ')'."""


class LinuxHost(PosixHost):
    """Readings and watches of a Linux kernel.

    Args:
        proc: root of the proc file system; another folder in tests.
    """

    name = "linux"

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

    def quarantine(self, path: Path) -> str | None:  # noqa: ARG002  # the Host protocol
        """Return None: Linux has no quarantine."""
        return None

    def engine_environment(self, metal_keep_alive_s: int) -> Mapping[str, str]:  # noqa: ARG002  # the Host protocol
        """Return nothing: there is no Metal here."""
        return {}
