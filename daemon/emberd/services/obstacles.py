"""What keeps the engine from running, and whether it has gone: disks, files and memory as they are now."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from emberd.core import causes
from emberd.core.causes import LEAST_ROOM_BYTES, Cause, Kind
from emberd.core.engine_files import is_address
from emberd.core.errors import EmberdError, ModelError, StateUnusable
from emberd.core.gguf import split_names
from emberd.core.lifecycle import CauseGone, LaunchFailed
from emberd.host.files import make_private_folder, write_atomically
from emberd.host.model_file import check_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from structlog.typing import FilteringBoundLogger

    from emberd.core.engine_files import NamedFile
    from emberd.core.settings import Settings

_PROBE = "room.probe"
_LOOK_S = 1.0
EXIT_LIMIT_S = 3.0
"""How long files and disks are looked at for the cause of an engine's end."""


class Obstacles:
    """Looks at what an engine needs of this computer. All methods may block for some milliseconds.

    Args:
        settings: the present ones.
        directory: the state directory.
        files: returns the files that the engine's options name; may raise EmberdError.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        directory: Path,
        log: FilteringBoundLogger,
        files: Callable[[], Iterable[NamedFile]] = tuple,
    ) -> None:
        self._settings = settings
        self._files = files
        self._directory = directory
        self._log = log
        self._marks = self._read_marks()

    async def find_after_exit(self, status: int | None, last_words: str) -> Cause | None:
        """Return the passing cause of an engine's end, as far as it is seen within EXIT_LIMIT_S.

        A network volume that is dead never answers. The news of the end does not wait for it: then only the
        engine's own words count. The thread is a daemon thread, so that it does not hold up the end of emberd.
        """
        answer: Future[Cause | None] = Future()
        answer.set_running_or_notify_cancel()  # it cannot be cancelled, so that a late answer finds its place

        def look() -> None:
            try:
                answer.set_result(self.of_exit(status, last_words))
            except Exception as error:  # noqa: BLE001  # told to the caller
                answer.set_exception(error)

        threading.Thread(target=look, name="cause of an exit", daemon=True).start()
        try:
            async with asyncio.timeout(EXIT_LIMIT_S):
                return await asyncio.wrap_future(answer)
        except TimeoutError:
            self._log.warning("exit_cause_unknown", reason="a file system does not answer", seconds=EXIT_LIMIT_S)
            return causes.of_exit(status, last_words, None, None)

    def of_exit(self, status: int | None, last_words: str) -> Cause | None:
        """Return the passing cause of an engine's end."""
        return self._noted(causes.of_exit(status, last_words, self._missing_model(), self.full_disk()))

    def failed_launch(self, error: EmberdError | OSError) -> LaunchFailed:
        """Return what a start that was refused means."""
        if isinstance(error, OSError):
            reason = f"cannot start the engine: {error}"
            return LaunchFailed(reason, is_permanent=False, cause=causes.of_os_error(error))
        cause = self._noted(causes.of_error(error))
        return LaunchFailed(str(error), is_permanent=not isinstance(error, StateUnusable), cause=cause)

    async def watch(self, cause: Cause, retries: int, post: Callable[[CauseGone], None]) -> None:
        """Post when this cause has gone, as far as can be seen; later if so many tries were in vain."""
        await asyncio.sleep(causes.look_after_s(retries))
        # Disks tell nobody that they have room again.
        while not await asyncio.to_thread(self.has_gone, cause):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        self._log.info("obstacle_gone", cause=cause.kind.value, was=cause.message)
        post(CauseGone())

    def has_gone(self, cause: Cause) -> bool:
        """Return True if this cause is seen to have gone; what cannot be seen is only waited for."""
        match cause.kind:
            case Kind.DISK:
                return self.full_disk() is None and self._can_write()
            case Kind.FILES:
                return self._read_marks() != self._marks
            case Kind.MEMORY | Kind.PORT:
                return False

    def full_disk(self) -> Cause | None:
        """Return the disk that has no room for an engine, None if all have."""
        for path in (self._directory, Path(tempfile.gettempdir())):
            try:
                seen = os.statvfs(path)
            except OSError:
                continue
            # Some file systems make inodes as they need them, and count none (statvfs(3): f_files 0).
            if seen.f_bavail * seen.f_frsize < LEAST_ROOM_BYTES or (seen.f_files and not seen.f_favail):
                what = "has no room" if seen.f_bavail * seen.f_frsize < LEAST_ROOM_BYTES else "takes no more files"
                return Cause(Kind.DISK, f"the disk of {path} {what}", "Make room; emberd tries again at once.")
        return None

    def _noted(self, cause: Cause | None) -> Cause | None:
        if cause is not None:
            self._marks = self._read_marks()
        return cause

    def _missing_model(self) -> str | None:
        try:
            if self._settings().model.path:
                check_model(self._settings().model.path)
        except ModelError as error:
            return error.message
        return None

    def _can_write(self) -> bool:
        probe = self._directory / _PROBE
        try:
            make_private_folder(self._directory)
            write_atomically(probe, " " * LEAST_ROOM_BYTES)
            probe.unlink()
        except (EmberdError, OSError):
            return False
        return True

    def _read_marks(self) -> dict[Path, tuple[int, ...] | None]:
        settings = self._settings()
        named = [settings.model.path, settings.engine.path, settings.engine.kcpps]
        with suppress(EmberdError):  # a .kcpps file that is broken; it is looked at itself
            named += [each.path for each in self._files()]
        first_parts = [Path(each).expanduser() for each in named if each and not is_address(each)]
        parts = [first.with_name(name) for first in first_parts for name in split_names(first.name)]
        return {part: _mark(part) for part in parts}


def _mark(path: Path) -> tuple[int, ...] | None:
    """Return a value that changes when a file comes, goes, is written, or changes its permissions."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_size, int(os.access(path, os.R_OK))
