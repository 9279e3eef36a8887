"""How much of the running model is in memory: sampled by the toucher, or from the engine's processes."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from emberd.core import residency
from emberd.core.engine_files import Held
from emberd.core.residency import Residency, Unknown
from emberd.core.status import FileStatus, ResidencyStatus
from emberd.host.toucher import Toucher, ToucherLost, ToucherRefused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from structlog.typing import FilteringBoundLogger

    from emberd.core.engine_files import EngineFile
    from emberd.core.residency import Paging
    from emberd.core.types import EngineSample
    from emberd.services.observer import Observer

_FRESH_S = 2.0
_PATIENCE_S = 3.0
"""While a model loads, residency is out of date after seconds; the status shows none older than this."""


class ResidencyMeter:
    """Owns the toucher, and keeps the last residency."""

    def __init__(self, paging: Paging, log: FilteringBoundLogger, observer: Observer) -> None:
        self._log = log
        self._observer = observer
        self.toucher = Toucher(paging)
        self._last: tuple[tuple[Any, ...], float, Residency] | None = None
        self._reading = asyncio.Lock()
        self._asked: asyncio.Task[Residency | None] | None = None

    async def tick(self) -> Residency | None:
        """Read once; return None while there is no engine. Never fails: what cannot be read is unknown."""
        async with self._reading:
            engine = self._observer.sample()
            if engine.key is None:
                self._last = None
                return None
            try:
                seen = await self._read(engine)
            except ToucherRefused as refusal:
                seen = residency.unknown(_KINDS.get(refusal.kind, Unknown.NO_READING), str(refusal))
            except ToucherLost as loss:
                self._log.warning("toucher_lost", reason=str(loss))
                seen = residency.unknown(Unknown.TOUCHER_LOST, str(loss))
            except Exception:  # noqa: BLE001  # a reading is not worth the daemon
                self._log.exception("residency_meter_bug")
                seen = residency.unknown(Unknown.NO_READING)
            self._note_change(seen)
            self._last = (_measured(engine), time.monotonic(), seen)
            return seen

    async def status(self) -> ResidencyStatus | None:
        """Return the residency, at most _FRESH_S old. None without an engine."""
        last = self._last
        is_old = (
            last is None or last[0] != _measured(self._observer.sample()) or time.monotonic() - last[1] > _FRESH_S
        )
        if is_old and not self.toucher.is_touching:  # a pass over a cold model takes seconds
            # A toucher that was stopped must not hold up who asks.
            if self._asked is None or self._asked.done():
                self._asked = asyncio.create_task(self.tick())
            await asyncio.wait({self._asked}, timeout=_PATIENCE_S)
            last = self._last
        return None if last is None else describe(last[2], round(time.monotonic() - last[1], 3))

    async def files(self, files: Sequence[EngineFile], *, is_locked_outside: bool) -> tuple[FileStatus, ...]:
        """Return these files, the engine's, with a sample of each mapped one."""
        seen = await self._counts([each.path for each in files if each.held is Held.MAPPED])
        return tuple(
            FileStatus(
                each.path,
                each.role.value,
                each.size_bytes,
                each.held.value,
                resident := seen.get(each.path),
                resident if is_locked_outside and resident is not None else each.locked_bytes,
            )
            for each in files
        )

    async def _counts(self, paths: Sequence[str]) -> dict[str, int | None]:
        """Return the resident bytes of files, none during a pass over them or if they cannot be told."""
        found: dict[str, int | None] = {}
        is_slow = self._asked is not None and not self._asked.done()
        if self.toucher.is_touching or is_slow or not paths:
            return found
        async with self._reading:
            self.toucher.use(paths)
            try:
                for number, path in enumerate(paths):
                    count = await self.toucher.sample(residency.SAMPLED_PAGES, number)
                    found[path] = residency.from_pages(count).resident_bytes
            except (ToucherRefused, ToucherLost):
                pass  # the whole's residency tells why
        return found

    async def close(self) -> None:
        """End the toucher."""
        if self._asked is not None:
            self._asked.cancel()
            await asyncio.wait({self._asked})
        await self.toucher.close()

    async def _read(self, engine: EngineSample) -> Residency:
        if engine.model is None and not engine.files:
            return residency.unknown(Unknown.NO_MODEL)
        memory = self._observer.recent().memory
        if engine.weights_bytes and residency.is_copied(engine.weights_bytes, memory, is_mapped=engine.is_mapped):
            return residency.from_process(engine.weights_bytes, memory)
        self.toucher.use(engine.touchable)
        return residency.from_pages(await self.toucher.sample(residency.SAMPLED_PAGES))

    def _note_change(self, seen: Residency) -> None:
        before = self._last[2].unknown if self._last else None
        if seen.unknown is not None and seen.unknown is not before:
            self._log.info("residency_unknown", reason=seen.unknown.value, message=seen.message)


def _measured(engine: EngineSample) -> tuple[Any, ...]:
    return engine.key, engine.touchable


_KINDS = {"not_owner": Unknown.NOT_OWNER, "unreadable": Unknown.UNREADABLE}
"""The toucher's refusals, in the words of the core."""


def describe(seen: Residency, age_s: float | None = None) -> ResidencyStatus:
    """Return a residency as the status tells it."""
    return ResidencyStatus(
        share=seen.share,
        at_least=seen.at_least,
        at_most=seen.at_most,
        resident_bytes=seen.resident_bytes,
        total_bytes=seen.total_bytes,
        source=seen.source.value if seen.source else None,
        unknown=seen.unknown.value if seen.unknown else None,
        message=seen.message,
        age_s=age_s,
    )
