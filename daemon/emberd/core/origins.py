"""Names and pages as an owner writes them into the settings, and as a browser sends them. Pure.

A pattern is exact but for `*`: `*.example.org` stands for every name below example.org, `chrome-extension://*` for
every page of that scheme, and `:*` for every port.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|[^\[\]/:@?#\s,]+)(?::(?P<port>\d+|\*))?"
)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PORTS = {"http": "80", "https": "443"}
_PRIVATE_ENDINGS = frozenset({"home", "internal", "lan", "local", "localdomain", "localhost", "test"})
"""Nobody can register a name below these: RFC 6761, RFC 6762, ICANN's resolutions on .home and .internal."""


def is_private_name(name: str) -> bool:
    """Return True if nobody on the internet can own such a name: of one label, or below a reserved ending."""
    labels = name.split(".")
    return len(labels) == 1 or labels[-1] in _PRIVATE_ENDINGS or labels[-2:] == ["home", "arpa"]


@lru_cache(maxsize=256)
def name_pattern(text: str) -> str:
    """Return an entry of endpoint.names in the form that names are compared in.

    Raises:
        ValueError: it is no name, or so wide that DNS rebinding would be possible; says what to write.
    """
    found = text.strip().lower()
    if "://" in found or "/" in found:
        name = found.partition("://")[2] or found
        raise ValueError(f'{text!r} is an address; write the name alone: "{_bare(name)}"')
    if _as_address(found) is not None:
        return found
    if ":" in found:
        raise ValueError(f'{text!r} has a port, and names count for every port; write "{_bare(found)}"')
    name = _ascii(found.rstrip("."), text)
    labels = name.removeprefix("*.").split(".")
    if name == "*" or (name.startswith("*.") and len(labels) == 1 and labels[0] not in _PRIVATE_ENDINGS):
        raise ValueError(
            f"{text!r} would let in pages of anybody who points a name to this computer; write the whole name, or "
            'a pattern below a name of yours, such as "*.example.org"'
        )
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f'{text!r} is no name; write it such as "studio.example.org" or "*.example.org"')
    return name


@lru_cache(maxsize=256)
def origin_pattern(text: str) -> str:
    """Return an entry of endpoint.origins in the form that origins are compared in.

    Raises:
        ValueError: no browser would send such an origin; says what to write.
    """
    found = text.strip().lower()
    if found in {"*", "null"}:
        return found
    if found.startswith("file:"):
        raise ValueError(f'{text!r}: browsers send "null" for pages that are opened from a file; write that')
    found = found.rstrip("/") if not found.endswith("://") else found
    has_scheme = "://" in found
    match = _ORIGIN.fullmatch(found if has_scheme else f"https://{found}")
    if match is None:
        shorter = _ORIGIN.match(re.sub(r"://[^/]*@", "://", found if has_scheme else f"https://{found}"))
        example = shorter.group() if shorter else "https://lite.koboldai.net"
        raise ValueError(f'{text!r} is no origin (scheme, name and port, no more); write "{example}"')
    scheme, host, port = match["scheme"], match["host"], match["port"]
    if "*" in host.removeprefix("*.") and host != "*":
        raise ValueError(f'{text!r}: a * stands for the beginning of a name; write "{scheme}://*.example.org"')
    if scheme in _PORTS:
        host = host if host.startswith("[") or host == "*" else _ascii(host, text)
        port = None if port == _PORTS[scheme] else port
    return (f"{scheme}://" if has_scheme else "") + host + (f":{port}" if port else "")


def matches_name(name: str, patterns: Iterable[str]) -> bool:
    """Return True if a name in lower case, without a final dot, is one of the owner's."""
    return any(_fits(name, pattern) for pattern in _right(name_pattern, patterns))


def matches_origin(origin: str, patterns: Iterable[str]) -> bool:
    """Return True if a page of this origin, as a browser sends it, is one of the owner's."""
    wanted = _right(origin_pattern, patterns)
    if "*" in wanted or origin in wanted:
        return True
    sent = _ORIGIN.fullmatch(origin.lower())
    if sent is None or "*" in origin:
        return False
    return any(_is_of(sent, pattern) for pattern in wanted)


def _is_of(sent: re.Match[str], pattern: str) -> bool:
    scheme, separator, rest = pattern.rpartition("://")
    own = _ORIGIN.fullmatch(pattern if separator else f"https://{rest}")
    if own is None or (sent["scheme"] not in _PORTS if not separator else sent["scheme"] != scheme):
        return False
    default = _PORTS.get(sent["scheme"])
    is_port = own["port"] == "*" or (own["port"] or default) == (sent["port"] or default)
    return is_port and _fits(sent["host"], own["host"])


def _fits(name: str, pattern: str) -> bool:
    if pattern.startswith("*."):
        return name.endswith(pattern[1:]) and len(name) > len(pattern) - 1
    return pattern in {"*", name}


def _right(normal: Callable[[str], str], patterns: Iterable[str]) -> set[str]:
    """Return the patterns that can be understood; the check of the settings has refused all others."""
    found = set()
    for each in patterns:
        try:
            found.add(normal(each))
        except ValueError:
            continue
    return found


def _ascii(name: str, text: str) -> str:
    """Return a name of other letters as browsers send it (IDNA)."""
    if name.isascii():
        return name
    try:
        return name.encode("idna").decode()
    except UnicodeError:
        raise ValueError(f"{text!r} is no name that can be looked up") from None


def _bare(text: str) -> str:
    name = text.partition("/")[0].rpartition("@")[2]
    return name.rpartition(":")[0] if ":" in name and not name.startswith("[") else name.strip("[]")


def _as_address(text: str) -> object:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
