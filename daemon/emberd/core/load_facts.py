"""What the engine's log tells about memory while a model loads, and about Metal's heartbeat."""

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
        locked_bytes: the part of the same buffer or file that it had locked before; this stays locked.
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
    """The engine's log on memory since its start; engine/llama_log.py reads it.

    Attributes:
        model: the first file that was read, empty if the log names none.
        is_mapped: whether the weights are pages of the file, None if the log does not tell.
        warnings: locks that failed.
        buffers: where the weights lie; empty if the log does not tell.
        keep_alive_s: Metal: for how long after the last use residency is renewed.
        uses_residency_sets: Metal: whether the engine uses residency sets.
        working_set_bytes: Metal: what the system recommends as the greatest working set.
        context_tokens: cells of the KV cache, None if the log does not tell.
        kv_bytes: size of the KV cache with all its parts, None if the log does not tell.
        is_cache_shared: the slots share the cells of one KV cache, None if the log does not tell.
    """

    model: str = ""
    is_mapped: bool | None = None
    warnings: tuple[MlockWarning, ...] = ()
    buffers: tuple[WeightsBuffer, ...] = ()
    keep_alive_s: int | None = None
    uses_residency_sets: bool | None = None
    working_set_bytes: int | None = None
    context_tokens: int | None = None
    kv_bytes: int | None = None
    is_cache_shared: bool | None = None

    def bytes_in(self, place: Place) -> int:
        """Return how many bytes of weights lie there, by the log."""
        return sum(buffer.size_bytes for buffer in self.buffers if buffer.place is place)


class KeepAliveState(Enum):
    """What the engine's log says about Metal's heartbeat."""

    HELD = "HELD"
    """The engine says that it renews residency for as long as it was asked."""
    SHORT = "SHORT"
    """It renews for a shorter time: the variable did not reach it."""
    ABSENT = "ABSENT"
    """Metal is in use without a heartbeat."""
    UNKNOWN = "UNKNOWN"
    """The log says nothing about Metal."""


@dataclass(frozen=True, slots=True)
class KeepAliveVerdict:
    """The judgement on Metal's heartbeat.

    Attributes:
        state: the verdict.
        seconds: the time that the engine names, None if it names none.
        message: a sentence about what is missing, or empty.
        remedy: what a person can do, or empty.
    """

    state: KeepAliveState
    seconds: int | None = None
    message: str = ""
    remedy: str = ""


def judge_keep_alive(load: LoadFacts, wanted_s: int) -> KeepAliveVerdict:
    """Judge the heartbeat of a loaded engine, which was given `wanted_s` in its environment.

    macOS 26 unwires a model about a second after its last use; llama.cpp renews the residency for `keep_alive`
    seconds (PR 17766, ggml/src/ggml-metal/ggml-metal-device.m). HELD is the engine's word and not measured: both
    lines are printed outside the compile-time check, so a build with an SDK older than macOS 15 prints them too.
    """
    if load.uses_residency_sets is False:
        return KeepAliveVerdict(
            KeepAliveState.ABSENT,
            load.keep_alive_s,
            "the engine uses no Metal residency sets",
            "Remove GGML_METAL_NO_RESIDENCY from the environment; residency sets need macOS 15.",
        )
    if load.keep_alive_s is None:
        if load.uses_residency_sets is None and load.working_set_bytes is None:
            return KeepAliveVerdict(KeepAliveState.UNKNOWN)
        return KeepAliveVerdict(
            KeepAliveState.ABSENT,
            None,
            "this build of the engine has no heartbeat for Metal",
            "Use a build from after December 2025 (llama.cpp PR 17766).",
        )
    if load.keep_alive_s < wanted_s:
        return KeepAliveVerdict(
            KeepAliveState.SHORT,
            load.keep_alive_s,
            f"the engine keeps the model resident for {load.keep_alive_s} s, not for {wanted_s} s",
            "Run `emberd restart`: the engine was started with other settings.",
        )
    return KeepAliveVerdict(KeepAliveState.HELD, load.keep_alive_s)
