"""emberd's own log file: written, rotated, followed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from typing import TYPE_CHECKING

from emberd.host.files import PRIVATE_FILE_MODE, PRIVATE_FOLDER_MODE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from emberd.core.ports import EventWatch

_LOOK_AGAIN_S = 1.0
"""A watch follows a file, not its name: a rotation is seen by looking."""
_MOST_LOST_IN_ROTATION = 1000
"""Rotated files that a follower looks for; more are never kept."""


class RotatingFile:
    """Appends lines to a file that is never larger than was said, and whose owner alone may read it.

    A full disk, a folder that went away or lost its permissions: lines are lost and counted in `lost`, nothing is
    raised, and the next line tries again. Others may move or remove the file at any time.

    Args:
        path: the file; its folder is made.
        rotate_bytes: size at which it becomes `path.1`.
        kept_files: rotated files to keep.
    """

    def __init__(self, path: Path, rotate_bytes: int, kept_files: int) -> None:
        self._path = path
        self._rotate_bytes = rotate_bytes
        self._kept_files = kept_files
        self._descriptor = -1
        self._is_torn = False
        self.lost = 0
        self.error = ""

    def write(self, text: str) -> bool:
        """Append one line; tells whether it is in the file."""
        data = (b"\n" if self._is_torn else b"") + text.encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._make_ready(len(data))
            written = os.write(self._descriptor, data)
        except OSError as error:
            self._lose(error.strerror or str(error))
            return False
        if written < len(data):  # the disk is full, or RLIMIT_FSIZE (write(2))
            self._is_torn = True
            self._lose("No space left on device")
            return False
        self._is_torn = False
        return True

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lose(self, reason: str) -> None:
        self.lost += 1
        self.error = reason

    def _make_ready(self, more_bytes: int) -> None:
        if self._descriptor >= 0 and not self._is_still_there(os.fstat(self._descriptor)):
            self.close()
        if self._descriptor < 0:
            self._open()
        seen = os.fstat(self._descriptor)
        if seen.st_size and seen.st_size + more_bytes > self._rotate_bytes and stat.S_ISREG(seen.st_mode):
            self.close()
            self._rotate()
            self._open()

    def _is_still_there(self, seen: os.stat_result) -> bool:
        """Tell whether the name still leads to the open file: newsyslog and people move files."""
        try:
            return os.path.samestat(seen, self._path.stat())
        except FileNotFoundError:
            return False

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER_MODE)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, PRIVATE_FILE_MODE)
        if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            with contextlib.suppress(OSError):  # it may be somebody else's, who let us write
                os.fchmod(self._descriptor, PRIVATE_FILE_MODE)
        self._is_torn = False

    def _rotate(self) -> None:
        """Rename the files by one; where that is refused, give up the content: the file must not grow."""
        try:
            for number in range(self._kept_files, 1, -1):
                with contextlib.suppress(FileNotFoundError):
                    rotated(self._path, number - 1).replace(rotated(self._path, number))
            if self._kept_files:
                self._path.replace(rotated(self._path, 1))
            else:
                self._path.unlink()
        except OSError:
            os.truncate(self._path, 0)


def rotated(path: Path, number: int) -> Path:
    """Return the name of a rotated file; 1 is the newest."""
    return path.with_name(f"{path.name}.{number}") if number else path


def _all_files(path: Path) -> list[Path]:
    """Return the file and its rotated ones, the oldest first."""
    found = []
    for other in path.parent.glob(f"{path.name}.*"):
        number = other.name.removeprefix(f"{path.name}.")
        if number.isdecimal():
            found.append((int(number), other))
    return [other for _, other in sorted(found, reverse=True)] + ([path] if path.exists() else [])


def read_lines(path: Path, since_s: float | None = None) -> Iterator[str]:
    """Yield the lines of the file and its rotated ones, the oldest first; files last written before are left out.

    Raises:
        OSError: one cannot be read.
    """
    for each in _all_files(path):
        with contextlib.suppress(FileNotFoundError):  # rotated away meanwhile
            if since_s is not None and each.stat().st_mtime < since_s:
                continue
            with each.open(encoding="utf-8", errors="replace") as file:
                yield from (line.rstrip("\n") for line in file)


class LogFollower:
    """Reads what is appended to a log file, across its rotations.

    Args:
        path: the file; it need not exist yet.
        from_beginning: yield what is there already.
    """

    def __init__(self, path: Path, *, from_beginning: bool = False) -> None:
        self._path = path
        self._descriptor = -1
        self._pending = b""
        self._open(path)
        if self._descriptor >= 0 and not from_beginning:
            os.lseek(self._descriptor, 0, os.SEEK_END)

    async def lines(self, watch_file: Callable[[Path], EventWatch]) -> AsyncIterator[str]:
        """Yield line after line for ever; woken by a watch of the file, where there can be one."""
        watch: EventWatch | None = None
        try:
            while True:
                found, has_changed = self.read()
                for line in found:
                    yield line
                if has_changed and watch is not None:
                    watch.close()
                    watch = None
                if watch is None:
                    with contextlib.suppress(OSError):
                        watch = watch_file(self._path)
                        continue  # what came before the watch stood
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_AGAIN_S):
                        await (watch.wait() if watch is not None else asyncio.sleep(_LOOK_AGAIN_S * 2))
        finally:
            if watch is not None:
                watch.close()
            self.close()

    def read(self) -> tuple[list[str], bool]:
        """Return the whole lines since the last call, and whether the file is another one than before."""
        found = self._read_open()
        files = self._newer_files()
        for each in files:
            self.close()
            self._open(each)
            found += self._read_open()
        return found, bool(files)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._pending = b""

    def _newer_files(self) -> list[Path]:
        """Return the files written after the open one, the oldest first."""
        if self._descriptor < 0:
            return [self._path] if self._path.exists() else []
        mine = os.fstat(self._descriptor)
        newer: list[Path] = []
        for number in range(_MOST_LOST_IN_ROTATION):
            each = rotated(self._path, number)
            try:
                if os.path.samestat(mine, each.stat()):
                    return newer[::-1]
            except FileNotFoundError:
                if number:
                    break
                continue
            newer.append(each)
        # Its name is gone: removed, or rotated out of what is kept. The current file is what goes on.
        return [self._path] if self._path in newer else []

    def _read_open(self) -> list[str]:
        if self._descriptor < 0:
            return []
        if os.lseek(self._descriptor, 0, os.SEEK_CUR) > os.fstat(self._descriptor).st_size:
            os.lseek(self._descriptor, 0, os.SEEK_SET)  # somebody emptied it
            self._pending = b""
        while chunk := os.read(self._descriptor, 1 << 16):
            self._pending += chunk
        *whole, self._pending = self._pending.split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]
