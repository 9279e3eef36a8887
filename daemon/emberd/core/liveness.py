"""Is the engine alive, busy, or hung? A pure judgement over successive probes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emberd.core.settings import LifecycleSettings
    from emberd.core.types import Activity

_WORKING_CPU_SHARE = 0.01
"""Less than 1 % of a core is what an engine uses while it waits; a generation uses far more, also on a GPU."""
_IDLE_STRETCH = 3
"""An idle engine that answered is asked less often: each question wakes two processes."""


class Verdict(Enum):
    """What the probes so far allow to say."""

    ALIVE = "alive"
    SILENT = "silent"
    """No answer or no progress, but not for long enough to act."""
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Watch:
    """What the judgement remembers between two probes. Times are monotonic seconds.

    Attributes:
        alive_at: last time the engine showed that it lives (an answer while idle, or work done).
        output_at: last time a generation produced something, or none was running.
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
    """Start watching an engine that has just shown itself ready."""
    return Watch(alive_at=now_s, output_at=now_s, probed_at=now_s)


def pause_s(verdict: Verdict, settings: LifecycleSettings, *, is_idle: bool) -> float:
    """Return how long to wait until the next probe, in seconds.

    Args:
        verdict: the last probe's.
        settings: the settings.
        is_idle: no request is running.
    """
    if verdict is not Verdict.ALIVE or not is_idle:
        return settings.probe_interval_s
    # A request may come just after a probe: the next one must find it before its silence counts as a hang.
    return max(settings.probe_interval_s, min(_IDLE_STRETCH * settings.probe_interval_s, settings.hang_after_s / 2))


def judge(watch: Watch, seen: Activity, now_s: float, settings: LifecycleSettings) -> tuple[Watch, Verdict]:
    """Weigh one probe.

    A long prompt is silent for minutes and a generation holds the model, so silence alone is no hang:
    an engine that uses the CPU is given `generation_silence_s`, one that does nothing `hang_after_s`.
    A loop that eats the CPU without producing anything (KoboldCPP issue 1489) falls to the former.
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
