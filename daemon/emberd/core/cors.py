"""What a browser must be told so that an allowed page sees an answer (CORS). Pure.

The Fetch standard, 3.2 and 4.8; Private Network Access (WICG) for pages of the internet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    Headers = list[tuple[bytes, bytes]]

_ALLOWS = b"access-control-allow-origin"
_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_REMEMBER_S = b"600"
"""How long a browser need not ask again; an owner may take an origin back."""


def is_preflight(method: str, headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Return True if a browser asks whether a page may send a request."""
    return method == "OPTIONS" and {b"origin", b"access-control-request-method"} <= {name for name, _ in headers}


def preflight_answer(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Return the headers that allow the request that the browser asks about, without those of `shown_to`."""
    asked = dict(headers)
    answer = [(b"access-control-allow-methods", _METHODS), (b"access-control-max-age", _REMEMBER_S)]
    if wanted := asked.get(b"access-control-request-headers"):
        answer.append((b"access-control-allow-headers", wanted))
    if asked.get(b"access-control-request-private-network") == b"true":
        answer.append((b"access-control-allow-private-network", b"true"))
    varies = b"Access-Control-Request-Headers, Access-Control-Request-Private-Network"
    return [*answer, (b"content-length", b"0"), (b"vary", varies)]


def shown_to(origin: bytes | None, headers: Headers, *, has_key: bool) -> Headers:
    """Return an answer's headers such that a page that was let in can read it.

    Args:
        origin: of the page, None for a request of no page.
        headers: of the answer, names in lower case.
        has_key: clients need a key; the engine's `*` is then narrowed to that page.
    """
    allowed = [value for name, value in headers if name == _ALLOWS]
    if origin is None:
        return _varied([each for each in headers if each[0] != _ALLOWS]) if has_key and allowed else headers
    if allowed and not has_key:
        return headers
    kept = [each for each in headers if each[0] != _ALLOWS]
    if not any(name == b"access-control-expose-headers" for name, _ in kept):
        kept.append((b"access-control-expose-headers", b"*"))
    return _varied([*kept, (_ALLOWS, origin)])


def _varied(headers: Headers) -> Headers:
    """Say that the answer differs by page, for caches."""
    named = {word.strip().lower() for name, value in headers if name == b"vary" for word in value.split(b",")}
    return headers if named & {b"origin", b"*"} else [*headers, (b"vary", b"Origin")]
