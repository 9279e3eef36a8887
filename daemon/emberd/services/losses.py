"""What is taken from the engine between two passes, and what a pass does not bring back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core import warmth
from emberd.core.warmth import Found

if TYPE_CHECKING:
    from emberd.core.memory import EngineMemory, Observation


class Losses:
    """Compares the engine's memory with what it was at its best, and with what the last pass left."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._best: EngineMemory | None = None
        self._unused_swap_bytes = self._useless_swap_bytes = 0
        self._faults: int | None = None

    def watch(self, seen: Observation, *, is_idle: bool) -> bool:
        """Return True if memory was taken from the idle engine since it was at its best.

        While a user or emberd uses the engine nothing counts: what a generation needed and gave back was not
        taken.
        """
        memory = self._of_this_engine(seen)
        swapped_bytes = memory.swapped_bytes or 0
        self._unused_swap_bytes = min(self._unused_swap_bytes, swapped_bytes)
        self._useless_swap_bytes = min(self._useless_swap_bytes, swapped_bytes)
        is_evicting = is_idle and warmth.is_evicting(self._best, memory)
        self._best = warmth.best_of(None if is_evicting else self._best, memory) if is_idle else None
        return is_evicting

    def taken(self, seen: Observation) -> Found:
        """Return what was taken from the engine since the last pass."""
        is_known, memory = seen.engine.key == self._key, seen.memory
        swapped_bytes, buffers_bytes = (
            None if memory.swapped_bytes is None else max(memory.swapped_bytes - is_known * left_bytes, 0)
            for left_bytes in (self._unused_swap_bytes, self._useless_swap_bytes)
        )
        return Found(swapped_bytes=swapped_bytes, buffers_bytes=buffers_bytes, engine_bytes=memory.footprint_bytes)

    def note_pass(self, seen: Observation, *, is_thorough: bool) -> None:
        """Remember what a whole pass has left in swap: the next pass would not bring it back either.

        Nobody uses what is left after a replay: some 100 MiB of KoboldCPP's own memory, from loading the model.
        Without a replay it may be a cache that emberd cannot reach. A pass that is not thorough may leave buffers
        in swap that are still needed.
        """
        self._unused_swap_bytes = self._of_this_engine(seen).swapped_bytes or 0
        if is_thorough:
            self._useless_swap_bytes = self._unused_swap_bytes

    def major_faults(self, seen: Observation) -> int | None:
        """Return the engine's major faults since the last call, None if unknown."""
        count = self._of_this_engine(seen).major_faults
        before, self._faults = self._faults, count
        return None if count is None or before is None else count - before

    def _of_this_engine(self, seen: Observation) -> EngineMemory:
        """Return the engine's memory; forget everything if it is another engine than the last one."""
        if seen.engine.key != self._key:
            self._key, self._best, self._faults = seen.engine.key, None, None
            self._unused_swap_bytes = self._useless_swap_bytes = 0
        return seen.memory
