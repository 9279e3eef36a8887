"""Keeps the idle model warm: looks, asks core/warmth.py what to do, does it, and looks again when that says so.

APScheduler says when. A look that was missed (the computer slept) is made once and at once: `coalesce`, no grace
time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import psutil

from emberd.core import thrash, warmth
from emberd.core.gguf import split_names
from emberd.core.hours import left_of
from emberd.core.lock import LockState
from emberd.core.lock_limits import judge_limits
from emberd.core.memory import PowerSource, Pressure
from emberd.core.replay import GENKEY, Replay, is_replayable, make_replay, shortened, tiny
from emberd.core.warmth import Cache, Decision, Found, Reason, Snapshot, Step, Trigger
from emberd.core.warmth_cost import WarmthCost
from emberd.host.toucher import ToucherLost, ToucherRefused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from structlog.typing import FilteringBoundLogger

    from emberd.core.memory import EngineMemory, Power, SystemMemory
    from emberd.core.ports import Engine, Host
    from emberd.core.settings import Settings, WarmthSettings
    from emberd.core.types import EngineSample
    from emberd.host.toucher import Toucher
    from emberd.services.accounts import Accounts
    from emberd.services.forecaster import Forecaster
    from emberd.services.knocks import Knocks
    from emberd.services.memory_meter import MemoryMeter
    from emberd.services.places import Places
    from emberd.services.turns import Turns

T = TypeVar("T")
GUARD_S = 2.0
"""A storm writes 220 MB to swap in a second (6.6 GB in 30 s, measured): so long may one go unseen."""
CALM_GUARD_S = 10
"""So long between two readings where the kernel tells of stalls by itself. Each takes almost a millisecond, with
cold caches: at every two seconds they were half of what the idle daemon took."""
_CALM_AFTER_S = 30.0
_POWER_S = 30.0
"""Power is read so often: on macOS it takes some 10 ms."""
_SLEPT_S = 5.0
"""The computer slept if the clocks moved apart by so much."""
_REPLAY_LIMIT_S = 600.0
"""Processing a long prompt again on a CPU takes minutes."""
_ABORT_S = 2.0
_STOP_AGAIN_S = 0.2
_DWELL_PAUSE_S = 0.2
_CALM_ROUNDS = 25
"""The weights are left alone again when nothing was taken of them for about 5 s without pressure."""
_LONGEST_DWELL_S = 600.0
_STAYS_S = 900.0
"""Who asks within the hours for other work may pause so long between two turns."""
_SAVE_S = 3600.0
"""The cost goes to disk so often, and at the end."""
_TIGHT = frozenset({Pressure.WARN, Pressure.CRITICAL})
_PASSING = frozenset({Reason.NOT_READY, Reason.BUSY, Reason.PRESSURE})
"""Obstacles that pass by themselves; what a look was for is then still to be done."""
_LOOK = "look"


class Owner(Protocol):
    """What is asked of the supervisor."""

    @property
    def engine(self) -> Engine:
        """The engine's adapter."""
        ...

    @property
    def port(self) -> int | None:
        """The engine's port, None while it is not ready."""
        ...

    @property
    def is_adopted(self) -> bool:
        """Whether the engine served before this emberd was there."""
        ...

    @property
    def lock_state(self) -> LockState:
        """The last verdict about the engine's lock."""
        ...

    @property
    def will_lock(self) -> bool:
        """Whether the engine was asked to lock: there is room for it, and its owner wants it."""
        ...

    def sample(self) -> EngineSample:
        """Return what the engine is at this moment."""
        ...

    async def wait_for_change(self) -> None:
        """Return when the engine's state has changed."""
        ...

    def restart_without_lock(self) -> None:
        """Start the engine anew, without asking it to lock."""
        ...


class KeepWarm:
    """The keep-warm service.

    Args:
        host: this computer.
        log: events go here.
        settings: tells the settings.
        owner: the supervisor.
        meter: reads the computer's memory.
        toucher: touches and locks the model's pages.
        turns: knows what the engine's cache holds.
        knocks: tells that somebody is there.
        places: tells who waits.
        accounts: keep what it costs, by day.
        forecaster: foretells the next first token.
    """

    def __init__(
        self,
        host: Host,
        log: FilteringBoundLogger,
        settings: Callable[[], Settings],
        owner: Owner,
        meter: MemoryMeter,
        toucher: Toucher,
        turns: Turns,
        knocks: Knocks,
        places: Places,
        accounts: Accounts,
        forecaster: Forecaster,
    ) -> None:
        self._host = host
        self._log = log
        self._settings = settings
        self._owner = owner
        self._meter = meter
        self._toucher = toucher
        self._turns = turns
        self._knocks = knocks
        self._places = places
        self._accounts = accounts
        self._forecaster = forecaster
        self._guard = thrash.Guard()
        self._cost = self._unsaved = WarmthCost()
        self._saved_s = time.monotonic()
        self._progress: tuple[int, int] | None = None
        self._trigger = Trigger.TIMER
        self._interval_s = settings().warmth.min_interval_s
        self._paused_until_s: float | None = None
        self._cool_until_s: float | None = None
        self._cool_since_s = 0.0
        self._locked_by: tuple[int | None, tuple[Any, ...] | None] | None = None
        self._refused_lock_of: str | None = None
        self._last_critical_s: float | None = None
        self._last_pass_s: float | None = None
        self._seen_engine: str | None = None
        self._seen_faults: tuple[str | None, int | None] = (None, None)
        self._memory: SystemMemory | None = None
        self._engine_best: EngineMemory | None = None
        self._unused_swap_bytes = self._useless_swap_bytes = 0
        self._loss_wait_s = self._interval_s
        self._letting_go = asyncio.Event()
        self._recalling: asyncio.Task[None] | None = None
        self._is_woken = False
        self._calm_since_s = time.monotonic()
        self._power: tuple[float, Power] | None = None
        self._gap_s = _clock_gap_s()
        self._last: dict[str, Any] | None = None
        self._rest = ""
        self._next_s: float | None = None
        self._scheduler: Any = None
        self._acting = asyncio.Lock()
        self._dwelling: asyncio.Task[None] | None = None

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
        watching = [asyncio.create_task(each) for each in (self._keep_watch(), self._follow_engine())]
        try:
            while True:
                await self._knocks.wait()
                self.wake(Trigger.KNOCK)
        finally:
            self._scheduler.shutdown(wait=False)
            for each in watching:
                each.cancel()
            if self._dwelling is not None:
                self._dwelling.cancel()

    def wake(self, trigger: Trigger) -> None:
        """Look now, and say why."""
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
        await self._save_cost()

    async def status(self) -> dict[str, Any]:
        """Return mode, last and next pass, the forecast, and what it has cost."""
        if self._progress is None:  # the toucher does one thing at a time, and a cold pass takes seconds
            await self._forecaster.look()
        today = await self._accounts.today(WarmthCost) + self._unsaved
        now_s = time.monotonic()
        return {
            "mode": self._settings().warmth.mode,
            "hold": self._guard.hold.value,
            "is_locked_outside": self._is_locked_outside(),
            "paused_for_s": _until(now_s, self._paused_until_s),
            "cool_for_s": _until(now_s, self._cool_until_s),
            "interval_s": round(self._interval_s, 3),
            "next_look_in_s": _until(now_s, self._next_s),
            "warm_for_s": None if self._last_pass_s is None else round(now_s - self._last_pass_s, 3),
            "last": self._last,
            "progress": self._progress and self.progress,
            "hot_replay_s": self._forecaster.hot_replay_s,
            "forecast": self._forecaster.status(),
            "cost": _plain_cost(self._cost),
            "cost_today": _plain_cost(today),
        }

    @property
    def progress(self) -> dict[str, int]:
        """How far a pass over the weights is; zeros while there is none."""
        done_bytes, total_bytes = self._progress or (0, 0)
        return {"done_bytes": done_bytes, "total_bytes": total_bytes}

    @property
    def is_warm(self) -> bool:
        """Whether a pass or a user has used the model a short time ago."""
        warmed = [when for when in (self._last_pass_s, self._turns.ended_s) if when is not None]
        if not warmed or self._owner.port is None:
            return False
        return time.monotonic() - max(warmed) <= 2 * self._interval_s + GUARD_S

    # --- looking --------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Decide, act, and plan the next look."""
        async with self._acting:
            self._is_woken = False
            try:
                seen = await self._snapshot()
                decision = warmth.decide(seen, self._settings().warmth)
                await self._act(decision, seen)
                is_put_off = decision.reason in _PASSING or (
                    decision.reason is Reason.NOT_DUE and seen.trigger is Trigger.LOSING
                )
                if is_put_off and self._trigger is Trigger.TIMER and seen.trigger is not Trigger.ASKED:
                    self._trigger = seen.trigger  # what it is about is still to be done
                if decision.steps:
                    await self._forecaster.look()
                again_s = decision.look_again_s
                if decision.steps:
                    again_s = min(again_s, self._interval_s)  # shorter after a pass that found a loss
                # The scheduler drops a look that is asked for during this one.
                self._plan(warmth.SOON_S if self._is_woken else again_s)
            except Exception:  # noqa: BLE001  # keeping warm is not worth the daemon
                self._log.exception("keepwarm_bug")
                self._plan(self._settings().warmth.max_interval_s)

    async def _keep_watch(self) -> None:
        """Watch every GUARD_S, or when the kernel says that there is reason to."""
        while True:
            stalls = self._host.watch_stalls(CALM_GUARD_S) if self._is_calm() else None
            if stalls is None:
                await self._watch_after(asyncio.sleep(GUARD_S))
                continue
            try:
                while self._is_calm():
                    began_s = time.monotonic()
                    await self._watch_after(stalls.wait())
                    if time.monotonic() - began_s < CALM_GUARD_S / 2:  # a stall, or the computer has slept
                        self._calm_since_s = time.monotonic()
            finally:
                stalls.close()

    async def _follow_engine(self) -> None:
        """Notice a new engine at once: its cache is empty."""
        while True:
            await self._owner.wait_for_change()
            self._watch_engine()

    def _is_calm(self) -> bool:
        has_passed_s = time.monotonic() - self._calm_since_s
        is_at_rest = self._owner.port is not None and not self._is_dwelling()
        return is_at_rest and has_passed_s > _CALM_AFTER_S

    async def _watch_after(self, pause: Awaitable[None]) -> None:
        await pause
        try:
            await self._watch()
        except Exception:  # noqa: BLE001  # keeping warm is not worth the daemon
            self._log.exception("keepwarm_bug")

    async def _watch(self) -> None:
        """See what flips between two looks: storms of swapping, relief, wakes, a new engine."""
        memory = self._meter.read()
        now_s = time.monotonic()
        is_losing = self._watch_engine()
        was = self._memory.pressure if self._memory else Pressure.UNKNOWN
        if not warmth.is_calm(self._memory, memory, self._guard, is_losing=is_losing):
            self._calm_since_s = now_s
        self._memory = memory
        self._recall(memory.pressure)
        self._watch_swap(thrash.Reading(now_s, memory.swapped_out_bytes, memory.pressure, is_losing))
        if self._guard.hold is thrash.Hold.ALL and memory.pressure is not Pressure.CRITICAL:
            self._letting_go.clear()
        else:
            self._letting_go.set()  # a pass that is under way would bring back gigabytes yet
        if memory.pressure is Pressure.CRITICAL:
            self._last_critical_s = now_s
        elif was is Pressure.CRITICAL:
            self.wake(Trigger.RELIEVED)
        elif memory.pressure is Pressure.WARN and was is Pressure.NORMAL:
            self.wake(Trigger.TIMER)  # the interval is the shortest now
        self._watch_clock(now_s)
        if self._power is not None and self._power[1].source is PowerSource.BATTERY:
            power = await self._read_power()
            if power.source is PowerSource.MAINS:
                self.wake(Trigger.WOKEN)
        await self._forecaster.learn(may_look=self._is_free() and not self._acting.locked())
        if now_s - self._saved_s > _SAVE_S:
            await self._save_cost()

    def _watch_clock(self, now_s: float) -> None:
        """Notice that the computer slept, or that its clock was set back."""
        gap_s, self._gap_s = self._gap_s, _clock_gap_s()
        if self._gap_s - gap_s > _SLEPT_S:
            self._log.info("woken", slept_s=round(self._gap_s - gap_s))
            self.wake(Trigger.WOKEN)
        elif gap_s - self._gap_s > _SLEPT_S and self._next_s is not None:
            # The clock was set back, and the scheduler counts by it.
            self._plan(max(self._next_s - now_s, 0.0))

    def _recall(self, pressure: Pressure) -> None:
        """Keep emberd itself in memory while there is pressure; reading swap can take long: nobody waits for it."""
        is_recalling = self._recalling is not None and not self._recalling.done()
        if not is_recalling and (pressure in _TIGHT or self._is_dwelling()):
            self._recalling = asyncio.create_task(asyncio.to_thread(self._host.recall_own_memory))

    def _watch_swap(self, reading: thrash.Reading) -> None:
        """Let go, or take hold again, as the thrash guard says."""
        hold = self._guard.hold
        priority = self._settings().warmth.priority
        self._guard = thrash.step(
            self._guard, reading, priority, is_holding=self._is_holding(), frees=self._what_frees()
        )
        if self._guard.hold is not hold:
            self._log.warning("thrash_guard", hold=self._guard.hold.value, was=hold.value)
            self.wake(Trigger.RELIEVED if self._guard.hold is thrash.Hold.ALL else Trigger.TIMER)

    def _watch_engine(self) -> bool:
        """Look at once when memory of the idle engine is taken, which is returned, and notice a new engine."""
        engine = self._owner.sample()
        memory = self._host.engine_memory(engine.pids)
        if self._owner.port is not None and engine.key is not None and engine.key != self._seen_engine:
            self._seen_engine, self._interval_s = engine.key, self._settings().warmth.min_interval_s
            self._engine_best, self._unused_swap_bytes, self._useless_swap_bytes = None, 0, 0
            self.wake(Trigger.RESTARTED)
        swapped_bytes = memory.swapped_bytes or 0
        self._unused_swap_bytes = min(self._unused_swap_bytes, swapped_bytes)
        self._useless_swap_bytes = min(self._useless_swap_bytes, swapped_bytes)
        # What a generation needed and gave back, a user's or emberd's own, was not taken.
        is_idle = self._is_free() and not self._acting.locked()
        is_losing = is_idle and warmth.is_losing(self._engine_best, memory)
        best = None if is_losing else self._engine_best
        self._engine_best = warmth.best_of(best, memory) if is_idle else None
        if is_losing:
            self.wake(Trigger.LOSING)
        return is_losing

    async def _snapshot(self) -> Snapshot:
        power = await self._read_power()
        await self._learn_what_was_taken_whole()
        # Nothing is awaited from here on: all of it is of one moment.
        engine = self._owner.sample()
        memory = self._memory
        if memory is None:
            memory = self._host.system_memory()
        if self._cool_until_s is not None and (
            (self._turns.ended_s or 0.0) > self._cool_since_s  # somebody needed the model
            or time.monotonic() >= self._cool_until_s  # the hours of the settings count again
        ):
            self._cool_until_s = None
        settings = self._settings().warmth
        trigger, self._trigger = self._trigger, Trigger.TIMER
        cache = self._turns.cache(engine.key, is_adopted=self._owner.is_adopted)
        last = self._turns.last
        can_replay = (
            last is not None
            and is_replayable(last, self._owner.engine.name, keeps_state=engine.keeps_state)
            and self._turns.taken_whole == (engine.key, True)
        )
        if cache is Cache.KNOWN and not can_replay:
            cache = Cache.UNKNOWN
        elif cache is Cache.EMPTY and can_replay and settings.reprime:
            cache = Cache.KNOWN  # a new engine: nothing can be lost, and the last turn can be brought back
        return Snapshot(
            now_s=time.monotonic(),
            trigger=trigger,
            is_ready=self._owner.port is not None,
            requests=(0 if engine.is_idle else 1) + self._places.waiting,
            lock=self._owner.lock_state,
            is_locked_outside=self._is_locked_outside(),
            can_lock_outside=self._can_lock(engine, memory),
            is_mapped=engine.is_mapped,
            cache=cache,
            pressure=memory.pressure,
            last_critical_s=self._last_critical_s,
            power=power,
            paused_until_s=self._paused_until_s,
            cool_until_s=self._cool_until_s or self._cool_hours_end_s(settings),
            hold=self._guard.hold,
            last_use_s=self._turns.ended_s,
            last_pass_s=self._last_pass_s,
            interval_s=self._interval_s,
            loss_wait_s=self._loss_wait_s,
        )

    async def _learn_what_was_taken_whole(self) -> None:
        """Ask the engine, once for each turn, whether it took all of the last prompt; not where that is idle."""
        port, engine, turn = self._owner.port, self._owner.sample(), self._turns.last
        known = self._turns.taken_whole
        if port is None or engine.key is None or turn is None or (known is not None and known[0] == engine.key):
            return
        may_replay = self._settings().warmth.replay and is_replayable(
            turn, self._owner.engine.name, keeps_state=engine.keeps_state
        )
        if not may_replay or self._must_rest() or not self._is_free():
            return  # letting go waits for no answer
        is_whole = await self._owner.engine.took_whole(port, turn, _ABORT_S)
        if is_whole is not None and self._turns.last is turn:
            self._turns.taken_whole = (engine.key, is_whole)

    def _cool_hours_end_s(self, settings: WarmthSettings) -> float | None:
        """Return when the hours for other work end, None if it is not their time or somebody needs the model."""
        left_s = left_of(settings.cool_hours, datetime.now().astimezone())
        now_s = time.monotonic()
        used_s = self._turns.ended_s
        if left_s is None or (used_s is not None and now_s - used_s < _STAYS_S):
            return None
        return now_s + left_s

    def _can_lock(self, engine: EngineSample, memory: SystemMemory) -> bool | None:
        """Tell whether limits and room let the toucher lock the weights; unknown without their size."""
        if not self._owner.will_lock or engine.key == self._refused_lock_of:
            return False
        if engine.weights_bytes is None:
            return None
        return judge_limits(engine.weights_bytes, self._host.lock_limits(None), memory.wired_bytes)[0]

    def _is_locked_outside(self) -> bool:
        """Tell whether the toucher that was told to lock still maps the same file; the lock ends with either."""
        return self._locked_by is not None and self._locked_by == self._lockable()

    def _lockable(self) -> tuple[int | None, tuple[Any, ...] | None]:
        """Return what tells a lock on these weights by this toucher from any other."""
        model = self._owner.sample().model
        try:
            facts = None if model is None else model.stat()
        except OSError:
            facts = None
        return self._toucher.pid, facts and (model, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)

    def _is_holding(self) -> bool:
        is_warming = self._settings().warmth.mode != "off" and self._last_pass_s is not None
        return is_warming or self._is_locked_outside() or self._owner.lock_state is LockState.HELD

    def _what_frees(self) -> thrash.Hold:
        """Tell the first step of letting go that gives memory back."""
        if self._is_locked_outside():
            return thrash.Hold.NO_OUTSIDE_LOCK
        return thrash.Hold.NOTHING if self._owner.lock_state is LockState.HELD else thrash.Hold.NO_WARMING

    async def _read_power(self) -> Power:
        now_s = time.monotonic()
        if self._power is None or now_s - self._power[0] > _POWER_S:
            self._power = (now_s, await asyncio.to_thread(self._host.power))
        return self._power[1]

    def _plan(self, seconds: float) -> None:
        self._next_s = time.monotonic() + seconds
        if self._scheduler is not None and self._scheduler.running:
            self._scheduler.add_job(self._look, "date", id=_LOOK, run_date=_in_s(seconds), replace_existing=True)

    # --- acting ---------------------------------------------------------------------------------------------

    async def _act(self, decision: Decision, seen: Snapshot) -> None:
        if not decision.steps:
            if self._rest != decision.reason.value:
                self._log.debug("keepwarm_rests", reason=decision.reason.value)
            self._rest = decision.reason.value
            return
        began_s, cpu_s = time.monotonic(), self._cpu_s()
        found = self._before()
        done: list[str] = []
        is_thorough = warmth.must_use_buffers(seen, found)
        is_warming = not {Step.UNLOCK, Step.RESTART} & set(decision.steps)
        for step in decision.steps:
            if step in {Step.REPLAY, Step.TINY} and not self._is_free():
                break  # a user is here: the generation warms better than any replay
            if is_warming and self._letting_go.is_set():
                break
            outcome = await self._do(step, is_thorough=is_thorough)
            if outcome is None:
                break
            found = replace(found, **outcome)
            done.append(step.value)
        found = replace(found, major_faults=self._faults())
        if is_warming and (len(done) == len(decision.steps) or self._is_free()):
            # What failed although nobody came is tried again after the interval, not at once.
            if len(done) == len(decision.steps):
                self._note_unused_swap(is_thorough=is_thorough)
            self._note_pass(seen, found)
            if Step.TOUCH.value in done and warmth.may_dwell(seen, found):
                self._begin_to_dwell()
        used_s = self._cpu_s() - cpu_s
        self._spend(WarmthCost(passes=1, cpu_ms=max(round(used_s * 1000), 0)))
        self._last = {
            "reason": decision.reason.value,
            "steps": done,
            "is_complete": len(done) == len(decision.steps),
            "seconds": round(time.monotonic() - began_s, 4),
            "had_lost": found.has_lost,
            "cold_share": found.cold_share,
            "swapped_bytes": found.swapped_bytes,
            "cpu_s": round(used_s, 3),
        }
        self._log.info("keepwarm", cache=seen.cache.value, next_s=round(self._interval_s, 1), **self._last)

    def _note_pass(self, seen: Snapshot, found: Found) -> None:
        self._last_pass_s = time.monotonic()
        self._interval_s = warmth.next_interval(self._interval_s, found, self._settings().warmth)
        if seen.trigger is Trigger.LOSING and not self._is_dwelling():  # else nothing is missing because of that
            self._loss_wait_s = warmth.next_loss_wait(self._loss_wait_s, found, self._settings().warmth)

    def _is_dwelling(self) -> bool:
        return self._dwelling is not None and not self._dwelling.done()

    def _begin_to_dwell(self) -> None:
        if not self._is_dwelling():
            self._dwelling = asyncio.create_task(self._dwell())

    async def _dwell(self) -> None:
        """Touch the weights again and again, until nothing is taken any more.

        Between two passes 5 s apart a busy program took two thirds of a model of 2 GiB (0.3 GiB short); pages
        that are used as often as its own stay. A user's generations do not keep them: the third and fourth in a row
        took 4 to 5 times as long as a hot one, and mostly 1.4 to 2.4 times with the weights touched meanwhile. Nor
        do replays: who came while they were made, and nobody touched, waited 14 times as long (845 major faults).
        """
        began_s, calm, rounds, used_s = time.monotonic(), 0, 0, 0.0
        try:
            while calm < _CALM_ROUNDS and time.monotonic() - began_s < _LONGEST_DWELL_S:
                await asyncio.sleep(_DWELL_PAUSE_S)
                if self._owner.port is None or self._must_rest() or warmth.saves_power(await self._read_power()):
                    break
                cpu_s = _cpu_s(self._toucher.pid)  # the engine's at this time may be a user's
                touched = await self._giving_way(self._toucher.touch(), self._toucher.stop)
                if not self._acting.locked():  # a pass counts what the toucher does meanwhile
                    used_s += max(_cpu_s(self._toucher.pid) - cpu_s, 0.0)
                self._spend(WarmthCost(read_bytes=touched.cold_bytes or 0))
                if not touched.is_complete:
                    continue  # somebody came
                rounds += 1
                is_tight = self._memory is not None and self._memory.pressure in _TIGHT
                calm = 0 if touched.cold_bytes or is_tight else calm + 1
        except (ToucherRefused, ToucherLost) as error:
            self._log.warning("keepwarm_failed", step="dwell", reason=str(error))
        except Exception:  # noqa: BLE001  # keeping warm is not worth the daemon
            self._log.exception("keepwarm_bug")
        self._spend(WarmthCost(cpu_ms=round(used_s * 1000)))
        seconds = round(time.monotonic() - began_s, 1)
        self._log.info("keepwarm_dwelt", rounds=rounds, seconds=seconds, cpu_s=round(used_s, 2))

    def _must_rest(self) -> bool:
        """Tell whether nothing may be warmed, whoever says so."""
        if self._guard.hold is not thrash.Hold.ALL or self._settings().warmth.mode == "off":
            return True
        if self._memory is not None and self._memory.pressure is Pressure.CRITICAL:
            return True
        now_s = time.monotonic()
        ends_s = (self._paused_until_s, self._cool_until_s, self._cool_hours_end_s(self._settings().warmth))
        return any(end_s is not None and now_s < end_s for end_s in ends_s)

    def _before(self) -> Found:
        """Read what was taken from the engine since the last pass."""
        pids = self._owner.sample().pids
        memory = self._host.engine_memory(pids)
        swapped_bytes, buffers_bytes = (
            None if memory.swapped_bytes is None else max(memory.swapped_bytes - left_bytes, 0)
            for left_bytes in (self._unused_swap_bytes, self._useless_swap_bytes)
        )
        return Found(swapped_bytes=swapped_bytes, buffers_bytes=buffers_bytes, engine_bytes=memory.footprint_bytes)

    def _note_unused_swap(self, *, is_thorough: bool) -> None:
        """Remember what a pass has left in swap: the next one would not bring it back either.

        After a replay nobody uses it: some 100 MiB of KoboldCPP's own memory, from loading the model. Without a
        replay it may be a cache that emberd cannot reach.

        Args:
            is_thorough: it used the buffers for several tokens, too; what others leave may be needed for those.
        """
        self._unused_swap_bytes = self._host.engine_memory(self._owner.sample().pids).swapped_bytes or 0
        if is_thorough:
            self._useless_swap_bytes = self._unused_swap_bytes

    def _faults(self) -> int | None:
        """Return the engine's major faults since the last question, None if they are not told."""
        engine = self._owner.sample()
        count = self._host.engine_memory(engine.pids).major_faults
        key, before = self._seen_faults
        self._seen_faults = (engine.key, count)
        return count - before if count is not None and before is not None and key == engine.key else None

    async def _do(self, step: Step, *, is_thorough: bool) -> dict[str, Any] | None:
        """Do one thing; return what it found, None if it could not be done."""
        try:
            match step:
                case Step.LOCK | Step.TOUCH:
                    return await self._touch(locks=step is Step.LOCK)
                case Step.UNLOCK:
                    self._locked_by = None
                    await self._toucher.unlock()
                    return {}
                case Step.RESTART:
                    self._owner.restart_without_lock()
                    return {}
                case Step.REPLAY | Step.TINY:
                    return await self._generate(is_tiny=step is Step.TINY, is_thorough=is_thorough)
        except (ToucherRefused, ToucherLost) as error:
            self._locked_by = None
            self._log.warning("keepwarm_failed", step=step.value, reason=str(error))
        return None

    async def _touch(self, *, locks: bool) -> dict[str, Any] | None:
        engine = self._owner.sample()
        if engine.model is None:
            return None
        self._toucher.use([engine.model.with_name(name) for name in split_names(engine.model.name)])
        if not locks:
            touched = await self._giving_way(self._toucher.touch(self._note_progress), self._toucher.stop)
            self._note_reading(touched.cold_bytes, touched.elapsed_s)
            return {"cold_share": _share(touched.cold_bytes, touched.total_bytes)} if touched.is_complete else None
        locked = await self._giving_way(self._toucher.lock(self._note_progress), self._toucher.stop)
        self._note_reading(locked.cold_bytes, locked.elapsed_s)
        if locked.is_complete:
            self._locked_by = self._lockable()
            self._log.info("locked_outside", locked_bytes=locked.locked_bytes)
        elif locked.error is None:  # a user came, or it lets go: nothing else would free a part of a lock
            await self._toucher.unlock()
            return None
        else:
            self._refused_lock_of = engine.key
            self._log.warning("lock_outside_refused", locked_bytes=locked.locked_bytes, reason=locked.error)
            await self._toucher.unlock()
        return {"cold_share": _share(locked.cold_bytes, locked.total_bytes)}

    async def _giving_way(self, work: Coroutine[Any, Any, T], stop: Callable[[], None]) -> T:
        """Do something that reads from the disk, and stop it when a user comes: their pages are read first."""
        doing, coming = asyncio.create_task(work), self._interruption()
        try:
            await asyncio.wait({doing, coming}, return_when=asyncio.FIRST_COMPLETED)
            while not doing.done():
                stop()
                # What waited for its turn at the toucher begins only now, and is stopped as well.
                await asyncio.wait({doing}, timeout=_STOP_AGAIN_S)
            return await doing
        finally:
            coming.cancel()
            self._progress = None

    def _interruption(self) -> asyncio.Task[None]:
        """Wait for a user who comes from now on, or for the guard to let go."""
        return asyncio.create_task(_first_of(self._places.next_arrival, self._letting_go))

    def _note_progress(self, done_bytes: int, total_bytes: int) -> None:
        self._progress = (done_bytes, total_bytes)

    def _note_reading(self, cold_bytes: int | None, seconds: float) -> None:
        """Count what was read, and learn how fast that goes."""
        self._spend(WarmthCost(read_bytes=cold_bytes or 0))
        self._forecaster.note_reading(cold_bytes, seconds)

    def _spend(self, cost: WarmthCost) -> None:
        self._cost += cost
        self._unsaved += cost

    async def _save_cost(self) -> None:
        unsaved, self._unsaved, self._saved_s = self._unsaved, WarmthCost(), time.monotonic()
        await self._accounts.add(unsaved)

    def _cpu_s(self) -> float:
        """Return the processor time of engine and toucher so far, in seconds."""
        return sum(_cpu_s(pid) for pid in (*self._owner.sample().pids, self._toucher.pid))

    async def _generate(self, *, is_tiny: bool, is_thorough: bool) -> dict[str, Any] | None:
        """Send a generation of one token, or one for each conversation; given up at once when a user comes.

        Args:
            is_tiny: with a prompt of emberd's own.
            is_thorough: use the buffers for several tokens, too.
        """
        port, key = self._owner.port, self._owner.sample().key
        if port is None:
            return None
        if is_tiny:
            return None if await self._send(port, tiny(self._owner.engine.name)) is None else {}
        took_s = None
        for turn in await self._replays(port, is_thorough=is_thorough):
            took = []
            for request in turn:
                took.append(await self._send(port, request))
                if took[-1] is None:
                    return None
            took_s = took[0]  # the others have more to process
        if took_s is None:
            return None
        self._turns.replayed(key)
        return {"replay_ratio": self._forecaster.note_replay(took_s)}

    async def _send(self, port: int, request: Replay) -> float | None:
        """Send one request; return how long it took in seconds, None if it was given up or failed."""
        if not self._is_free():
            return None  # since the pass began
        engine = self._owner.engine
        began_s = time.monotonic()
        sending, coming = asyncio.create_task(engine.send(port, request, _REPLAY_LIMIT_S)), self._interruption()
        try:
            await asyncio.wait({sending, coming}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                await engine.abort(port, GENKEY, _ABORT_S)
                return None
        finally:
            for task in (sending, coming):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(sending, coming, return_exceptions=True)
        took_s = time.monotonic() - began_s
        self._spend(WarmthCost(engine_ms=round(took_s * 1000)))
        return took_s if sending.result() else None

    async def _replays(self, port: int, *, is_thorough: bool) -> list[list[Replay]]:
        """Return the replays of each conversation, the most recent one last.

        Of a thorough one the first leaves the cache without the last words, which the second has to process.
        """
        engine = self._owner.engine
        continues = await engine.continues_turns(port, _ABORT_S)
        turns = [[shortened(turn), turn] if is_thorough and turn.reply else [turn] for turn in self._turns.all]
        made = [[make_replay(each, engine.name, continues_turn=continues) for each in turn] for turn in turns]
        return [found for each in made if (found := [request for request in each if request is not None])]

    def _is_free(self) -> bool:
        return self._owner.port is not None and self._owner.sample().is_idle and not self._places.waiting


def _cpu_s(pid: int | None) -> float:
    """Return the processor time of a process so far, in seconds; 0 if there is none."""
    try:
        return 0.0 if pid is None else sum(psutil.Process(pid).cpu_times()[:2])
    except psutil.Error:
        return 0.0


async def _first_of(*events: asyncio.Event) -> None:
    """Return when one of them is set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()


def _plain_cost(cost: WarmthCost) -> dict[str, Any]:
    return {
        "passes": cost.passes,
        "read_bytes": cost.read_bytes,
        "engine_s": cost.engine_ms / 1000,
        "cpu_s": cost.cpu_ms / 1000,
    }


def _share(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else part / whole


def _in_s(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def _until(now_s: float, then_s: float | None) -> float | None:
    return None if then_s is None or then_s < now_s else round(then_s - now_s, 3)


def _clock_gap_s() -> float:
    """Return how far the wall clock is ahead of the monotonic one, which stands still while the computer sleeps.

    A wall clock that is set forward looks the same, and costs one pass.
    """
    return time.time() - time.monotonic()
