"""The engine's output: a file that the engine writes and emberd follows.

It is a file and not a pipe, so that the engine outlives emberd and never blocks on a reader. Even with `--quiet`
KoboldCPP prints passwords and unparsable request bodies, so private lines are overwritten in place as soon as
they are read. This is safe, because a writer in append mode never touches old bytes.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_CHUNK_BYTES = 64 * 1024
_LONGEST_LINE_BYTES = 8 * 1024
"""Longer lines are cut, so that a person can read them."""
_LEAST_ROOM_BYTES = 64 * 1024
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
TAIL_LINES = 50
"""llama.cpp names the cause of a failed load within its last 50 lines (docs/engines.md)."""


def open_for_engine(path: Path) -> int:
    """Open the output file for an engine to write, in append mode, readable by its owner only."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


class OutputFollower:
    """Reads what an engine wrote since the last look.

    Args:
        path: the output file.
        is_private: returns True if a line must neither stay on disk nor be passed on.
        rotate_bytes: size at which the file is rotated.
        kept_files: rotated files to keep (`path.1` is the newest).
        reserve: reserves room on the disk, as Host.reserve_room does.
    """

    def __init__(
        self,
        path: Path,
        is_private: Callable[[str], bool],
        rotate_bytes: int,
        kept_files: int,
        reserve: Callable[[int, int], None] = lambda _descriptor, _size_bytes: None,
    ) -> None:
        self._path = path
        self.is_private = is_private
        self._rotate_bytes = rotate_bytes
        self._kept_files = kept_files
        self._reserve = reserve
        self._room_bytes = rotate_bytes
        self._offset = 0
        self._pending = b""
        self._is_cutting = False
        self._is_scrubbing = False
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    def set_limits(self, rotate_bytes: int, kept_files: int) -> None:
        """Take over new settings; they count from the next line on."""
        self._rotate_bytes, self._kept_files = rotate_bytes, kept_files
        self._room_bytes = rotate_bytes

    def make_room(self) -> bool:
        """Reserve the room that an engine's output needs, so that a full disk does not end the engine.

        With less than that to be had the file is rotated earlier; with next to nothing its content is given up.

        Returns:
            False if an engine could not write: the file cannot be made, or the disk has no room at all.
        """
        try:
            descriptor = open_for_engine(self._path)
        except OSError:
            return False
        try:
            if not self._find_room(descriptor):
                self._empty()
                return self._find_room(descriptor)
        except OSError:
            return False
        else:
            return True
        finally:
            os.close(descriptor)

    def _find_room(self, descriptor: int) -> bool:
        least = os.fstat(descriptor).st_size + _LEAST_ROOM_BYTES
        for size_bytes in (max(self._rotate_bytes + _LEAST_ROOM_BYTES, least), least + (1 << 20), least):
            try:
                self._reserve(descriptor, size_bytes)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    continue
                # This file system cannot reserve (NFS, FAT).
                free = os.fstatvfs(descriptor)
                if free.f_bavail * free.f_frsize < _LEAST_ROOM_BYTES:
                    return False
            # What an engine prints until the file is rotated fits too.
            self._room_bytes = min(size_bytes - _LEAST_ROOM_BYTES // 2, self._rotate_bytes)
            return True
        return False

    def _empty(self) -> None:
        os.truncate(self._path, 0)
        self._offset, self._pending = 0, b""

    def skip_to_end(self) -> None:
        """Begin at the end of the file; lines of an earlier engine are scrubbed, not reported."""
        self.read_lines()
        self.tail.clear()

    def read_lines(self) -> list[str]:
        r"""Return the complete lines written since the last call, without private ones.

        Progress bars use carriage returns, so both `\r` and `\n` end a line. Lines are also kept in `tail`.
        """
        lines: list[str] = []
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            return lines
        try:
            if os.fstat(descriptor).st_size < self._offset:  # somebody truncated it
                self._offset, self._pending = 0, b""
            while chunk := os.pread(descriptor, _CHUNK_BYTES, self._offset):
                self._offset += len(chunk)
                lines += self._take(descriptor, chunk)
        finally:
            os.close(descriptor)
        self.tail.extend(lines)
        if self._offset >= self._room_bytes and not self._pending:
            self._rotate()
        return lines

    def last_words(self, count: int) -> list[str]:
        """Return the last lines for a person, an unfinished one included."""
        unfinished = self.unfinished
        lines = [*self.tail, *([unfinished] if unfinished else [])]
        return lines[-count:]

    @property
    def unfinished(self) -> str:
        """A last line without a line end, empty if there is none or it is private."""
        return "" if self._is_scrubbing else self._pending.decode("utf-8", "replace").strip()

    def _take(self, descriptor: int, chunk: bytes) -> list[str]:
        """Split a chunk into lines, scrubbing private ones in the file."""
        lines: list[str] = []
        end = self._offset - len(chunk)
        for piece in chunk.replace(b"\r", b"\n").splitlines(keepends=True):
            start, end = end, end + len(piece)
            is_complete = piece.endswith(b"\n")
            self._pending += piece.rstrip(b"\n")
            text = self._pending.decode("utf-8", "replace").strip()
            if not self._is_cutting and text and self.is_private(text):
                self._is_scrubbing = True
                start -= len(self._pending) - len(piece.rstrip(b"\n"))
            if self._is_scrubbing:
                width = end - start - (1 if is_complete else 0)
                os.pwrite(descriptor, b"*" * width, start)
            if is_complete:
                if text and not self._is_cutting and not self._is_scrubbing:
                    lines.append(text[:_LONGEST_LINE_BYTES])
                self._pending, self._is_cutting, self._is_scrubbing = b"", False, False
            elif len(self._pending) > _LONGEST_LINE_BYTES:
                if not self._is_scrubbing and not self._is_cutting:
                    lines.append(text[:_LONGEST_LINE_BYTES])
                self._pending, self._is_cutting = b"", True
        return lines

    def _rotate(self) -> None:
        """Copy what was read (and scrubbed) aside, and empty the file; its writer goes on at the new end.

        Lines written between the last read and the truncation, some microseconds, are lost.
        """
        for number in range(self._kept_files, 1, -1):
            older = self._path.with_name(f"{self._path.name}.{number - 1}")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{number}"))
        if self._kept_files:
            newest = self._path.with_name(f"{self._path.name}.1")
            try:
                self._copy(newest)
            except OSError:
                # On a full disk the file must not go on growing: its content is given up.
                newest.unlink(missing_ok=True)
        self._empty()
        self.make_room()

    def _copy(self, target: Path) -> None:
        """Copy no further than was read: later bytes may hold private lines."""
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as copy, self._path.open("rb") as source:
            left = self._offset
            while left and (chunk := source.read(min(_CHUNK_BYTES, left))):
                copy.write(chunk)
                left -= len(chunk)
