"""The daemon's end of the toucher: starts it, asks it, and starts it again when it has died.

The other end, and why it is a process of its own: host/toucher_process.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.core.residency import PageCount, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from emberd.core.residency import Paging

_PROCESS = Path(__file__).with_name("toucher_process.py")
SILENCE_LIMIT_S = 30.0
"""Longer than a count of 64 GiB (1.5 s) or the longest read of a disk that is waking up takes."""
STOP_LIMIT_S = 2.0
_LINE_LIMIT_BYTES = 1 << 24
"""The counts of a million tensors."""

Span = tuple[int, int, int]
"""A file's number, the first byte, a length."""


@dataclass(frozen=True, slots=True)
class Touched:
    """What a pass over the pages did.

    Attributes:
        is_complete: it was not stopped.
        done_bytes: loaded, in whole pages.
        total_bytes: what there is to load.
        cold_bytes: what of the loaded was not resident before; None if the kernel does not tell.
        elapsed_s: how long it took.
    """

    is_complete: bool
    done_bytes: int
    total_bytes: int
    cold_bytes: int | None
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Locked:
    """What an attempt to lock the pages did.

    Attributes:
        is_complete: everything is locked.
        locked_bytes: locked now.
        total_bytes: what there is to lock.
        cold_bytes: what was not resident before; None if the kernel does not tell.
        elapsed_s: how long bringing the pages in took.
        error: the system's words for why no more could be locked, None if it refused nothing.
    """

    is_complete: bool
    locked_bytes: int
    total_bytes: int
    cold_bytes: int | None
    elapsed_s: float
    error: str | None


class ToucherRefused(Exception):
    """The toucher lives and cannot do it.

    Attributes:
        kind: not_owner, unreadable, no_reading or usage.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ToucherLost(Exception):
    """The toucher ended or fell silent; the next command starts another one."""


class Toucher:
    """One toucher for one model. Commands from several tasks wait for each other, only `stop` overtakes.

    Args:
        paging: what this system's calls can do.
    """

    def __init__(self, paging: Paging) -> None:
        self._paging = paging
        self._process: asyncio.subprocess.Process | None = None
        self._paths: tuple[str, ...] = ()
        self._mapped: tuple[str, ...] = ()
        self._turn = asyncio.Lock()
        self._number = 0
        self._walks = 0

    @property
    def pid(self) -> int | None:
        """Process id of the running toucher, None if there is none."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def is_touching(self) -> bool:
        """Whether a pass over the pages is under way; other commands wait for its end."""
        return self._walks > 0

    def use(self, paths: Sequence[Path | str]) -> None:
        """Name the model's files; they are mapped with the next command."""
        self._paths = tuple(str(path) for path in paths)

    async def count(self, spans: Sequence[Span] | None = None) -> tuple[Source, int, list[tuple[int, int]]]:
        """Count resident pages exactly.

        Args:
            spans: stretches of the files; None for each file as a whole.

        Returns:
            What told, the size of a page in bytes, and resident and all pages of each span.

        Raises:
            ToucherRefused: it cannot be told, or a file cannot be read.
            ToucherLost: the process died or fell silent.
        """
        answer = await self._ask({"do": "count", "spans": spans})
        return Source(answer["source"]), answer["page_bytes"], [(each[0], each[1]) for each in answer["counts"]]

    async def sample(self, pages: int, file: int | None = None) -> PageCount:
        """Look at so many pages, one in each of as many equal stretches, of all files or of the one so numbered.

        Raises:
            ToucherRefused: it cannot be told, or a file cannot be read.
            ToucherLost: the process died or fell silent.
        """
        answer = await self._ask({"do": "sample", "pages": pages, "file": file})
        return PageCount(
            answer["resident"], answer["sampled"], answer["total"], answer["page_bytes"], Source(answer["source"])
        )

    async def look(self, spans: Sequence[Span], pages: int) -> list[tuple[int, int]]:
        """Look at so many evenly spaced pages of each span, the same ones each time: some 2 microseconds a page.

        Returns:
            Resident pages and pages looked at of each span.

        Raises:
            ToucherRefused: it cannot be told, or a file cannot be read.
            ToucherLost: the process died or fell silent.
        """
        answer = await self._ask({"do": "look", "spans": spans, "pages": pages})
        return [(each[0], each[1]) for each in answer["counts"]]

    async def touch(
        self, progress: Callable[[int, int], None] = lambda *_: None, spans: Sequence[Span] | None = None
    ) -> Touched:
        """Bring pages into memory and mark them as used; `stop` or cancelling ends it early.

        Args:
            progress: told bytes loaded and bytes to load, some 10 times a second.
            spans: stretches of the files; None for all.

        Raises:
            ToucherRefused: a file cannot be read.
            ToucherLost: the process died (SIGBUS: the file was shortened) or fell silent.
        """
        answer = await self._walk({"do": "touch", "spans": spans}, progress)
        return Touched(**{name: answer[name] for name in Touched.__slots__})

    async def lock(self, progress: Callable[[int, int], None] = lambda *_: None) -> Locked:
        """Touch all pages and lock them (mlock(2)) until `unlock`, or the end of the process or of the mapping.

        A limit is no exception: `Locked.error` has it, and what was locked before stays locked.

        Args:
            progress: as for `touch`.

        Raises:
            ToucherRefused: a file cannot be read.
            ToucherLost: the process died or fell silent.
        """
        answer = await self._walk({"do": "lock"}, progress)
        return Locked(
            answer["is_complete"],
            answer["locked_bytes"],
            answer["total_bytes"],
            answer["cold_bytes"],
            answer["elapsed_s"],
            answer["lock_error"],
        )

    async def unlock(self) -> None:
        """Let go of the lock; does not start a process for it.

        Raises:
            ToucherLost: the process died or fell silent; the lock is gone then too.
        """
        if self.pid is not None and self._mapped:
            await self._ask({"do": "unlock"})

    async def _walk(self, command: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Do what `stop` and a cancellation can end early."""
        self._walks += 1  # one runs, others may wait for their turn
        try:
            return await self._ask(command, progress)
        except asyncio.CancelledError:
            with contextlib.suppress(ToucherLost):
                self._say({"id": 0, "do": "stop"})
            raise
        finally:
            self._walks -= 1

    def stop(self) -> None:
        """End a running `touch` within 50 ms; it returns what it did so far. Nothing happens if there is none."""
        if self._walks:
            with contextlib.suppress(ToucherLost):
                self._say({"id": 0, "do": "stop"})

    async def close(self) -> None:
        """End the process; idempotent."""
        process, self._process, self._mapped = self._process, None, ()
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # the end of input ends it
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                await process.wait()
        except TimeoutError:
            await _kill(process)

    # --- one command ----------------------------------------------------------------------------------------

    async def _ask(
        self, command: dict[str, Any], progress: Callable[[int, int], None] = lambda *_: None
    ) -> dict[str, Any]:
        async with self._turn:
            is_old = self.pid is not None
            try:
                await self._be_ready()
                return await self._exchange(command, progress)
            except ToucherLost:
                if not is_old or self.pid is not None or command["do"] in {"touch", "lock"}:
                    raise
            # It died since the last command, and this one was the first to notice.
            await self._be_ready()
            return await self._exchange(command, progress)

    async def _be_ready(self) -> None:
        if self.pid is None:
            self._mapped = ()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",  # nothing of the environment or the current folder
                "-S",  # no site-packages
                str(_PROCESS),
                json.dumps(asdict(self._paging)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the daemon
                limit=_LINE_LIMIT_BYTES,
            )
        if self._mapped != self._paths:
            self._mapped = ()
            await self._exchange({"do": "map", "paths": list(self._paths)})
            self._mapped = self._paths

    async def _exchange(
        self, command: dict[str, Any], progress: Callable[[int, int], None] = lambda *_: None
    ) -> dict[str, Any]:
        self._number += 1
        number = self._number
        try:
            self._say({"id": number, **command})
        except ToucherLost:
            # Its end can be heard of before a word was said to it; then there is a cause to tell.
            await self._raise_death()
            raise
        while True:
            answer = await self._hear()
            if answer["id"] != number:
                continue  # of a command that was cancelled, or a stop
            if "progress" in answer:
                progress(*answer["progress"])
                continue
            if "error" in answer:
                raise ToucherRefused(answer["error"], answer["message"])
            return answer

    def _say(self, command: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None or process.stdin.is_closing():
            raise ToucherLost("the toucher is not running")
        process.stdin.write(json.dumps(command).encode() + b"\n")

    async def _raise_death(self) -> None:
        """Raise ToucherLost with the cause, if the process has one within STOP_LIMIT_S."""
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_LIMIT_S):
                    raise ToucherLost(_death(await self._process.wait()))

    async def _hear(self) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdout is None:
            raise ToucherLost("the toucher is not running")
        try:
            async with asyncio.timeout(SILENCE_LIMIT_S):
                line = await process.stdout.readline()
                if not line.endswith(b"\n"):
                    raise ToucherLost(_death(await process.wait()))
        except TimeoutError as error:
            await _kill(process)
            raise ToucherLost(f"the toucher did not answer for {SILENCE_LIMIT_S:g} s and was killed") from error
        answer: dict[str, Any] = json.loads(line)
        return answer


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    # A process that waits for a disk dies when the disk answers; nobody here waits for that.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_LIMIT_S):
            await process.wait()


def _death(status: int) -> str:
    if status == -signal.SIGBUS:
        return "the toucher ended by SIGBUS: the file was shortened, or the disk cannot be read"
    if status < 0:
        return f"the toucher ended by {signal.Signals(-status).name}"
    return f"the toucher ended with exit status {status}"
