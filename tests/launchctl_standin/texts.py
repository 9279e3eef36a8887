"""Exit codes of launchctl and their texts, and the times that launchd has of itself."""

from __future__ import annotations

import os

NO_SUCH_PROCESS = 3
INPUT_OUTPUT = 5
NOW_IN_PROGRESS = 36
ALREADY_IN_PROGRESS = 37
USAGE = 64
NO_DOMAIN = 112
NO_SERVICE = 113
DISABLED = 119
UNSUPPORTED = 125

# errno numbers are those of Darwin, whatever system this runs on.
_TEXTS = {
    0: "Success",
    1: "Operation not permitted",
    2: "No such file or directory",
    NO_SUCH_PROCESS: "No such process",
    INPUT_OUTPUT: "Input/output error",
    13: "Permission denied",
    17: "File exists",
    22: "Invalid argument",
    NOW_IN_PROGRESS: "Operation now in progress",
    ALREADY_IN_PROGRESS: "Operation already in progress",
    NO_DOMAIN: "Could not find specified domain",
    NO_SERVICE: "Could not find specified service",
    DISABLED: "Service is disabled",
    UNSUPPORTED: "Domain does not support specified action",
}
RICHER = "Try re-running the command as root for richer errors."
RICHER_LOAD = "Try running `launchctl {verb}` as root for richer errors."

THROTTLE_S = 10
EXIT_TIMEOUT_S = 5
OPEN_FILES = 256
"""launchd's soft limit for its jobs; the hard one is unlimited."""
BACKLOG = 128
"""kern.ipc.somaxconn of macOS."""

EX_CONFIG = 78
_SYSEXITS = {
    getattr(os, name): name for name in dir(os) if name.startswith("EX_") and isinstance(getattr(os, name), int)
}


def text_of(code: int) -> str:
    """Return what `launchctl error CODE` says."""
    return _TEXTS.get(code, "unknown error code")


def failed(what: str, code: int) -> str:
    """Return the lines of a verb that failed, such as `Bootstrap failed: 5: Input/output error`."""
    lines = f"{what} failed: {code}: {text_of(code)}"
    return f"{lines}\n{RICHER}" if code == INPUT_OUTPUT else lines


def exit_words(code: int) -> str:
    """Return an exit code as `launchctl print` shows it: `78: EX_CONFIG`, `1`."""
    name = _SYSEXITS.get(code)
    return f"{code}: {name}" if name and code >= os.EX_USAGE else str(code)
