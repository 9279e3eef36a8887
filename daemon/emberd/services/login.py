"""Logging a browser in: a form for the key, which becomes a session cookie. Nothing is stored."""

from __future__ import annotations

import time
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from starlette.responses import HTMLResponse, RedirectResponse

from emberd.core import access
from emberd.core.credentials import has_key, session_cookie
from emberd.services.messages import Body, ClientGone, ClientSilent

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from emberd.core.access import AccessRules
    from emberd.services.door import Door

_MOST_BYTES = 16 * 1024
SAFE_HEADERS = {
    "content-security-policy": "default-src 'none'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    # `no-referrer` would make browsers send the form with `Origin: null`.
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}
"""The page runs no script, loads nothing, and cannot be shown within another one."""
_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>emberd: log in</title></head>
<body>
<h1>emberd</h1>
<form method="post" action="{action}">
<p>{said}</p>
<input type="hidden" name="to" value="{to}">
<input type="text" name="user" value="emberd" autocomplete="username" hidden>
<p><label>API key <input type="password" name="key" autocomplete="current-password" autofocus required></label>
<button>Log in</button></p>
</form>
</body>
</html>
"""


class Login:
    """The ASGI app of /emberd/login (GET: the form, POST: log in) and /emberd/logout (POST)."""

    def __init__(self, door: Door, rules: Callable[[], AccessRules]) -> None:
        self._door = door
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        shown = await self._door.admit(scope, send, is_open=True)
        if shown is None:
            return
        try:
            answer = await self._answer(scope, receive)
        except (ClientGone, ClientSilent):
            return
        answer.headers.update(SAFE_HEADERS)
        await answer(scope, receive, shown)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        key, host = self._rules().key, access.only(scope["headers"], b"host") or ""
        if scope["path"] != access.LOGIN_PATH:
            return _leaving("/", session_cookie("", host, time.time()) if scope["method"] == "POST" else "")
        if scope["method"] != "POST":
            to = _local(_field(scope["query_string"].decode("latin-1"), "to"))
            return _page(to, "This model asks for a key.") if key else _leaving(to)
        body = Body(receive, _MOST_BYTES)
        await body.read_first_part()
        form = (body.in_hand or b"").decode(errors="replace")
        to, given = _local(_field(form, "to")), _field(form, "key").strip()
        if not key or has_key([(b"x-api-key", given.encode(errors="replace"))], key):
            return _leaving(to, session_cookie(key, host, time.time()) if key else "")
        if await self._door.slow_down() is not None:
            return _page(to, "Too many wrong keys at once. Try again in a moment.", 429)
        return _page(to, "That is not the key. Try again.", 401)


def _page(to: str, said: str, status: int = 200) -> Response:
    return HTMLResponse(_PAGE.format(action=access.LOGIN_PATH, said=escape(said), to=escape(to)), status)


def _leaving(to: str, cookie: str = "") -> Response:
    return RedirectResponse(to, 303, {"set-cookie": cookie} if cookie else None)


def _field(text: str, name: str) -> str:
    return parse_qs(text).get(name, [""])[0]


def _local(to: str) -> str:
    """Return the path if it is one of this server, else its root: a link could lead to another site."""
    is_local = to.startswith("/") and not to.startswith(("//", "/\\")) and to.isprintable() and "\\" not in to
    return to if is_local else "/"
