"""The HTTP server inside the daemon: uvicorn on a socket that exists already, without ticks and without signals."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp

_KEEP_ALIVE_S = 75
"""Clients poll; reopening a connection for each poll costs them more than an idle one costs us."""
_TRUNCATED = "ASGI callable returned without completing response."


class _Server(uvicorn.Server):
    """uvicorn's server, woken by an event.

    uvicorn ticks ten times a second to refresh a date header that is not sent here; a daemon that idles at 0.2 % of
    a core has no such ticks. Signals belong to the daemon.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()

    async def main_loop(self) -> None:
        await self.stopping.wait()


class Endpoint:
    """Serves one ASGI app on one socket."""

    def __init__(self) -> None:
        self._server: _Server | None = None
        self._ended = asyncio.Event()

    async def serve(self, app: ASGIApp, listener: socket.socket) -> None:
        """Serve until `stop`; returns when running requests have ended or were cut."""
        # A reply that breaks off with its engine is reported by the proxy; uvicorn's words add nothing.
        logging.getLogger("uvicorn.error").addFilter(lambda record: record.getMessage() != _TRUNCATED)
        server = self._server = _Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )
        try:
            # `_serve` is `serve` without uvicorn's signal handlers.
            await server._serve(sockets=[listener])  # noqa: SLF001
        finally:
            self._ended.set()

    async def stop(self, timeout_s: float) -> None:
        """Stop accepting, give running requests `timeout_s`, then cut them."""
        if self._server is None:
            return
        self._server.config.timeout_graceful_shutdown = max(round(timeout_s), 1)
        self._server.should_exit = True
        self._server.stopping.set()
        await self._ended.wait()
