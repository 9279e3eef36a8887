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
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
    }
)
"""Headers between two neighbours (RFC 9110, 7.6.1); `expect` is answered here, before the engine is asked."""
_FIRST_PART_BYTES = 256 * 1024
"""Read before the engine is connected: a client that sends nothing must not hold one of its 24 threads. A body that
ends within it can be sent again when the engine dies before it answers."""
MAX_ENGINE_CONNECTIONS = 16
"""KoboldCPP has 24 threads, one connection each, no time-outs: eight are left for emberd's own questions."""
_MOST_SENDS = 3
"""How often one request may meet an engine that ends before it answers."""
_RETRY_BUSY_S = 1
_CONNECT_TIMEOUT_S = 5.0


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

    def unreachable(self, port: int) -> None:
        """Hear that connecting to `port` was refused."""
        ...


class _ClientGoneError(Exception):
    """The client closed its connection."""


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
        body = _Body(receive)
        try:
            await body.read_first_part()
        except _ClientGoneError:
            return
        passing = asyncio.create_task(self._pass_on(scope, body, send))
        leaving = asyncio.create_task(body.wait_for_client_to_leave())
        try:
            await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (passing, leaving):
                task.cancel()
            ended, _ = await asyncio.gather(passing, leaving, return_exceptions=True)
        if isinstance(ended, Exception) and not isinstance(ended, _ClientGoneError | _ReplyBrokenOffError):
            raise ended

    async def _pass_on(self, scope: Scope, body: _Body, send: Send) -> None:
        deadline_s = time.monotonic() + self._hold_timeout_s()
        sends = 0
        try:
            while sends < _MOST_SENDS and body.can_be_sent_again:
                port = await self._gate.ensure_ready(max(deadline_s - time.monotonic(), 0))
                try:
                    async with asyncio.timeout(max(deadline_s - time.monotonic(), 0)):
                        await self._slots.acquire()
                except TimeoutError:
                    raise NotReady("BUSY", "the engine is busy with other requests", _RETRY_BUSY_S) from None
                try:
                    with self._gate.admitted() as flowed:
                        response = await self._transport.handle_async_request(_request(scope, body, port))
                        await self._reply(response, send, flowed)
                        return
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    pass  # nothing was sent, so nothing counts
                except httpx.TransportError as error:
                    sends += 1
                    self._log.warning("request_failed", error=type(error).__name__, was_sent=sends)
                finally:
                    self._slots.release()
                self._gate.unreachable(port)
                await asyncio.sleep(0)  # the supervisor takes note before it is asked again
        except NotReady as not_ready:
            await _refuse(send, not_ready)
            return
        await _answer(send, 502, {}, _error("engine_died", "READY", "the engine ended before it answered"))

    async def _reply(self, response: httpx.Response, send: Send, flowed: Callable[[int], None]) -> None:
        headers = _end_to_end([(name.lower(), value) for name, value in response.headers.raw])
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        try:
            async for chunk in response.aiter_raw():
                flowed(len(chunk))
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx.TransportError as error:
            # No normal end: the client must see that something is missing.
            self._log.warning("reply_broken_off", error=type(error).__name__)
            raise _ReplyBrokenOffError from error
        finally:
            await response.aclose()
        await send({"type": "http.response.body", "body": b""})


class _Body:
    """A request's body: its first part in hand, the rest as it comes."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_complete = asyncio.Event()
        self._first = b""
        self._rest_was_taken = False

    @property
    def can_be_sent_again(self) -> bool:
        """Whether everything is still in hand."""
        return not self._rest_was_taken

    async def read_first_part(self) -> None:
        """Read until the body ends or _FIRST_PART_BYTES are here."""
        while not self._is_complete.is_set() and len(self._first) < _FIRST_PART_BYTES:
            self._first += await self._next()

    def content(self) -> bytes | AsyncIterator[bytes]:
        """Return the whole body if it is in hand, else a stream of it."""
        return self._first if self._is_complete.is_set() else self._stream()

    async def _stream(self) -> AsyncIterator[bytes]:
        self._rest_was_taken = True
        yield self._first
        while not self._is_complete.is_set():
            yield await self._next()

    async def _next(self) -> bytes:
        message: Message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _ClientGoneError
        if not message.get("more_body", False):
            self._is_complete.set()
        part: bytes = message.get("body", b"")
        return part

    async def wait_for_client_to_leave(self) -> None:
        """Return when the client has closed its connection; the body's own reader sees it before the body's end."""
        await self._is_complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _request(scope: Scope, body: _Body, port: int) -> httpx.Request:
    """Return the same request for the engine; the target is passed byte by byte."""
    target: bytes = scope["raw_path"]
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    content = body.content()
    return httpx.Request(
        scope["method"],
        f"http://127.0.0.1:{port}",
        headers=_end_to_end(scope["headers"]),
        content=content or None,
        extensions={
            "target": target,
            "timeout": {"connect": _CONNECT_TIMEOUT_S, "read": None, "write": None, "pool": None},
        },
    )


def _end_to_end(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Drop the headers that are meant for the next neighbour only, those named by `Connection` included."""
    named = {word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")}
    # Some engines name `close` or `keep-alive` there, some name headers; content-length is never a hop's business.
    hops = _HOP_BY_HOP | (named - {b"content-length", b"content-type", b"host"})
    return [(name, value) for name, value in headers if name not in hops]


async def _refuse(send: Send, not_ready: NotReady) -> None:
    headers = {"retry-after": str(not_ready.retry_after_s)}
    await _answer(send, 503, headers, _error("engine_not_ready", not_ready.state, not_ready.message))


def _error(kind: str, state: str, message: str) -> dict[str, Any]:
    """Return an error body in which clients of both OpenAI and KoboldCPP find the message."""
    return {
        "error": {"type": kind, "code": kind, "state": state, "message": message},
        "detail": {"type": "service_unavailable", "msg": message},
    }


async def _answer(send: Send, status: int, headers: dict[str, str], content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    all_headers = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in all_headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


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
