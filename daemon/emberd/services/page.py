"""The page at /emberd/: its files, what it shows, and its buttons. Imported at the first request for it."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import inspect
import json
import math
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.datastructures import QueryParams
from starlette.responses import JSONResponse, Response

from emberd.core import access
from emberd.core.errors import EmberdError
from emberd.core.event_words import say_event
from emberd.core.report import make_report
from emberd.core.sentence import Finding, say
from emberd.core.status import Status, from_plain, to_plain
from emberd.services import logs
from emberd.services.events import MOST_VIEWERS, Events, LiveResponse
from emberd.services.messages import Body, ClientGone, ClientSilent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.types import Receive, Scope, Send
    from structlog.typing import FilteringBoundLogger

    from emberd.services.control import Verb
    from emberd.services.door import Door

_FOLDER = Path(__file__).parent.parent / "web"
_INDEX = "index.html"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_ACTIONS = {"warm": False, "pause": True, "cool": True, "resume": False, "restart": False}
"""Verbs that the page has buttons for, and whether they take a time in seconds."""
_LONGEST_S = 7 * 86_400.0
_BODY_BYTES = 1024
_LEAST_PACKED_BYTES = 1024
_PACKING_LEVEL = 6
"""A week of history: 100 KB become 20 in 5 ms."""
_LATEST_S = 253_402_300_800.0
"""The year 10000: further than dates go."""
_NO_ENGINE = "there is no engine"
_DOCTOR_FRESH_S = 30.0
"""An examination asks the engine's program and looks at all processes; people reload pages."""


class Page:
    """An ASGI app for the paths below /emberd/ that people use; without a viewer it does nothing.

    Args:
        verbs: what the daemon can be asked; the same as on the control socket.
        door: lets in who may use the endpoint.
        log: for a live view that fails.
    """

    def __init__(self, verbs: Mapping[str, Verb], door: Door, log: FilteringBoundLogger) -> None:
        self.events = Events(self.view, log)
        self._verbs = verbs
        self._door = door
        self._examined: tuple[float, dict[str, Any]] | None = None
        self._examining = asyncio.Lock()
        self._state = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Scripts and colours are for everybody: nothing in them is private."""
        method, name = scope["method"], scope["path"].removeprefix("/emberd/")
        file = _file_of(name) if method in {"GET", "HEAD"} else None
        shown = await self._door.admit(scope, send, is_open=file is not None and file.name != _INDEX)
        if shown is None:
            return
        response = await self._answer(scope, receive, name, file)
        for header, value in _HEADERS.items():
            response.headers.setdefault(header, value)
        response.headers.setdefault("cache-control", "no-store")
        if (
            _takes_gzip(scope)
            and not isinstance(response, LiveResponse)
            and len(response.body) > _LEAST_PACKED_BYTES
        ):
            response = await asyncio.to_thread(_pack, response)
        await response(scope, receive, shown)

    async def _answer(self, scope: Scope, receive: Receive, name: str, file: Path | None) -> Response:
        method, headers = scope["method"], scope["headers"]
        if file is not None:
            return await asyncio.to_thread(_send_file, file, headers)
        refusal = access.judge_view(method, headers)
        if refusal is None and not self._door.has_key and not _is_near(scope):
            # An emberd that stands by may not know its key; what it says is for this computer.
            refusal = access.Refusal(403, "no_key", "without a key this is for the computer that emberd runs on")
        if refusal is not None:
            return _refused(refusal.status, refusal.code, refusal.message)
        views = {"doctor": self._doctor, "layers": self._layers, "report": self._report, "status": self.view}
        show = views.get(name)
        if method in {"GET", "HEAD"} and show is not None:
            return await _shown(show)
        if method == "GET" and name in {"events", "history", "metrics"}:
            return await self._tell(name, scope)
        if method == "POST" and name.removeprefix("do/") in _ACTIONS:
            return await self._act(name.removeprefix("do/"), receive)
        return _refused(404, "not_found", "emberd has no such page")

    # --- what it shows --------------------------------------------------------------------------------------

    async def view(self) -> dict[str, Any]:
        """Return what the live part of the page shows: the sentence, the status, the last events in words."""
        plain = await self._ask("live" if "live" in self._verbs else "status")
        if plain["state"] != self._state:
            self._state, self._examined = plain["state"], None  # what was found in another state explains nothing
        found = [
            Finding(each["title"], each["evidence"], each["remedy"], is_error=each["severity"] == "error")
            for each in _ills(self._examined[1] if self._examined else {})
        ]
        sentence = say(from_plain(Status, plain), found[0] if found else None)
        events = [(event["timestamp"], event["level"], say_event(event)) for event in logs.recent()]
        return {
            "sentence": to_plain(sentence),
            "status": plain,
            "events": [{"at": at, "level": level, "text": text} for at, level, text in events if text],
        }

    async def _tell(self, name: str, scope: Scope) -> Response:
        """Return what programs also ask for: the live view, the past, or metrics."""
        if name == "events" and self.events.is_full:
            return _refused(503, "too_many_viewers", f"{MOST_VIEWERS} viewers are there already")
        if name == "events":
            return LiveResponse(self.events, self._door.same_key())
        try:
            if name == "history":
                past = await self._ask("history", **_history_times(QueryParams(scope["query_string"])))
                return await asyncio.to_thread(JSONResponse, past)  # a week is 100 KB
            accept = b",".join(value for header, value in scope["headers"] if header == b"accept")
            told = await self._ask("metrics", accept=accept.decode("latin-1"))
            return Response(told["text"], headers={"content-type": told["content_type"]})
        except ValueError:
            words = "since and until are seconds since the epoch, step is seconds; each may be left out"
            return _refused(400, "no_time", words)
        except EmberdError as error:
            return _refused(503, "cannot_tell", error.message, error.remedy)

    async def _doctor(self) -> dict[str, Any]:
        async with self._examining:
            if self._examined is None or time.monotonic() - self._examined[0] > _DOCTOR_FRESH_S:
                found = await self._ask("doctor")
                self._examined = time.monotonic(), {"shown": found.get("shown", ()), "unknown": found["unknown"]}
            return self._examined[1]

    async def _layers(self) -> dict[str, Any]:
        return await self._ask("layers") if "layers" in self._verbs else {"files": [], "unknown": _NO_ENGINE}

    async def _report(self) -> dict[str, Any]:
        status, examined = from_plain(Status, await self._ask("status")), await self._doctor()
        codes = dict.fromkeys(each["code"] for each in examined["shown"])
        return {"text": make_report(status, codes, f"{platform.platform(terse=True)} {platform.machine()}")}

    async def _ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        answer = self._verbs[verb](**arguments)
        return await answer if inspect.isawaitable(answer) else answer

    # --- what it does ---------------------------------------------------------------------------------------

    async def _act(self, verb: str, receive: Receive) -> Response:
        body = Body(receive, _BODY_BYTES)
        try:
            await body.read_first_part()
            asked = json.loads(body.in_hand or b"{}")
            arguments = {"seconds": _seconds(asked["seconds"])} if _ACTIONS[verb] else {}
        except (ClientGone, ClientSilent, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            words = f"{verb} takes a JSON object with seconds, a number up to {_LONGEST_S:.0f}"
            return _refused(400, "no_seconds", words)
        try:
            return JSONResponse(await self._ask(verb, **arguments))
        except EmberdError as error:
            return _refused(409, "refused", error.message, error.remedy)


async def _shown(show: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
    try:
        return JSONResponse(await show())
    except EmberdError as error:
        return _refused(503, "cannot_tell", error.message, error.remedy)


def _history_times(asked: QueryParams) -> dict[str, float]:
    times = {f"{name}_s": float(asked[name]) for name in ("since", "until", "step") if name in asked}
    if not all(math.isfinite(value) and abs(value) < _LATEST_S for value in times.values()):
        raise ValueError
    return times


def _takes_gzip(scope: Scope) -> bool:
    return any(name == b"accept-encoding" and b"gzip" in value for name, value in scope["headers"])


def _pack(response: Response) -> Response:
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    headers |= {"content-encoding": "gzip", "vary": "accept-encoding"}
    return Response(gzip.compress(bytes(response.body), _PACKING_LEVEL, mtime=0), response.status_code, headers)


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 < seconds <= _LONGEST_S:  # NaN is neither
        raise ValueError(value)
    return seconds


def _is_near(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and access.is_loopback(client[0])


def _ills(examined: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the conditions that are more than a note."""
    return [each for each in examined.get("shown", ()) if each["severity"] != "note"]


def _refused(status: int, code: str, message: str, remedy: str = "") -> Response:
    return JSONResponse({"error": message, "code": code, "remedy": remedy}, status)


def _file_of(name: str) -> Path | None:
    """Return the file of that name in the folder of the page, None if there is none."""
    file = _FOLDER / (name.removeprefix("web/") or _INDEX)
    try:
        return file if file.parent == _FOLDER and file.suffix in _KINDS and file.is_file() else None
    except OSError:  # a name that is too long for a file
        return None


def _send_file(file: Path, headers: list[tuple[bytes, bytes]]) -> Response:
    """Return a file, or that the browser's copy is still right. It is read each time: memory is dearer."""
    content = file.read_bytes()
    tag = f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'
    cache = {"etag": tag, "cache-control": "no-cache"}  # kept, and asked for again by its digest
    if any(name == b"if-none-match" and tag.encode() in value for name, value in headers):
        return Response(status_code=304, headers=cache)
    return Response(content, headers=cache, media_type=_KINDS[file.suffix])
