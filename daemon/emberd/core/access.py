"""Who may use the endpoint, by the requested host, the asking page and the key. Pure.

A browser lets any page send requests to 127.0.0.1, and KoboldCPP answers all of them with
`access-control-allow-origin: *` (1.76 to 1.104): the page could read the replies. And a page whose name is
pointed to 127.0.0.1 after it was loaded (DNS rebinding) is of the same origin; its requests carry its name.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from emberd.core.generation import changes_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

_OWN_NAMES = ("localhost", "host.docker.internal")
"""A container gives the second name to its computer (Docker's documentation)."""


@dataclass(frozen=True, slots=True)
class AccessRules:
    """Whom to let in.

    Attributes:
        names: host names that this computer has for clients, besides loopback names and any IP address.
        origins: allowed pages, as `https://name[:port]`; `null` for files and `*` for every page.
        key: what clients must send as a bearer token, empty for no key.
    """

    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not passed on.

    Attributes:
        status: HTTP status.
        code: stable name.
        message: for a person, with the remedy.
    """

    status: int
    code: str
    message: str


def judge(method: str, path: str, headers: Sequence[tuple[bytes, bytes]], rules: AccessRules) -> Refusal | None:
    """Return why a request is refused, None if it may pass.

    `path` has no query; names of `headers` are in lower case.
    """
    host = _only(headers, b"host")
    if host is not None and not is_own_host(host, rules.names):
        return Refusal(
            403,
            "foreign_host",
            f"this computer is not known as {_shown(host)}; add the name to endpoint.names if it is yours",
        )
    if not _is_own_page(method, path, headers, host or "", rules.origins):
        origin = _only(headers, b"origin") or "another site"
        return Refusal(
            403,
            "foreign_page",
            f"a page of {_shown(origin)} may not use this model; add it to endpoint.origins if it may",
        )
    if rules.key and method != "OPTIONS" and not _has_key(headers, rules.key):
        return Refusal(401, "wrong_key", "the API key is missing or wrong; send it as Authorization: Bearer KEY")
    return None


ACTION_HEADER = b"x-emberd"
"""A page can add a header of its own only to requests to its own origin, unless that origin allows it (CORS)."""


def judge_action(headers: Sequence[tuple[bytes, bytes]]) -> Refusal | None:
    """Return why a request may not change what emberd does, None if it may: only emberd's own page and programs do.

    Stricter than `judge`: a page of endpoint.origins may use the model, and has no business with these.
    """
    host, origin = _only(headers, b"host"), _only(headers, b"origin")
    is_own = origin is None or origin.lower() in {
        f"{scheme}://{(host or '').lower()}" for scheme in ("http", "https")
    }
    is_own = is_own and _only(headers, b"sec-fetch-site") in {None, "same-origin"}
    if is_own and _only(headers, ACTION_HEADER) is not None:
        return None
    return Refusal(
        403, "foreign_page", "only emberd's own page, and programs that send the header X-Emberd, may do this"
    )


def is_own_host(host: str, names: Sequence[str]) -> bool:
    """Return True if a Host header names this computer.

    An IP address always does, because a page can only be bound to a name that its owner controls.
    """
    name = _name_of(host)
    if name is None:
        return False
    if name in {*_OWN_NAMES, *(each.lower() for each in names)} or name.endswith(".localhost"):
        return True
    return _is_address(name)


def is_loopback(host: str) -> bool:
    """Return True if only this computer reaches an address to listen on."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_own_page(
    method: str, path: str, headers: Sequence[tuple[bytes, bytes]], host: str, allowed: Sequence[str]
) -> bool:
    """Return True if a request comes from no page, from a page of this computer, or from an allowed one.

    Browsers send Origin with requests that can change something, and Sec-Fetch-Site with all others (Fetch
    Metadata); programs send neither.
    """
    origin = _only(headers, b"origin")
    if origin is None:
        is_foreign = _only(headers, b"sec-fetch-site") == "cross-site"
        is_visit = _only(headers, b"sec-fetch-mode") == "navigate" and not changes_cache(method, path)
        return not is_foreign or is_visit or "*" in allowed
    if "*" in allowed or origin in allowed:
        return True
    try:
        parts = urlsplit(origin)
    except ValueError:  # "http://[x"
        return False
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        return False
    name = _name_of(parts.netloc)
    is_same = parts.netloc.lower() == host.lower()
    return is_same or name == "localhost" or (name is not None and is_loopback(name))


def _has_key(headers: Sequence[tuple[bytes, bytes]], key: str) -> bool:
    """Compare in constant time."""
    sent = _only(headers, b"authorization") or ""
    scheme, _, value = sent.partition(" ")
    given = value.strip() if scheme.lower() == "bearer" else ""
    return hmac.compare_digest(given.encode("latin-1", "replace"), key.encode())  # the bytes as sent


def _only(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> str | None:
    """Return a header's value, None if it is missing or comes twice."""
    values = [value for header, value in headers if header == name]
    if not values:
        return None
    return values[0].decode("latin-1").strip() if len(values) == 1 else ","


def _name_of(host: str) -> str | None:
    """Return the name of `name[:port]` in lower case, without brackets; None if it is none."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return None
    return name.rstrip(".") if name else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    """Return a client's text, made safe to show."""
    return "".join(character if character.isprintable() else "?" for character in text[:80])
