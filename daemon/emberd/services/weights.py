"""Keep-warm's way to the weights: the toucher touches and locks their pages, and stops for users."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from emberd.core.lock_limits import judge_limits
from emberd.core.status import ProgressStatus
from emberd.core.warmth_cost import WarmthCost
from emberd.services.accounts import cpu_s

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from structlog.typing import FilteringBoundLogger

    from emberd.core.memory import SystemMemory
    from emberd.core.ports import Host
    from emberd.core.types import EngineSample
    from emberd.host.toucher import Toucher
    from emberd.services.accounts import Spending
    from emberd.services.forecaster import Forecaster
    from emberd.services.gate import Gate
    from emberd.services.model_use import ModelUse

T = TypeVar("T")
_STOP_AGAIN_S = 0.2


class Weights:
    """Owns the outside lock."""

    def __init__(
        self,
        host: Host,
        log: FilteringBoundLogger,
        gate: Gate,
        toucher: Toucher,
        use: ModelUse,
        forecaster: Forecaster,
        spending: Spending,
    ) -> None:
        self._host = host
        self._log = log
        self._gate = gate
        self._toucher = toucher
        self._use = use
        self._forecaster = forecaster
        self._spending = spending
        self._progress: tuple[int, int] | None = None
        self._locked_by: tuple[int | None, tuple[Any, ...] | None] | None = None
        self._refused_lock_of: str | None = None
        self.is_kept_touched = False
        """Whether the weights are also touched between two passes."""

    @property
    def progress(self) -> ProgressStatus | None:
        """Progress of a pass over the weights, None while there is none."""
        return None if self._progress is None else ProgressStatus(*self._progress)

    def cpu_s(self) -> float:
        """Return the processor time of the toucher so far, in seconds."""
        return cpu_s(self._toucher.pid)

    @property
    def is_locked_outside(self) -> bool:
        """Whether the outside lock stands; it ends with the toucher, and when the toucher maps another file."""
        return self._locked_by is not None and self._locked_by == self._lockable()

    @property
    def locked_bytes(self) -> int:
        """What emberd itself has locked, as the kernel counts it."""
        pid = self._toucher.pid if self.is_locked_outside else None
        return 0 if pid is None else self._host.engine_memory((pid,)).locked_bytes or 0

    def can_lock(self, engine: EngineSample, memory: SystemMemory) -> bool | None:
        """Return True if limits and room let the toucher lock the weights, None if their size is unknown."""
        if not self._gate.will_lock or engine.key == self._refused_lock_of:
            return False
        if engine.weights_bytes is None:
            return None
        return judge_limits(engine.weights_bytes, self._host.lock_limits(None), memory.wired_bytes)[0]

    async def touch_again(self) -> bool | None:
        """Touch the weights once; return whether some were cold, None if a user came.

        Raises:
            ToucherRefused: it cannot be done.
            ToucherLost: the toucher died.
        """
        if not self._name_files():
            return None
        touched = await self._giving_way(self._toucher.touch(), self._toucher.stop)
        self._spending.add(WarmthCost(read_bytes=touched.cold_bytes or 0))
        return bool(touched.cold_bytes) if touched.is_complete else None

    async def touch(self) -> dict[str, Any] | None:
        """Touch the weights with progress; return the share that was cold, None if a user came.

        Raises:
            ToucherRefused: it cannot be done.
            ToucherLost: the toucher died.
        """
        if not self._name_files():
            return None
        touched = await self._giving_way(self._toucher.touch(self._note_progress), self._toucher.stop)
        self._note_reading(touched.cold_bytes, touched.elapsed_s)
        return {"cold_share": _ratio(touched.cold_bytes, touched.total_bytes)} if touched.is_complete else None

    async def lock(self) -> dict[str, Any] | None:
        """Have the toucher lock the weights; return the share that was cold, None if a user came.

        A refused lock is not tried again on this engine.

        Raises:
            ToucherRefused: it cannot be done.
            ToucherLost: the toucher died.
        """
        if not self._name_files():
            return None
        locked = await self._giving_way(self._toucher.lock(self._note_progress), self._toucher.stop)
        self._note_reading(locked.cold_bytes, locked.elapsed_s)
        if locked.is_complete:
            self._locked_by = self._lockable()
            self._log.info("locked_outside", locked_bytes=locked.locked_bytes)
        elif locked.error is None:  # a user came, or emberd lets go: nothing else would free a part of a lock
            await self._toucher.unlock()
            return None
        else:
            self._refused_lock_of = self._gate.sample().key
            self._log.warning("lock_outside_refused", locked_bytes=locked.locked_bytes, reason=locked.error)
            await self._toucher.unlock()
        return {"cold_share": _ratio(locked.cold_bytes, locked.total_bytes)}

    async def unlock(self) -> dict[str, Any]:
        """Let go of the lock.

        Raises:
            ToucherLost: the toucher died; the lock is gone then too.
        """
        self._locked_by = None
        await self._toucher.unlock()
        return {}

    def note_failure(self) -> None:
        """The toucher refused or died: there is no outside lock any more."""
        self._locked_by = None

    def _name_files(self) -> bool:
        """Tell the toucher the mapped files; return False if there are none, or they are unknown."""
        files = self._gate.sample().touchable
        if files:
            self._toucher.use(files)
        return bool(files)

    def _lockable(self) -> tuple[int | None, tuple[Any, ...] | None]:
        """Return a key for a lock on these weights by this toucher."""
        try:
            facts = tuple((path, Path(path).stat()) for path in self._gate.sample().touchable)
        except OSError:
            facts = ()
        files = tuple((path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in facts)
        return self._toucher.pid, files or None

    def _note_progress(self, done_bytes: int, total_bytes: int) -> None:
        self._progress = (done_bytes, total_bytes)

    def _note_reading(self, cold_bytes: int | None, seconds: float) -> None:
        self._spending.add(WarmthCost(read_bytes=cold_bytes or 0))
        self._forecaster.note_reading(cold_bytes, seconds)

    async def _giving_way(self, work: Coroutine[Any, Any, T], stop: Callable[[], None]) -> T:
        """Do something that reads from the disk, and stop it when a user comes, whose pages are read first."""
        doing, coming = asyncio.create_task(work), self._use.interruption()
        try:
            await asyncio.wait({doing, coming}, return_when=asyncio.FIRST_COMPLETED)
            while not doing.done():
                stop()
                # Work that waited for its turn at the toucher begins only now, and is stopped as well.
                await asyncio.wait({doing}, timeout=_STOP_AGAIN_S)
            return await doing
        finally:
            coming.cancel()
            self._progress = None


def _ratio(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else part / whole
