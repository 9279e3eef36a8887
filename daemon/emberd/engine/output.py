"""The engine's output: a file that the engine writes and emberd follows.

It is a file and not a pipe, so that the engine outlives emberd and never blocks on a reader. Even with `--quiet`
KoboldCPP prints passwords and unparsable request bodies, so private lines are overwritten in place as soon as
they are read. This is safe, because a writer in append mode never touches old bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from typing import TYPE_CHECKING

from emberd.engine.output_lines import LineFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_CHUNK_BYTES = 64 * 1024
_MOST_UNREAD_BYTES = 1024 * 1024
"""An engine that is so far ahead prints faster than emberd can read."""
_LONGEST_SKIP_S = 5.0
_LEAST_ROOM_BYTES = 64 * 1024
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
TAIL_LINES = 50
"""llama.cpp names the cause of a failed load within its last 50 lines (docs/engines.md)."""


def open_for_engine(path: Path) -> int:
    """Open the output file for an engine to write, in append mode, readable by its owner only."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _identity(descriptor: int) -> tuple[int, int]:
    """Return what tells a file from another one at the same path."""
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino


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
        self.lines = LineFilter(is_private)
        self._rotate_bytes = rotate_bytes
        self._kept_files = kept_files
        self._reserve = reserve
        self._room_bytes = rotate_bytes
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.has_more = False
        """Whether something was left unread by the last call."""
        self.has_given_up = False
        """Whether output was given up unread; it is for the caller to set it back."""

    def set_limits(self, rotate_bytes: int, kept_files: int) -> None:
        """Take over new settings; they count from the next line on."""
        self._rotate_bytes, self._kept_files = rotate_bytes, kept_files
        self._room_bytes = rotate_bytes

    def make_room(self) -> bool:
        """Reserve the room that an engine's output needs, so that a full disk does not end the engine.

        From now on it is the engine's file; no other one that takes its path is read. With less than that room to
        be had it is rotated earlier; with next to nothing its content is given up.

        Returns:
            False if an engine could not write: the file cannot be made, or the disk has no room at all.
        """
        try:
            descriptor = open_for_engine(self._path)
        except OSError:
            return False
        try:
            self._begin(descriptor)
            return self._make_room(descriptor)
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def _begin(self, descriptor: int) -> None:
        """Read another file than the last one from its start."""
        if _identity(descriptor) != self._file:
            self._file, self._offset, self.lines = _identity(descriptor), 0, LineFilter(self.lines.is_private)

    def _make_room(self, descriptor: int) -> bool:
        if self._find_room(descriptor):
            return True
        self._cut(descriptor, 0)
        return self._find_room(descriptor)

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

    def _cut(self, descriptor: int, size_bytes: int) -> None:
        """Keep the beginning of the file only; its writer goes on at the new end. What is unread is lost."""
        if os.fstat(descriptor).st_size > self._offset:
            self.lines.lose()
        os.ftruncate(descriptor, size_bytes)
        self._offset = size_bytes

    def skip_to_end(self) -> None:
        """Begin at what is now the end of the file; lines of an earlier engine are scrubbed, not reported.

        This takes 5 s at most; what is unread then is given up: much can have come while no emberd read.
        """
        deadline_s = time.monotonic() + _LONGEST_SKIP_S
        with self._opened() as descriptor:
            self._begin(descriptor)
            end = os.fstat(descriptor).st_size
            while self._offset < end and time.monotonic() < deadline_s:
                self._read(descriptor)
            self._tidy(descriptor, end, 0)
        self.tail.clear()

    def read_lines(self, most_unread_bytes: int = _MOST_UNREAD_BYTES) -> list[str]:
        """Return complete lines written since the last call, without private ones; they are also kept in `tail`.

        A call reads at most 64 KiB or 1,000 lines, so that an engine that prints much does not stop emberd;
        `has_more` tells whether there is more.

        Args:
            most_unread_bytes: if more than this is unread then, it is given up.

        Raises:
            FileNotFoundError: the file is gone, or another one has its path.
            OSError: it cannot be read or scrubbed.
        """
        self.has_more = False
        with self._opened() as descriptor:
            if self._file not in {None, _identity(descriptor)}:
                raise FileNotFoundError(errno.ENOENT, "another file has its path", str(self._path))
            end = os.fstat(descriptor).st_size
            lines = self._read(descriptor)
            self.tail.extend(lines)
            self._tidy(descriptor, end, most_unread_bytes)
        return lines

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            if os.fstat(descriptor).st_size < self._offset:  # somebody truncated it
                self._offset = 0
            yield descriptor
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int) -> list[str]:
        chunk = os.pread(descriptor, _CHUNK_BYTES, self._offset)
        self._offset, lines, private = self.lines.take(chunk, self._offset)
        for start, end in private:
            os.pwrite(descriptor, b"*" * (end - start), start)
        return lines

    def _tidy(self, descriptor: int, end: int, most_unread_bytes: int) -> None:
        """Give up what is unread if it is too much, and rotate a file that was read to its end."""
        self.has_more = self._offset < end
        if end - self._offset > most_unread_bytes:
            self.has_more, self.has_given_up = False, True
            self._cut(descriptor, self._offset)
            self._make_room(descriptor)
        if self._offset >= self._room_bytes and not self.has_more:
            self._rotate(descriptor)

    def last_words(self, count: int) -> list[str]:
        """Return the last lines for a person, an unfinished one included."""
        lines = [*self.tail, *([self.unfinished] if self.unfinished else [])]
        return lines[-count:]

    @property
    def unfinished(self) -> str:
        """A last line without a line end, empty if there is none or it is private."""
        return self.lines.unfinished

    def _rotate(self, descriptor: int) -> None:
        """Copy what was read (and scrubbed) aside, and empty the file.

        A line that has not ended goes on in the emptied file. Its beginning may turn out to be private, so it is
        kept in memory only. (KoboldCPP ends a line when it begins the next one.) Lines written between the last
        read and the truncation, some milliseconds, are lost.
        """
        for number in range(self._kept_files, 1, -1):
            older = self._path.with_name(f"{self._path.name}.{number - 1}")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{number}"))
        if self._kept_files:
            newest = self._path.with_name(f"{self._path.name}.1")
            try:
                self._copy(descriptor, newest)
            except OSError:
                # On a full disk the file must not go on growing: its content is given up.
                newest.unlink(missing_ok=True)
        self._cut(descriptor, 0)
        self._make_room(descriptor)

    def _copy(self, descriptor: int, target: Path) -> None:
        """Copy no further than whole lines were read: later bytes may be private."""
        end = max(self._offset - len(self.lines.pending), 0)
        made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(made, "wb") as copy:
            at = 0
            while chunk := os.pread(descriptor, min(_CHUNK_BYTES, end - at), at):
                copy.write(chunk)
                at += len(chunk)
