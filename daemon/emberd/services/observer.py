"""The one place where the memory of the engine and of the computer is read while emberd runs."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING

from emberd.core.memory import Observation, Pressure, SwapRates, SystemMemory, swap_rates, worse_of
from emberd.core.status import EngineMemoryStatus, MemoryStatus, SystemMemoryStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.core.ports import Host
    from emberd.core.types import EngineSample

_APART_S = 10.0
_KEPT = 3
"""Rates are those of the last 20 to 30 s."""
_PROPORTIONAL_S = 30.0
_FRESH_S = 1.0
"""Questions asked together, such as the parts of a status, share an observation up to this age."""


class Observer:
    """Reads the memory of engine and computer; logs changes of memory pressure."""

    def __init__(self, host: Host, log: FilteringBoundLogger, sample: Callable[[], EngineSample]) -> None:
        self._host = host
        self._log = log
        self.sample = sample
        self._readings: deque[tuple[float, SystemMemory]] = deque(maxlen=_KEPT)
        self._pressure = Pressure.NORMAL
        self._last: Observation | None = None
        self._worst = SystemMemory()
        self._proportional: tuple[float, tuple[int, ...], int | None] | None = None

    def look(self) -> Observation:
        """Read everything now."""
        engine = self.sample()
        seen = Observation(
            time.monotonic(), engine, self._host.engine_memory(engine.pids), self._host.system_memory()
        )
        self._last = seen
        self._worst = worse_of(self._worst, seen.system)
        if not self._readings or seen.at_s - self._readings[-1][0] >= _APART_S:
            self._readings.append((seen.at_s, seen.system))
        self._note_pressure(seen.system)
        return seen

    def recent(self) -> Observation:
        """Return the last observation if it is fresh and of the same engine, otherwise look."""
        last = self._last
        is_fresh = last is not None and time.monotonic() - last.at_s < _FRESH_S
        return last if last is not None and is_fresh and last.engine.key == self.sample().key else self.look()

    def take_worst(self) -> SystemMemory:
        """Return the worst of all readings since the last call: see `worse_of`."""
        worst, self._worst = self._worst, SystemMemory()
        return worst

    async def status(self) -> MemoryStatus:
        """Return all of a new observation. What the system does not tell is None."""
        oldest = self._readings[0] if self._readings else None
        seen = self.look()
        rates = SwapRates() if oldest is None else swap_rates(oldest[1], seen.system, seen.at_s - oldest[0])
        proportional_bytes = await self._proportional_bytes(seen)
        return MemoryStatus(
            power=await asyncio.to_thread(self._host.power),
            gpu=self._host.gpu_limits(),
            engine=EngineMemoryStatus(**asdict(seen.memory), proportional_bytes=proportional_bytes),
            system=SystemMemoryStatus(
                **asdict(seen.system),
                swap_in_bytes_per_s=rates.in_bytes_per_s,
                swap_out_bytes_per_s=rates.out_bytes_per_s,
            ),
        )

    async def _proportional_bytes(self, seen: Observation) -> int | None:
        """Return the engine's PSS, read now and then: the kernel walks all its pages for it, 5 ms for 300 MB."""
        last = self._proportional
        if last is None or last[1] != seen.engine.pids or seen.at_s - last[0] > _PROPORTIONAL_S:
            found = await asyncio.to_thread(self._host.proportional_bytes, seen.engine.pids)
            last = self._proportional = (seen.at_s, seen.engine.pids, found)
        return last[2]

    def _note_pressure(self, seen: SystemMemory) -> None:
        was, self._pressure = self._pressure, seen.pressure
        if seen.pressure is was or Pressure.UNKNOWN in {seen.pressure, was}:
            return
        tell = self._log.warning if seen.pressure is Pressure.CRITICAL else self._log.info
        tell(
            "memory_pressure",
            level=seen.pressure.value,
            was=was.value,
            available_bytes=seen.available_bytes,
            stall_some_share=seen.stall_some_share,
        )
