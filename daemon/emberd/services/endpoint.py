"""The HTTP server inside the daemon: uvicorn on an existing socket, without ticks and signals."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import uvicorn

from emberd.services.client_connection import ClientConnection, is_news

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
        logging.getLogger("uvicorn.error").addFilter(is_news)
        server = self._server = _Server(
            uvicorn.Config(
                app,
                http=ClientConnection,
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
