"""What makes a process the one emberd of its place: the lock of the state directory, and the listening sockets."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING

from emberd.core.errors import AlreadyRunning, PortTaken, StateUnusable
from emberd.host.activation import execute_with, were_bound_by_emberd
from emberd.host.files import PRIVATE_FILE_MODE
from emberd.host.listener import addresses, bind, resolve

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from emberd.core.ports import Host


class Instance:
    """Holds both as long as the process lives: an emberd that cannot start stands by on what it got."""

    def __init__(self) -> None:
        self.listeners: list[socket.socket] = []
        self.urls: tuple[str, ...] = ()
        """Where clients find this emberd, IPv4 first; empty if it does not listen."""
        self.lacks = ""
        """Why it does not listen on one of the two loopback addresses, empty if nothing is wrong."""
        self.successor: list[str] = []
        """Command line of the emberd that is to follow; empty for this one's."""
        self._are_own = False
        """Not a service manager's."""
        self._lock: int | None = None

    def take_given(self, host: Host) -> None:
        """Take the sockets that this process was given, if any; only the first call can.

        Raises:
            ConfigError: something else was given.
        """
        are_own = were_bound_by_emberd()
        given = host.given_sockets()
        if given:
            self._keep(given, are_own=are_own)

    def take_lock(self, path: Path) -> None:
        """Take the lock of the state directory, unless it is held. Raises like `hold_lock`."""
        if self._lock is None:
            self._lock = hold_lock(path)

    def keep_lock(self, path: Path) -> None:
        """Take the lock anew if its file has been removed with the state directory. Raises like `hold_lock`."""
        try:
            is_there = self._lock is not None and os.path.samestat(os.fstat(self._lock), path.stat())
        except FileNotFoundError:
            is_there = False
        if not is_there:
            old, self._lock = self._lock, hold_lock(path)
            if old is not None:
                os.close(old)

    def listen(self, host: str, port: int, *, is_brief: bool = False) -> None:
        """Listen there, unless a service manager's sockets are here; own ones follow the settings. Like `bind`.

        On loopback IPv4 is enough: a port that is taken for IPv6 is told in `lacks`.
        """
        if self.listeners and not self._are_own:
            return
        first, *others = addresses(host)
        old = {_address(each): each for each in self.listeners}
        self.listeners, self.urls, self.lacks = [], (), ""
        kept: list[socket.socket] = []
        try:
            for name in (first, *others):
                there = resolve(name, port)[1][:2]
                kept.append(old.pop(there) if there in old else bind(name, port, is_brief=is_brief))
        except PortTaken as error:
            if not kept:
                raise
            self.lacks = error.message
        finally:
            for each in old.values():
                each.close()
            if kept:
                self._keep(kept, are_own=True)

    def stop_listening(self) -> None:
        """Close the sockets; a service manager has a descriptor of its own."""
        for listener in self.listeners:
            listener.close()
        self.listeners = []

    def replace_process(self) -> None:
        """Become the successor, on the same sockets: see `execute_with`. The lock is free for it."""
        execute_with(self.listeners, self.successor, are_own=self._are_own)

    def _keep(self, listeners: list[socket.socket], *, are_own: bool) -> None:
        self.listeners = sorted(listeners, key=lambda each: each.family)  # AF_INET is the least
        self._are_own = are_own
        names = [(f"[{host}]" if ":" in host else host, port) for host, port in map(_address, self.listeners)]
        self.urls = tuple(f"http://{host}:{port}" for host, port in names)

    @property
    def url(self) -> str | None:
        """The first of `urls`, None if there is none."""
        return self.urls[0] if self.urls else None


def _address(listener: socket.socket) -> tuple[str, int]:
    host, port = listener.getsockname()[:2]
    return host, port


def holder_of(path: Path) -> int | None:
    """Return the process that holds the lock, None if nobody does or it cannot be told; nothing is made."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.read(descriptor, 32).decode(errors="replace").strip()
        return int(text) if text.isdecimal() else None
    finally:
        os.close(descriptor)
    return None


def hold_lock(path: Path) -> int:
    """Take the lock for the life of this process and return its descriptor; the kernel frees it at any end.

    Where the file cannot be made or written (a full or read-only disk), the file as it is will do, or the folder:
    flock(2) asks for no right to write.

    Raises:
        AlreadyRunning: another emberd has it.
        StateUnusable: there is no such folder, or no permission.
    """
    try:
        descriptor = _open_lock(path)
    except OSError as error:
        raise StateUnusable(f"cannot open {path}: {error.strerror}", "Mend its permissions.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _name_in(descriptor)
        os.close(descriptor)
        raise AlreadyRunning(
            f"emberd is already running here (pid {holder}, state directory {path.parent})",
            "`emberd status` shows it; `emberd stop` ends it. A second one needs its own state.directory and port.",
        ) from error
    # For people only. The old bytes are written over, so that a full disk has a block for the new ones.
    name = f"{os.getpid()}\n".encode()
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, name, 0)
        os.ftruncate(descriptor, len(name))
    return descriptor


def _name_in(descriptor: int) -> str:
    try:
        return os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
    except OSError:  # it is the folder
        return "unknown"


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE_MODE)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            raise
        return os.open(path if path.exists() else path.parent, os.O_RDONLY | os.O_CLOEXEC)
