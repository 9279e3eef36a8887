"""Importing structlog without what only a terminal needs.

structlog.dev imports rich: 5 MiB (PSS, Linux, CPython 3.11), of which 3.7 remain saved once uvicorn and starlette
are loaded, which share modules with it. emberd's command line needs rich, so it is installed.
"""

from __future__ import annotations

import importlib
import sys

_HIDDEN = "rich"


def import_lean() -> None:
    """Import structlog with rich hidden, unless that is loaded already."""
    is_hidden = _HIDDEN not in sys.modules
    if is_hidden:
        sys.modules[_HIDDEN] = None  # type: ignore[assignment]  # makes the import fail, as documented
    try:
        importlib.import_module("structlog")
    finally:
        if is_hidden:
            del sys.modules[_HIDDEN]
