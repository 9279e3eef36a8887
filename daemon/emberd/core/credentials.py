"""The ways in which clients send a key, and the session of a browser that has logged in. Pure."""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Sequence

    Headers = Sequence[tuple[bytes, bytes]]

_KEY_HEADERS = frozenset({b"authorization", b"x-api-key", b"api-key", b"apikey"})
"""OpenAI's, KoboldCPP's and llama.cpp's clients; Anthropic's; Azure's; a header that KoboldCPP's CORS names."""
_COOKIE = "emberd_session"
SESSION_S = 30 * 86_400
"""How long a browser stays logged in."""
_PURPOSE = b"emberd session until "
_HTTP_PORT = 80


def keys_in(headers: Headers) -> list[bytes]:
    """Return every key that a request carries, the bytes as sent."""
    found = []
    for name, value in headers:
        sent = value.strip()
        scheme, _, rest = sent.partition(b" ")
        if name not in _KEY_HEADERS:
            continue
        if name == b"authorization" and scheme.lower() == b"basic":
            found += _password(rest.strip())
        elif name == b"authorization" and scheme.lower() == b"bearer":
            found.append(rest.strip())
        else:
            found.append(sent)  # llama.cpp takes a key without `Bearer` (server-http.cpp)
    return [each for each in found if each]


def has_key(headers: Headers, key: str) -> bool:
    """Return True if one of a request's keys is right; compares all in constant time."""
    wanted = key.encode()
    return any([hmac.compare_digest(each, wanted) for each in keys_in(headers)])  # noqa: C419  # all of them


def without_keys(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Return the headers without keys and without emberd's own cookies."""
    kept = []
    for name, value in headers:
        if name in _KEY_HEADERS:
            continue
        left = value
        if name == b"cookie":
            left = b"; ".join(each for each in map(bytes.strip, value.split(b";")) if not _is_ours(each))
        if left or not value:
            kept.append((name, left))
    return kept


def _is_ours(cookie: bytes) -> bool:
    return cookie.startswith(_COOKIE.encode())


def _password(encoded: bytes) -> list[bytes]:
    """Return the password of Basic authentication (RFC 7617), whoever the user is."""
    try:
        user, colon, password = base64.b64decode(encoded, validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return []
    # Some clients can only send a user name.
    return [password or user] if colon else []


# --- browsers ---------------------------------------------------------------------------------------------------


def session_cookie(key: str, host: str, now_s: float) -> str:
    """Return the Set-Cookie that logs a browser in; an empty key logs it out.

    The token is signed with the key, so nothing has to be stored, and another key ends every session.

    Args:
        key: emberd's.
        host: the Host header. Cookies are the same for all ports of a host, so the name has the port.
        now_s: seconds since the epoch.
    """
    lasts_s = SESSION_S if key else 0
    until_s = int(now_s) + lasts_s
    token = f"{until_s}.{_signature(key, until_s)}" if key else ""
    return f"{_cookie_name(host)}={token}; Path=/; Max-Age={lasts_s}; HttpOnly; SameSite=Strict"


def has_session(headers: Headers, host: str, key: str, now_s: float) -> bool:
    """Return True if a request carries a session that is signed with `key` and has not ended."""
    name = _cookie_name(host)
    for header, value in headers:
        for cookie in value.decode("latin-1").split(";") if header == b"cookie" else ():
            each, _, token = cookie.strip().partition("=")
            until, _, signature = token.partition(".")
            is_one = each == name and until.isdecimal() and until.isascii() and len(until) <= len(str(1 << 63))
            if is_one and int(until) > now_s and _is_signed(signature, key, int(until)):
                return True
    return False


def _is_signed(signature: str, key: str, until_s: int) -> bool:
    return hmac.compare_digest(signature.encode("latin-1"), _signature(key, until_s).encode())


def _signature(key: str, until_s: int) -> str:
    return hmac.new(key.encode(), _PURPOSE + str(until_s).encode(), "sha256").hexdigest()


def _cookie_name(host: str) -> str:
    try:
        port = urlsplit(f"//{host}").port or _HTTP_PORT
    except ValueError:
        port = _HTTP_PORT
    return f"{_COOKIE}_{port}"
