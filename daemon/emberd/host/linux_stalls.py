"""Waking when tasks wait for memory, so that nobody has to look every two seconds whether they do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
from typing import TYPE_CHECKING, Any

from emberd.host.posix import ReadableWatch

if TYPE_CHECKING:
    from pathlib import Path

_linux_select: Any = select
"""typeshed knows epoll on Linux only."""
_TRIGGER = b"some 10000 2000000\0"
"""10 ms of waiting within 2 s, in µs (psi.rst); without CAP_SYS_RESOURCE the window must be a multiple of 2 s."""
_CLOCK_BOOTTIME = 7
"""<linux/time.h>: goes on while the computer sleeps (clock_gettime(2))."""
_TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
"""TFD_NONBLOCK and TFD_CLOEXEC, <sys/timerfd.h>"""
_COUNTER_BYTES = 8


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    """timerfd_create(2)."""

    _fields_ = (("interval", _Timespec), ("value", _Timespec))


def watch_stalls(proc: Path, longest_s: int) -> ReadableWatch:
    """Return a watch that wakes when tasks wait for memory, every `longest_s`, and when the computer wakes.

    The trigger tells of itself by POLLPRI, for which asyncio cannot wait: an epoll of its own stands between.

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
