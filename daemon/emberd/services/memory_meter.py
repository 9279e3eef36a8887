"""The memory of the engine and of the computer, for `status`; changes of memory pressure are logged."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING

from emberd.core.memory import Pressure, SystemMemory
from emberd.core.pressure import SwapRates, swap_rates
from emberd.core.status import EngineMemoryStatus, MemoryStatus, SystemMemoryStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.core.ports import Host
    from emberd.core.types import EngineSample

_APART_S = 10.0
_KEPT = 3
"""Rates are told over the last 20 to 30 s."""


class MemoryMeter:
    """Reads memory for those who watch it, and all of it when asked.

    Args:
        host: this computer.
        log: events go here.
        sample: tells what the engine is.
    """

    def __init__(self, host: Host, log: FilteringBoundLogger, sample: Callable[[], EngineSample]) -> None:
        self._host = host
        self._log = log
        self._sample = sample
        self._readings: deque[tuple[float, SystemMemory]] = deque(maxlen=_KEPT)
        self._pressure = Pressure.NORMAL

    def read(self) -> SystemMemory:
        """Read the computer's memory once, and log a change of its pressure."""
        seen, now_s = self._host.system_memory(), time.monotonic()
        last, self._pressure = self._pressure, seen.pressure
        if not self._readings or now_s - self._readings[-1][0] >= _APART_S:
            self._readings.append((now_s, seen))
        if seen.pressure is not last and Pressure.UNKNOWN not in {seen.pressure, last}:
            tell = self._log.warning if seen.pressure is Pressure.CRITICAL else self._log.info
            tell(
                "memory_pressure",
                level=seen.pressure.value,
                was=last.value,
                available_bytes=seen.available_bytes,
                stall_some_share=seen.stall_some_share,
            )
        return seen

    async def status(self) -> MemoryStatus:
        """Read everything now. What the system does not tell is None."""
        seen = self._host.system_memory()
        rates = SwapRates()
        if self._readings:
            began_s, before = self._readings[0]
            rates = swap_rates(before, seen, time.monotonic() - began_s)
        return MemoryStatus(
            power=await asyncio.to_thread(self._host.power),
            gpu=self._host.gpu_limits(),
            engine=await asyncio.to_thread(self._engine),
            system=SystemMemoryStatus(
                **asdict(seen),
                swap_in_bytes_per_s=rates.in_bytes_per_s,
                swap_out_bytes_per_s=rates.out_bytes_per_s,
            ),
        )

    def _engine(self) -> EngineMemoryStatus:
        pids = self._sample().pids
        seen = self._host.engine_memory(pids)
        return EngineMemoryStatus(**asdict(seen), proportional_bytes=self._host.proportional_bytes(pids))
