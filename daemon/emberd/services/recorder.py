"""Makes a row of the history each minute, of what the services have counted and one observation."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from emberd.core.forecast import Temperature
from emberd.core.minute import MINUTE_S, PRESSURES, Minute, lost_bytes, worth_keeping

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.core.memory import Observation
    from emberd.core.swap_account import SwapWrites
    from emberd.core.tally import Tally
    from emberd.services.accounts import Accounts, Spending
    from emberd.services.forecaster import Forecaster
    from emberd.services.gate import Gate
    from emberd.services.swap_meter import SwapMeter
    from emberd.services.turns import Turns

BATCH_S = 7200.0
"""How much a crash may lose. A day of batches writes less than 1 MiB; with one an hour a busy day wrote 1.04 MiB,
because each also changes pages that others have changed (scripts/bench-night)."""


class Recorder:
    """Keeps the history.

    Args:
        swap: takes the one observation of a minute.
        is_warm: returns whether a pass or a user has recently used the model.
    """

    def __init__(
        self,
        log: FilteringBoundLogger,
        swap: SwapMeter,
        gate: Gate,
        forecaster: Forecaster,
        spending: Spending,
        turns: Turns,
        is_warm: Callable[[], bool],
    ) -> None:
        self._log = log
        self._swap = swap
        self._gate = gate
        self._forecaster = forecaster
        self._spending = spending
        self._turns = turns
        self._is_warm = is_warm
        self._seen_s = self._saved_s = time.monotonic()
        self._observation: Observation | None = None
        self._counted = self.counts()

    @property
    def _accounts(self) -> Accounts:
        return self._spending.accounts

    async def run(self) -> None:
        """Make a row at the end of each minute of the clock, until cancelled."""
        while True:
            try:
                await self.tick()
                if time.monotonic() - self._saved_s >= BATCH_S:
                    await self.save()
            except Exception:  # noqa: BLE001  # a row is not worth the daemon
                self._log.exception("recorder_bug")
            await asyncio.sleep(MINUTE_S - time.time() % MINUTE_S)

    async def tick(self, *, is_last: bool = False) -> Minute | None:
        """Keep what has happened since the last call, in memory; None if that was less than a second ago.

        Args:
            is_last: keep also what has happened in less than a second.
        """
        writes = await self._swap.tick()
        now_s, seen = time.monotonic(), self._swap.observer.recent()
        observed_s = round(now_s - self._seen_s)
        is_first = self._observation is None
        if is_first or not (observed_s or is_last):
            self._observation = self._observation or seen
            if is_first:
                self._seen_s = now_s
            return None
        self._seen_s = now_s
        before, self._observation = self._observation, seen
        worst, forecast = self._swap.observer.take_worst(), self._forecaster.status()
        counted, self._counted = self._counted, self.counts()
        ready_s = observed_s if self._gate.port is not None else 0
        is_hot = forecast.temperature == Temperature.HOT.value
        is_cold = forecast.temperature == Temperature.COLD.value
        minute = Minute(
            # Of the middle: a row is made a little before or after the minute's end.
            at_s=int(time.time() - observed_s / 2) // MINUTE_S * MINUTE_S,
            observed_s=observed_s,
            ready_s=ready_s,
            warm_s=ready_s if is_hot or (self._is_warm() and not is_cold) else 0,
            resident_bytes=seen.memory.resident_bytes,
            locked_bytes=seen.memory.locked_bytes,
            swapped_bytes=seen.memory.swapped_bytes,
            missing_bytes=self._forecaster.missing_bytes,
            lost_bytes=lost_bytes(before, seen),
            pressure=PRESSURES.index(worst.pressure) if worst.pressure in PRESSURES else None,
            stall_some_share=worst.stall_some_share,
            available_bytes=worst.available_bytes,
            swap_engine_bytes=None if seen.system.swapped_out_bytes is None else writes.engine,
            swap_other_bytes=None
            if seen.system.swapped_out_bytes is None
            else writes.other_idle + writes.other_busy,
            swap_unknown_bytes=(
                None if seen.system.swapped_out_bytes is None else writes.unknown_idle + writes.unknown_busy
            ),
            pass_reasons=self._gate.tally.take_reasons(),
            **{name: now - counted[name] for name, now in self._counted.items()},
        )
        await self._accounts.keep_rows([minute], worth_keeping(self._turns.take_first_tokens()))
        return minute

    @property
    def tally(self) -> Tally:
        """What was counted where it happened."""
        return self._gate.tally

    @property
    def swapped(self) -> SwapWrites:
        """Written to swap since emberd's start."""
        return self._swap.total

    async def past(
        self, since_s: float | None = None, until_s: float | None = None, step_s: float | None = None
    ) -> dict[str, Any]:
        """Return what `tell_past` tells of a time, of the last day if no other is named."""
        from emberd.services.past import DEFAULT_SPAN_S, tell_past  # noqa: PLC0415  # asked for once in a while

        end_s = time.time() + 1 if until_s is None else until_s
        begin_s = end_s - DEFAULT_SPAN_S if since_s is None else since_s
        return await self._accounts.ask(lambda history: tell_past(history, begin_s, end_s, step_s))

    async def save(self) -> None:
        """Write what is in memory. If the disk takes nothing, it stays there for the next time."""
        self._saved_s = time.monotonic()
        await self._spending.save()
        await self._accounts.flush()

    async def close(self) -> None:
        """Write everything, also the minute that has begun, and close the file."""
        try:
            await self.tick(is_last=True)
            await self._spending.save()
        except Exception:  # noqa: BLE001  # a row is not worth a failed end
            self._log.exception("recorder_bug")
        await self._accounts.close()

    def counts(self) -> dict[str, int]:
        """Return the counts since emberd's start, by their columns."""
        tally, cost = self._gate.tally, self._spending.total
        return {
            "state_changes": tally.state_changes,
            "starts": tally.starts,
            "requests": self._gate.requests,
            "first_tokens": tally.first_tokens,
            "reused_tokens": tally.reused_tokens,
            "processed_tokens": tally.processed_tokens,
            "cuts": tally.cuts,
            "continuations": tally.continuations,
            "lettings_go": tally.lettings_go,
            "passes": cost.passes,
            "pass_ms": tally.pass_ms,
            "pass_cpu_ms": cost.cpu_ms,
            "pass_read_bytes": cost.read_bytes,
            "pass_tokens": cost.processed_tokens,
        }
