"""Writing files so that a crash or a full disk loses nothing, and the lock of one daemon."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from emberd.core.errors import AlreadyRunning, StateUnusable

if TYPE_CHECKING:
    from pathlib import Path

PRIVATE_FILE_MODE = 0o600
PRIVATE_FOLDER_MODE = 0o700


def write_atomically(path: Path, text: str, mode: int = PRIVATE_FILE_MODE) -> None:
    """Replace `path` with `text`, of exactly this mode: temporary file, fsync, rename, fsync of the folder.

    Raises:
        StateUnusable: the folder is not writable or the disk is full; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE_FILE_MODE)
        try:
            os.fchmod(descriptor, mode)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StateUnusable(
            f"cannot write {path}: {error.strerror}", "Free space or mend the folder's permissions."
        ) from error


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` that a killed `write_atomically` has left."""
    with contextlib.suppress(OSError):
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)


def make_private_folder(path: Path) -> Path:
    """Make a folder that only its owner may enter, and its parents with their usual mode.

    Raises:
        StateUnusable: it cannot be made, or belongs to somebody else.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER_MODE)
        if path.stat().st_uid != os.geteuid():
            raise StateUnusable(f"{path} belongs to another user", "Set state.directory to a folder of your own.")
        with contextlib.suppress(PermissionError):
            path.chmod(PRIVATE_FOLDER_MODE)
    except OSError as error:
        raise StateUnusable(
            f"cannot use the state directory {path}: {error.strerror}",
            "Mend its permissions, or set state.directory in the settings.",
        ) from error
    return path


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
