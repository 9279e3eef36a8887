"""Importing httpx and structlog without what only a terminal needs.

httpx imports its own command line if click, rich and pygments are installed, and structlog.dev imports rich: about
5.5 MiB (PSS, Linux, CPython 3.11) that a daemon carries for ever. emberd's command line needs rich, so it is
installed; here it is hidden for the time of the two imports.
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
            del sys.modules[name]
