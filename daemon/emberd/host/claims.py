"""What a run holds of this computer: the lock of the state directory, and the endpoint's sockets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from emberd.host.activation import execute_with, were_bound_by_emberd
from emberd.host.files import hold_lock
from emberd.host.listener import bind, resolve

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from pathlib import Path

    from emberd.core.ports import Host


class Claims:
    """Holds them until `close`; a run that fails leaves them to the one that waits in its place."""

    def __init__(self) -> None:
        self.listeners: list[socket.socket] = []
        self.are_own = False
        """Whether emberd bound the sockets, rather than a service manager."""
        self._lock: int | None = None

    def take_given(self, host: Host) -> None:
        """Take the sockets that this process was given, if any; only the first call can.

        Raises:
            ConfigError: something else was given.
        """
        are_own = were_bound_by_emberd()
        given = host.given_sockets()
        if given:
            self.listeners, self.are_own = given, are_own

    def take_lock(self, path: Path) -> None:
        """Take the lock of the state directory.

        Raises:
            AlreadyRunning: another emberd has it.
            StateUnusable: the file cannot be made.
        """
        if self._lock is None:
            self._lock = hold_lock(path)

    def listen(self, host: str, port: int, *, is_brief: bool = False) -> None:
        """Listen there, unless a service manager's sockets are here; own ones follow the settings.

        Args:
            host: address.
            port: TCP port.
            is_brief: do not look for who has a taken port.

        Raises:
            PortTaken: another program listens there.
            ConfigError: the name is not known, the address is not of this computer, or the port needs privileges.
        """
        if self.listeners and not (self.are_own and self._stands_elsewhere(host, port)):
            return
        self._close_listeners()
        self.listeners, self.are_own = [bind(host, port, is_brief=is_brief)], True

    def replace_process(self, command: Sequence[str] = ()) -> None:
        """Become a new emberd on the same sockets; the lock is free for it.

        Returns only by raising OSError: the program is gone.

        Args:
            command: its command line; empty for this process' own.
        """
        execute_with(self.listeners, command, are_own=self.are_own)

    def close(self) -> None:
        """Let go of everything; idempotent."""
        self._close_listeners()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _stands_elsewhere(self, host: str, port: int) -> bool:
        _, address = resolve(host, port)
        return tuple(self.listeners[0].getsockname()[:2]) != tuple(address[:2])

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()
        self.listeners = []
