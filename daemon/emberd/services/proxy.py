"""The front port: every request goes to the engine unchanged, and waits while there is none.

An ASGI app between uvicorn and one httpx transport. Bytes pass as they come, in both directions; nothing is
decoded, buffered whole or added.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any, Protocol

import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from emberd.core.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractContextManager

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from structlog.typing import FilteringBoundLogger

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
    }
)
"""Headers between two neighbours (RFC 9110, 7.6.1), besides proxy-*; `expect` is answered here, before the engine
is asked."""
_FIRST_PART_BYTES = 256 * 1024
"""Read before the engine is connected: a client that sends nothing must not hold one of its 24 threads. A body that
ends within it can be sent again when the engine dies before it answers."""
MAX_ENGINE_CONNECTIONS = 16
"""KoboldCPP has 24 threads, one connection each, no time-outs: eight are left for emberd's own questions."""
_MOST_SENDS = 3
"""How often one request may meet an engine that ends before it answers."""
_RETRY_BUSY_S = 1
_RETRY_STOPPING_S = 5
_CONNECT_TIMEOUT_S = 5.0
_WRITE_TIMEOUT_S = 120.0
"""An engine reads a body as soon as it has the head; one that does not for so long is hung."""
_PAUSE_AFTER_REFUSAL_S = 0.05
"""The supervisor looks meanwhile; without a pause a closed port would be asked thousands of times a second."""
_CLIENT_SILENCE_S = 60.0
"""Longest pause within a request's body, and the longest time that a client may read nothing of its reply: either
holds one of the engine's few connections."""


class Gate(Protocol):
    """What the proxy asks of the supervisor."""

    async def ensure_ready(self, timeout_s: float) -> int:
        """Return the port of a ready engine.

        Raises:
            NotReady: there is none in time.
        """
        ...

    def admitted(self) -> AbstractContextManager[Callable[[int], None]]:
        """Count a request on its way to the engine; yields what is told of reply bytes that pass."""
        ...

    async def is_alive(self, port: int) -> bool:
        """Tell whether the engine on `port` outlived the reply that has just ended; bounded."""
        ...

    def doubt(self, port: int) -> None:
        """Hear that the engine on `port` refused or broke a connection; it must show again that it is ready."""
        ...


class _ClientGoneError(Exception):
    """The client closed its connection."""


class _ClientSilentError(Exception):
    """The client stopped in the middle of its request's body."""


class _ReplyBrokenOffError(Exception):
    """The engine ended in the middle of a reply."""


class Proxy:
    """The ASGI app that passes requests on.

    Args:
        gate: the supervisor.
        hold_timeout_s: tells how long a request may wait for an engine, seconds.
        log: events go here; never a header, a path's query or a body.
    """

    def __init__(self, gate: Gate, hold_timeout_s: Callable[[], float], log: FilteringBoundLogger) -> None:
        self._gate = gate
        self._hold_timeout_s = hold_timeout_s
        self._log = log
        self._slots = asyncio.Semaphore(MAX_ENGINE_CONNECTIONS)
        self._transport = httpx.AsyncHTTPTransport(
            verify=False,  # plain HTTP on loopback; loading certificate authorities costs 1 MiB
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def aclose(self) -> None:
        """Close what is still open to the engine."""
        await self._transport.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        client = _Client(send)
        try:
            if _asks_for_websocket(scope):
                await _answer(client, 501, {}, _error("no_websocket", "the engine speaks no WebSocket"))
                return
            await self._serve(scope, _Body(receive), client)
        except (_ClientGoneError, _ReplyBrokenOffError):
            return  # uvicorn closes the connection without a normal end
        except _ClientSilentError:
            if not client.has_begun:
                message = f"no more of the request came within {_CLIENT_SILENCE_S:g} s"
                await _answer(client, 408, {"connection": "close"}, _error("request_timeout", message))
        except asyncio.CancelledError:
            # Only the endpoint's end cancels; it waits for this task, and passing it on would be logged as a bug.
            if not client.has_begun:
                await _refuse(client, NotReady("STOPPING", "emberd is shutting down", _RETRY_STOPPING_S))

    async def _serve(self, scope: Scope, body: _Body, client: _Client) -> None:
        await body.read_first_part()
        passing = asyncio.create_task(self._pass_on(scope, body, client))
        leaving = asyncio.create_task(body.wait_for_client_to_leave())
        try:
            await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (passing, leaving):
                task.cancel()
            ended, _ = await asyncio.gather(passing, leaving, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended

    async def _pass_on(self, scope: Scope, body: _Body, client: _Client) -> None:
        deadline_s = time.monotonic() + self._hold_timeout_s()
        sends = 0
        try:
            while sends < _MOST_SENDS and body.can_be_sent_again:
                port = await self._take_slot(deadline_s)
                try:
                    with self._gate.admitted() as flowed:
                        response = await self._transport.handle_async_request(_request(scope, body, port))
                        body.let_go()
                        await self._reply(response, client, flowed, port)
                        return
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    pass  # nothing was sent, so nothing counts
                except httpx.TransportError as error:
                    sends += 1
                    self._log.warning("request_failed", error=type(error).__name__, was_sent=sends)
                finally:
                    self._slots.release()
                self._gate.doubt(port)
                if not _left(deadline_s):
                    break
                await asyncio.sleep(min(_PAUSE_AFTER_REFUSAL_S, _left(deadline_s)))
        except NotReady as not_ready:
            await _refuse(client, not_ready)
            return
        if sends:
            await _answer(client, 502, {}, _error("engine_died", "the engine ended before it answered"))
        else:
            await _refuse(client, NotReady("LOADING", "the engine accepts no connections", _RETRY_BUSY_S))

    async def _take_slot(self, deadline_s: float) -> int:
        """Wait for a ready engine and for one of its connections, first come first served; return its port.

        Raises:
            NotReady: one of the two did not come before `deadline_s`.
        """
        while True:
            port = await self._gate.ensure_ready(_left(deadline_s))
            was_free = not self._slots.locked()
            try:
                async with asyncio.timeout(_left(deadline_s)):
                    await self._slots.acquire()
            except TimeoutError:
                raise NotReady("BUSY", "the engine is busy with other requests", _RETRY_BUSY_S) from None
            if was_free:
                return port
            # The engine may have gone, or be draining, since this request took its place in the queue.
            try:
                return await self._gate.ensure_ready(0)
            except NotReady:
                self._slots.release()
            except BaseException:
                self._slots.release()
                raise

    async def _reply(
        self, response: httpx.Response, client: _Client, flowed: Callable[[int], None], port: int
    ) -> None:
        headers = _end_to_end([(name.lower(), value) for name, value in response.headers.raw])
        await client.send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        try:
            async for chunk in response.aiter_raw():
                flowed(len(chunk))
                await client.send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx.TransportError as error:
            # No normal end: the client must see that something is missing.
            self._log.warning("reply_broken_off", error=type(error).__name__)
            raise _ReplyBrokenOffError from error
        finally:
            await response.aclose()
        if not _tells_its_length(response) and not await self._gate.is_alive(port):
            self._log.warning("reply_broken_off", error="engine_died")
            self._gate.doubt(port)
            raise _ReplyBrokenOffError
        await client.send({"type": "http.response.body", "body": b""})


class _Client:
    """The way back to the client: knows whether an answer has begun, and gives up a client that reads nothing."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def send(self, message: Message) -> None:
        """Send one part of the answer.

        Raises:
            _ClientGoneError: the client took nothing for _CLIENT_SILENCE_S.
        """
        self.has_begun = True
        try:
            async with asyncio.timeout(_CLIENT_SILENCE_S):
                await self._send(message)
        except TimeoutError:
            raise _ClientGoneError from None


class _Body:
    """A request's body: its first part in hand, the rest as it comes."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_complete = False
        self._is_free = asyncio.Event()
        self._first = b""
        self._rest_was_taken = False

    @property
    def can_be_sent_again(self) -> bool:
        """Whether everything is still in hand."""
        return not self._rest_was_taken

    async def read_first_part(self) -> None:
        """Read until the body ends or _FIRST_PART_BYTES are here."""
        while not self._is_complete and len(self._first) < _FIRST_PART_BYTES:
            self._first += await self._next()

    @property
    def in_hand(self) -> bytes | None:
        """The whole body; None if only its first part is here."""
        return self._first if self._is_complete else None

    def let_go(self) -> None:
        """Hear that the engine has answered: it wants no more of the body, whatever the client still sends."""
        self._is_free.set()

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the first part and then the rest as it comes; only once."""
        self._rest_was_taken = True
        yield self._first
        while not self._is_complete:
            yield await self._next()

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout(_CLIENT_SILENCE_S):
                message: Message = await self._receive()
        except TimeoutError:
            raise _ClientSilentError from None
        if message["type"] == "http.disconnect":
            raise _ClientGoneError
        if not message.get("more_body", False):
            self._is_complete = True
            self._is_free.set()
        part: bytes = message.get("body", b"")
        return part

    async def wait_for_client_to_leave(self) -> None:
        """Return when the client has closed its connection; until `let_go` the body's own reader sees it."""
        await self._is_free.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class _Upload(httpx.AsyncByteStream):
    """A body that is still coming, in the shape that httpx takes."""

    def __init__(self, body: _Body) -> None:
        self._body = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._body.stream()


def _request(scope: Scope, body: _Body, port: int) -> httpx.Request:
    """Return the same request for the engine; the target is passed byte by byte."""
    target: bytes = scope["raw_path"]
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    headers = _end_to_end(scope["headers"])
    names = {name for name, _ in scope["headers"]}
    if b"host" not in names:  # HTTP/1.0
        headers.insert(0, (b"host", f"127.0.0.1:{port}".encode()))
    if b"transfer-encoding" in names:
        # A length beside it is untrue (RFC 9112, 6.3); the engine must not believe it.
        headers = [(name, value) for name, value in headers if name != b"content-length"]
        whole = body.in_hand
        headers.append(
            (b"transfer-encoding", b"chunked") if whole is None else (b"content-length", b"%d" % len(whole))
        )
    # `stream` and not `content`: httpx then adds no header of its own.
    request = httpx.Request(
        scope["method"],
        f"http://127.0.0.1:{port}",
        headers=headers,
        stream=_Upload(body) if body.in_hand is None else httpx.ByteStream(body.in_hand),
        extensions={
            "target": target,
            "timeout": {"connect": _CONNECT_TIMEOUT_S, "read": None, "write": _WRITE_TIMEOUT_S, "pool": None},
        },
    )
    request.method = scope["method"]  # httpx makes it upper case
    return request


def _end_to_end(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Drop the headers that are meant for the next neighbour only, those named by `Connection` included."""
    named = {word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")}
    # Some engines name `close` or `keep-alive` there, some name headers; content-length is never a hop's business.
    hops = _HOP_BY_HOP | (named - {b"content-length", b"content-type", b"host"})
    return [(name, value) for name, value in headers if name not in hops and not name.startswith(b"proxy-")]


def _asks_for_websocket(scope: Scope) -> bool:
    return any(name == b"upgrade" and b"websocket" in value.lower() for name, value in scope["headers"])


def _tells_its_length(response: httpx.Response) -> bool:
    """Tell whether a cut reply shows by itself; KoboldCPP's streams and errors end by closing, as a death does."""
    framed = "content-length" in response.headers or "transfer-encoding" in response.headers
    return framed or response.status_code in {204, 304}


def _left(deadline_s: float) -> float:
    """Return the seconds until a deadline on the monotonic clock, never negative."""
    return max(deadline_s - time.monotonic(), 0.0)


async def _refuse(client: _Client, not_ready: NotReady) -> None:
    headers = {"retry-after": str(not_ready.retry_after_s)}
    await _answer(client, 503, headers, _error("engine_not_ready", not_ready.message, not_ready.state))


def _error(kind: str, message: str, state: str | None = None) -> dict[str, Any]:
    """Return an error body in which clients of both OpenAI and KoboldCPP find the message."""
    error = {"type": kind, "code": kind, "state": state, "message": message}
    return {
        "error": {key: value for key, value in error.items() if value is not None},
        "detail": {"type": "service_unavailable", "msg": message},
    }


async def _answer(client: _Client, status: int, headers: dict[str, str], content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    all_headers = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    await client.send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in all_headers.items()],
        }
    )
    await client.send({"type": "http.response.body", "body": body})


def make_app(proxy: Proxy, state: Callable[[], str]) -> ASGIApp:
    """Return the front port's app: everything under /emberd is emberd's own, everything else the engine's.

    Args:
        proxy: passes requests on.
        state: tells the name of the engine's state.
    """

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def readyz(_: Request) -> Response:
        name = state()
        return JSONResponse({"status": name}, 200 if name == "READY" else 503)

    own = Starlette(routes=[Route("/emberd/healthz", healthz), Route("/emberd/readyz", readyz)])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        is_own = scope["path"] == "/emberd" or scope["path"].startswith("/emberd/")
        await (own if is_own else proxy)(scope, receive, send)

    return app
