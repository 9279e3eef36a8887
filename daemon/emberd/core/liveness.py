"""Is the engine alive, busy or hung? A pure judgement of successive probes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emberd.core.settings import LifecycleSettings
    from emberd.core.types import Activity

_WORKING_CPU_SHARE = 0.01
"""A waiting engine uses less than 1 % of a core; a generation uses far more, even on a GPU."""
_IDLE_STRETCH = 3
"""An idle engine that answered is probed less often, because each probe wakes two processes."""


class Verdict(Enum):
    """The judgement after the probes so far."""

    ALIVE = "alive"
    SILENT = "silent"
    """No answer or no progress, but not yet for long enough."""
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Watch:
    """The judgement's memory between two probes. Times are monotonic seconds.

    Attributes:
        alive_at: when the engine last showed that it lives (an answer while idle, or work done).
        output_at: when a generation last produced something, or none was running.
        probed_at: time of the last probe.
        cpu_seconds: CPU time at the last probe, None if unknown.
        generated_units: output counter at the last probe, None if unknown.
    """

    alive_at: float
    output_at: float
    probed_at: float
    cpu_seconds: float | None = None
    generated_units: int | None = None


def begin(now_s: float) -> Watch:
    """Begin to watch an engine that is ready."""
    return Watch(alive_at=now_s, output_at=now_s, probed_at=now_s)


def pause_s(verdict: Verdict, settings: LifecycleSettings, *, is_idle: bool) -> float:
    """Return the seconds until the next probe; `is_idle` means that no request runs."""
    if verdict is not Verdict.ALIVE or not is_idle:
        return settings.probe_interval_s
    # A request may come just after a probe; the next probe must see it before its silence counts as a hang.
    return max(settings.probe_interval_s, min(_IDLE_STRETCH * settings.probe_interval_s, settings.hang_after_s / 2))


def judge(watch: Watch, seen: Activity, now_s: float, settings: LifecycleSettings) -> tuple[Watch, Verdict]:
    """Judge one probe.

    The engine is silent for minutes on a long prompt, so silence alone is no hang: an engine that uses the CPU
    gets `generation_silence_s`, one that does nothing `hang_after_s`. The former also ends a loop that uses the
    CPU without producing anything (KoboldCPP issue 1489).
    """
    elapsed_s = max(now_s - watch.probed_at, 1e-9)
    has_worked = (
        seen.cpu_seconds is not None
        and watch.cpu_seconds is not None
        and (seen.cpu_seconds - watch.cpu_seconds) / elapsed_s > _WORKING_CPU_SHARE
    )
    has_output = seen.generated_units is not None and seen.generated_units != watch.generated_units
    is_idle = seen.answered and seen.is_generating is not True
    after = replace(
        watch,
        probed_at=now_s,
        alive_at=now_s if is_idle or has_worked or has_output else watch.alive_at,
        output_at=now_s if is_idle or has_output else watch.output_at,
        cpu_seconds=seen.cpu_seconds if seen.cpu_seconds is not None else watch.cpu_seconds,
        generated_units=seen.generated_units if seen.generated_units is not None else watch.generated_units,
    )
    if now_s - after.alive_at >= settings.hang_after_s or now_s - after.output_at >= settings.generation_silence_s:
        return after, Verdict.HUNG
    return after, Verdict.ALIVE if after.alive_at == now_s else Verdict.SILENT
