"""Does Metal's heartbeat hold the model on the GPU? Judged from the engine's log."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emberd.core.load_facts import LoadFacts


class KeepAliveState(Enum):
    """What the engine's log says about Metal's heartbeat."""

    HELD = "HELD"
    """The engine says that it renews residency for as long as it was asked."""
    SHORT = "SHORT"
    """It does for a shorter time: the variable did not reach it."""
    ABSENT = "ABSENT"
    """Metal is in use and there is no heartbeat."""
    UNKNOWN = "UNKNOWN"
    """The log says nothing about Metal."""


@dataclass(frozen=True, slots=True)
class KeepAliveVerdict:
    """The judgement on Metal's heartbeat.

    Attributes:
        state: the verdict.
        seconds: the time that the engine names, None if it names none.
        message: a sentence about what is missing, empty if nothing.
        remedy: what a person can do, empty if nothing.
    """

    state: KeepAliveState
    seconds: int | None = None
    message: str = ""
    remedy: str = ""


def judge_keep_alive(load: LoadFacts, wanted_s: int) -> KeepAliveVerdict:
    """Judge the heartbeat of an engine that has loaded.

    macOS 26 unwires a model about a second after its last use; llama.cpp renews the residency for `keep_alive`
    seconds (PR 17766, ggml/src/ggml-metal/ggml-metal-device.m). HELD is the engine's word and no measurement: both
    lines are printed outside the compile-time check, so a build with an SDK older than macOS 15 prints them too.

    Args:
        load: what the log told.
        wanted_s: the time that the engine was given in its environment.
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
