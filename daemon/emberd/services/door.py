"""The door of the endpoint: who may come in, and what a browser is told so that an allowed page sees the answer."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

from emberd.core import access, cors
from emberd.core.credentials import keys_in, without_keys
from emberd.services.messages import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import Message, Scope, Send
    from structlog.typing import FilteringBoundLogger

    from emberd.core.access import AccessRules, Refusal

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 2.0
_FORGIVEN_AFTER_S = 60.0
"""Without a wrong key for this long, the next one is the first again."""
_MOST_DELAYED = 16
"""Answers to wrong keys that are held back at once; further ones are told to come back."""


class Door:
    """Judges requests, answers preflights and refusals, and slows down those who guess keys.

    A right key is never held back: nobody is locked out by another one's mistakes.

    Args:
        rules: returns whom to let in.
        log: events go here; never a header or a query.
    """

    def __init__(self, rules: Callable[[], AccessRules], log: FilteringBoundLogger) -> None:
        self._rules = rules
        self._log = log
        self._delayed = 0
        self._wrong = 0
        self._last_wrong_s = 0.0

    @property
    def has_key(self) -> bool:
        """Whether clients must send a key."""
        return bool(self._rules().key)

    def knows(self, scope: Scope) -> bool:
        """Return True if a request may come in by itself, not only because its path is open. Ask before `admit`."""
        headers, rules = scope["headers"], self._rules()
        return access.judge(scope["method"], scope["path"], headers, rules, now_s=time.time()) is None

    def same_key(self) -> Callable[[], bool]:
        """Return a function that tells whether the key is still the one of this moment."""
        key = self._rules().key
        return lambda: self._rules().key == key

    async def admit(self, scope: Scope, send: Send, *, is_open: bool = False) -> Send | None:
        """Return how to send the answer, None if the request was answered here. Takes the keys out of `scope`.

        Args:
            scope: ASGI's.
            send: ASGI's.
            is_open: whether the path needs no key.
        """
        rules, headers = self._rules(), scope["headers"]
        refusal = access.judge(scope["method"], scope["path"], headers, rules, is_open=is_open, now_s=time.time())
        if refusal is not None and refusal.status == 403:  # noqa: PLR2004  # the page must learn nothing
            await self._refuse(Client(send, scope["path"]), refusal)
            return None
        shown = _shown(scope, send, has_key=bool(rules.key))
        if cors.is_preflight(scope["method"], headers):
            answer = cors.preflight_answer(headers)
            await shown({"type": "http.response.start", "status": 200, "headers": answer})
            await shown({"type": "http.response.body", "body": b""})
            return None
        if refusal is not None:
            await self._ask_for_key(scope, shown, refusal)
            return None
        if rules.key:
            scope["headers"] = without_keys(headers)
        return shown

    async def slow_down(self) -> Mapping[str, str] | None:
        """Hold back the answer to a wrong key; return headers for 429 if too many are held back already."""
        now_s = time.monotonic()
        self._wrong = self._wrong + 1 if now_s - self._last_wrong_s < _FORGIVEN_AFTER_S else 1
        self._last_wrong_s = now_s
        if self._delayed >= _MOST_DELAYED:
            return {"retry-after": str(round(_LONGEST_DELAY_S))}
        self._delayed += 1
        try:
            await asyncio.sleep(delay_s(self._wrong))
        finally:
            self._delayed -= 1
        return None

    async def _ask_for_key(self, scope: Scope, send: Send, refusal: Refusal) -> None:
        client = Client(send, scope["path"])
        if keys_in(scope["headers"]):
            too_many = await self.slow_down()
            if too_many is not None:
                message = "too many wrong API keys at once; try again in a moment"
                await client.answer(
                    429, "too_many_wrong_keys", message, headers={**too_many, "connection": "close"}
                )
                return
        elif _is_visit(scope):
            target = scope["path"] + (
                f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
            )
            location = f"{access.LOGIN_PATH}?to={quote(target, safe='/')}"
            headers = [(b"location", location.encode()), (b"content-length", b"0"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 303, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        await self._refuse(client, refusal, {"www-authenticate": 'Bearer realm="emberd"'})

    async def _refuse(self, client: Client, refusal: Refusal, headers: Mapping[str, str] | None = None) -> None:
        self._log.warning("request_refused", reason=refusal.code)
        await client.answer(
            refusal.status, refusal.code, refusal.message, headers={"connection": "close", **(headers or {})}
        )


def delay_s(wrong: int) -> float:
    """Return how long the answer to the `wrong`th wrong key in a row is held back."""
    return min(_FIRST_DELAY_S * 2.0 ** min(wrong - 1, 10), _LONGEST_DELAY_S)


def _is_visit(scope: Scope) -> bool:
    """Return True if a person opens a page in a browser."""
    headers = scope["headers"]
    accepts = access.only(headers, b"accept") or ""
    return scope["method"] == "GET" and "text/html" in accepts and access.only(headers, b"origin") is None


def _shown(scope: Scope, send: Send, *, has_key: bool) -> Send:
    """Return a `send` that lets the page that asked see the answer."""
    origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
    if origin is None and not has_key:
        return send

    async def shown(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = cors.shown_to(origin, list(message["headers"]), has_key=has_key)
        await send(message)

    return shown
