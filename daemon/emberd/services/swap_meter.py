"""Bytes written to swap, by day: read from the kernel's counters, kept across restarts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.status import SwapStatus
from emberd.core.swap_account import SwapReading, SwapWrites, attribute, share_of_endurance

if TYPE_CHECKING:
    from emberd.core.types import EngineSample
    from emberd.services.accounts import Accounts
    from emberd.services.observer import Observer


class SwapMeter:
    """Keeps the daily account of bytes written to swap."""

    def __init__(self, observer: Observer, accounts: Accounts) -> None:
        self.observer = observer
        self._accounts = accounts
        self.total = SwapWrites()
        """Since emberd's start."""
        self._last: tuple[SwapReading, EngineSample] | None = None

    async def tick(self) -> SwapWrites:
        """Read once, and add to the account what was written since the last reading."""
        seen = self.observer.look()
        engine = seen.engine
        reading = SwapReading(seen.system.swapped_out_bytes, seen.memory.swapped_bytes, engine.key)
        last, self._last = self._last, (reading, engine)
        if last is None:
            return SwapWrites()
        is_same = engine.key is not None and (engine.key, engine.requests) == (last[1].key, last[1].requests)
        was_idle = is_same and engine.is_idle and last[1].is_idle
        writes = attribute(last[0], reading, is_idle=was_idle)
        self.total += writes
        await self._accounts.add(writes)
        return writes

    async def status(self, endurance_tb: float) -> SwapStatus | None:
        """Return today's account and its share of the rated endurance, None if the system tells nothing."""
        if self.observer.recent().system.swapped_out_bytes is None:
            return None
        today = await self._accounts.today(SwapWrites)
        return SwapStatus(
            written_today_bytes=today.total,
            engine_idle_bytes=today.engine_idle,
            engine_busy_bytes=today.engine_busy,
            other_bytes=today.other_idle + today.other_busy,
            unknown_bytes=today.unknown_idle + today.unknown_busy,
            share_of_endurance=share_of_endurance(today.total, endurance_tb),
            endurance_bytes=round(endurance_tb * 1e12) or None,
        )
