"""The engine's output as it comes: loading progress, memory, token counts, and that it cannot serve."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from emberd.core.turn import UNTOLD
from emberd.engine.llama_log import find_cause
from emberd.engine.output import OutputFollower, open_for_engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from emberd.core.ports import Engine, Host
    from emberd.core.settings import LogSettings
    from emberd.core.turn import PromptCounts
    from emberd.core.types import LoadProgress

_REST_S = 0.02
"""Pause between two reads: an engine that prints much wakes emberd fifty times a second, not ten thousand."""
_POLL_S = 1.0
_MOST_READS = 32
"""For the rest that an engine leaves, up to 2 MiB."""
_MAKE_ROOM = "Make room; the engine's output is kept from its next start on."
_TAIL_IN_MESSAGE = 8


class EngineOutput:
    """Follows the file that the engine writes its output to.

    Args:
        note: takes every line, for what it tells of memory and model.
        cannot_serve: told, with the last words, when the engine says that it will never serve.
    """

    def __init__(
        self,
        path: Path,
        settings: LogSettings,
        engine: Engine,
        host: Host,
        log: FilteringBoundLogger,
        note: Callable[[str], None],
        cannot_serve: Callable[[str], None],
    ) -> None:
        self._path = path
        self._engine = engine
        self._host = host
        self._log = log
        self._note = note
        self._cannot_serve = cannot_serve
        self._follower = OutputFollower(path, engine.is_private, *_limits(settings), host.reserve_room)
        self._trouble = ""
        self._counts, self._old_words = UNTOLD, ""
        self.progress: LoadProgress | None = None
        """Loading progress, None before and after loading."""
        self.has_progressed = asyncio.Event()
        """Set when a step of loading is done."""

    def use(self, engine: Engine, settings: LogSettings) -> None:
        """Take over new settings; they count from the next line on."""
        if engine.name != self._engine.name:
            # Else the filter stays that there is: it knows whether a reply is being printed.
            self._follower.lines.is_private = engine.is_private
        self._engine = engine
        self._follower.set_limits(*_limits(settings))

    def skip_to_end(self) -> None:
        """Begin at the end of the file; lines of an earlier engine are scrubbed, not reported."""
        with contextlib.suppress(OSError):  # what cannot be scrubbed now is scrubbed before it is read
            self._follower.skip_to_end()
        self.progress = None

    def adopt(self) -> None:
        """Go on with the file of an engine that an earlier emberd started; one that is gone is not made again."""
        self.skip_to_end()
        with contextlib.suppress(OSError):  # without permission; the first read says so
            if self._path.exists():
                self.make_room()

    def open_for_engine(self) -> int:
        """Return a descriptor for an engine to write to, and on which it cannot fail.

        Without room for a file that is the null device: an engine that serves is worth more than its output.
        """
        return open_for_engine(self._path) if self.make_room() else os.open(os.devnull, os.O_WRONLY)

    def make_room(self) -> bool:
        """Reserve room for what the engine prints; return False, and say so, if there is none."""
        has_room = self._follower.make_room()
        self._say("" if has_room else f"no room or no permission at {self._path}")
        return has_room

    @property
    def said(self) -> str:
        """The last words of the engine, of which some may tell why it ended."""
        return "\n".join(self._follower.last_words(_TAIL_IN_MESSAGE))

    @property
    def has_said_anything(self) -> bool:
        """Whether the engine has printed a line."""
        return bool(self._follower.tail)

    @property
    def cause(self) -> str | None:
        """The cause of a failure that the engine itself names, None if it names none."""
        return find_cause(self._follower.tail)

    def with_last_words(self, text: str) -> str:
        """Return the text with the engine's last lines below it."""
        return "\n".join([text, *(f"  | {line}" for line in self._follower.last_words(_TAIL_IN_MESSAGE))])

    async def follow(self) -> None:
        """Read what comes, until cancelled."""
        try:
            watch = self._host.watch_file(self._path)
        except OSError as error:
            # The user's inotify instances can be used up by other programs; then the file is polled.
            self._log.warning("output_polled", error=str(error))
            watch = None
        try:
            while True:
                self.read()
                await asyncio.sleep(_REST_S)
                if not self._follower.has_more:
                    await (watch.wait() if watch is not None else asyncio.sleep(_POLL_S))
        finally:
            if watch is not None:
                watch.close()

    async def read_rest(self) -> None:
        """Read what an engine that has ended has left, and give up what is too much; others may work between."""
        for _ in range(_MOST_READS):
            self.read()
            if not self._follower.has_more:
                return
            await asyncio.sleep(0)
        self.read(is_last=True)

    def read(self, *, is_last: bool = False) -> None:
        """Read some of what has come since the last time; after the last read nothing is left unread.

        A broken disk or too many open files must not end an engine.
        """
        try:
            lines = self._follower.read_lines(0) if is_last else self._follower.read_lines()
        except FileNotFoundError:
            # Or there was no room for it: that has been said.
            self._say(self._trouble or f"{self._path} was removed", "It is made again at the engine's next start.")
            return
        except OSError as error:
            self._say(error.strerror or str(error))
            return
        if self._follower.has_given_up:
            self._follower.has_given_up = False
            self._say(
                "the engine prints faster than emberd can read",
                "Look into engine.log for the lines that it repeats; emberd leaves out what it cannot read.",
            )
        for line in lines:
            self._note(line)
            if line != self._old_words:
                self._note_counts(line)
            self._old_words = ""
            self._log.info("engine_line", category="engine", line=line)
            progress = self._engine.read_progress(line)
            if progress is not None and progress != self.progress:
                self.progress = progress
                self.has_progressed.set()
                self._log.info("engine_loading", category="engine", phase=progress.phase, detail=progress.detail)
            if self._engine.is_fatal(line):
                self._cannot_serve(self.with_last_words("the engine says that it cannot serve"))

    def forget_counts(self) -> None:
        """Forget earlier counts: a generation is about to be sent."""
        self.read()
        # KoboldCPP ends a line only when it begins the next one.
        self._counts, self._old_words = UNTOLD, self._follower.unfinished

    def counts(self) -> PromptCounts:
        """Return the counts of the generation that has just ended."""
        self.read()
        told = None if self._old_words else self._engine.counts_in_line(self._follower.unfinished)
        return self._counts if told is None else told.after(self._counts)

    def _note_counts(self, line: str) -> None:
        told = self._engine.counts_in_line(line)
        self._counts = self._counts if told is None else told.after(self._counts)

    def _say(self, trouble: str, remedy: str = _MAKE_ROOM) -> None:
        """Say once that the engine's output is lost, and why."""
        if trouble and trouble != self._trouble:
            self._log.warning("output_lost", error=trouble, remedy=remedy)
        self._trouble = trouble


def _limits(settings: LogSettings) -> tuple[int, int]:
    return settings.engine_file_mib * 1024 * 1024, settings.engine_files
