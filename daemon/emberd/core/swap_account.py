"""Who wrote to the swap space, and was the engine idle? Pure accounting over two readings.

An idle model that is swapped out costs its owner twice: the next reply is slow, and the SSD wears. Kernels count
how much the whole system writes to swap and how much a process has there, not how much a process has written. So
the engine is charged with the growth of its memory in swap, at most with all that was written meanwhile.

- Linux: `VmSwap` grows by what was swapped out of the process (proc_pid_status(5)), so the charge is a lower
  bound: pages that came back and went again are not seen. With zswap or zram it counts bytes that never reached a
  disk, as does `pswpout` of /proc/vmstat.
- macOS: the kernel tells how much of a process is compressed, but not how much of that is in swap files, so the
  charge is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

TB = 10**12
"""Endurance is rated in decimal terabytes."""


@dataclass(frozen=True, slots=True)
class SwapReading:
    """One reading of the counters. Unknown is None.

    Attributes:
        written_bytes: written to swap by the whole system since boot.
        engine_bytes: memory of the engine's processes in swap (macOS: compressed or in swap).
        engine: text that tells this engine from another one (pid and start token), None while there is none.
    """

    written_bytes: int | None
    engine_bytes: int | None = None
    engine: str | None = None


@dataclass(frozen=True, slots=True)
class SwapWrites:
    """Bytes written to swap, by whom and when.

    Attributes:
        engine_idle: charged to the engine, while it was idle.
        engine_busy: the same, while it worked or loaded.
        other_idle: written by everybody else while the engine was idle.
        other_busy: the same, while the engine worked, or there was none.
        unknown_idle: written by unknown programs while the engine was idle.
        unknown_busy: the same, while the engine worked.
    """

    engine_idle: int = 0
    engine_busy: int = 0
    other_idle: int = 0
    other_busy: int = 0
    unknown_idle: int = 0
    unknown_busy: int = 0

    def __add__(self, more: SwapWrites) -> SwapWrites:
        """Return both together."""
        return SwapWrites(*(getattr(self, each.name) + getattr(more, each.name) for each in fields(self)))

    @property
    def engine(self) -> int:
        """Everything that is charged to the engine."""
        return self.engine_idle + self.engine_busy

    @property
    def total(self) -> int:
        """Everything that was written."""
        return self.engine + self.other_idle + self.other_busy + self.unknown_idle + self.unknown_busy


def attribute(before: SwapReading, after: SwapReading, *, is_idle: bool) -> SwapWrites:
    """Return who wrote what between two readings; `is_idle` if the engine was idle all the time.

    A counter that went backwards (a reboot) says nothing about the time between: nothing is charged, and counting
    begins again at the later reading.
    """
    written = _written(before, after)
    if not written:
        return SwapWrites()
    grown = _grown(before, after)
    if grown is None:
        return SwapWrites(unknown_idle=written) if is_idle else SwapWrites(unknown_busy=written)
    own = min(grown, written)
    if is_idle:
        return SwapWrites(engine_idle=own, other_idle=written - own)
    return SwapWrites(engine_busy=own, other_busy=written - own)


def _written(before: SwapReading, after: SwapReading) -> int:
    if before.written_bytes is None or after.written_bytes is None:
        return 0
    return max(after.written_bytes - before.written_bytes, 0)


def _grown(before: SwapReading, after: SwapReading) -> int | None:
    """Return by how much the engine's part grew, None if that is unknown."""
    if after.engine is None:
        # None now: an engine that has ended has nothing in swap.
        return 0 if before.engine is None else None
    if after.engine_bytes is None:
        return None
    if before.engine != after.engine:
        return after.engine_bytes  # it started after the earlier reading, with nothing in swap
    if before.engine_bytes is None:
        return None
    return max(after.engine_bytes - before.engine_bytes, 0)


def share_of_endurance(written_bytes: int, endurance_tb: float) -> float:
    """Return the share of the rated endurance that these bytes are; 1 is all of it."""
    return written_bytes / (endurance_tb * TB)
