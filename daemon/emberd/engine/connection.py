"""One request to an engine and its reply, byte by byte: h11 on a socket of asyncio's.

httpx's pool, locks and time-outs for each token took half of the daemon's time (scripts/bench-endpoint).
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h11

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_CONNECT_TIMEOUT_S = 5.0
_WRITE_TIMEOUT_S = 120.0
"""An engine reads a body as soon as it has the head; if it does not for so long, it hangs."""
_LARGEST_HEAD_BYTES = 128 * 1024
_LEAST_ERROR = 400
_SWITCHING = 101
_READ_BYTES = 256 * 1024


class EngineRefused(Exception):
    """No connection was made; nothing was sent."""


class EngineBrokeOff(Exception):
    """The connection ended, or broke the protocol, before the reply was whole."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What to send.

    Attributes:
        target: path and query as in the request line.
        headers: in order; a length or `transfer-encoding: chunked` among them if there is a body.
        body: the whole body, or its parts as they come.
    """

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes | AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """Status and headers of a reply; names are in lower case."""

    status: int
    headers: list[tuple[bytes, bytes]]

    def get(self, name: bytes) -> bytes | None:
        """Return a header's first value, None if it is not there."""
        return next((value for each, value in self.headers if each == name), None)


class _Reader(asyncio.StreamReader):
    """Gives out what had come before it reports that the connection was lost."""

    lost: Exception | None = None

    def set_exception(self, exc: Exception) -> None:
        """Note the loss."""
        self.lost = exc
        self.feed_eof()


class EngineConnection:
    """A connection for one request; none is kept open, because each takes one of KoboldCPP's 24 threads."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LARGEST_HEAD_BYTES)
        self._reader: _Reader
        self._ends_with_loss = False
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: EngineRequest) -> ReplyHead:
        """Send a request and return the head of its reply, which may take as long as the engine computes.

        Raises:
            EngineRefused: nothing was sent.
            EngineBrokeOff: the engine ended before it answered.
        """
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                self._writer = writer = await self._connect()
        except (OSError, TimeoutError) as error:
            raise EngineRefused from error
        try:
            # An engine may answer and close without having read everything; its answer counts then.
            with contextlib.suppress(ConnectionError):
                await self._send(writer, request)
            while True:
                event = await self._next_event()
                if isinstance(event, h11.Response):
                    if event.status_code >= _LEAST_ERROR:
                        self._ends_with_loss = True  # it may not have read all of the body that it refuses
                    return ReplyHead(event.status_code, list(event.headers))
                if not isinstance(event, h11.InformationalResponse):
                    raise EngineBrokeOff
                if event.status_code == _SWITCHING:
                    return ReplyHead(event.status_code, list(event.headers))
        except (h11.ProtocolError, ConnectionError, TimeoutError) as error:
            raise EngineBrokeOff from error

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the reply's body as it comes; bytes that arrived together stay together.

        Raises:
            EngineBrokeOff: it ended too early, as far as its headers tell.
        """
        try:
            while True:
                event = await self._next_event()
                part = bytearray()
                while isinstance(event, h11.Data):
                    part += event.data
                    event = self._protocol.next_event()
                if part:
                    yield bytes(part)
                if isinstance(event, h11.EndOfMessage):
                    return
        except (h11.ProtocolError, ConnectionError) as error:
            raise EngineBrokeOff from error

    def streams(self) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the bare connection, for the protocol that the engine has agreed to with a 101.

        The first value is what it has said in that protocol so far.
        """
        if self._writer is None:
            raise EngineBrokeOff
        return self._protocol.trailing_data[0], self._reader, self._writer

    async def outlast(self) -> None:
        """Read and discard the rest of the reply."""
        if self._writer is not None:
            with contextlib.suppress(ConnectionError):
                while await self._reader.read(_READ_BYTES):
                    pass

    def close(self) -> None:
        """Close at once; an engine that still works sees that nobody waits."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def _connect(self) -> asyncio.StreamWriter:
        loop = asyncio.get_running_loop()
        self._reader = _Reader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(self._reader, loop=loop)
        transport, _ = await loop.create_connection(lambda: protocol, "127.0.0.1", self._port)
        return asyncio.StreamWriter(transport, protocol, self._reader, loop)

    async def _send(self, writer: asyncio.StreamWriter, request: EngineRequest) -> None:
        head = self._bytes(h11.Request(method=request.method, target=request.target, headers=request.headers))
        if isinstance(request.body, bytes):
            whole = self._bytes(h11.Data(data=request.body)) if request.body else b""
            writer.write(head + whole + self._bytes(h11.EndOfMessage()))
            await self._drain(writer)
            return
        writer.write(head)
        async for part in request.body:
            writer.write(self._bytes(h11.Data(data=part)))
            await self._drain(writer)
        writer.write(self._bytes(h11.EndOfMessage()))
        await self._drain(writer)

    async def _drain(self, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_WRITE_TIMEOUT_S):
            await writer.drain()

    def _bytes(self, event: h11.Event) -> bytes:
        return self._protocol.send(event) or b""

    async def _next_event(self) -> Any:
        while (event := self._protocol.next_event()) is h11.NEED_DATA:
            data = await self._reader.read(_READ_BYTES)
            if not data and self._reader.lost is not None and not self._ends_with_loss:
                raise self._reader.lost
            self._protocol.receive_data(data)
        return event
