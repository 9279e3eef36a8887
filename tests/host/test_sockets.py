"""Whether somebody still holds the other end of a connection."""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from typing import TYPE_CHECKING

import pytest

from emberd.host import ThisHost, darwin_sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

V4 = ("127.0.0.1", 5001), ("127.0.0.1", 60123)
V6 = ("::1", 5001), ("::1", 60123)


@pytest.fixture(params=["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a connection: the client's, and the server's."""
    name = request.param
    listens = "127.0.0.1" if "." in name else name
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    with socket.socket(socket.AF_INET if "." in name else socket.AF_INET6) as listener:
        try:
            listener.bind((listens, 0))
        except OSError:
            pytest.skip("no IPv6 on this computer")
        listener.listen()
        with socket.socket(family) as client:
            client.connect((name, listener.getsockname()[1]))
            server, _ = listener.accept()
            with server:
                yield client, server


def asked(server: socket.socket) -> bool | None:
    return ThisHost().is_held(server.getpeername()[:2], server.getsockname()[:2])


@pytest.mark.skipif(sys.platform not in {"linux", "darwin"}, reason="the two systems that are known")
def test_a_half_closed_end_is_held_and_a_closed_one_is_not(ends: tuple[socket.socket, socket.socket]):
    client, server = ends
    assert asked(server) is True
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    assert asked(server) is True
    client.close()
    assert asked(server) is False


def test_an_end_that_is_not_here_is_unknown(ends: tuple[socket.socket, socket.socket]):
    _, server = ends
    assert ThisHost().is_held(("192.0.2.1", 4711), server.getsockname()[:2]) is None
    listener_only = ThisHost().is_held(server.getsockname()[:2], ("192.0.2.1", 4711))
    assert listener_only is None, "a listener at that address is no connection"


# --- the list of macOS, made by hand --------------------------------------------------------------------------


class Connection(ctypes.LittleEndianStructure):
    """The beginning of xinpcb_n (xnu, bsd/netinet/in_pcb.h)."""

    _pack_ = 4
    _fields_ = (
        ("xi_len", ctypes.c_uint32),
        ("xi_kind", ctypes.c_uint32),
        ("xi_inpp", ctypes.c_uint64),
        ("inp_fport", ctypes.c_uint8 * 2),
        ("inp_lport", ctypes.c_uint8 * 2),
        ("inp_ppcb", ctypes.c_uint64),
        ("inp_gencnt", ctypes.c_uint64),
        ("inp_flags", ctypes.c_int),
        ("inp_flow", ctypes.c_uint32),
        ("inp_vflag", ctypes.c_uint8),
        ("inp_ip_ttl", ctypes.c_uint8),
        ("inp_ip_p", ctypes.c_uint8),
        ("foreign", ctypes.c_uint32 * 4),
        ("local", ctypes.c_uint32 * 4),
        ("rest", ctypes.c_uint32 * 6),
    )


class Socket(ctypes.LittleEndianStructure):
    """The beginning of xsocket_n (xnu, bsd/sys/socketvar.h)."""

    _pack_ = 4
    _fields_ = (
        ("xso_len", ctypes.c_uint32),
        ("xso_kind", ctypes.c_uint32),
        ("xso_so", ctypes.c_uint64),
        ("so_type", ctypes.c_short),
        ("so_options", ctypes.c_uint32),
        ("so_linger", ctypes.c_short),
        ("so_state", ctypes.c_short),
        ("rest", ctypes.c_uint32 * 15),
    )


def listed(local: tuple[str, int], remote: tuple[str, int], state: int) -> bytes:
    """Return the records of one connection, as the kernel writes them."""
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    connection = Connection(
        xi_len=ctypes.sizeof(Connection), xi_kind=0x10, inp_vflag=1 if family == socket.AF_INET else 2
    )
    ctypes.memmove(connection.inp_fport, struct.pack("!H", remote[1]), 2)
    ctypes.memmove(connection.inp_lport, struct.pack("!H", local[1]), 2)
    for field, (host, _) in ((connection.foreign, remote), (connection.local, local)):
        packed = socket.inet_pton(family, host)
        ctypes.memmove(field, bytes(16 - len(packed)) + packed, 16)
    end = Socket(xso_len=ctypes.sizeof(Socket), xso_kind=1, so_state=state)
    buffer = struct.pack("<II", 44, 2) + bytes(36)
    return b"".join(bytes(each) + bytes(-len(bytes(each)) % 8) for each in (connection, end, buffer))


@pytest.mark.parametrize("pair", [V4, V6])
@pytest.mark.parametrize(("state", "is_held"), [(0x0012, True), (0x0013, False)])
def test_macos_lists_who_holds_a_connection(
    pair: tuple[tuple[str, int], tuple[str, int]], state: int, is_held: bool
):
    server, client = pair
    header = struct.pack("<IIQQ", 24, 2, 0, 0)
    records = header + listed(server, client, 0x0012) + listed(client, server, state) + header
    asked_for = []

    def sysctl(name: str, most_bytes: int) -> bytes | None:
        asked_for.append(name)
        return records if len(asked_for) > 1 and len(records) <= most_bytes else None

    assert darwin_sockets.is_held(client, server, sysctl) is is_held
    assert darwin_sockets.is_held(("192.0.2.1", 1), server, sysctl) is None
    assert set(asked_for) == {"net.inet.tcp.pcblist_n"}


@pytest.mark.parametrize("records", [None, b"", bytes(64), b"\x68\x00\x00\x00\x10"])
def test_a_list_that_macos_does_not_give_tells_nothing(records: bytes | None):
    assert darwin_sockets.is_held(*V4, lambda *_: records) is None
