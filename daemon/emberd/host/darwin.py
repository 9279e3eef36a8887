"""macOS: kqueue, extended attributes, Metal's environment. Facts are cited where they are used."""

from __future__ import annotations

import ctypes
import resource
import select
import subprocess
from typing import TYPE_CHECKING, Any

import psutil

from emberd.core.lock_limits import LockLimits, WireRefusals
from emberd.core.residency import Paging
from emberd.host.posix import PosixHost, ReadableWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

_kqueue: Any = select
"""typeshed knows kqueue on macOS only."""
_XATTR = "/usr/bin/xattr"
_QUARANTINE = "com.apple.quarantine"
_XATTR_TIMEOUT_S = 5.0
_RUSAGE_INFO_V4 = 4
_RUSAGE_V4_BYTES = 296
_WIRED_SIZE_OFFSET = 56
"""struct rusage_info_v4: 16 bytes of UUID, then 64-bit numbers without padding; ri_wired_size is the sixth of them
(xnu, bsd/sys/resource.h; unchanged since macOS 10.14)."""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class DarwinHost(PosixHost):
    """Readings and watches of a macOS kernel."""

    name = "darwin"
    paging = Paging(
        checks_owner=False,  # xnu looks pages up for any reader (bsd/kern/kern_mman.c)
        cachestat=None,
        populate=None,
        touches_twice=True,
    )

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

    def start_token(self, pid: int) -> str | None:
        """Return the start time that the kernel noted at fork (`p_starttime`); it is not moved by clock changes."""
        try:
            return f"{psutil.Process(pid).create_time():.6f}"
        except psutil.Error:
            return None

    def wired_bytes(self) -> int | None:
        """Return wired memory of the system in bytes.

        None where psutil cannot tell: up to 7.2.2 it raises RuntimeError on macOS 26 (psutil issue 2853).
        """
        try:
            wired: int = getattr(psutil.virtual_memory(), "wired", None) or 0
        except (RuntimeError, psutil.Error):
            return None
        return wired or None

    def memory(self) -> tuple[int | None, int | None]:
        """Return `hw.memsize` (sysctl(3)) and psutil's available memory, which is unknown on macOS 26."""
        total, available = super().memory()
        return self._sysctl("hw.memsize") or total, available

    def locked_bytes(self, pids: Sequence[int]) -> int | None:
        """Return the sum of `ri_wired_size`: what mlock wired in these processes (xnu, bsd/sys/resource.h).

        Only processes of the same user can be read; None if none could.
        """
        known = [wired for wired in map(self._wired_size, pids) if wired is not None]
        return sum(known) if known else None

    def _wired_size(self, pid: int) -> int | None:
        usage = ctypes.create_string_buffer(_RUSAGE_V4_BYTES)
        if _libc().proc_pid_rusage(ctypes.c_int(pid), ctypes.c_int(_RUSAGE_INFO_V4), usage) != 0:
            return None
        return int.from_bytes(usage.raw[_WIRED_SIZE_OFFSET : _WIRED_SIZE_OFFSET + 8], "little")

    def swapped_out_bytes(self) -> int | None:
        """Return None: psutil's `sout` counts page-outs of files here, not swap (psutil/arch/osx/mem.c)."""
        return None

    def swapped_bytes(self, pids: Sequence[int]) -> int | None:  # noqa: ARG002  # the Host protocol
        """Return None: no call tells what another process has in swap."""
        return None

    def lock_limits(self, pid: int | None) -> LockLimits:  # noqa: ARG002  # a child has the limits of this process
        """Return RLIMIT_MEMLOCK and the two wire limits, which anyone may read (xnu, bsd/kern/kern_sysctl.c)."""
        return LockLimits(
            "darwin",
            memlock_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            user_wire_bytes=self._sysctl("vm.user_wire_limit"),
            global_wire_bytes=self._sysctl("vm.global_user_wire_limit"),
        )

    def wire_refusals(self) -> WireRefusals | None:
        """Return vm.add_wire_count_over_user_limit and _global_limit (xnu, bsd/kern/kern_sysctl.c)."""
        over_user = self._sysctl("vm.add_wire_count_over_user_limit")
        over_global = self._sysctl("vm.add_wire_count_over_global_limit")
        return None if over_user is None or over_global is None else WireRefusals(over_user, over_global)

    def _sysctl(self, name: str) -> int | None:
        """Return a number by sysctlbyname(3), 32 or 64 bits wide as the kernel says; None if there is none."""
        value = ctypes.create_string_buffer(8)
        length = ctypes.c_size_t(len(value))
        if _libc().sysctlbyname(name.encode(), value, ctypes.byref(length), None, ctypes.c_size_t(0)) != 0:
            return None
        return int.from_bytes(value.raw[: length.value], "little")

    def quarantine(self, path: Path) -> str | None:
        """Return the value of com.apple.quarantine, None if the file has none; xattr(1) exits 1 then."""
        try:
            asked = subprocess.run(
                [_XATTR, "-p", _QUARANTINE, str(path)],
                capture_output=True,
                text=True,
                timeout=_XATTR_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return asked.stdout.strip() or None if asked.returncode == 0 else None

    def engine_environment(self, metal_keep_alive_s: int) -> Mapping[str, str]:
        """Return the keep-alive of Metal's residency sets.

        llama.cpp requests residency again for so many seconds after the last computation, 180 by default
        (llama.cpp PR 17766, ggml/src/ggml-metal/ggml-metal-device.m).
        """
        return {"GGML_METAL_RESIDENCY_KEEP_ALIVE_S": str(metal_keep_alive_s)}
