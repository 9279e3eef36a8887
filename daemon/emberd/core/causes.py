"""Causes that can pass with no change of the settings: a full disk, a volume that is away, too little memory."""

from __future__ import annotations

import errno
import re
import signal
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.errors import ConfigError, EngineNotUsable, ModelError, StateUnusable

if TYPE_CHECKING:
    from emberd.core.errors import EmberdError

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
"""Of open files, memory and processes (fork(2), open(2))."""
LEAST_ROOM_BYTES = 64 * 1024
"""With less than this free a disk is full: an engine's start prints some 30 KiB."""
FIRST_RETRY_S = 15.0
LONGEST_RETRY_S = 900.0
_LONGEST_REST_S = 60.0
_MOST_DOUBLINGS = 10
"""More would only overflow."""


class Kind(Enum):
    """What has to change before another try makes sense."""

    DISK = "disk"
    """The state directory must be writable and have room."""
    FILES = "files"
    """The model, the engine's program or a file that they need."""
    MEMORY = "memory"
    """Memory; nobody can tell when there is enough."""
    PORT = "port"
    """The engine's port; the next start chooses another one."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why the engine does not run, with what a person can do about it."""

    kind: Kind
    message: str
    remedy: str


_MEMORY_REMEDY = "Close programs, or choose a smaller model or context; emberd tries again by itself."
_SAID = (
    (
        re.compile(r"No space left on device|Disk quota exceeded"),
        Kind.DISK,
        "Make room; emberd tries again at once.",
    ),
    (re.compile(r"Read-only file system"), Kind.DISK, "Make it writable; emberd tries again at once."),
    (
        re.compile(r"[Oo]ut of memory|Cannot allocate memory|MemoryError|unable to allocate"),
        Kind.MEMORY,
        _MEMORY_REMEDY,
    ),
    (
        re.compile(r"Address already in use|couldn't bind"),
        Kind.PORT,
        "emberd tries again by itself, on another port.",
    ),
    (
        re.compile(
            r"(?:tensor \S+ data is not within the file bounds|error loading model|failed to load model)[^\n]*"
        ),
        Kind.FILES,
        "Bring the whole file; emberd tries again when it changes.",
    ),
)
"""strerror(3) of ENOSPC, EDQUOT, EROFS, ENOMEM, EADDRINUSE, and llama.cpp's own words (ggml-backend, server,
llama-model-loader)."""


def of_error(error: EmberdError) -> Cause | None:
    """Return the passing cause behind a start that was refused, None if only a person can mend it."""
    if isinstance(error, StateUnusable):
        return Cause(Kind.DISK, error.message, error.remedy)
    if isinstance(error, ModelError | EngineNotUsable | ConfigError):  # its files are read at each start
        return Cause(Kind.FILES, error.message, error.remedy)
    return None


def of_os_error(error: OSError) -> Cause:
    """Return the cause of a start that the system refused: what it refuses now it may grant later."""
    if error.errno in SHORTAGES:
        remedy = "Close programs, or raise the limit of open files or processes; emberd tries again by itself."
        return Cause(Kind.MEMORY, error.strerror or str(error), remedy)
    return Cause(Kind.DISK, str(error), "Make the disk writable and make room; emberd tries again by itself.")


def of_exit(
    status: int | None, last_words: str, missing_model: str | None, full_disk: Cause | None
) -> Cause | None:
    """Return the passing cause of an engine's end, None if none is seen.

    Args:
        status: exit code or negative signal number, None if unknown.
        last_words: what it printed last.
        missing_model: why its model cannot be read now, None if it can.
        full_disk: the disk that is full now, None if none is.
    """
    if missing_model is not None:
        return Cause(Kind.FILES, missing_model, "Bring it back; emberd tries again at once.")
    for pattern, kind, remedy in _SAID:
        found = pattern.search(last_words)
        if found:
            return full_disk if full_disk and kind is Kind.DISK else Cause(kind, found[0], remedy)
    if status == -signal.SIGKILL:
        return Cause(Kind.MEMORY, "the system may have killed it for memory", _MEMORY_REMEDY)
    return full_disk if status is None or status >= 0 else None


def retry_after_s(retries: int) -> float:
    """Return when to try again although the cause seems to be there still, after so many tries, in seconds."""
    return min(FIRST_RETRY_S * 2.0 ** min(retries, _MOST_DOUBLINGS), LONGEST_RETRY_S)


def look_after_s(retries: int) -> float:
    """Return when to begin to look whether the cause has gone, in seconds: soon, but not for ever in a circle."""
    return min(2.0 ** min(retries, _MOST_DOUBLINGS), _LONGEST_REST_S)
