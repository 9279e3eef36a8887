"""Whether somebody still holds a TCP socket of this computer, from the kernel's table of sockets (sock_diag(7))."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Any

_linux_socket: Any = socket
"""typeshed knows netlink on Linux only."""
_NETLINK_SOCK_DIAG = 4
"""<linux/netlink.h>"""
_SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 20, 1
"""<linux/sock_diag.h>, <linux/netlink.h>"""
_REQUEST = struct.Struct("=IHHII BBBx I 4s16s16s I II")
"""nlmsghdr (netlink(7)) and inet_diag_req_v2 (sock_diag(7)); ports and addresses in network order."""
_ANSWER = struct.Struct("=IHHII BB2x 48s IIIII")
"""nlmsghdr and inet_diag_msg."""
_ANY_STATE, _ANY_COOKIE = 0xFFFFFFFF, 0xFFFFFFFF
_LISTEN = 10
"""TCP_LISTEN, <net/tcp_states.h>: the kernel falls back on it where no connection fits."""
_LIMIT_S = 0.5
_ANSWER_BYTES = 8192

Address = tuple[str, int]


def is_held(local: Address, remote: Address) -> bool | None:
    """Return whether a process still holds the socket at `local` that is connected to `remote`; None if unknown.

    It is unknown of another computer's or container's. A socket that its owner has closed lives on in the kernel
    for up to a minute (tcp(7), tcp_fin_timeout), without an inode.
    """
    try:
        addresses = [_unmapped(host) for host, _ in (local, remote)]
        family = socket.AF_INET if all(each.version == 4 for each in addresses) else socket.AF_INET6  # noqa: PLR2004
        ports = struct.pack("!HH", local[1], remote[1])
        with _linux_socket.socket(
            _linux_socket.AF_NETLINK, socket.SOCK_RAW | _linux_socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        ) as kernel:
            kernel.settimeout(_LIMIT_S)
            kernel.send(
                _REQUEST.pack(
                    *(_REQUEST.size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0),
                    *(family, socket.IPPROTO_TCP, 0, _ANY_STATE, ports),
                    *(each.packed for each in addresses),
                    *(0, _ANY_COOKIE, _ANY_COOKIE),
                )
            )
            answer: bytes = kernel.recv(_ANSWER_BYTES)
    except (OSError, ValueError):
        return None
    if len(answer) < _ANSWER.size:  # an error: it knows no such socket
        return None
    _, kind, _, _, _, _, state, _, _, _, _, _, inode = _ANSWER.unpack_from(answer)
    return None if kind != _SOCK_DIAG_BY_FAMILY or state == _LISTEN else inode != 0


def _unmapped(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address
