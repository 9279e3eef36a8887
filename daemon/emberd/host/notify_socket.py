"""Speaking to systemd: the datagrams of sd_notify(3)."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""They are left in the environment, for the emberd that replaces this one, and kept from engines."""
_SEND_LIMIT_S = 1.0
"""A datagram waits only if the manager's queue is full."""
_USEC_PER_S = 1_000_000


class NotifySocket:
    """The way to a service manager that wants to be told; says nothing where there is none.

    Args:
        environment: of this process. NOTIFY_SOCKET is a path, or an abstract name behind "@" (unix(7)).
        pid: of this process; a watchdog is meant for the process in WATCHDOG_PID only (sd_watchdog_enabled(3)).
    """

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = _address(name)
        self._socket: socket.socket | None = None
        self.watchdog_s = _watchdog_s(environment, pid) if self._address else None
        """The manager kills a process that says nothing for so long; None if it does not."""

    @property
    def is_there(self) -> bool:
        """Whether somebody listens."""
        return bool(self._address)

    def tell(self, *assignments: str) -> bool:
        """Send `NAME=value` lines as one datagram; False if it did not get through, which is no error here."""
        if not self._address:
            return False
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.settimeout(_SEND_LIMIT_S)
            self._socket.sendto("\n".join(assignments).encode(), self._address)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the socket; the next word opens it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def in_usec(seconds: float) -> str:
    """Return seconds as the protocol counts them."""
    return str(round(seconds * _USEC_PER_S))


def monotonic_usec() -> str:
    """Return CLOCK_MONOTONIC for MONOTONIC_USEC, which tells a reload from one that was asked for later."""
    return str(time.monotonic_ns() // 1000)


def _address(name: str) -> str | bytes:
    if name.startswith("/"):
        return name
    if name.startswith("@") and len(name) > 1:
        return b"\0" + name[1:].encode()
    return ""  # unset, or vsock:, which virtual machines use towards their host


def _watchdog_s(environment: Mapping[str, str], pid: int) -> float | None:
    usec = environment.get("WATCHDOG_USEC", "")
    meant = environment.get("WATCHDOG_PID", "") or str(pid)
    if not usec.isdecimal() or not int(usec) or meant != str(pid):
        return None
    return int(usec) / _USEC_PER_S
