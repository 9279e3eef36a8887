"""One client's connection: uvicorn's HTTP/1.1, more patient with clients that are odd but right.

uvicorn takes the end of what a client sends for the end of the client, resets a connection whose client still sends
when the answer is there, and does not say what is wrong with a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from emberd.host import ThisHost
from emberd.services.logs import logger
from emberd.services.messages import error_content

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

UNREAD_S = 30.0
"""A closing connection is cut when its client has read nothing for this long."""
SWITCH = "emberd.switch"
"""The extension of an ASGI scope by which the app takes over the connection after a 101: `switch_protocols`."""
_FIRST_LOOK_S, _LOOK_S = 0.05, 1.0
"""After a client has ended its side, how often to look whether it still waits for the answer. The first look may
come while the kernel is still about to take the socket from a client that closes it."""
_KEEP_ALIVE_S = 5
"""Between the kernel's own questions (tcp(7)). A closed socket of a computer elsewhere answers them for up to a
minute, then with a reset; nothing shows it earlier without writing."""
_LINGER_S, _LINGER_SILENCE_S, _LINGER_BYTES = 30.0, 5.0, 128 * 1024 * 1024
"""How much more of a refused request is read and dropped: nginx's lingering_time and lingering_timeout, and more
than twice the largest body that KoboldCPP takes (48 MB)."""
_UNREAD_STATES = (h11.SEND_BODY, h11.ERROR)
_TLS_HANDSHAKE = b"\x16"
"""The first byte of a client that speaks TLS (RFC 8446, 5.1)."""
_REASONS = (
    ("Found multiple Host", "a request must have one Host header, not several"),
    ("Missing mandatory Host", "HTTP/1.1 wants a Host header"),
    ("illegal request line", "the request line must be METHOD TARGET HTTP/1.1, in ASCII, other bytes as %XX"),
    ("Illegal target", "the target must be ASCII, other bytes as %XX"),
    ("no request line", "there is no request line"),
    ("illegal header line", "a header line must be NAME: VALUE, without control characters"),
    ("Illegal header", "a header line must be NAME: VALUE, without control characters"),
    ("continuation line", "the first header line must not be indented"),
    ("conflicting Content-Length", "there are several different Content-Length headers"),
    ("bad Content-Length", "Content-Length must be a number"),
    ("multiple Transfer-Encoding", "there are several Transfer-Encoding headers"),
    ("Only Transfer-Encoding", "of the transfer codings only chunked is known"),
    ("Receive buffer too long", "the head of the request is too long"),
    ("illegal chunk header", "the body is not in chunks, as its head says"),
    ("malformed chunk", "the body is not in chunks, as its head says"),
    ("peer closed connection", "the connection was closed before the body was whole"),
)
"""What h11 complains of, without the client's bytes that it may quote: the log must not have them."""
_log = logger("endpoint")
_host = ThisHost()


def is_news(record: logging.LogRecord) -> bool:
    """Drop what is reported elsewhere: a reply that broke off with its engine, and a request that is no HTTP."""
    return record.getMessage() not in {
        "ASGI callable returned without completing response.",
        "Invalid HTTP request received.",
    }


class _Way:
    """The way to the client, which lets `may_close` delay its end."""

    def __init__(self, transport: asyncio.Transport, may_close: Callable[[], bool]) -> None:
        self._transport = transport
        self._may_close = may_close
        self._is_ending = False
        self.write = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """End it now or soon."""
        if self._is_ending or self._may_close():
            self._transport.close()
        self._is_ending = True

    def is_closing(self) -> bool:
        """Return True if nothing more may be written."""
        return self._is_ending or self._transport.is_closing()


class _Tunnel(asyncio.StreamReaderProtocol):
    """The connection after a change of protocols."""

    def __init__(self, reader: asyncio.StreamReader, lost: Callable[[Exception | None], None]) -> None:
        super().__init__(reader, loop=asyncio.get_running_loop())
        self._lost = lost

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost(exc)


class ClientConnection(H11Protocol):
    """One client's connection; uvicorn limits its silence only after a reply, this also before and within a head.

    A silent connection costs a file descriptor, and launchd gives a daemon 256 of them. If there are too many,
    the one that has been silent for the longest time makes room.

    A client may end its side after its request and still wait for the answer. It counts as gone when the kernel
    says that nobody holds its socket any more, or when it resets the connection.
    """

    silent_since_s: float | None = None
    _has_begun_head = False
    _has_sent_all = False
    _is_tunnel = False
    _looks_after_unread: asyncio.TimerHandle | None = None
    _looks_after_client: asyncio.TimerHandle | None = None
    _linger_until_s: float | None = None
    _linger_left_bytes = _LINGER_BYTES

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin, and make room if there are too many."""
        super().connection_made(transport)
        self.transport = _Way(transport, self._may_close)  # type: ignore[assignment]  # as far as uvicorn uses it
        self.silent_since_s = self.loop.time()
        self._limit_silence()
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """End, and leave no timer behind."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn forgets it after a reset
        for timer in (self._looks_after_unread, self._looks_after_client):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """Begin to watch whether the client reads."""
        super().pause_writing()
        if self._looks_after_unread is None:
            self._look_after_unread(None)

    def data_received(self, data: bytes) -> None:
        """Take what the client sends, and limit the next silence."""
        if self._linger_until_s is not None:
            self._linger_left_bytes -= len(data)
            self._linger(self._linger_until_s)
            return
        if not self._has_begun_head and self.conn.their_state is h11.IDLE:
            data = data.lstrip(b"\r\n")  # a server should ignore an empty line before a request (RFC 9112, 2.2)
            if not data:
                return
        super().data_received(data)
        if self._is_busy:
            self._has_begun_head = False
            return
        if not self._has_begun_head:  # once: a client that sends a byte a minute would stay for ever
            self.silent_since_s = self.loop.time()
            self._has_begun_head = True
        self._limit_silence()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's own signature
        """Stay for a client that waits for its answer; return False to close."""
        if not self._is_busy or self._linger_until_s is not None:
            return False
        self._has_sent_all = True
        if self.cycle.more_body:
            self.conn.receive_data(b"")
            self.handle_events()  # h11 says what is missing
            return not self.transport.is_closing()
        self._look_after_client(self.transport.get_extra_info("socket"), _FIRST_LOOK_S)
        return True

    def handle_events(self) -> None:
        """Begin with requests that are here."""
        super().handle_events()
        if self._is_busy:
            self.silent_since_s = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP with 400 and the reason if that is still possible, log it, and end the connection.

        uvicorn raises within a reply and after HEAD, and lets the app answer after its 400. 431 and 501 say that
        the request is not wrong but too much for this server (RFC 6585, 5; RFC 9112, 6.1).
        """
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        reason = next((ours for theirs, ours in _REASONS if str(error).startswith(theirs)), "this is not HTTP/1.1")
        if self.conn.trailing_data[0][:1] == _TLS_HANDSHAKE:
            reason = "this port speaks http, not https"
        _log.warning("request_invalid", reason=reason)
        body = json.dumps(error_content("", "bad_request", f"{msg} {reason}")).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self._is_busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def on_response_complete(self) -> None:
        """Go on with the next request; end if none can come."""
        self.silent_since_s = self.loop.time()
        super().on_response_complete()  # may begin with the next request at once
        if self._has_sent_all and not self._is_busy:
            self.transport.close()

    def shutdown(self) -> None:
        """End it as soon as a running request has been answered; a tunnel and a refused request at once."""
        if self._is_tunnel or self.transport.is_closing():
            self.transport.close()
        else:
            super().shutdown()

    def switch_protocols(
        self, headers: list[tuple[bytes, bytes]]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send 101 with these headers, and give the connection away; uvicorn sees only its end."""
        head = self.conn.send(
            h11.InformationalResponse(status_code=101, headers=headers, reason=b"Switching Protocols")
        )
        reader = asyncio.StreamReader(loop=self.loop)
        reader.feed_data(self.conn.trailing_data[0])
        tunnel = _Tunnel(reader, self.connection_lost)
        self._is_tunnel = self.cycle.response_started = True
        self.transport.set_protocol(tunnel)
        tunnel.connection_made(self.transport)
        self.transport.resume_reading()
        with contextlib.suppress(OSError):
            ask_often(self.transport.get_extra_info("socket"), int(UNREAD_S))
        writer = asyncio.StreamWriter(self.transport, tunnel, reader, self.loop)
        writer.write(head or b"")
        return reader, writer

    @property
    def _is_busy(self) -> bool:
        # uvicorn's annotation hides that there is no cycle before the first head.
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]

    def _make_room(self) -> None:
        silent = [
            (each.silent_since_s, id(each), each)
            for each in self.connections
            if isinstance(each, ClientConnection) and each is not self and each.silent_since_s is not None
        ]
        if silent:
            _, _, longest = min(silent)
            longest.transport.close()
            self.connections.discard(longest)

    def _limit_silence(self) -> None:
        self._unset_keepalive_if_required()
        if not self.transport.is_closing():
            end_s = (self.silent_since_s or self.loop.time()) + self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_at(end_s, self.timeout_keep_alive_handler)

    def _may_close(self) -> bool:
        """Return True unless the client still sends: then it would be reset, and never see the answer.

        So this side ends first, and the rest of the request is read and dropped (RFC 9112, 9.6).
        """
        if self._has_sent_all or self._is_tunnel or self.conn.their_state not in _UNREAD_STATES:
            return True
        if self.transport.is_closing():
            return True
        try:
            self.transport.write_eof()
        except OSError:
            return True
        self.transport.resume_reading()
        self.silent_since_s = self.loop.time()
        self._linger(self.loop.time() + _LINGER_S)
        return False

    def _linger(self, until_s: float) -> None:
        self._unset_keepalive_if_required()
        self._linger_until_s = until_s
        if self._linger_left_bytes < 0:
            self.transport.close()
            return
        end_s = min(until_s, self.loop.time() + _LINGER_SILENCE_S)
        self.timeout_keep_alive_task = self.loop.call_at(end_s, self.transport.close)

    def _look_after_client(self, ends: socket.socket, again_s: float = _LOOK_S) -> None:
        """Notice that a client that has sent everything is gone: asyncio no longer watches its side."""
        if not self._is_busy:
            return
        try:
            ask_often(ends, _KEEP_ALIVE_S)
            is_gone = ends.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
            is_gone = is_gone or _host.is_held(ends.getpeername()[:2], ends.getsockname()[:2]) is False
        except OSError:
            is_gone = True
        if is_gone:
            self.transport.abort()
        else:
            self._looks_after_client = self.loop.call_later(again_s, self._look_after_client, ends)

    def _look_after_unread(self, before_bytes: int | None) -> None:
        """Cut a closing connection whose client reads nothing: `before_bytes` was unread UNREAD_S ago."""
        self._looks_after_unread = None
        unread_bytes = self.transport.get_write_buffer_size()
        if self.transport.is_closing() and unread_bytes == before_bytes:
            self.transport.abort()
        elif unread_bytes:
            self._looks_after_unread = self.loop.call_later(UNREAD_S, self._look_after_unread, unread_bytes)

    def _should_upgrade(self) -> bool:
        """Leave it to the app; uvicorn would advise to install a WebSocket library."""
        self.scope["extensions"] = {SWITCH: {"protocols": self.switch_protocols}}
        return False


def ask_often(connection: socket.socket, idle_s: int) -> None:
    """Let the kernel ask the other computer whether a quiet connection still lives, every `idle_s`.

    Raises:
        OSError: the connection has ended.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE")  # noqa: B009  # macOS' name
    connection.setsockopt(socket.IPPROTO_TCP, idle, idle_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, idle_s)
