"""Whether somebody still holds a TCP socket of this Mac, from the list of connections that netstat(1) reads.

Layouts: xnu, bsd/netinet/in_pcb.h (xinpcb_n), bsd/sys/socketvar.h (xsocket_n, XSO_ kinds, SS_NOFDREF); the order of
the records: bsd/netinet/in_pcblist.c.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LIST = "net.inet.tcp.pcblist_n"
_SIZES = (256 * 1024, 4 * 1024 * 1024)
"""Some 300 connections, and some 5,000; a list that is longer is refused (ENOMEM)."""
_RECORD = struct.Struct("<II")
"""Length and kind; the next record begins at a multiple of eight."""
_SOCKET, _CONNECTION = 0x001, 0x010
"""XSO_SOCKET, XSO_INPCB: of each connection, the second comes first."""
_PORTS, _FOREIGN, _OWN, _VERSION, _STATE = 16, 48, 64, 44, 26
"""Where xinpcb_n has its ports (foreign, own), addresses and inp_vflag, and xsocket_n its so_state; both are packed
to four bytes."""
_IPV4 = 0x1
_NOT_HELD = 0x0001
"""SS_NOFDREF: no file table refers to it any more."""


Address = tuple[str, int]


def is_held(local: Address, remote: Address, sysctl: Callable[[str, int], bytes | None]) -> bool | None:
    """Return whether a process still holds the socket at `local` that is connected to `remote`; None if unknown.

    It is unknown of another computer's. A socket that its owner has closed lives on in the kernel for a while.
    """
    records = next((found for size in _SIZES if (found := sysctl(_LIST, size)) is not None), b"")
    wanted = struct.pack("!HH", remote[1], local[1]), _packed(remote[0]), _packed(local[0])
    at, is_wanted = 0, False
    while at + _RECORD.size <= len(records):
        length, kind = _RECORD.unpack_from(records, at)
        if length < _RECORD.size:
            break
        record = records[at : at + length]
        if kind == _CONNECTION:
            addresses = (record[start : start + 16] for start in (_FOREIGN, _OWN))
            if len(record) > _OWN + 16 and record[_VERSION] & _IPV4:
                addresses = (bytes(10) + b"\xff\xff" + each[12:] for each in addresses)
            is_wanted = (record[_PORTS : _PORTS + 4], *addresses) == wanted
        elif kind == _SOCKET and is_wanted and len(record) > _STATE + 2:
            return not int.from_bytes(record[_STATE : _STATE + 2], "little") & _NOT_HELD
        at += -(-length // 8) * 8
    return None


def _packed(host: str) -> bytes:
    """Return an address in 16 bytes, that of IPv4 as IPv6 maps it."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return bytes(10) + b"\xff\xff" + address.packed if address.version == 4 else address.packed  # noqa: PLR2004
