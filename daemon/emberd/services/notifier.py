"""Messages to systemd (sd_notify(3)): emberd is ready, its state, and that it works."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from emberd.host.notify_socket import in_usec, monotonic_usec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.host.notify_socket import NotifySocket

_FED_PER_LIMIT = 2
"""sd_watchdog_enabled(3) recommends half of the limit between two signs of life."""


class Notifier:
    """Speaks for the daemon; without a service manager it says nothing."""

    def __init__(self, socket: NotifySocket, log: FilteringBoundLogger) -> None:
        self._socket = socket
        self._log = log
        self._said = ""

    def ready(self) -> None:
        """Say that the service is up: clients are served.

        The endpoint accepts then; the model need not be loaded. From then on clients wait and are not refused, so
        units ordered after this one may start. Waiting for a large model would run into TimeoutStartSec, after
        which systemd kills the emberd that was loading it.
        """
        self._socket.tell("READY=1")

    def status(self, text: str) -> None:
        """Show one line in `systemctl status`."""
        line = " ".join(text.split())
        if line != self._said:
            self._said = line
            self._socket.tell(f"STATUS={line}")

    def replacing(self) -> None:
        """Say that another program takes this one's place under the same pid, until its `ready`."""
        self._socket.tell("RELOADING=1", f"MONOTONIC_USEC={monotonic_usec()}")

    def stopping(self, limit_s: float) -> None:
        """Say that the service ends, and how long that may take.

        systemd takes the longer of this and TimeoutStopSec. It needs two datagrams: the first begins the state
        whose time the second extends.
        """
        self._socket.tell("STOPPING=1")
        self._socket.tell(f"EXTEND_TIMEOUT_USEC={in_usec(limit_s)}")

    async def follow(self, text: Callable[[], str], changed: Callable[[], Awaitable[None]]) -> None:
        """Show `text` again each time `changed` returns, until cancelled."""
        while self._socket.is_there:
            self.status(text())
            await changed()

    async def feed_watchdog(self, prove: Callable[[], Awaitable[None]]) -> None:
        """Say as often as the manager wants that emberd works, after `prove` has returned; until cancelled.

        If a proof does not come, that is logged once and nothing more is sent: the manager then kills emberd, and
        the next one adopts the engine.
        """
        limit_s = self._socket.watchdog_s
        if limit_s is None:
            return
        pause_s = limit_s / _FED_PER_LIMIT
        is_silent = False
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    await prove()
            except TimeoutError:
                if not is_silent:
                    self._log.error("watchdog_not_fed", seconds=math.floor(pause_s))
                is_silent = True
            else:
                is_silent = False
                self._socket.tell("WATCHDOG=1")
                await asyncio.sleep(pause_s)
