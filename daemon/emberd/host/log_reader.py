"""Reading emberd's log back: its file, across rotations, or the system's log by the system's own program."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
from collections import deque
from typing import IO, TYPE_CHECKING

from emberd.core import log_reading
from emberd.core.errors import EmberdError
from emberd.host.log_sinks import rotated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from emberd.core.log_reading import Entry, Wanted
    from emberd.core.ports import EventWatch

READ_THE_FILE = "Read the log file: emberd logs --source file."
_DEFAULT_SPAN = "1d"
"""How far back the unified log is read if nobody says: the whole of it takes minutes."""
_END_LIMIT_S = 5.0
"""How long a reader that was told to end may take."""
_WORDS_OF_ERROR = 500
_LOOK_AGAIN_S = 1.0
"""A watch follows a file, not its name: a rotation is seen by looking."""
_MOST_LOST_IN_ROTATION = 1000
"""Rotated files that a follower looks for; more are never kept."""


class LogStoreRefused(EmberdError):
    """The system did not let this user read its log, or has no program for it."""


def file_entries(path: Path, wanted: Wanted) -> Iterator[Entry]:
    """Yield the wanted entries of the file log and its rotated files, the oldest first.

    Raises:
        EmberdError: there is no such file, or it cannot be read.
    """
    if not path.exists():
        raise EmberdError(
            f"there is no log yet: {path}", "It is written while emberd runs: emberd run. Or log.file is another."
        )
    since_s = None if wanted.since is None else wanted.since.timestamp()
    try:
        for line in read_lines(path, since_s):
            entry = log_reading.from_json_line(line)
            if wanted.takes(entry):
                yield entry
    except OSError as error:
        raise EmberdError(f"cannot read {path}: {error.strerror}", "Mend its permissions.") from error


async def follow_file(
    path: Path,
    wanted: Wanted,
    last: int | None,
    watch_file: Callable[[Path], EventWatch],
    show: Callable[[Entry], None],
) -> None:
    """Show the last entries, then every new one, for ever."""
    follower = LogFollower(path)
    if path.exists():
        for entry in deque(file_entries(path, wanted), last):
            show(entry)
    async for line in follower.lines(watch_file):
        entry = log_reading.from_json_line(line)
        if wanted.takes(entry):
            show(entry)


def read_lines(path: Path, since_s: float | None = None) -> Iterator[str]:
    """Yield the lines of the file and its rotated ones, the oldest first; files last written before are left out.

    Raises:
        OSError: one cannot be read.
    """
    endings = [other.name.removeprefix(f"{path.name}.") for other in path.parent.glob(f"{path.name}.*")]
    numbers = sorted((int(ending) for ending in endings if ending.isdecimal()), reverse=True)
    for each in (*(path.with_name(f"{path.name}.{number}") for number in numbers), path):
        with contextlib.suppress(FileNotFoundError):  # rotated away meanwhile
            if since_s is not None and each.stat().st_mtime < since_s:
                continue
            with each.open(encoding="utf-8", errors="replace") as file:
                yield from (line.rstrip("\n") for line in file)


class LogFollower:
    """Reads what is appended to a log file, across its rotations; the file need not exist yet."""

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


class SystemReader:
    """Asks the program that reads the system's log: log(1), or journalctl(1) where `is_journal`."""

    def __init__(self, program: str, *, is_journal: bool) -> None:
        self._program = program
        self._is_journal = is_journal

    def entries(self, wanted: Wanted, last: int | None) -> Iterator[Entry]:
        """Yield the wanted entries, the oldest first.

        Raises:
            LogStoreRefused: the program is missing, refused, or ended before its answer was whole.
        """
        if self._is_journal:
            yield from self._run(log_reading.journalctl(wanted, lines=last, follow=False), wanted)
        else:
            yield from deque(self._run(log_reading.log_show(wanted, _DEFAULT_SPAN), wanted), last)

    def follow(self, wanted: Wanted, last: int | None) -> Iterator[Entry]:
        """Yield the last entries, then every new one, for ever.

        Raises:
            LogStoreRefused: the program is missing, refused, or ended.
        """
        if self._is_journal:
            yield from self._run(log_reading.journalctl(wanted, lines=last, follow=True), wanted, is_endless=True)
        else:
            yield from self.entries(wanted, last)
            yield from self._run(log_reading.log_stream(wanted), wanted, is_endless=True)

    def newest(self, wanted: Wanted) -> Entry | None:
        """Return the newest wanted entry, None if there is none or the log cannot be read."""
        try:
            return next(iter(deque(self.entries(wanted, 1), 1)), None)
        except LogStoreRefused:
            return None

    def _run(self, arguments: list[str], wanted: Wanted, *, is_endless: bool = False) -> Iterator[Entry]:
        read = log_reading.from_journal if self._is_journal else log_reading.from_unified
        is_whole = self._is_journal or is_endless
        # A pipe that nobody reads would block the program: its errors go to a file.
        with tempfile.TemporaryFile() as errors, self._start(arguments, errors) as child:
            try:
                for line in child.stdout or ():
                    is_whole = is_whole or log_reading.is_last_of_unified(line)
                    entry = read(line)
                    if entry is not None and wanted.takes(entry):
                        yield entry
                if child.wait(_END_LIMIT_S) or not is_whole:
                    errors.seek(0)
                    said = errors.read(_WORDS_OF_ERROR).decode("utf-8", "replace").strip()
                    raise self._refused(said or f"it ended with exit code {child.returncode}")
            finally:
                if child.poll() is None:
                    child.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(_END_LIMIT_S)
                child.kill()  # does nothing to one that has ended

    def _start(self, arguments: list[str], errors: IO[bytes]) -> subprocess.Popen[str]:
        try:
            return subprocess.Popen(
                [self._program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise LogStoreRefused(f"cannot run {self._program}: {error.strerror}", READ_THE_FILE) from error

    def _refused(self, said: str) -> LogStoreRefused:
        """Return what a person needs to know.

        macOS says `log: Could not open local log store: Operation not permitted`, exit code 64, to who is no
        administrator.
        """
        who, remedy = "the unified log", READ_THE_FILE
        if self._is_journal:
            who = "the journal"
            remedy = "Join the group systemd-journal, or read the log file: emberd logs --source file."
        return LogStoreRefused(f"this system did not let {who} be read: {said}", remedy)
