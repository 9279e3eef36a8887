"""The endpoint's listening socket; made before anything heavy is imported, so that clients can queue at once."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Any

from emberd.core.access import listen_addresses
from emberd.core.errors import ConfigError, PortTaken

_BACKLOG = 1024
"""Connections that may wait while emberd starts; the kernel caps it at its own limit."""


def addresses(host: str) -> tuple[str, ...]:
    """Return where to listen on this computer for an endpoint.host: see `listen_addresses`."""
    return listen_addresses(host, has_ipv6=has_ipv6_loopback())


def has_ipv6_loopback() -> bool:
    """Return True if this computer has the address ::1."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def bind(host: str, port: int, *, is_brief: bool = False) -> socket.socket:
    """Return a socket that listens on host and port.

    Args:
        host: name or address.
        port: TCP port.
        is_brief: do not look for who has a taken port, which reads all processes.

    Raises:
        PortTaken: another program listens there; named where the system tells.
        ConfigError: the name is not known, the address is not of this computer, or the port needs privileges.
    """
    family, address = resolve(host, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"port {port} on {host} is taken{'' if is_brief else _holder(port)}",
                "Stop that program, or set endpoint.port to another port.",
            ) from error
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}", "Set endpoint.host and endpoint.port."
        ) from error
    return listener


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Return the family and the address to listen on.

    Raises:
        ConfigError: the name is not known.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"endpoint.host {host!r} cannot be resolved ({error})",
            "Set endpoint.host to 127.0.0.1 or another address of this computer.",
        ) from error
    return family, address


def _holder(port: int) -> str:
    """Return ` by NAME (pid N)`, empty where the system does not tell (another user's process)."""
    import psutil  # noqa: PLC0415  # only to explain a failure

    for process in psutil.process_iter(["pid", "name"]):
        with contextlib.suppress(psutil.Error, OSError):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return f" by {process.info['name']} (pid {process.info['pid']})"
    return ""
