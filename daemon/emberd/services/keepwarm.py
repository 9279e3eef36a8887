"""Keeps the idle model warm: looks, asks core/warmth.py what to do, has it done, and plans the next look.

APScheduler says when. A look that was missed (the computer slept) is made once and at once: `coalesce`, no grace
time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from emberd.core import thrash, warmth
from emberd.core.hours import left_of
from emberd.core.memory import Pressure
from emberd.core.status import PassStatus, ProgressStatus, WarmthStatus, from_plain, to_plain
from emberd.core.warmth import Decision, Found, Reason, Snapshot, Step, Trigger
from emberd.core.warmth_cost import WarmthCost
from emberd.services.pressure_watch import WATCH_INTERVAL_S
from emberd.services.touching import Touching

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.core.memory import Power
    from emberd.core.settings import WarmthSettings
    from emberd.services.gate import Gate
    from emberd.services.knocks import Knocks
    from emberd.services.pressure_watch import PressureWatch
    from emberd.services.warming import Warming

_STAYS_S = 900.0
"""During cool hours a user may pause so long between two turns before memory is released again."""
_PASSING = frozenset({Reason.NOT_READY, Reason.BUSY, Reason.PRESSURE})
"""Obstacles that pass by themselves; what a look was for is then still to be done."""
_LOOK = "look"


class KeepWarm:
    """The keep-warm service.

    Args:
        log: events go here.
        settings: tells the settings of warmth.
        gate: the way to the engine.
        warming: does what is decided.
        watch: tells what happens between two looks.
        knocks: tells that somebody is there.
    """

    def __init__(
        self,
        log: FilteringBoundLogger,
        settings: Callable[[], WarmthSettings],
        gate: Gate,
        warming: Warming,
        watch: PressureWatch,
        knocks: Knocks,
    ) -> None:
        self._log = log
        self._settings = settings
        self._gate = gate
        self._warming = warming
        self._turns = warming.turns
        self._watch = watch
        self._knocks = knocks
        self._trigger = Trigger.TIMER
        self._interval_s = self._loss_wait_s = settings().min_interval_s
        self._paused_until_s: float | None = None
        self._cool_until_s: float | None = None
        self._cool_since_s = 0.0
        self._is_woken = self._is_over_budget = False
        self._last: dict[str, Any] | None = None
        self._rest = ""
        self._next_s: float | None = None
        self._scheduler: Any = None
        self._touching = Touching(
            log, warming, self._may_touch, lambda: not watch.is_tight, lambda: watch.is_swapping
        )
        watch.wake = self.wake

    async def run(self) -> None:
        """Keep warm until cancelled; lets go of what is locked at the end."""
        from apscheduler.schedulers.asyncio import AsyncIOScheduler  # noqa: PLC0415  # 5 MiB, for the daemon only

        # A look that is asked for during another one is skipped on purpose: that one plans the next.
        logging.getLogger("apscheduler").setLevel(logging.ERROR)
        self._scheduler = AsyncIOScheduler(
            timezone=UTC,
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )
        self._scheduler.add_job(self._look, "date", id=_LOOK, run_date=_in_s(0))
        self._scheduler.start()
        watching = asyncio.create_task(self._watch.run(self._after_reading))
        try:
            while True:
                await self._knocks.wait()
                self.wake(Trigger.KNOCK)
        finally:
            self._scheduler.shutdown(wait=False)
            watching.cancel()
            self._touching.stop()

    def wake(self, trigger: Trigger) -> None:
        """Look now, and say why."""
        if trigger is Trigger.RESTARTED:
            self._interval_s = self._settings().min_interval_s
        if self._trigger is not Trigger.ASKED and trigger is not Trigger.TIMER:
            self._trigger = trigger
        self._is_woken = True
        self._plan(0)

    async def warm(self) -> dict[str, Any]:
        """Warm everything now, whatever the time; return what was done and why."""
        self._cool_until_s = self._paused_until_s = None
        self._trigger = Trigger.ASKED
        before = self._last
        await self._look()
        done = self._last if self._last is not before else {"reason": self._rest, "steps": []}
        return {"ok": True, **(done or {})}

    def pause(self, seconds: float) -> dict[str, Any]:
        """Warm nothing for a while; locks stay."""
        self._paused_until_s = time.monotonic() + seconds
        return {"ok": True, "seconds": seconds}

    def resume(self) -> dict[str, Any]:
        """End a pause or a cool spell."""
        was = self._paused_until_s is not None or self._cool_until_s is not None
        self._paused_until_s = self._cool_until_s = None
        self.wake(Trigger.ASKED)
        return {"ok": True, "was_paused": was}

    async def cool(self, seconds: float) -> dict[str, Any]:
        """Let go of the model's memory for a while, or until the next request."""
        self._cool_since_s = time.monotonic()
        self._cool_until_s = self._cool_since_s + seconds
        await self._look()
        return {"ok": True, "seconds": seconds}

    async def close(self) -> None:
        """Save the cost that is not on disk yet."""
        await self._warming.spending.save()

    async def status(self) -> WarmthStatus:
        """Return mode, last and next pass, the forecast, and what it has cost."""
        warming, forecaster = self._warming, self._warming.forecaster
        if warming.progress is None:  # the toucher does one thing at a time, and a cold pass takes seconds
            await forecaster.look()
        cost, cost_today = await warming.spending.status()
        now_s = time.monotonic()
        return replace(
            self._watch.status(),
            mode=self._settings().mode,
            is_locked_outside=warming.is_locked_outside,
            paused_for_s=_until(now_s, self._paused_until_s),
            cool_for_s=_until(now_s, self._cool_until_s),
            interval_s=round(self._interval_s, 3),
            over_budget_for_s=round(warming.spending.wait_s, 3),
            next_look_in_s=_until(now_s, self._next_s),
            warm_for_s=None if warming.last_pass_s is None else round(now_s - warming.last_pass_s, 3),
            last=None if self._last is None else from_plain(PassStatus, self._last),
            progress=warming.progress,
            hot_replay_s=forecaster.hot_replay_s,
            forecast=forecaster.status(),
            reuse=self._turns.status(self._gate.sample().key),
            cost=cost,
            cost_today=cost_today,
        )

    @property
    def progress(self) -> dict[str, int]:
        """How far a pass over the weights is; zeros while there is none."""
        return to_plain(self._warming.progress or ProgressStatus())

    @property
    def is_warm(self) -> bool:
        """Whether a pass or a user has used the model a short time ago."""
        warmed = [when for when in (self._warming.last_pass_s, self._turns.ended_s) if when is not None]
        if not warmed or self._gate.port is None:
            return False
        return time.monotonic() - max(warmed) <= 2 * self._interval_s + WATCH_INTERVAL_S

    # --- looking --------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Decide, act, and plan the next look."""
        async with self._warming.passing:
            self._is_woken = False
            try:
                seen = await self._snapshot()
                decision = warmth.decide(seen, self._settings())
                await self._act(decision, seen)
                is_put_off = decision.reason in _PASSING or (
                    decision.reason is Reason.NOT_DUE and seen.trigger is Trigger.LOSING
                )
                if is_put_off and self._trigger is Trigger.TIMER and seen.trigger is not Trigger.ASKED:
                    self._trigger = seen.trigger  # what it is about is still to be done
                again_s = decision.look_again_s
                if decision.steps:
                    await self._warming.forecaster.look()
                    again_s = min(again_s, self._interval_s)  # shorter after a pass that found a loss
                # The scheduler drops a look that is asked for during this one.
                self._plan(warmth.SOON_S if self._is_woken else again_s)
            except Exception:  # noqa: BLE001  # keeping warm is not worth the daemon
                self._log.exception("keepwarm_bug")
                self._plan(self._settings().max_interval_s)

    async def _snapshot(self) -> Snapshot:
        power = await self._watch.power()
        if self._settings().replay and not self._must_rest():  # letting go waits for no answer
            await self._warming.learn_what_was_taken_whole()
        if self._cool_until_s is not None and (
            (self._turns.ended_s or 0.0) > self._cool_since_s  # somebody needed the model
            or time.monotonic() >= self._cool_until_s  # the hours of the settings count again
        ):
            self._cool_until_s = None
        trigger, self._trigger = self._trigger, Trigger.TIMER
        return self._observe(power, trigger)

    def _observe(self, power: Power, trigger: Trigger) -> Snapshot:
        """Return what is now; nothing is awaited: all of it is of one moment."""
        engine, memory, settings = self._gate.sample(), self._watch.latest(), self._settings()
        warming = self._warming
        return Snapshot(
            now_s=time.monotonic(),
            trigger=trigger,
            is_ready=self._gate.port is not None,
            requests=warming.requests,
            lock=self._gate.lock_state,
            is_locked_outside=warming.is_locked_outside,
            can_lock_outside=warming.can_lock(engine, memory),
            is_mapped=engine.is_mapped,
            cache=warming.cache(engine, settings),
            pressure=memory.pressure,
            last_critical_s=self._watch.last_critical_s,
            power=power,
            paused_until_s=self._paused_until_s,
            cool_until_s=self._cool_until_s or self._cool_hours_end_s(settings),
            hold=self._watch.guard.hold,
            last_use_s=self._turns.ended_s,
            last_pass_s=warming.last_pass_s,
            interval_s=self._interval_s,
            loss_wait_s=self._loss_wait_s,
            is_storming=self._watch.is_storming,
            budget_wait_s=warming.spending.wait_s,
        )

    def _cool_hours_end_s(self, settings: WarmthSettings) -> float | None:
        """Return when the hours for other work end, None if it is not their time or somebody needs the model."""
        left_s = left_of(settings.cool_hours, datetime.now().astimezone())
        now_s = time.monotonic()
        used_s = self._turns.ended_s
        if left_s is None or (used_s is not None and now_s - used_s < _STAYS_S):
            return None
        return now_s + left_s

    def _plan(self, seconds: float) -> None:
        self._next_s = time.monotonic() + seconds
        if self._scheduler is not None and self._scheduler.running:
            self._scheduler.add_job(self._look, "date", id=_LOOK, run_date=_in_s(seconds), replace_existing=True)

    # --- between two looks ----------------------------------------------------------------------------------

    async def _after_reading(self) -> None:
        """Touch while a storm goes on; learn from the last reply; save the cost now and then."""
        warming = self._warming
        if self._watch.is_storming:
            warming.spending.excuse()
            power = await self._watch.power()
            if not self._must_rest():
                self._keep_touching(self._observe(power, Trigger.TIMER), has_lost=False)
        await warming.forecaster.learn(may_look=warming.is_free and not warming.passing.locked())
        await warming.spending.save(is_due=False)

    def _keep_touching(self, seen: Snapshot, *, has_lost: bool) -> None:
        if warmth.may_keep_touching(seen, self._settings(), has_lost=has_lost):
            self._touching.begin()

    async def _may_touch(self) -> bool:
        power = await self._watch.power()
        return self._gate.port is not None and not self._must_rest() and not warmth.saves_power(power)

    def _must_rest(self) -> bool:
        """Return True if nothing may be warmed, whoever says so."""
        memory, settings = self._watch.memory, self._settings()
        if self._watch.guard.hold is not thrash.Hold.ALL or settings.mode == "off":
            return True
        if memory is not None and memory.pressure is Pressure.CRITICAL:
            return True
        now_s = time.monotonic()
        ends_s = (self._paused_until_s, self._cool_until_s, self._cool_hours_end_s(settings))
        return any(end_s is not None and now_s < end_s for end_s in ends_s)

    # --- acting ---------------------------------------------------------------------------------------------

    async def _act(self, decision: Decision, seen: Snapshot) -> None:
        self._say_budget(decision, seen.budget_wait_s)
        if not decision.steps:
            if self._rest != decision.reason.value:
                self._log.debug("keepwarm_rests", reason=decision.reason.value)
            self._rest = decision.reason.value
            return
        warming, losses, engine = self._warming, self._watch.losses, self._gate.sample()
        began_s, cpu_s, warming.has_primed = time.monotonic(), warming.cpu_s(), False
        found = losses.before_a_pass(engine)
        is_thorough = warmth.must_use_buffers(seen, found)
        is_warming = not {Step.UNLOCK, Step.RESTART} & set(decision.steps)
        done, found = await self._do(decision.steps, found, is_warming=is_warming, is_thorough=is_thorough)
        found = replace(found, major_faults=losses.major_faults(engine))
        is_complete = len(done) == len(decision.steps)
        if is_warming and (is_complete or warming.is_free):
            # What failed although nobody came is tried again after the interval, not at once.
            if is_complete:
                losses.note_pass(engine, is_thorough=is_thorough)
            self._note_pass(seen, found)
            if Step.TOUCH.value in done:
                self._keep_touching(seen, has_lost=found.has_lost)
        used_s = warming.cpu_s() - cpu_s
        was_missing = found.has_lost or seen.is_storming or warming.has_primed or seen.trigger is Trigger.RESTARTED
        if was_missing:
            warming.spending.excuse()
        cost = WarmthCost(passes=1, cpu_ms=max(round(used_s * 1000), 0))
        warming.spending.add(cost, counts=not was_missing)
        self._last = {
            "reason": decision.reason.value,
            "steps": done,
            "is_complete": is_complete,
            "seconds": round(time.monotonic() - began_s, 4),
            "had_lost": found.has_lost,
            "cold_share": found.cold_share,
            "swapped_bytes": found.swapped_bytes,
            "cpu_s": round(used_s, 3),
        }
        self._log.info("keepwarm", cache=seen.cache.value, next_s=round(self._interval_s, 1), **self._last)

    async def _do(
        self, steps: tuple[Step, ...], found: Found, *, is_warming: bool, is_thorough: bool
    ) -> tuple[list[str], Found]:
        """Have the steps done, until one cannot be; return the names of those that were, and what they found."""
        warming, done = self._warming, list[str]()
        for step in steps:
            if step in {Step.REPLAY, Step.TINY} and not warming.is_free:
                break  # a user is here: the generation warms better than any replay
            if is_warming and warming.letting_go.is_set():
                break
            outcome = await warming.do(step, is_thorough=is_thorough)
            if outcome is None:
                break
            found = replace(found, **outcome)
            done.append(step.value)
        return done, found

    def _note_pass(self, seen: Snapshot, found: Found) -> None:
        settings, is_storming = self._settings(), self._watch.is_storming
        self._warming.last_pass_s = time.monotonic()
        self._interval_s = warmth.next_interval(self._interval_s, found, settings, is_storming=is_storming)
        if seen.trigger is Trigger.LOSING and not self._touching.is_on:  # else nothing is missing because of that
            self._loss_wait_s = warmth.next_loss_wait(self._loss_wait_s, found, settings, is_storming=is_storming)

    def _say_budget(self, decision: Decision, wait_s: float) -> None:
        """Say once that keep-warm took too much of a processor for nothing."""
        if decision.reason is Reason.OVER_BUDGET and not self._is_over_budget:
            self._is_over_budget = True
            self._log.warning("keepwarm_over_budget", wait_s=round(wait_s, 1))
        self._is_over_budget = self._is_over_budget and wait_s > 0


def _in_s(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def _until(now_s: float, then_s: float | None) -> float | None:
    return None if then_s is None or then_s < now_s else round(then_s - now_s, 3)
