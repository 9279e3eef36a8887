"""Writing files so that a crash or a full disk loses nothing."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from emberd.core.errors import StateUnusable

if TYPE_CHECKING:
    from pathlib import Path

PRIVATE_FILE_MODE = 0o600
PRIVATE_FOLDER_MODE = 0o700
_BLOCK_BYTES = 512
"""Unit of st_blocks (stat(2))."""


def write_atomically(path: Path, text: str, mode: int = PRIVATE_FILE_MODE, *, may_write_over: bool = False) -> None:
    """Replace `path` with `text`, of exactly this mode: temporary file, fsync, rename, fsync of the folder.

    With `may_write_over`, a text that fits into the old file's blocks is written over the old one on a full disk: a
    record that is out of date may cost more than one that a power cut could tear.

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
        if error.errno in {errno.ENOSPC, errno.EDQUOT} and may_write_over and _write_over(path, text.encode()):
            return
        raise StateUnusable(
            f"cannot write {path}: {error.strerror}", "Free space or mend the folder's permissions."
        ) from error


def _write_over(path: Path, content: bytes) -> bool:
    """Write over a file that has enough blocks; return False if it has not."""
    try:
        descriptor = os.open(path, os.O_WRONLY)
    except OSError:
        return False
    try:
        if len(content) > os.fstat(descriptor).st_blocks * _BLOCK_BYTES:
            return False
        is_whole = os.pwrite(descriptor, content, 0) == len(content)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    except OSError:
        return False
    else:
        return is_whole
    finally:
        os.close(descriptor)


def has_text(path: Path, text: str) -> bool:
    """Return True if a file holds exactly this text."""
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


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
        with contextlib.suppress(OSError):  # not ours to change, or read-only
            path.chmod(PRIVATE_FOLDER_MODE)
    except OSError as error:
        raise StateUnusable(
            f"cannot use the state directory {path}: {error.strerror}",
            "Mend its permissions, or set state.directory in the settings.",
        ) from error
    return path
