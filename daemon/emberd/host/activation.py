"""Listening sockets that somebody else made: systemd, launchd, or the emberd that this one replaces.

Such a socket outlives the process: while emberd restarts, connections wait in its backlog and none is refused.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

from emberd.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

SOCKET_NAME = "Listeners"
"""Name of the sockets in launchd's job."""
_FIRST = 3
"""sd_listen_fds(3): SD_LISTEN_FDS_START."""
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_OWN = "bound-by-emberd"
"""Name of sockets that no service manager made; in LISTEN_FDNAMES."""
_NO_SUCH_NAME, _NOT_OF_LAUNCHD = 2, 3
"""launch_activate_socket(3): ENOENT, ESRCH."""


def from_environment() -> list[socket.socket]:
    """Return the sockets that this process was given as sd_listen_fds(3) says; only the first call does.

    The variables count for the process that they name, and for no child of it.

    Raises:
        ConfigError: something was given that is no listening TCP socket.
    """
    values = {name: os.environ.pop(name, "") for name in _VARIABLES}
    if values["LISTEN_PID"] != str(os.getpid()) or not values["LISTEN_FDS"].isdecimal():
        return []
    return [_adopt(_FIRST + number) for number in range(int(values["LISTEN_FDS"]))]


def were_bound_by_emberd() -> bool:
    """Return True if the sockets come from an emberd that had bound them itself; ask before they are taken."""
    return os.environ.get("LISTEN_FDNAMES", "").split(":")[0] == _OWN


def from_launchd(libc: Any) -> list[socket.socket]:
    """Ask launchd by launch_activate_socket(3), which gives an array that the caller frees.

    Args:
        libc: the C library.

    Raises:
        ConfigError: launchd refused for another reason than that there are no sockets, or gave another kind.
    """
    descriptors, count = ctypes.POINTER(ctypes.c_int)(), ctypes.c_size_t()
    ask = getattr(libc, "launch_activate_socket", None)
    if ask is None:
        return []
    ask.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.POINTER(ctypes.c_int)), ctypes.POINTER(ctypes.c_size_t)]
    error = ask(SOCKET_NAME.encode(), ctypes.byref(descriptors), ctypes.byref(count))
    if error in {_NO_SUCH_NAME, _NOT_OF_LAUNCHD}:
        return []
    if error:
        raise ConfigError(
            f"launchd does not give its sockets: {os.strerror(error)}", "Restart the job: emberd restart --daemon."
        )
    libc.free.argtypes = [ctypes.c_void_p]
    try:
        return [_adopt(descriptors[number]) for number in range(count.value)]
    finally:
        libc.free(descriptors)


def _adopt(descriptor: int) -> socket.socket:
    try:
        found = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigError(
            f"descriptor {descriptor}, given for listening, is no socket: {error.strerror}", "Mend the socket unit."
        ) from error
    is_tcp = found.type == socket.SOCK_STREAM and found.family in {socket.AF_INET, socket.AF_INET6}
    if not is_tcp or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ConfigError(
            f"descriptor {descriptor}, given for listening, is no listening TCP socket",
            "In the socket unit: ListenStream=127.0.0.1:5001 and ListenStream=[::1]:5001.",
        )
    found.set_inheritable(False)
    found.setblocking(False)
    return found


def execute_with(listeners: Sequence[socket.socket], command: Sequence[str] = (), *, are_own: bool = False) -> None:
    """Replace this process by a new one, which is given the sockets as systemd gives them.

    Returns only by raising OSError: the program is gone.

    Args:
        listeners: the sockets.
        command: what to execute; empty for this process' own command line.
        are_own: emberd had bound them itself, so that the new one may give them up.
    """
    # Copies first: a socket may stand where another is to go.
    copies = [os.dup(each.fileno()) for each in listeners]
    highest = _FIRST + len(copies)
    copies = [os.dup(each) if each < highest else each for each in copies]
    for number, each in enumerate(copies):
        os.dup2(each, _FIRST + number, inheritable=True)
    environment = {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(copies))}
    if are_own:
        environment["LISTEN_FDNAMES"] = ":".join([_OWN] * len(copies))
    words = [*command] or [sys.executable, *sys.orig_argv[1:]]
    os.execve(words[0], words, environment)  # noqa: S606  # our own words, or our owner's
