"""Watches what changes between two looks: memory pressure, swapping, sleep, power, losses of the idle engine."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from emberd.core import thrash, warmth
from emberd.core.lifecycle import State
from emberd.core.lock import LockState
from emberd.core.memory import STORM_LASTS_S, PowerSource, Pressure, is_sign_of_storm, is_swapping
from emberd.core.status import ReliefStatus, WarmthStatus
from emberd.core.warmth import Trigger
from emberd.services.losses import Losses

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.core.memory import Observation, Power
    from emberd.core.ports import Host
    from emberd.core.settings import WarmthSettings
    from emberd.services.gate import Gate
    from emberd.services.model_use import ModelUse
    from emberd.services.observer import Observer
    from emberd.services.weights import Weights

WATCH_INTERVAL_S = 2.0
"""The longest that a storm may go unnoticed: it writes 220 MB to swap in a second (6.6 GB in 30 s, measured)."""
CALM_WATCH_INTERVAL_S = 10
"""The same if the kernel itself reports stalls. A reading takes almost a millisecond with cold caches: one every
two seconds was half of the idle daemon's processor time."""
_CALM_AFTER_S = 30.0
_POWER_S = 30.0
"""How often power is read: on macOS that takes some 10 ms."""
_SLEPT_S = 5.0
"""The computer slept if the clocks moved apart by this much."""
_TIGHT = frozenset({Pressure.WARN, Pressure.CRITICAL})


class PressureWatch:
    """Owns the thrash guard, and tells keep-warm when to look."""

    def __init__(
        self,
        host: Host,
        log: FilteringBoundLogger,
        settings: Callable[[], WarmthSettings],
        gate: Gate,
        observer: Observer,
        weights: Weights,
        use: ModelUse,
    ) -> None:
        self._host = host
        self._log = log
        self._settings = settings
        self._gate = gate
        self._observer = observer
        self._weights = weights
        self._use = use
        self._engine_key: str | None = None
        self._calm_since_s = time.monotonic()
        self._storm_s = self._swapping_s = float("-inf")
        self._power: tuple[float, Power] | None = None
        self._gap_s = clock_gap_s()
        self._recalling: asyncio.Task[None] | None = None
        self._seen: Observation | None = None
        self.losses = Losses()
        self.guard = thrash.ThrashGuard()
        self.last_critical_s: float | None = None
        self.wake: Callable[[Trigger], None] = lambda _: None
        """Called when keep-warm is to look at once."""

    @property
    def is_storming(self) -> bool:
        """Whether the computer takes memory from its programs now, by its own signs."""
        return time.monotonic() - self._storm_s < STORM_LASTS_S

    @property
    def is_swapping(self) -> bool:
        """Whether the computer writes to swap in this storm."""
        return time.monotonic() - self._swapping_s < STORM_LASTS_S

    @property
    def is_tight(self) -> bool:
        """Whether there is memory pressure, or a storm."""
        return self.is_storming or (self._seen is not None and self._seen.system.pressure in _TIGHT)

    def latest(self) -> Observation:
        """Return the last observation; if there is none, a new one."""
        return self._observer.look() if self._seen is None else self._seen

    def status(self) -> WarmthStatus:
        """Return the thrash guard's part of the status; keep-warm adds the rest."""
        guard = self.guard
        return WarmthStatus(
            hold=guard.hold.value,
            is_helpless=guard.is_helpless,
            relief=ReliefStatus(guard.rate_before, guard.rate_after),
            is_storming=self.is_storming,
        )

    async def run(self, after_reading: Callable[[], Awaitable[None]]) -> None:
        """Watch until cancelled; call `after_reading` after each reading."""
        following = asyncio.create_task(self._follow_engine())
        try:
            await self._keep_watch(after_reading)
        finally:
            following.cancel()

    async def power(self) -> Power:
        """Return the computer's power, read now and then."""
        now_s = time.monotonic()
        if self._power is None or now_s - self._power[0] > _POWER_S:
            self._power = (now_s, await asyncio.to_thread(self._host.power))
        return self._power[1]

    async def _keep_watch(self, after_reading: Callable[[], Awaitable[None]]) -> None:
        """Read every WATCH_INTERVAL_S, or when the kernel reports a stall."""
        while True:
            stalls = self._host.watch_stalls(CALM_WATCH_INTERVAL_S) if self._is_calm() else None
            if stalls is None:
                await self._read_after(asyncio.sleep(WATCH_INTERVAL_S), after_reading)
                continue
            try:
                while self._is_calm():
                    began_s = time.monotonic()
                    await self._read_after(stalls.wait(), after_reading)
                    if time.monotonic() - began_s < CALM_WATCH_INTERVAL_S / 2:  # a stall, or the computer has slept
                        self._calm_since_s = time.monotonic()
            finally:
                stalls.close()

    async def _follow_engine(self) -> None:
        """Notice a new engine at once: its cache is empty."""
        while True:
            await self._gate.wait_for_change()
            self._notice_engine()

    def _is_calm(self) -> bool:
        has_come_to_rest = self._gate.port is not None or self._gate.state is State.COOL
        is_at_rest = has_come_to_rest and not self._weights.is_kept_touched
        return is_at_rest and time.monotonic() - self._calm_since_s > _CALM_AFTER_S

    async def _read_after(self, pause: Awaitable[None], after_reading: Callable[[], Awaitable[None]]) -> None:
        await pause
        try:
            await self.read()
            await after_reading()
        except Exception:  # noqa: BLE001  # keeping warm is not worth the daemon
            self._log.exception("keepwarm_bug")

    async def read(self) -> None:
        """Take one reading, and draw the consequences."""
        was, seen = self._seen, self._observer.look()
        self._seen = seen
        before, memory = was.system if was else None, seen.system
        seconds = seen.at_s - was.at_s if was else 0.0
        if is_sign_of_storm(before, memory, seconds):
            self._storm_s = seen.at_s
        if is_swapping(before, memory, seconds):
            self._swapping_s = seen.at_s
        is_evicting = self._watch_engine(seen)
        if not warmth.is_calm(before, memory, self.guard, is_evicting=is_evicting):
            self._calm_since_s = seen.at_s
        self._recall_own_memory()
        is_locked = self._gate.lock_state is LockState.HELD
        self._watch_swap(
            thrash.Reading(
                seen.at_s,
                memory.swapped_out_bytes,
                memory.pressure,
                is_evicting=is_evicting and not is_locked,
                has_let_go=self._has_let_go(),
            )
        )
        if self.guard.hold is thrash.HoldLevel.ALL and memory.pressure is not Pressure.CRITICAL:
            self._use.letting_go.clear()
        else:
            self._use.letting_go.set()  # a pass under way would still bring back gigabytes
        pressure_was = before.pressure if before else Pressure.UNKNOWN
        if memory.pressure is Pressure.CRITICAL:
            self.last_critical_s = seen.at_s
        elif pressure_was is Pressure.CRITICAL:
            self.wake(Trigger.RELIEVED)
        elif memory.pressure is Pressure.WARN and pressure_was is Pressure.NORMAL:
            self.wake(Trigger.TIMER)  # the interval is the shortest now
        self._watch_clock()
        if self._power is not None and self._power[1].source is PowerSource.BATTERY:
            power = await self.power()
            if power.source is PowerSource.MAINS:
                self.wake(Trigger.WOKEN)

    def _watch_clock(self) -> None:
        """Notice that the computer slept, or that its clock was set back."""
        gap_s, self._gap_s = self._gap_s, clock_gap_s()
        if self._gap_s - gap_s > _SLEPT_S:
            self._log.info("woken", slept_s=round(self._gap_s - gap_s))
            self.wake(Trigger.WOKEN)
        elif gap_s - self._gap_s > _SLEPT_S:
            self.wake(Trigger.TIMER)  # the next look is planned by that clock

    def _recall_own_memory(self) -> None:
        """Keep emberd itself in memory under pressure; reading swap can take long, so nobody waits."""
        is_recalling = self._recalling is not None and not self._recalling.done()
        if not is_recalling and (self.is_tight or self._weights.is_kept_touched):
            self._recalling = asyncio.create_task(asyncio.to_thread(self._host.recall_own_memory))

    def _watch_swap(self, reading: thrash.Reading) -> None:
        was, settings = self.guard, self._settings()
        is_locked_outside, lock = self._weights.is_locked_outside, self._gate.lock_state
        is_warming = settings.mode != "off" and self._use.last_pass_s is not None
        frees = thrash.what_frees(
            lock, settings.priority, is_locked_outside=is_locked_outside, may_restart=settings.may_restart
        )
        is_holding = is_warming or is_locked_outside or lock is LockState.HELD
        now = self.guard = thrash.step(was, reading, settings.priority, is_holding=is_holding, frees=frees)
        if (now.hold, now.is_helpless) != (was.hold, was.is_helpless):
            self._log.warning(
                "thrash_guard",
                hold=now.hold.value,
                was=was.hold.value,
                is_helpless=now.is_helpless,
                bytes_per_s_before=now.rate_before and round(now.rate_before),
                bytes_per_s_after=now.rate_after and round(now.rate_after),
            )
        if now.hold is not was.hold:
            self._gate.tally.lettings_go += now.hold is not thrash.HoldLevel.ALL
            self.wake(Trigger.RELIEVED if now.hold is thrash.HoldLevel.ALL else Trigger.TIMER)

    def _has_let_go(self) -> bool:
        """Return True if what the thrash guard let go has left memory, and no user's request uses it."""
        is_locked = self._gate.lock_state in {LockState.HELD, LockState.PARTIAL}
        match self.guard.hold:
            case thrash.HoldLevel.NOTHING if is_locked or self._gate.port is None:
                return False
            case thrash.HoldLevel.NO_OUTSIDE_LOCK if self._weights.is_locked_outside:
                return False
        return not self._use.requests

    def _notice_engine(self) -> None:
        key = self._gate.sample().key
        if self._gate.port is not None and key is not None and key != self._engine_key:
            self._engine_key = key
            self.wake(Trigger.RESTARTED)

    def _watch_engine(self, seen: Observation) -> bool:
        """Make keep-warm look at once if memory of the idle engine was taken; return whether it was."""
        self._notice_engine()
        is_evicting = self.losses.watch(seen, is_idle=self._use.is_idle)
        if is_evicting:
            self.wake(Trigger.EVICTING)
        return is_evicting


def clock_gap_s() -> float:
    """Return how far the wall clock is ahead of the monotonic one, which stops while the computer sleeps.

    A wall clock that is set forward looks the same, and costs one pass.
    """
    return time.time() - time.monotonic()
