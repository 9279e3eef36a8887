"""Importing httpx and structlog without what only a terminal needs.

httpx imports its own command line if click, rich and pygments are installed, and structlog.dev imports rich. With
those hidden the two imports cost 6.6 MiB instead of 11.6 (PSS, Linux, CPython 3.11); once uvicorn and starlette are
loaded, which share modules with rich, 3.7 MiB remain saved. emberd's command line needs rich, so it is installed.
"""

from __future__ import annotations

import importlib
import sys

_HIDDEN = ("rich", "pygments", "httpx._main")
_LEAN = ("httpx", "structlog")


def import_lean() -> None:
    """Import httpx and structlog with the terminal libraries hidden; what is loaded already stays as it is."""
    hidden = [name for name in _HIDDEN if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # makes the import fail, as documented
    try:
        for name in _LEAN:
            importlib.import_module(name)
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
