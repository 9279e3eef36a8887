"""The paths below /emberd/ that show something to pages and programs: events, history and metrics. Read-only."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.datastructures import QueryParams
from starlette.responses import JSONResponse, Response

from emberd.core import access
from emberd.services.events import MOST_VIEWERS, Events

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Receive, Scope, Send
    from structlog.typing import FilteringBoundLogger

    from emberd.core.access import AccessRules
    from emberd.core.status import Status
    from emberd.services.recorder import Recorder

NAMES = ("events", "history", "metrics")


class Views:
    """An ASGI app for the paths of NAMES.

    Args:
        status: returns the status.
        view: returns what the live view tells.
        recorder: has the past and the counts.
        rules: whom to let in.
        log: for a view that fails.
    """

    def __init__(
        self,
        status: Callable[[], Awaitable[Status]],
        view: Callable[[], Awaitable[dict[str, Any]]],
        recorder: Recorder,
        rules: Callable[[], AccessRules],
        log: FilteringBoundLogger,
    ) -> None:
        self._status = status
        self._recorder = recorder
        self._rules = rules
        self.events = Events(view, log)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request: with the key where one is set, and never a page of another site."""
        refusal = access.judge(scope["method"], scope["path"], scope["headers"], replace(self._rules(), origins=()))
        if refusal is not None:
            await _refuse(refusal.status, refusal.code, refusal.message)(scope, receive, send)
            return
        await self.show(scope, receive, send)

    async def show(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request of somebody who may see it."""
        name = scope["path"].removeprefix("/emberd/")
        if scope["method"] not in {"GET", "HEAD"}:
            response = _refuse(405, "not_allowed", "this path can only be read")
        elif name == "events" and self.events.is_full:
            response = _refuse(503, "too_many_viewers", f"{MOST_VIEWERS} viewers are there already")
            response.headers["retry-after"] = "10"
        elif name == "events" and scope["method"] == "GET":
            await self.events.serve(receive, send)
            return
        elif name == "history":
            response = await self._history(QueryParams(scope["query_string"]))
        else:
            response = await self._metrics(scope)
        response.headers["cache-control"] = "no-store"
        await response(scope, receive, send)

    async def _history(self, asked: QueryParams) -> Response:
        try:
            since_s, until_s = (float(asked[name]) if name in asked else None for name in ("since", "until"))
            step_s = int(asked["step"]) if "step" in asked else None
            past = await self._recorder.past(since_s, until_s, step_s)
        except (ValueError, OverflowError, OSError):
            words = "since and until are seconds since the epoch, step is seconds; each may be left out"
            return _refuse(400, "no_time", words)
        # A week is 100 KB, which takes 20 ms to write down.
        return Response(await asyncio.to_thread(_compact, past), media_type="application/json")

    async def _metrics(self, scope: Scope) -> Response:
        from emberd.services.metrics import render  # noqa: PLC0415  # prometheus-client, only for who scrapes

        accept = b",".join(value for name, value in scope["headers"] if name == b"accept").decode("latin-1")
        recorder = self._recorder
        content, kind = render(await self._status(), recorder.counts(), recorder.tally, recorder.swapped, accept)
        return Response(content, headers={"content-type": kind})


def _compact(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _refuse(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": message, "code": code}, status)
