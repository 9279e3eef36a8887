"""Keeps the idle model warm: looks, decides by core/warmth.py, acts, and plans the next look."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emberd.core import warmth
from emberd.core.lifecycle import State
from emberd.core.lock import LockState
from emberd.core.status import (
    GivenBackStatus,
    PassStatus,
    ProgressStatus,
    WarmthStatus,
    from_plain,
    to_plain,
)
from emberd.core.warmth import Decision, Found, Reason, Snapshot, Step, Trigger
from emberd.core.warmth_cost import WarmthCost
from emberd.services.pressure_watch import WATCH_INTERVAL_S
from emberd.services.schedule import Pauses, Schedule, left_s
from emberd.services.touching import Touching

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.core.memory import EngineMemory, Observation, Power
    from emberd.core.settings import WarmthSettings
    from emberd.services.gate import Gate
    from emberd.services.observer import Observer
    from emberd.services.pressure_watch import PressureWatch
    from emberd.services.turns import Knocks
    from emberd.services.warming import Warming

_PASSING = frozenset({Reason.NOT_READY, Reason.BUSY, Reason.PRESSURE})
"""Obstacles that pass by themselves; the purpose of the look remains."""


class KeepWarm:
    """The keep-warm service."""

    def __init__(
        self,
        log: FilteringBoundLogger,
        settings: Callable[[], WarmthSettings],
        gate: Gate,
        observer: Observer,
        warming: Warming,
        watch: PressureWatch,
        knocks: Knocks,
    ) -> None:
        self._log = log
        self._settings = settings
        self._gate = gate
        self._observer = observer
        self._warming = warming
        self._use = warming.use
        self._turns = warming.replays.turns
        self._watch = watch
        self._knocks = knocks
        self._interval_s = self._loss_wait_s = settings().min_interval_s
        self._is_over_budget = False
        self._last: dict[str, Any] | None = None
        self._rest = ""
        self._schedule = Schedule(self._look)
        self._pauses = Pauses()
        self._touching = Touching(log, warming.weights, warming.spending, watch, warming.use, self._may_touch)
        watch.wake = self.wake

    async def run(self) -> None:
        """Keep warm until cancelled; let go of the outside lock at the end."""
        self._schedule.begin()
        watching = asyncio.create_task(self._watch.run(self._after_reading))
        try:
            while True:
                await self._knocks.wait()
                self.wake(Trigger.KNOCK)
        finally:
            self._schedule.end()
            watching.cancel()
            self._touching.stop()

    def wake(self, trigger: Trigger) -> None:
        """Look now, and say why."""
        self._schedule.wake(trigger)

    async def warm(self) -> dict[str, Any]:
        """Warm everything now, a cool engine as soon as it is READY again; return what was done and why."""
        self._pauses.end()
        self._schedule.ask()
        if self._gate.wake():
            return {"ok": True, "reason": Reason.ASKED.value, "steps": [Step.START.value], "seconds": 0.0}
        before, replays = self._last, self._warming.replays
        replays.take_refusal()
        await self._look()
        done = self._last if self._last is not before else {"reason": self._rest, "steps": []}
        refused = replays.take_refusal()
        return {"ok": True, **(done or {}), **({"refused": refused} if refused else {})}

    async def pause(self, seconds: float) -> dict[str, Any]:
        """Warm nothing for a while; locks stay."""
        self._pauses.pause(seconds)
        await self._use.end_pass()
        return {"ok": True, "seconds": seconds}

    def resume(self) -> dict[str, Any]:
        """End a pause or a cool spell."""
        was_paused = self._pauses.end() | self._gate.wake()
        self.wake(Trigger.ASKED)
        return {"ok": True, "was_paused": was_paused}

    async def cool(self, seconds: float) -> dict[str, Any]:
        """Let go of the model's memory for a while, or until the next request; return what was given back."""
        self._pauses.cool(seconds)
        self._gate.tally.lettings_go += 1
        await self._use.end_pass()
        await self._look()
        given = self._pauses.given_back
        is_locked = self._gate.lock_state is LockState.HELD and self._gate.port is not None
        return {
            "ok": True,
            "seconds": seconds,
            "is_put_off": is_locked,
            "given_back": None if given is None else to_plain(given),
        }

    async def status(self) -> WarmthStatus:
        """Return mode, last and next pass, the forecast, and what it has cost."""
        warming, forecaster = self._warming, self._warming.forecaster
        if warming.weights.progress is None:  # the toucher does one thing at a time, and a cold pass takes seconds
            await forecaster.look()
        cost, cost_today = await warming.spending.status()
        now_s = time.monotonic()
        passed_s = self._use.last_pass_s
        self._note_use()
        return replace(
            self._watch.status(),
            mode=self._settings().mode,
            is_locked_outside=warming.weights.is_locked_outside,
            paused_for_s=left_s(now_s, self._pauses.paused_until_s),
            cool_for_s=left_s(now_s, self._cool_end_s()),
            given_back=self._pauses.given_back,
            interval_s=round(self._interval_s, 3),
            over_budget_for_s=round(warming.spending.wait_s, 3),
            next_look_in_s=self._schedule.next_in_s,
            warm_for_s=None if passed_s is None else round(now_s - passed_s, 3),
            last=None if self._last is None else from_plain(PassStatus, self._last),
            progress=warming.weights.progress,
            hot_replay_s=forecaster.hot_replay_s,
            forecast=forecaster.status(),
            reuse=self._turns.status(self._gate.sample().key),
            cost=cost,
            cost_today=cost_today,
        )

    @property
    def is_locked_outside(self) -> bool:
        """Whether emberd holds a lock on all of the engine's mapped files."""
        return self._warming.weights.is_locked_outside

    @property
    def progress(self) -> dict[str, int]:
        """Progress of a pass over the weights; zeros while there is none."""
        return to_plain(self._warming.weights.progress or ProgressStatus())

    @property
    def is_warm(self) -> bool:
        """Whether a pass or a user has recently used the model."""
        warmed = [when for when in (self._use.last_pass_s, self._turns.ended_s) if when is not None]
        if not warmed or self._gate.port is None:
            return False
        return time.monotonic() - max(warmed) <= 2 * self._interval_s + WATCH_INTERVAL_S

    # --- looking --------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        async with self._use.passing:
            self._schedule.note_look()
            try:
                seen = await self._snapshot()
                decision = self._decide(seen)
                is_put_off = decision.reason in _PASSING or (
                    decision.reason is Reason.NOT_DUE and seen.trigger is Trigger.EVICTING
                )
                self._note(decision, seen.budget_wait_s)
                if decision.steps:
                    decision = await self._act(decision, seen)
                if is_put_off:
                    self._schedule.put_off(seen.trigger)
                self._schedule.plan_after_look(decision.look_again_s)
            except Exception:  # noqa: BLE001  # keeping warm is not worth the daemon
                self._log.exception("keepwarm_bug")
                self._schedule.plan(self._settings().max_interval_s)

    async def _snapshot(self) -> Snapshot:
        """Return the present, and what made emberd look."""
        self._note_use()
        power, settings = await self._watch.power(), self._settings()
        seen = self._consider(self._observer.look(), power)
        if settings.replay and warmth.may_warm(seen, settings):  # letting go waits for no answer
            await self._warming.replays.check_prompt_was_not_truncated()
            seen = self._consider(self._observer.look(), power)
        return replace(seen, trigger=self._schedule.take_trigger())

    def _note_use(self) -> None:
        self._pauses.note_use(self._use.arrived_s, self._gate.woken_s)

    def _cool_end_s(self) -> float | None:
        return self._pauses.cool_end_s(self._settings(), self._turns.used_s, self._gate.woken_s)

    def _consider(self, seen: Observation, power: Power, found: Found | None = None) -> Snapshot:
        """Return the snapshot to decide on; nothing is awaited here, so that all of it is of one moment."""
        settings, weights, replays = self._settings(), self._warming.weights, self._warming.replays
        return Snapshot(
            now_s=time.monotonic(),
            is_ready=self._gate.port is not None and not self._gate.is_empty,
            is_stopped=self._gate.state is State.COOL,
            requests=self._use.requests,
            lock=self._gate.lock_state,
            is_locked_outside=weights.is_locked_outside,
            can_lock_outside=weights.can_lock(seen.engine, seen.system),
            is_mapped=seen.engine.is_mapped,
            cache=replays.cache(seen.engine, settings),
            pressure=seen.system.pressure,
            last_critical_s=self._watch.last_critical_s,
            power=power,
            paused_until_s=self._pauses.paused_until_s,
            cool_until_s=self._cool_end_s(),
            hold=self._watch.guard.hold,
            last_use_s=self._turns.used_s,
            last_pass_s=self._use.last_pass_s,
            interval_s=self._interval_s,
            loss_wait_s=self._loss_wait_s,
            is_storming=self._watch.is_storming,
            budget_wait_s=self._warming.spending.wait_s,
            taken=self._watch.losses.taken(seen),
            found=found,
        )

    def _decide(self, seen: Snapshot) -> Decision:
        decision = warmth.decide(seen, self._settings())
        self._interval_s, self._loss_wait_s = decision.interval_s, decision.loss_wait_s
        return decision

    # --- between two looks ----------------------------------------------------------------------------------

    async def _after_reading(self) -> None:
        """Touch while a storm lasts, learn from the last reply."""
        if self._watch.is_storming:
            self._warming.spending.excuse()
            if (await self._decide_on_touching()).begins_touching:
                self._touching.begin()
        await self._warming.forecaster.learn(may_look=self._use.is_idle)

    async def _decide_on_touching(self) -> Decision:
        return self._decide(self._consider(self._watch.latest(), await self._watch.power()))

    async def _may_touch(self) -> bool:
        return (await self._decide_on_touching()).may_touch

    # --- acting ---------------------------------------------------------------------------------------------

    def _note(self, decision: Decision, budget_wait_s: float) -> None:
        """Log once why nothing is done, and when keep-warm is over its budget."""
        is_over_budget = decision.reason is Reason.OVER_BUDGET
        if is_over_budget and not self._is_over_budget:
            self._log.warning("keepwarm_over_budget", wait_s=round(budget_wait_s, 1))
        self._is_over_budget = (self._is_over_budget or is_over_budget) and budget_wait_s > 0
        if not decision.steps and self._rest != decision.reason.value:
            self._log.debug("keepwarm_rests", reason=decision.reason.value)
        if not decision.steps:
            self._rest = decision.reason.value

    async def _act(self, decision: Decision, seen: Snapshot) -> Decision:
        """Carry out the steps; return the decision that follows from what they found."""
        warming, losses = self._warming, self._watch.losses
        began_s, cpu_s = time.monotonic(), warming.cpu_s()
        warming.replays.has_primed = False
        is_warming = not {Step.UNLOCK, Step.STOP, Step.START, Step.RESTART} & set(decision.steps)
        before, outside_bytes = self._observer.recent().memory, warming.weights.locked_bytes
        done, found = await self._do(decision, seen.taken, is_warming=is_warming)
        now = self._observer.look()
        if decision.reason is Reason.COOL and done:
            self._note_given_back(before, now.memory, outside_bytes, time.monotonic() - began_s)
        is_for_loss = seen.trigger is Trigger.EVICTING and not self._touching.is_on
        found = replace(found, major_faults=losses.major_faults(now), was_for_loss=is_for_loss)
        is_complete = len(done) == len(decision.steps)
        # A step that failed without a user is tried again after the interval, not at once.
        is_pass = is_warming and (is_complete or self._use.is_free)
        if is_pass:
            self._use.last_pass_s = time.monotonic()
            if is_complete:
                losses.note_pass(now, is_thorough=decision.is_thorough)
        used_s = max(warming.cpu_s() - cpu_s, 0.0)  # an engine that was stopped has none
        was_missing = (
            found.has_lost or seen.is_storming or warming.replays.has_primed or seen.trigger is Trigger.RESTARTED
        )
        if was_missing:
            warming.spending.excuse()
        cost = WarmthCost(passes=1, cpu_ms=round(used_s * 1000))
        warming.spending.add(cost, counts=not was_missing)
        await warming.forecaster.look()
        after = self._decide(self._consider(now, seen.power, found if is_pass else None))
        if after.begins_touching and Step.TOUCH.value in done:
            self._touching.begin()
        seconds = time.monotonic() - began_s
        self._gate.tally.pass_ms += round(seconds * 1000)
        self._gate.tally.pass_reasons.add(decision.reason.value)
        self._last = {
            "reason": decision.reason.value,
            "steps": done,
            "is_complete": is_complete,
            "seconds": round(seconds, 4),
            "had_lost": found.has_lost,
            "cold_share": found.cold_share,
            "swapped_bytes": found.swapped_bytes,
            "cpu_s": round(used_s, 3),
        }
        self._log.info("keepwarm", cache=seen.cache.value, next_s=round(self._interval_s, 1), **self._last)
        return after

    def _note_given_back(
        self, before: EngineMemory, after: EngineMemory, outside_bytes: int, seconds: float
    ) -> None:
        has_stopped = self._gate.state is State.COOL
        now_outside_bytes = self._warming.weights.locked_bytes
        given = self._pauses.given_back = GivenBackStatus(
            seconds=round(seconds, 3),
            engine_stopped=has_stopped,
            resident_before_bytes=before.resident_bytes,
            resident_after_bytes=0 if has_stopped else after.resident_bytes,
            locked_before_bytes=(before.locked_bytes or 0) + outside_bytes,
            locked_after_bytes=now_outside_bytes + (0 if has_stopped else after.locked_bytes or 0),
        )
        self._log.info("cooled", **to_plain(given))

    async def _do(self, decision: Decision, found: Found, *, is_warming: bool) -> tuple[list[str], Found]:
        """Carry out the steps until one fails; return the names of those that were done, and what they found."""
        done = list[str]()
        for step in decision.steps:
            if step in {Step.REPLAY, Step.TINY} and not self._use.is_free:
                break  # a user is here: the generation warms better than a replay
            if is_warming and self._use.letting_go.is_set():
                break
            outcome = await self._warming.do(step, is_thorough=decision.is_thorough)
            if outcome is None:
                break
            found = replace(found, **outcome)
            done.append(step.value)
        return done, found
