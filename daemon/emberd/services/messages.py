"""The two ends of a request: the client's body, and the way back to the client. Bytes pass as they come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

from emberd.core.generation import is_ollama
from emberd.engine.connection import EngineRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from starlette.types import Message, Receive, Scope, Send

    from emberd.core.errors import NotReady
    from emberd.core.generation import Rest

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
"""Hop-by-hop headers (RFC 9110, 7.6.1), besides proxy-*; `expect` is answered here, before the engine is
asked."""
_PIECE_BYTES = 256 * 1024
"""A body of unknown length is passed on in pieces of at least this size, however small its client's chunks or their
TCP segments: KoboldCPP takes 48 MB, and no more than 512 chunks (1.115.1)."""
CLIENT_SILENCE_S = 60.0
"""Longest pause within a request's body, and longest time that a client may read nothing of its reply. Both
occupy one of the engine's few connections."""


class ClientGone(Exception):
    """The client closed its connection."""


class ClientSilent(Exception):
    """The client stopped in the middle of its request's body."""


class Client:
    """The way back to the client; gives up a client that reads nothing."""

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._path = path
        self._waits_since_s: float | None = None
        self.has_begun = False

    async def send(self, message: Message) -> None:
        """Send one part of the answer; return when the client has room for it, which `wait_beside` limits."""
        self.has_begun = True
        self._waits_since_s = time.monotonic()
        await self._send(message)
        self._waits_since_s = None

    async def wait_beside(self, tasks: Collection[asyncio.Task[None]]) -> None:
        """Return when one of the tasks has ended, or when the client has read nothing for CLIENT_SILENCE_S.

        One clock for the whole reply: a time-out for each token took an eighth of the daemon's time.
        """
        while self._waits_since_s is None or time.monotonic() - self._waits_since_s < CLIENT_SILENCE_S:
            limit_s = CLIENT_SILENCE_S / 2
            done, _ = await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return

    async def send_part(self, part: bytes) -> None:
        """Send bytes of the body; more follow."""
        if part:
            await self.send({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self) -> None:
        """End the answer."""
        await self.send({"type": "http.response.body", "body": b""})

    async def refuse(self, not_ready: NotReady) -> None:
        """Answer 503 with the state of the engine."""
        headers = {"retry-after": str(not_ready.retry_after_s)}
        await self.answer(503, "engine_not_ready", not_ready.message, not_ready.state, headers)

    async def answer(
        self,
        status: int,
        kind: str,
        message: str,
        state: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer with an error in the client's dialect: see `error_content`."""
        content = error_content(self._path, kind, message, state)
        body = json.dumps(content).encode()
        all_headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **(headers or {}),
        }
        lines = [(name.encode(), value.encode()) for name, value in all_headers.items()]
        with contextlib.suppress(TimeoutError):  # of a client that reads nothing
            async with asyncio.timeout(CLIENT_SILENCE_S):
                await self.send({"type": "http.response.start", "status": status, "headers": lines})
                await self.send({"type": "http.response.body", "body": body})


def error_content(path: str, kind: str, message: str, state: str | None = None) -> dict[str, Any]:
    """Return an error in the dialect of those who ask for `path`.

    OpenAI's clients find the message in `error.message`, KoboldCPP's in `detail.msg`, Ollama's in `error`;
    Anthropic's know an error by the `type` beside it.
    """
    if is_ollama(path):
        return {"error": message}
    error = {"type": kind, "code": kind, "state": state, "message": message}
    return {
        "type": "error",
        "error": {key: value for key, value in error.items() if value is not None},
        "detail": {"type": "service_unavailable", "msg": message},
    }


class Body:
    """A request's body: the first part in hand, the rest as it comes.

    Args:
        receive: ASGI's.
        first_part_bytes: read before the engine is connected.
    """

    def __init__(self, receive: Receive, first_part_bytes: int) -> None:
        self._receive = receive
        self._first_part_bytes = first_part_bytes
        self._is_complete = False
        self._is_free = asyncio.Event()
        self._first = bytearray()
        self._rest_was_taken = False
        self.in_hand: bytes | None = None
        """The whole body, None if only its first part is here."""

    @property
    def can_be_sent_again(self) -> bool:
        """Whether the whole body is still in hand."""
        return not self._rest_was_taken

    async def read_first_part(self) -> None:
        """Read until the body ends or its first part is here."""
        while not self._is_complete and len(self._first) < self._first_part_bytes:
            self._first += await self._next()
        if self._is_complete:
            self.in_hand = bytes(self._first)
            self._first.clear()

    def let_go(self) -> None:
        """Drop the rest of the body: the engine has answered."""
        self._is_free.set()

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the first part, then the rest as it comes, in pieces that are not small; only once."""
        self._rest_was_taken = True
        piece, self._first = self._first, bytearray()
        while True:
            while not self._is_complete and len(piece) < _PIECE_BYTES:
                piece += await self._next()
            if piece:
                yield bytes(piece)
            if self._is_complete:
                return
            piece = bytearray()

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout(CLIENT_SILENCE_S):
                message: Message = await self._receive()
        except TimeoutError:
            raise ClientSilent from None
        if message["type"] == "http.disconnect":
            raise ClientGone
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


def engine_request(scope: Scope, body: Body, port: int, rest: Rest | None = None) -> EngineRequest:
    """Return the same request for the engine, with the target byte by byte.

    Args:
        scope: ASGI's.
        body: the client's.
        port: the engine's.
        rest: asked for in place of what the client asked for.
    """
    content = None if rest is None else json.dumps(rest.body).encode()
    target: bytes = scope["raw_path"]
    if rest is not None and rest.path != scope["path"]:
        target = rest.path.encode()
    elif scope["query_string"]:
        target += b"?" + scope["query_string"]
    # One connection for one request. Without this word KoboldCPP leaves a connection open whose thread had a
    # WebSocket before, and an error reply of it has no length (1.104 to 1.115.1): it would never end.
    headers = [*end_to_end(scope["headers"]), (b"connection", b"close")]
    names = {name for name, _ in scope["headers"]}
    if b"host" not in names:  # HTTP/1.0
        headers.insert(0, (b"host", f"127.0.0.1:{port}".encode()))
    whole = body.in_hand if content is None else content
    if b"transfer-encoding" in names or content is not None:
        # A length beside chunks is invalid (RFC 9112, 6.3); the engine must not see it.
        headers = [(name, value) for name, value in headers if name != b"content-length"]
        headers.append(
            (b"transfer-encoding", b"chunked") if whole is None else (b"content-length", b"%d" % len(whole))
        )
    return EngineRequest(scope["method"].encode(), target, headers, body.stream() if whole is None else whole)


def end_to_end(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Drop hop-by-hop headers, those named by `Connection` included."""
    named = {word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")}
    # Some engines name `close` or `keep-alive` there, some name headers; content-length is always end-to-end.
    hops = _HOP_BY_HOP | (named - {b"content-length", b"content-type", b"host"})
    return [(name, value) for name, value in headers if name not in hops and not name.startswith(b"proxy-")]
