"""One daemon for each state directory."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from emberd.core.errors import AlreadyRunning, StateUnusable
from emberd.host.files import PRIVATE_FILE_MODE

if TYPE_CHECKING:
    from pathlib import Path


def holder_of(path: Path) -> int | None:
    """Return the process that holds the lock, None if nobody does or it cannot be told; nothing is made."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.read(descriptor, 32).decode(errors="replace").strip()
        return int(text) if text.isdecimal() else None
    finally:
        os.close(descriptor)
    return None


def hold_lock(path: Path) -> int:
    """Take the lock for the life of this process and return its descriptor; the kernel frees it at any end.

    Raises:
        AlreadyRunning: another emberd has it.
        StateUnusable: the file cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE_MODE)
    except OSError as error:
        raise StateUnusable(f"cannot open {path}: {error.strerror}", "Mend its permissions.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise AlreadyRunning(
            f"emberd is already running here (pid {holder}, state directory {path.parent})",
            "`emberd status` shows it; `emberd stop` ends it. A second one needs its own state.directory and port.",
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
