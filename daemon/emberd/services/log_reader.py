"""Reading emberd's log back, from wherever this system keeps it."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections import deque
from typing import TYPE_CHECKING

from emberd.core import log_reading
from emberd.core.errors import EmberdError
from emberd.host.log_file import LogFollower, read_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from emberd.core.log_reading import Entry, Wanted
    from emberd.core.ports import EventWatch

DEFAULT_SPAN = "1d"
"""How far back the unified log is read if nobody says: the whole of it takes minutes."""
_END_LIMIT_S = 5.0
"""How long a reader that was told to end may take."""
_WORDS_OF_ERROR = 500


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
    lines: AsyncIterator[str] = follower.lines(watch_file)
    async for line in lines:
        entry = log_reading.from_json_line(line)
        if wanted.takes(entry):
            show(entry)


class SystemReader:
    """Asks the program that reads the system's log.

    Args:
        program: log(1) or journalctl(1).
        is_journal: it is journalctl.
    """

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
            yield from deque(self._run(log_reading.log_show(wanted, DEFAULT_SPAN), wanted), last)

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
        errors = tempfile.TemporaryFile()  # noqa: SIM115  # a pipe that nobody reads would block the program
        try:
            child = subprocess.Popen(
                [self._program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
            )
        except OSError as error:
            errors.close()
            raise LogStoreRefused(
                f"cannot run {self._program}: {error.strerror}", "Read the log file: emberd logs --source file."
            ) from error
        is_whole = self._is_journal
        try:
            assert child.stdout is not None  # noqa: S101  # as asked for above
            for line in child.stdout:
                if not self._is_journal and log_reading.is_last_of_unified(line):
                    is_whole = True
                    continue
                entry = (log_reading.from_journal if self._is_journal else log_reading.from_unified)(line)
                if entry is not None and wanted.takes(entry):
                    yield entry
            if child.wait(_END_LIMIT_S) or not (is_whole or is_endless):
                errors.seek(0)
                said = errors.read(_WORDS_OF_ERROR).decode("utf-8", "replace").strip()
                raise self._refused(said or f"it ended with exit code {child.returncode}")
        finally:
            self._end(child)
            errors.close()

    def _refused(self, said: str) -> LogStoreRefused:
        """Return what a person needs to know.

        macOS says `log: Could not open local log store: Operation not permitted`, exit code 64, to who is no
        administrator.
        """
        who = "the journal" if self._is_journal else "the unified log"
        return LogStoreRefused(
            f"this system did not let {who} be read: {said}",
            "Read the log file: emberd logs --source file."
            if not self._is_journal
            else "Join the group systemd-journal, or read the log file: emberd logs --source file.",
        )

    @staticmethod
    def _end(child: subprocess.Popen[str]) -> None:
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_END_LIMIT_S)
        if child.poll() is None:
            child.kill()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()
