"""A stand-in for select.kqueue on Linux: the part of kqueue(2) that emberd uses, over epoll, pidfd and inotify.

As documented there: a kqueue is itself readable while an event is pending; EVFILT_PROC on a process that does not
exist fails with ESRCH; EV_CLEAR resets an event when it is fetched; EV_ONESHOT delivers it once.
"""

from __future__ import annotations

import ctypes
import os
import select
from dataclasses import dataclass

KQ_FILTER_PROC = -5
KQ_FILTER_VNODE = -4
KQ_EV_ADD = 0x1
KQ_EV_ONESHOT = 0x10
KQ_EV_CLEAR = 0x20
KQ_NOTE_EXIT = 0x80000000
KQ_NOTE_WRITE = 0x2
KQ_NOTE_EXTEND = 0x4


@dataclass
class kevent:  # noqa: N801  # select's name
    """One event, as select.kevent."""

    ident: int
    filter: int
    flags: int
    fflags: int


class kqueue:  # noqa: N801  # select's name
    """A queue of kernel events, as select.kqueue."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, kevent] = {}
        self.closed = False

    def fileno(self) -> int:
        """Return a descriptor that is readable while events are pending."""
        return self._epoll.fileno()

    def control(self, changes: list[kevent] | None, most: int, timeout: float | None = None) -> list[kevent]:
        """Register changes, then fetch at most `most` events."""
        for change in changes or ():
            assert change.flags & KQ_EV_ADD
            if change.filter == KQ_FILTER_PROC:
                assert change.fflags == KQ_NOTE_EXIT
                source = os.pidfd_open(change.ident)
            else:
                assert change.filter == KQ_FILTER_VNODE
                assert change.fflags & KQ_NOTE_WRITE
                libc = ctypes.CDLL(None, use_errno=True)
                source = libc.inotify_init1(os.O_NONBLOCK)
                libc.inotify_add_watch(source, f"/proc/self/fd/{change.ident}".encode(), 0x2)
            self._sources[source] = change
            self._epoll.register(source, select.EPOLLIN)
        fetched = []
        for source, _ in self._epoll.poll(timeout or 0, most) if most else ():
            event = self._sources[source]
            fetched.append(event)
            if event.flags & KQ_EV_CLEAR:
                os.read(source, 4096)
            if event.flags & KQ_EV_ONESHOT:
                self._epoll.unregister(source)
        return fetched

    def close(self) -> None:
        """Close the queue."""
        self.closed = True
        for source in self._sources:
            os.close(source)
        self._epoll.close()
