"""A stand-in for systemd as a unit of Type=notify meets it: the socket, and the watchdog that kills (sd_notify(3)).

It is not systemd: it starts nothing again. It does what WatchdogSec documents (systemd.service(5)): when WATCHDOG=1
does not come for so long, SIGABRT.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_POLL_S = 0.05
_BUFFER_BYTES = 65536


class ServiceManagerStandin:
    """Listens on a notify socket and keeps every datagram with its time.

    Args:
        address: path of the socket, or an abstract name behind "@".
        watchdog_s: limit of the watchdog; None for none.
    """

    def __init__(self, address: str | Path, watchdog_s: float | None = None) -> None:
        self.address = str(address)
        self.watchdog_s = watchdog_s
        self.said: list[tuple[float, list[str]]] = []
        self.killed_s: float | None = None
        self.main_pid: int | None = None
        """Killed when the watchdog is missed; counted from the first word of it on."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{self.address[1:]}" if self.address.startswith("@") else self.address)
        self._socket.settimeout(_POLL_S)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._listen)

    @property
    def environment(self) -> dict[str, str]:
        """What the unit's process finds in its environment; WATCHDOG_PID has to be set by who knows it."""
        watchdog = {} if self.watchdog_s is None else {"WATCHDOG_USEC": str(round(self.watchdog_s * 1e6))}
        return {"NOTIFY_SOCKET": self.address, **watchdog}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        fed_s: float | None = None
        while not self._is_closed.is_set():
            with contextlib.suppress(TimeoutError):
                lines = self._socket.recv(_BUFFER_BYTES).decode().split("\n")
                self.said.append((time.monotonic(), lines))
                if self.main_pid is not None and fed_s is None:
                    fed_s = time.monotonic()
                if "WATCHDOG=1" in lines:
                    fed_s = time.monotonic()
            if self.watchdog_s is None or fed_s is None or self.main_pid is None or self.killed_s is not None:
                continue
            if time.monotonic() - fed_s > self.watchdog_s:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.main_pid, signal.SIGABRT)
                self.killed_s = time.monotonic()

    def lines(self) -> list[str]:
        """Return everything that was said, the oldest first."""
        return [line for _, lines in self.said for line in lines]

    def wait_for(self, is_so: Callable[[list[str]], bool], limit_s: float = 40.0) -> list[str]:
        """Return all lines as soon as `is_so` holds of them."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            lines = self.lines()
            if is_so(lines):
                return lines
            time.sleep(0.02)
        raise AssertionError(f"it was not said: {self.lines()}")
