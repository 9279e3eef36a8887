"""The live view as server-sent events: one observation for all viewers, none without a viewer.

The format is that of the HTML standard (html.spec.whatwg.org, 9.2): `data: ` and one line of JSON, an empty line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.types import Receive, Scope, Send
    from structlog.typing import FilteringBoundLogger

MOST_VIEWERS = 16
EVERY_S = 2.0
_SLOW_S = 10.0
"""A viewer that has read nothing for so long is dropped; its browser comes back by itself."""
_AGAIN = b"retry: 2000\n\n"


class Events:
    """Tells viewers what is so now.

    Args:
        view: returns what to tell; asked every EVERY_S while there is a viewer.
        log: for a view that fails.
    """

    def __init__(self, view: Callable[[], Awaitable[dict[str, Any]]], log: FilteringBoundLogger) -> None:
        self._view = view
        self._log = log
        self._viewers = 0
        self._telling: asyncio.Task[None] | None = None
        self._event = b""
        self._has_come = asyncio.Event()
        self._is_closed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether there are as many viewers as may be."""
        return self._viewers >= MOST_VIEWERS

    def close(self) -> None:
        """End all views: a daemon that ends waits for nobody who only looks."""
        self._is_closed.set()

    async def serve(
        self,
        receive: Receive,
        send: Send,
        headers: Sequence[tuple[bytes, bytes]] = (),
        may_see: Callable[[], bool] = lambda: True,
    ) -> None:
        """Tell one viewer until it leaves, reads nothing, or the daemon ends. Look at `is_full` before.

        `may_see` is asked before each event: when it says no, the viewer is told no more.
        """
        self._viewers += 1
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell(), name="events")
        leaving = asyncio.create_task(_left(receive))
        closing = asyncio.create_task(self._is_closed.wait())
        try:
            with contextlib.suppress(TimeoutError):
                start = {"type": "http.response.start", "status": 200, "headers": list(headers)}
                await self._send(send, start)
                await self._follow(send, {leaving, closing}, may_see)
        finally:
            for task in (leaving, closing):
                task.cancel()
            self._viewers -= 1
            if not self._viewers and self._telling is not None:
                self._telling.cancel()
                self._telling, self._event = None, b""

    async def _follow(self, send: Send, ends: set[asyncio.Task[Any]], may_see: Callable[[], bool]) -> None:
        await self._send(send, {"type": "http.response.body", "body": _AGAIN + self._event, "more_body": True})
        while not any(each.done() for each in ends):
            coming = asyncio.create_task(self._has_come.wait())
            try:
                await asyncio.wait({coming, *ends}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                coming.cancel()
            if self._is_closed.is_set() or not may_see():
                await self._send(send, {"type": "http.response.body", "body": b""})
                return
            if not any(each.done() for each in ends):
                await self._send(send, {"type": "http.response.body", "body": self._event, "more_body": True})

    @staticmethod
    async def _send(send: Send, message: Any) -> None:
        """Send a part; a viewer that misses some in the meantime is told the newest next.

        Raises:
            TimeoutError: it read nothing.
        """
        async with asyncio.timeout(_SLOW_S):
            await send(message)

    async def _tell(self) -> None:
        while True:
            try:
                self._event = b"data: " + json.dumps(await self._view(), separators=(",", ":")).encode() + b"\n\n"
            except Exception:  # noqa: BLE001  # a view is not worth the daemon
                self._log.exception("events_bug")
            else:
                has_come, self._has_come = self._has_come, asyncio.Event()
                has_come.set()
            await asyncio.sleep(EVERY_S)


class LiveResponse(Response):
    """The live view for one viewer, as long as it `may_see`."""

    def __init__(self, events: Events, may_see: Callable[[], bool]) -> None:
        # A reverse proxy must not collect events (nginx.org, ngx_http_proxy_module).
        super().__init__(media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._may_see = may_see

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's
        """Tell the viewer."""
        await self._events.serve(receive, send, self.raw_headers, self._may_see)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
