"""Stands in for pyoslog 1.2.0: writes what os_log would get to PYOSLOG_STANDIN_FILE, as lines of JSON.

As the real one: if it is not supported, `is_supported` is the only name; a NUL raises ValueError, a wrong type
TypeError, an empty or too long category ValueError (simonrob/pyoslog, pyoslog/_pyoslog.c).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def is_supported() -> bool:
    """As on a macOS of 10.12 or later, unless PYOSLOG_STANDIN_UNSUPPORTED is set."""
    return not os.environ.get("PYOSLOG_STANDIN_UNSUPPORTED")


if is_supported():
    OS_LOG_TYPE_DEFAULT, OS_LOG_TYPE_INFO, OS_LOG_TYPE_DEBUG = 0x00, 0x01, 0x02
    OS_LOG_TYPE_ERROR, OS_LOG_TYPE_FAULT = 0x10, 0x11
    _TYPES = {0x00: "Default", 0x01: "Info", 0x02: "Debug", 0x10: "Error", 0x11: "Fault"}

    def os_log_create(subsystem: str, category: str) -> tuple[str, str]:
        """Return a log object."""
        if not 0 < len(subsystem) < 250 or not 0 < len(category) < 255:
            raise ValueError("subsystem and category must not be empty, nor too long")
        return subsystem, category

    def os_log_with_type(log_object: tuple[str, str], log_type: int, *message: Any) -> None:
        """Log a message; what is longer than 1,024 bytes is cut, as os_log does it."""
        text = " ".join(map(str, message))
        if "\0" in text:
            raise ValueError("embedded null character")
        if log_type not in _TYPES:
            raise TypeError("invalid log_type")
        with Path(os.environ["PYOSLOG_STANDIN_FILE"]).open("a", encoding="utf-8") as file:
            content = {
                "subsystem": log_object[0],
                "category": log_object[1],
                "messageType": _TYPES[log_type],
                "eventMessage": text.encode()[:1024].decode(errors="ignore"),
            }
            file.write(json.dumps(content) + "\n")
