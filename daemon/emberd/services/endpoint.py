"""The HTTP server inside the daemon: uvicorn on an existing socket, without ticks and signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from starlette.types import ASGIApp

_KEEP_ALIVE_S = 75
"""Clients poll; reopening a connection for each poll costs more than an idle connection."""
MOST_CONNECTIONS = 1024
_LARGEST_HEAD_BYTES = 128 * 1024
"""KoboldCPP takes request lines of 64 KiB (Python's http.server), and its /noscript page puts prompts there."""
_CANCEL_LIMIT_S = 1.0
_SHUTDOWN_POLL_S = 0.01
_FIRST_WORDS_S = 0.05
"""The newest connection may have a request on its way, which closing it would lose."""
UNREAD_S = 30.0
"""A closing connection is cut when its client has read nothing for this long."""
_TRUNCATED = "ASGI callable returned without completing response."


def _is_news(record: logging.LogRecord) -> bool:
    """Drop a reply that broke off with its engine: the proxy reports that itself."""
    return record.getMessage() != _TRUNCATED


class _Protocol(H11Protocol):
    """One client's connection; uvicorn limits its silence only after a reply, this also before and within a head.

    A silent connection costs a file descriptor, and launchd gives a daemon 256 of them. If there are too many,
    the one that has been silent for the longest time makes room.
    """

    silent_since_s: float | None = None
    _has_begun_head = False
    _looks_after_unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.silent_since_s = self.loop.time()
        self._limit_silence()
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn forgets it after a reset
        if self._looks_after_unread is not None:
            self._looks_after_unread.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._looks_after_unread is None:
            self._look_after_unread(None)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_busy:
            self._has_begun_head = False
            return
        if not self._has_begun_head:  # once: a client that sends a byte a minute would stay for ever
            self.silent_since_s = self.loop.time()
            self._has_begun_head = True
        self._limit_silence()

    def handle_events(self) -> None:
        super().handle_events()
        if self._is_busy:
            self.silent_since_s = None

    def send_400_response(self, msg: str) -> None:
        """Answer garbage with 400 if that is still possible, and end the connection.

        uvicorn raises within a reply and after HEAD, and lets the app answer after its 400.
        """
        with contextlib.suppress(h11.LocalProtocolError):
            super().send_400_response(msg)
        if self._is_busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def on_response_complete(self) -> None:
        self.silent_since_s = self.loop.time()
        super().on_response_complete()  # may begin with the next request at once

    @property
    def _is_busy(self) -> bool:
        # uvicorn's annotation hides that there is no cycle before the first head.
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]

    def _make_room(self) -> None:
        silent = [
            (each.silent_since_s, id(each), each)
            for each in self.connections
            if isinstance(each, _Protocol) and each is not self and each.silent_since_s is not None
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

    def _look_after_unread(self, before_bytes: int | None) -> None:
        """Cut a closing connection whose client reads nothing: `before_bytes` was unread UNREAD_S ago."""
        self._looks_after_unread = None
        unread_bytes = self.transport.get_write_buffer_size()
        if self.transport.is_closing() and unread_bytes == before_bytes:
            self.transport.abort()
        elif unread_bytes:
            self._looks_after_unread = self.loop.call_later(UNREAD_S, self._look_after_unread, unread_bytes)

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: the proxy answers, and uvicorn would advise to install a WebSocket library."""


class _Server(uvicorn.Server):
    """uvicorn's server, woken by an event.

    uvicorn ticks ten times a second to refresh a date header that is not sent here; the idle daemon takes 0.2 %
    of a core without such ticks. Signals belong to the daemon.
    """

    def __init__(self, config: uvicorn.Config, accepting: asyncio.Event, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self.patience_s = 0.0
        self._accepting = accepting
        self._stopping = stopping

    async def main_loop(self) -> None:
        self._accepting.set()
        try:
            await self._stopping.wait()
        except asyncio.CancelledError:
            await self.shutdown()
            raise

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002  # uvicorn's
        """Stop accepting, let running requests end for `patience_s`, cancel the rest, close every connection."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(_FIRST_WORDS_S)
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._await_end(self.patience_s)
        for task in self.server_state.tasks:
            task.cancel()
        await self._await_end(_CANCEL_LIMIT_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()  # only clients that read nothing are left

    async def _await_end(self, limit_s: float) -> None:
        """Return when no request runs and every reply is on its way, or after `limit_s`."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + limit_s
        state = self.server_state
        while (state.tasks or state.connections) and loop.time() < deadline_s:  # noqa: ASYNC110  # plain sets
            await asyncio.sleep(_SHUTDOWN_POLL_S)


class Endpoint:
    """Serves one ASGI app.

    Args:
        silence_s: the longest silence of a connection before and between requests, whole seconds.
        most_connections: how many may be open; beyond that silent ones are closed, then requests get 503.
    """

    def __init__(self, silence_s: int = _KEEP_ALIVE_S, most_connections: int = MOST_CONNECTIONS) -> None:
        self._silence_s = silence_s
        self._most_connections = most_connections
        self._server: _Server | None = None
        self.accepting = asyncio.Event()
        """Set as soon as connections are accepted."""
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    async def serve(self, app: ASGIApp, listeners: Sequence[socket.socket]) -> None:
        """Serve until `stop`; return when running requests have ended or were cut. Cancelling cuts at once.

        The listeners stay open: clients that come after the end wait in their backlog until they are closed.
        """
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        server = self._server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_keep_alive=self._silence_s,
                limit_concurrency=self._most_connections,
                h11_max_incomplete_event_size=_LARGEST_HEAD_BYTES,
            ),
            self.accepting,
            self._stopping,
        )
        try:
            # `_serve` is `serve` without uvicorn's signal handlers.
            await server._serve(sockets=[each.dup() for each in listeners])  # noqa: SLF001
        finally:
            self._ended.set()

    async def stop(self, timeout_s: float) -> None:
        """Stop accepting, give running requests `timeout_s`, then cut them; a later `serve` ends at once."""
        self._stopping.set()
        if self._server is not None:
            self._server.patience_s = timeout_s
            await self._ended.wait()
