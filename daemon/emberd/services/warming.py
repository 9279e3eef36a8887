"""Carries out keep-warm's decisions, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emberd.core.warmth import Step
from emberd.host.toucher import ToucherLost, ToucherRefused
from emberd.services.accounts import cpu_s

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.services.accounts import Spending
    from emberd.services.forecaster import Forecaster
    from emberd.services.gate import Gate
    from emberd.services.model_use import ModelUse
    from emberd.services.replays import Replays
    from emberd.services.weights import Weights


@dataclass(frozen=True, slots=True)
class Warming:
    """The means of keeping warm, and what they share.

    Attributes:
        gate: the way to the engine.
        use: tells who is at work.
        weights: touches and locks them.
        replays: keeps the prompt cache.
        forecaster: learns how long things take.
        spending: adds up what it costs.
    """

    log: FilteringBoundLogger
    gate: Gate
    use: ModelUse
    weights: Weights
    replays: Replays
    forecaster: Forecaster
    spending: Spending

    def cpu_s(self) -> float:
        """Return the processor time of the toucher and the engine so far, in seconds."""
        return self.weights.cpu_s() + cpu_s(*self.gate.sample().pids)

    async def do(self, step: Step, *, is_thorough: bool) -> dict[str, Any] | None:
        """Do one step; return what it found, None if it failed.

        If `is_thorough`, a replay uses the buffers for several tokens.
        """
        if step is Step.RESTART:
            self.gate.restart_without_lock()
            return {}
        if step is Step.START:
            self.gate.wake()
            return {}
        if step is Step.STOP:
            return {} if await self.gate.cool() else None
        work: dict[Step, Callable[[], Awaitable[dict[str, Any] | None]]] = {
            Step.LOCK: self.weights.lock,
            Step.TOUCH: self.weights.touch,
            Step.UNLOCK: self.weights.unlock,
            Step.TINY: self.replays.tiny,
            Step.REPLAY: lambda: self.replays.replay(is_thorough=is_thorough),
        }
        try:
            return await work[step]()
        except (ToucherRefused, ToucherLost) as error:
            self.weights.note_failure()
            self.log.warning("keepwarm_failed", step=step.value, reason=str(error))
            return None
