"""What macOS and Linux share, and how other programs are asked."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import subprocess
from typing import TYPE_CHECKING

import psutil

from emberd.host.activation import from_environment

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

_OPEN_FILES = 4096


def ask_program(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run a program without input, for a limited time, and return what it printed.

    Raises:
        OSError: it cannot be run.
        subprocess.TimeoutExpired: it has not ended in time, and was killed.
    """
    return subprocess.run(
        list(command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit_s,
        check=False,
    )


def _tell(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)


class ReadableWatch:
    """Wakes an asyncio task when a file descriptor becomes readable.

    Args:
        descriptor: becomes readable when there is news.
        close: closes what stands behind the descriptor.
        consume: takes the news off the descriptor, so that it can become readable again.
    """

    def __init__(
        self, descriptor: int, close: Callable[[], None], consume: Callable[[], object] = lambda: None
    ) -> None:
        self._descriptor = descriptor
        self._close = close
        self._consume = consume
        self._is_open = True
        self._news: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Return when there is news; cancelled if the watch is closed meanwhile."""
        loop = asyncio.get_running_loop()
        news = self._news = loop.create_future()
        loop.add_reader(self._descriptor, _tell, news)
        try:
            await news
        finally:
            if self._is_open:
                loop.remove_reader(self._descriptor)
        self._consume()

    def close(self) -> None:
        """Give up watching; idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        if self._news is not None and not self._news.done():
            # The number of a closed descriptor is used again: the reader must be gone before that.
            self._news.get_loop().remove_reader(self._descriptor)
            self._news.cancel()
        self._close()


class PosixHost:
    """What is alike on both systems."""

    def given_sockets(self) -> list[socket.socket]:
        """Return the listening sockets that a service manager, or an emberd that this one replaces, has given.

        Raises:
            ConfigError: something else was given.
        """
        return from_environment()

    def forbid_core_dumps(self) -> None:
        """Keep this process, which remembers what a person said, from being written to disk when it crashes.

        Its children inherit the limit (setrlimit(2)), the engine too: a core file of it would hold the same.
        """
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    def share_heap(self) -> None:
        """Do nothing where the allocator has no heaps of threads' own to join."""

    def raise_open_files(self) -> int:
        """Raise the soft limit of open files, 256 under launchd, as far as it goes, and return it.

        macOS refuses more than OPEN_MAX, 10,240, where the hard limit says infinite (setrlimit(2)).
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft >= wanted:
            return soft
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted

    def stderr_is_journal(self) -> bool:
        """Return True if standard error leads into the journal of systemd; elsewhere there is none."""
        return False

    def stderr_is_launchds(self) -> bool:
        """Return True if launchd keeps what standard error gets; elsewhere there is none."""
        return False

    def listeners(self, pids: Sequence[int]) -> frozenset[int] | None:
        """Return the TCP ports that these processes listen on, None if it cannot be told."""
        ports: set[int] = set()
        is_known = False
        for pid in pids:
            with contextlib.suppress(psutil.Error, OSError):
                for connection in psutil.Process(pid).net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        ports.add(connection.laddr.port)
                is_known = True
        return frozenset(ports) if is_known else None
