"""What the engine's log tells about memory while a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Place(Enum):
    """Where a buffer with weights lies."""

    MAPPED = "mapped"
    """Pages of the file itself."""
    HOST = "host"
    """A copy in ordinary memory, which the engine locks if asked."""
    REPACKED = "repacked"
    """A copy in another layout, which the engine never locks."""
    METAL = "metal"
    """A Metal buffer: ordinary memory on Apple silicon."""
    DEVICE = "device"
    """A graphics card's own memory."""


@dataclass(frozen=True, slots=True)
class MlockWarning:
    """The engine's own words about a lock that failed.

    Attributes:
        asked_bytes: size of the piece that was refused, 0 if the engine has no mlock at all.
        locked_bytes: what it had locked of the same buffer or file before; this stays locked.
        text: the error as the system words it.
        is_supported: whether the engine can lock at all.
    """

    asked_bytes: int
    locked_bytes: int
    text: str
    is_supported: bool = True


@dataclass(frozen=True, slots=True)
class WeightsBuffer:
    """One buffer of weights, as the engine lists it while it loads.

    Attributes:
        name: the engine's name for it.
        size_bytes: its size.
        place: where it lies.
    """

    name: str
    size_bytes: int
    place: Place


@dataclass(frozen=True, slots=True)
class LoadFacts:
    """What the engine's log told about memory since its start; engine/llama_log.py gathers it.

    Attributes:
        model: the file that was read first, empty if the log names none.
        is_mapped: whether the weights are pages of the file, None if the log does not tell.
        warnings: locks that failed.
        buffers: where the weights lie; empty if the log does not tell.
        keep_alive_s: Metal: for how long residency is requested again after the last use.
        uses_residency_sets: Metal: whether the engine uses residency sets.
        working_set_bytes: Metal: what the system recommends as the greatest working set.
        is_cache_shared: the slots share the cells of one KV cache, None if the log does not tell.
    """

    model: str = ""
    is_mapped: bool | None = None
    warnings: tuple[MlockWarning, ...] = ()
    buffers: tuple[WeightsBuffer, ...] = ()
    keep_alive_s: int | None = None
    uses_residency_sets: bool | None = None
    working_set_bytes: int | None = None
    is_cache_shared: bool | None = None

    def bytes_in(self, place: Place) -> int:
        """Return how many bytes of weights the log places there."""
        return sum(buffer.size_bytes for buffer in self.buffers if buffer.place is place)
