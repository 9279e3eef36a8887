"""Questions to an engine's server that are no work: health, names, versions, and the pages for a browser. Pure.

Which client asks what, in their public sources: SillyTavern `/v1/models`, `/api/v1/model`, `/api/tags` and
`/props` (text-completions.js); Kobold Lite `/api/v1/model`, versions and lengths (klite.embd); Open WebUI
`/api/version`, `/api/tags` and `/v1/models`, for 10 s at most; Continue `/api/tags` and `/api/show`. All take an
error or a delay for a server that is not there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Questions:
    """What one kind of server answers besides its work.

    Attributes:
        health: paths that ask whether it is ready.
        told: paths whose answers hold as long as the engine and its settings; none of them is private.
        pages: paths that need no key, as with the engine's own key; one that ends with `/` stands for all below.
        loading: the body of its 503 while it loads, or, if it does not listen yet, one of its kind.
    """

    health: tuple[str, ...]
    told: tuple[str, ...]
    pages: tuple[str, ...]
    loading: bytes

    def is_health(self, method: str, path: str) -> bool:
        """Return True if a request asks whether the engine is ready."""
        return method in {"GET", "HEAD"} and _plain(path) in self.health

    def is_told(self, method: str, path: str) -> bool:
        """Return True if the engine's last answer is as good as the next one."""
        return method in {"GET", "HEAD"} and _plain(path) in self.told

    def is_open(self, method: str, path: str, query: bytes = b"") -> bool:
        """Return True if the engine would answer without its key: a page, or health.

        KoboldCPP takes the query for a part of a file's name (1.115), and a path by its end (1.104): below a folder
        of pages only what is plainly a page's file is open.
        """
        if method not in {"GET", "HEAD"}:
            return False
        if self.is_health(method, path) or (_plain(path) or "/") in self.pages:
            return True
        folders = (page for page in self.pages if page.endswith("/") and page != "/" and path.startswith(page))
        return not query and any(_PAGE_FILE.fullmatch(path.removeprefix(folder)) for folder in folders)


_PAGE_FILE = re.compile(
    r"(?:[\w-]+/)*[\w-]+(?:\.[\w-]+)*\.(?:css|gif|html|ico|jpg|js|map|mjs|png|svg|ttf|webp|woff2?)", re.ASCII
)


def _plain(path: str) -> str:
    return path.rstrip("/")


KOBOLDCPP = Questions(
    health=("/health", "/v1/health", "/ping", "/api/admin/health"),
    told=(
        "/api/v1/model",
        "/api/latest/model",
        "/api/v1/config/max_length",
        "/api/latest/config/max_length",
        "/api/v1/config/max_context_length",
        "/api/latest/config/max_context_length",
        "/api/v1/info/version",
        "/api/latest/info/version",
        "/api/extra/true_max_context_length",
        "/api/extra/version",
        "/v1/models",
        "/models",
        "/api/tags",
        "/api/ps",
        "/api/version",
        "/props",
        "/.well-known/serviceinfo",
    ),
    pages=(
        "/",
        "/favicon.ico",
        "/manifest.json",
        "/sw.js",
        "/api",
        "/docs",
        "/sdui",
        "/lcpp",
        "/static/",
    ),
    loading=b'{"detail":{"msg":"Loading model","type":"service_unavailable"},'
    b'"error":{"message":"Loading model","type":"unavailable_error","code":503}}',
)
"""do_GET of koboldcpp.py, 1.104 and 1.115: it opens more than pages without its password. `/noscript` generates."""
LLAMA_SERVER = Questions(
    health=("/health", "/v1/health"),
    told=("/v1/models", "/models", "/api/tags", "/props"),
    pages=(
        "/",
        "/index.html",
        "/bundle.js",
        "/bundle.css",
        "/loading.html",
        "/favicon.ico",
        "/favicon.svg",
        "/manifest.json",
        "/manifest.webmanifest",
        "/sw.js",
        "/_app/",
        "/assets/",
    ),
    loading=b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}',
)
"""server-http.cpp and server.cpp of llama.cpp: its public endpoints, and middleware_server_state."""
