"""What the engine's log, its options and emberd's own log tell `emberd doctor`. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_OFFLOADED = re.compile(r"offloaded (\d+)/\d+ layers to GPU")
"""llama.cpp, src/llama-model.cpp; a build that supports no GPU does not print it."""
_VERSION = re.compile(r"Welcome to KoboldCpp - Version (\S+)")
_LOADING = "llama_model_loader: loaded meta data"
_LOADED = "load_tensors:"
_NO_METAL = "failed to initialize Metal backend"
"""KoboldCPP issues 744 and 964."""


def printed_version(log: str) -> str:
    """Return the version that KoboldCPP has printed last, empty if none."""
    found = _VERSION.findall(log)
    return str(found[-1]) if found else ""


def last_start(log: str) -> str:
    """Return the part of the engine's log that tells of its last start, all of it if none is told of."""
    before, _, after = log.rpartition(_LOADING)
    version = printed_version(before)
    return f"Welcome to KoboldCpp - Version {version}\n{after}" if version else after


def has_gpu(log: str, *, is_mac: bool) -> bool | None:
    """Tell from the log of a start whether the GPU is used; None if nothing was loaded."""
    offloaded = _OFFLOADED.findall(log)
    if _NO_METAL in log:
        return False
    if offloaded:
        return int(offloaded[-1]) > 0
    return False if is_mac and _LOADED in log else None


def is_mapped(log: str) -> bool | None:
    """Tell whether the weights are pages of the file; None if the log does not tell (1.76 has no such line)."""
    found = re.findall(r"\(mmap = (true|false)\)", log)
    return found[-1] == "true" if found else None


def are_logs_kept(sinks: Sequence[str] | None, journal_persists: bool | None) -> bool | None:  # noqa: FBT001  # a fact
    """Tell whether what is logged survives a restart of the computer; of macOS' log info messages do not."""
    if sinks is None:
        return None
    if "file" in sinks:
        return True
    if "journal" in sinks:
        return journal_persists
    return False if "unified" in sinks else None
