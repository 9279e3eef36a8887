"""Bytes written to swap, by day: read from the kernel's counters, kept across restarts."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING, Any

from emberd.core.swap_account import SwapReading, SwapWrites, attribute, share_of_endurance

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from emberd.core.ports import Host
    from emberd.core.types import EngineSample
    from emberd.services.history import History

TICK_S = 60.0


class SwapMeter:
    """Keeps the account; its file is opened only when something was written, or somebody asks.

    Args:
        host: this computer.
        path: the SQLite file.
        log: events go here.
        sample: tells what the engine is and whether it worked.
    """

    def __init__(
        self, host: Host, path: Path, log: FilteringBoundLogger, sample: Callable[[], EngineSample]
    ) -> None:
        self._host = host
        self._path = path
        self._log = log
        self._sample = sample
        self._history: History | None = None
        self._last: tuple[SwapReading, EngineSample] | None = None

    async def run(self) -> None:
        """Read the counters every TICK_S until cancelled."""
        while True:
            try:
                await self.tick()
            except Exception:  # noqa: BLE001  # an account is not worth the daemon
                self._log.exception("swap_meter_bug")
            await asyncio.sleep(TICK_S)

    async def tick(self) -> SwapWrites:
        """Take one reading, and account for what was written since the last one."""
        engine = self._sample()
        reading = SwapReading(
            self._host.system_memory().swapped_out_bytes,
            self._host.engine_memory(engine.pids).swapped_bytes,
            engine.key,
        )
        last, self._last = self._last, (reading, engine)
        if last is None:
            return SwapWrites()
        was_idle = engine.key is not None and engine.is_idle and engine.requests == last[1].requests
        writes = attribute(last[0], reading, is_idle=was_idle)
        if writes.total:
            await asyncio.to_thread(self._open().add, _today(), writes)
        return writes

    async def status(self, endurance_tb: float) -> dict[str, Any] | None:
        """Return today's account and its share of the rated endurance, None where the system tells nothing."""
        if self._host.system_memory().swapped_out_bytes is None:
            return None
        today = SwapWrites()
        if self._history is not None or self._path.exists():
            days = await asyncio.to_thread(self._open().days, _today())
            today = days.get(_today(), today)
        return {
            "written_today_bytes": today.total,
            "engine_idle_bytes": today.engine_idle,
            "engine_busy_bytes": today.engine_busy,
            "other_bytes": today.other_idle + today.other_busy,
            "unknown_bytes": today.unknown_idle + today.unknown_busy,
            "share_of_endurance": share_of_endurance(today.total, endurance_tb),
        }

    async def close(self) -> None:
        """Write what waits and close the file."""
        if self._history is not None:
            await asyncio.to_thread(self._history.close)

    def _open(self) -> History:
        if self._history is None:
            from emberd.services.history import History  # noqa: PLC0415  # sqlite3 costs 1 MiB: only when needed

            self._history = History(self._path, self._log)
        return self._history


def _today() -> dt.date:
    return dt.datetime.now().astimezone().date()
