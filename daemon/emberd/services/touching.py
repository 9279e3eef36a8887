"""Touches the weights again and again during a storm, between the passes and beside users."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from emberd.core.warmth_cost import WarmthCost
from emberd.host.toucher import ToucherLost, ToucherRefused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.services.accounts import Spending
    from emberd.services.model_use import ModelUse
    from emberd.services.pressure_watch import PressureWatch
    from emberd.services.weights import Weights

PAUSE_S = 0.2
_CALM_ROUNDS = 25
"""Touching ends when nothing was taken for about 5 s and the computer is calm."""
_LONGEST_S = 600.0
_REST_S = 30.0
"""Touching rests after so long unless the computer writes to swap, and after a failure: reading pages back itself
makes programs wait for memory (PSI, a share of the last 10 s), which alone must not keep it on."""


class Touching:
    """One task while it is on.

    Between two passes 5 s apart a busy program took two thirds of a model of 2 GiB (0.3 GiB short); pages that
    are used as often as its own stay. A user's generations do not keep the weights: the third and fourth in a row
    took 4 to 5 times as long as a hot one, and mostly 1.4 to 2.4 times with the weights touched meanwhile. Nor do
    replays: a user who came during one, without touching, waited 14 times as long (845 major faults).
    """

    def __init__(
        self,
        log: FilteringBoundLogger,
        weights: Weights,
        spending: Spending,
        watch: PressureWatch,
        use: ModelUse,
        may_go_on: Callable[[], Awaitable[bool]],
    ) -> None:
        self._log = log
        self._weights = weights
        self._spending = spending
        self._watch = watch
        self._use = use
        self._may_go_on = may_go_on
        self._task: asyncio.Task[None] | None = None
        self._rests_until_s = 0.0

    @property
    def is_on(self) -> bool:
        """Whether the weights are being touched."""
        return self._task is not None and not self._task.done()

    def begin(self) -> None:
        """Begin, unless it is on or rests."""
        if not self.is_on and time.monotonic() >= self._rests_until_s:
            self._weights.is_kept_touched = True
            self._task = asyncio.create_task(self.run())
            self._task.add_done_callback(self._note_end)

    def stop(self) -> None:
        """End at once."""
        if self._task is not None:
            self._task.cancel()

    def _note_end(self, _: asyncio.Task[None]) -> None:
        self._weights.is_kept_touched = self.is_on

    async def run(self) -> None:
        """Touch until nothing is taken any more, or touching is forbidden."""
        began_s, rounds, used_s = time.monotonic(), 0, 0.0
        try:
            calm = 0
            while calm < _CALM_ROUNDS:
                if time.monotonic() - began_s > _LONGEST_S and not self._watch.is_swapping:
                    self._rests_until_s = time.monotonic() + _REST_S
                    break
                await asyncio.sleep(PAUSE_S)
                if not await self._may_go_on():
                    break
                cpu_s = self._weights.cpu_s()  # the engine's time may be a user's
                was_cold = await self._weights.touch_again()
                if not self._use.passing.locked():  # a pass counts what the toucher does meanwhile
                    used_s += max(self._weights.cpu_s() - cpu_s, 0.0)
                if was_cold is None:
                    continue  # somebody came
                rounds += 1
                calm = 0 if was_cold or self._watch.is_tight else calm + 1
        except (ToucherRefused, ToucherLost) as error:
            self._rests_until_s = time.monotonic() + _REST_S
            self._log.warning("keepwarm_failed", step="dwell", reason=str(error))
        except Exception:  # noqa: BLE001  # keeping warm is not worth the daemon
            self._log.exception("keepwarm_bug")
        self._spending.add(WarmthCost(cpu_ms=round(used_s * 1000)), counts=False)
        seconds = round(time.monotonic() - began_s, 1)
        self._log.info("keepwarm_dwelt", rounds=rounds, seconds=seconds, cpu_s=round(used_s, 2))
