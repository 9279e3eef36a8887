"""Who may use the endpoint, by the requested host, the asking page and the key. Pure.

A browser lets any page send requests to 127.0.0.1, and KoboldCPP answers all of them with
`access-control-allow-origin: *` (1.76 to 1.115): the page could read the replies. And a page whose name is
pointed to 127.0.0.1 after it was loaded (DNS rebinding) is of the same origin; its requests carry its name.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from emberd.core.cors import is_preflight
from emberd.core.credentials import has_key, has_session
from emberd.core.generation import changes_cache
from emberd.core.origins import is_private_name, matches_name, matches_origin

if TYPE_CHECKING:
    from collections.abc import Sequence

_OWN_NAMES = frozenset(
    {
        "localhost",
        "gateway.docker.internal",
        "host.containers.internal",
        "host.docker.internal",
        "host.k3d.internal",
        "host.lima.internal",
        "host.minikube.internal",
        "host.orb.internal",
        "host.rancher-desktop.internal",
    }
)
"""What containers and virtual machines call the computer that they run on: Docker, Podman, Lima, OrbStack and
others (each one's documentation). Nobody can register a name below .internal."""
_SHELLS = frozenset({"app", "tauri", "vscode-file", "vscode-webview"})
"""Schemes of desktop programs' own pages; no page of the internet has them. Ollama lets in the same."""
_EXTENSIONS = frozenset({"chrome-extension", "moz-extension", "safari-web-extension"})
ONE_FAMILY_REMEDY = "End that program, or use http://127.0.0.1: clients that are told localhost may reach it."
LOGIN_PATH, LOGOUT_PATH = "/emberd/login", "/emberd/logout"


@dataclass(frozen=True, slots=True)
class AccessRules:
    """Whom to let in.

    Attributes:
        names: host names that this computer has for clients, besides `own_names` and any IP address; patterns of
            `origins.name_pattern`.
        origins: allowed pages; patterns of `origins.origin_pattern`.
        key: what clients must send, empty for no key.
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


def judge(
    method: str,
    path: str,
    headers: Sequence[tuple[bytes, bytes]],
    rules: AccessRules,
    *,
    is_open: bool = False,
    now_s: float | None = None,
) -> Refusal | None:
    """Return why a request is refused, None if it may pass. For a WebSocket's upgrade, too.

    Args:
        method: the request's.
        path: without the query.
        headers: names in lower case.
        rules: whom to let in.
        is_open: whether this path needs no key, such as an engine's page.
        now_s: seconds since the epoch; None to let no session of a browser count.
    """
    host = only(headers, b"host")
    if host is not None and not is_own_host(host, rules.names):
        return Refusal(
            403,
            "foreign_host",
            f"this computer is not known as {_shown(host)}; add the name to endpoint.names if it is yours",
        )
    if not _is_own_page(method, path, headers, host or "", rules.origins):
        origin = only(headers, b"origin") or "another site"
        scheme = origin.partition("://")[0].lower()
        pattern = f' ("{scheme}://*" for each that is installed)' if scheme in _EXTENSIONS else ""
        return Refusal(
            403,
            "foreign_page",
            f"a page of {_shown(origin)} may not use this model; add it to endpoint.origins if it may{pattern}",
        )
    if not rules.key or is_open or is_preflight(method, headers) or has_key(headers, rules.key):
        return None
    is_at_home = now_s is not None and _is_of_own_pages(method, path, headers, host or "")
    if is_at_home and has_session(headers, host or "", rules.key, now_s or 0.0):
        return None
    return Refusal(
        401,
        "wrong_key",
        f"the API key is missing or wrong; send it as Authorization: Bearer KEY, or log in at {LOGIN_PATH}",
    )


ACTION_HEADER = b"x-emberd"
"""A page can add a header of its own only to requests to its own origin, unless that origin allows it (CORS)."""


def judge_view(method: str, headers: Sequence[tuple[bytes, bytes]]) -> Refusal | None:
    """Return why a request may not see or change what emberd does, None if it may: only its own page and programs.

    Stricter than `judge`: a page of endpoint.origins may use the model, and has no business with these.
    """
    host, origin = (only(headers, b"host") or "").lower(), only(headers, b"origin")
    is_own = origin is None or origin.lower() in {f"http://{host}", f"https://{host}"}
    is_own = is_own and only(headers, b"sec-fetch-site") in {None, "same-origin", "none"}
    if not is_own:
        return Refusal(403, "foreign_page", "this is for emberd's own page, and for programs")
    if method == "POST" and only(headers, ACTION_HEADER) is None:
        return Refusal(403, "no_header", "to change something, send the header X-Emberd with any value")
    return None


def is_own_host(host: str, names: Sequence[str]) -> bool:
    """Return True if a Host header names this computer.

    An IP address always does, because a page can only be bound to a name that its owner controls.
    """
    name = _name_of(host)
    if name is None:
        return False
    return name in _OWN_NAMES or name.endswith(".localhost") or _is_address(name) or matches_name(name, names)


def own_names(hostname: str) -> tuple[str, ...]:
    """Return the names that this computer has by itself: its first label, that with `.local`, and a private one.

    A name that somebody could own is left out: the network may have given it to this computer (DHCP, reverse DNS).
    """
    name = hostname.lower().rstrip(".")
    label = name.partition(".")[0]
    if not label:
        return ()
    return (label, f"{label}.local", *([name] if is_private_name(name) and name != label else []))


def listen_addresses(host: str, *, has_ipv6: bool) -> tuple[str, ...]:
    """Return where to listen for an endpoint.host: 127.0.0.1 and localhost stand for both loopback addresses.

    Clients that are told `localhost` try `::1` first on many computers. `has_ipv6`: this computer has that address.
    """
    if host.lower() not in {"127.0.0.1", "localhost"}:
        return (host,)
    return ("127.0.0.1", "::1") if has_ipv6 else ("127.0.0.1",)


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
    origin = only(headers, b"origin")
    if origin is None:
        is_foreign = only(headers, b"sec-fetch-site") == "cross-site"
        is_visit = only(headers, b"sec-fetch-mode") == "navigate" and not changes_cache(method, path)
        return not is_foreign or is_visit or "*" in allowed
    if matches_origin(origin, allowed):
        return True
    try:
        parts = urlsplit(origin)
    except ValueError:  # "http://[x"
        return False
    if not parts.netloc or "@" in parts.netloc:
        return False
    if parts.scheme not in {"http", "https"}:
        return parts.scheme in _SHELLS
    name, is_same = _name_of(parts.netloc) or "", parts.netloc.lower() == host.lower()
    return is_same or name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def _is_of_own_pages(method: str, path: str, headers: Sequence[tuple[bytes, bytes]], host: str) -> bool:
    """Return True if a browser sent this from a page of this very address: only then does a session count.

    `SameSite` leaves out the port: without this, a page of another program of this computer would be logged in. A
    browser says nothing of the page if it asks without encryption on the network; then only reading is harmless.
    """
    origin, site = only(headers, b"origin"), only(headers, b"sec-fetch-site")
    if origin is not None:
        return origin.lower() in {f"http://{host.lower()}", f"https://{host.lower()}"}
    if site is not None:
        return site in {"same-origin", "none"}
    return method in {"GET", "HEAD"} and not changes_cache(method, path)


def only(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> str | None:
    """Return a header's value, None if it is missing, `,` if it comes twice."""
    values = [value for header, value in headers if header == name]
    if not values:
        return None
    return values[0].decode("latin-1").strip() if len(values) == 1 else ","


def _name_of(host: str) -> str | None:
    """Return the name of `name[:port]` in lower case, without brackets; None if it is none (RFC 9110, 7.2)."""
    if any(sign in host for sign in "@/?#\\"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises if it is no number
    except ValueError:
        return None
    return parts.hostname.rstrip(".") if parts.hostname else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    """Return a client's text, made safe to show."""
    return "".join(character if character.isprintable() else "?" for character in text[:80])
