"""Carries out what keep-warm decides: touches and locks the weights, replays turns; gives way to users at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from emberd.core.gguf import split_names
from emberd.core.lock_limits import judge_limits
from emberd.core.replay import GENKEY, is_replayable, make_replay, shortened, tiny
from emberd.core.reuse import Verdict
from emberd.core.status import ProgressStatus
from emberd.core.turn import UNTOLD
from emberd.core.warmth import Cache, Step
from emberd.core.warmth_cost import WarmthCost
from emberd.host.toucher import ToucherLost, ToucherRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from structlog.typing import FilteringBoundLogger

    from emberd.core.memory import SystemMemory
    from emberd.core.ports import Host
    from emberd.core.replay import Replay
    from emberd.core.settings import WarmthSettings
    from emberd.core.turn import PromptCounts, Turn
    from emberd.core.types import EngineSample
    from emberd.host.toucher import Toucher
    from emberd.services.forecaster import Forecaster
    from emberd.services.gate import Gate
    from emberd.services.places import Places
    from emberd.services.spending import Spending
    from emberd.services.turns import Turns

T = TypeVar("T")
_REPLAY_LIMIT_S = 600.0
"""Processing a long prompt again on a CPU takes minutes."""
ASK_S = 2.0
_STOP_AGAIN_S = 0.2


class Warming:
    """One step at a time; owns the toucher and the lock that it holds.

    Args:
        host: this computer.
        log: events go here.
        gate: the way to the engine.
        toucher: touches and locks the model's pages.
        turns: knows what the engine's cache holds.
        places: tells who waits.
        forecaster: learns how long things take.
        spending: adds up what it costs.
    """

    def __init__(
        self,
        host: Host,
        log: FilteringBoundLogger,
        gate: Gate,
        toucher: Toucher,
        turns: Turns,
        places: Places,
        forecaster: Forecaster,
        spending: Spending,
    ) -> None:
        self._host = host
        self._log = log
        self._gate = gate
        self._toucher = toucher
        self._places = places
        self._progress: tuple[int, int] | None = None
        self._locked_by: tuple[int | None, tuple[Any, ...] | None] | None = None
        self._refused_lock_of: str | None = None
        self.turns = turns
        self.forecaster = forecaster
        self.spending = spending
        self.letting_go = asyncio.Event()
        """Set while nothing may be brought back: a pass that is under way ends."""
        self.passing = asyncio.Lock()
        """Held by a pass, which is one at a time."""
        self.is_touching: Callable[[], bool] = lambda: False
        """Whether the weights are touched between two passes."""
        self.has_primed = False
        """Whether a replay of this pass had to bring a prompt into the cache."""
        self._replayed_s = 0.0
        self._said_barred: frozenset[str] = frozenset()
        self.last_pass_s: float | None = None
        """When a pass that warmed everything ended last, None for never."""

    @property
    def progress(self) -> ProgressStatus | None:
        """How far a pass over the weights is, None while there is none."""
        return None if self._progress is None else ProgressStatus(*self._progress)

    @property
    def is_free(self) -> bool:
        """Whether the engine is ready and nobody uses it or waits for it."""
        return self._gate.port is not None and self._gate.sample().is_idle and not self._places.waiting

    @property
    def requests(self) -> int:
        """Requests of users that run or wait; those that run count as one."""
        return (0 if self._gate.sample().is_idle else 1) + self._places.waiting

    def cpu_s(self, *, with_engine: bool = True) -> float:
        """Return the processor time of the toucher and the engine so far, in seconds."""
        pids = self._gate.sample().pids if with_engine else ()
        return sum(_cpu_s(pid) for pid in (*pids, self._toucher.pid))

    async def do(self, step: Step, *, is_thorough: bool) -> dict[str, Any] | None:
        """Do one thing; return what it found, None if it could not be done.

        Args:
            step: the thing.
            is_thorough: a replay shall use the buffers for several tokens, too.
        """
        try:
            match step:
                case Step.LOCK | Step.TOUCH:
                    return await self._touch(locks=step is Step.LOCK)
                case Step.UNLOCK:
                    self._locked_by = None
                    await self._toucher.unlock()
                    return {}
                case Step.RESTART:
                    self._gate.restart_without_lock()
                    return {}
                case Step.TINY:
                    return None if await self._send(tiny(self._gate.engine.name)) is None else {}
                case Step.REPLAY:
                    return await self._replay(is_thorough=is_thorough)
        except (ToucherRefused, ToucherLost) as error:
            self._locked_by = None
            self._log.warning("keepwarm_failed", step=step.value, reason=str(error))
        return None

    # --- weights --------------------------------------------------------------------------------------------

    @property
    def is_locked_outside(self) -> bool:
        """Whether the toucher that was told to lock still maps the same file; the lock ends with either."""
        return self._locked_by is not None and self._locked_by == self._lockable()

    def can_lock(self, engine: EngineSample, memory: SystemMemory) -> bool | None:
        """Return whether limits and room let the toucher lock the weights; unknown without their size."""
        if not self._gate.will_lock or engine.key == self._refused_lock_of:
            return False
        if engine.weights_bytes is None:
            return None
        return judge_limits(engine.weights_bytes, self._host.lock_limits(None), memory.wired_bytes)[0]

    async def touch_again(self) -> bool | None:
        """Touch the weights once; return whether some were cold, None if a user came.

        Raises:
            ToucherRefused: it cannot be done.
            ToucherLost: the toucher died.
        """
        if not self._name_files():
            return None
        touched = await self._giving_way(self._toucher.touch(), self._toucher.stop)
        self.spending.add(WarmthCost(read_bytes=touched.cold_bytes or 0))
        return bool(touched.cold_bytes) if touched.is_complete else None

    async def _touch(self, *, locks: bool) -> dict[str, Any] | None:
        if not self._name_files():
            return None
        if not locks:
            touched = await self._giving_way(self._toucher.touch(self._note_progress), self._toucher.stop)
            self._note_reading(touched.cold_bytes, touched.elapsed_s)
            return {"cold_share": _ratio(touched.cold_bytes, touched.total_bytes)} if touched.is_complete else None
        locked = await self._giving_way(self._toucher.lock(self._note_progress), self._toucher.stop)
        self._note_reading(locked.cold_bytes, locked.elapsed_s)
        if locked.is_complete:
            self._locked_by = self._lockable()
            self._log.info("locked_outside", locked_bytes=locked.locked_bytes)
        elif locked.error is None:  # a user came, or it lets go: nothing else would free a part of a lock
            await self._toucher.unlock()
            return None
        else:
            self._refused_lock_of = self._gate.sample().key
            self._log.warning("lock_outside_refused", locked_bytes=locked.locked_bytes, reason=locked.error)
            await self._toucher.unlock()
        return {"cold_share": _ratio(locked.cold_bytes, locked.total_bytes)}

    def _name_files(self) -> bool:
        """Tell the toucher which files the model has; return False if that is not known."""
        model = self._gate.sample().model
        if model is not None:
            self._toucher.use([model.with_name(name) for name in split_names(model.name)])
        return model is not None

    def _lockable(self) -> tuple[int | None, tuple[Any, ...] | None]:
        """Return what tells a lock on these weights by this toucher from any other."""
        model = self._gate.sample().model
        try:
            stat = None if model is None else model.stat()
        except OSError:
            stat = None
        return self._toucher.pid, stat and (model, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def _note_progress(self, done_bytes: int, total_bytes: int) -> None:
        self._progress = (done_bytes, total_bytes)

    def _note_reading(self, cold_bytes: int | None, seconds: float) -> None:
        """Count what was read, and learn how fast that goes."""
        self.spending.add(WarmthCost(read_bytes=cold_bytes or 0))
        self.forecaster.note_reading(cold_bytes, seconds)

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
        return asyncio.create_task(_first_of(self._places.next_arrival, self.letting_go))

    # --- the prompt cache -----------------------------------------------------------------------------------

    async def learn_what_was_taken_whole(self) -> None:
        """Ask the engine, once for each turn, whether it took all of the last prompt."""
        port, engine, turn = self._gate.port, self._gate.sample(), self.turns.last
        known = self.turns.taken_whole
        if port is None or engine.key is None or turn is None or (known is not None and known[0] == engine.key):
            return
        if not self._is_replayable(turn, engine) or not self.is_free:
            return
        is_whole = await self._gate.engine.took_whole(port, turn, ASK_S)
        if is_whole is not None and self.turns.last is turn:
            self.turns.taken_whole = (engine.key, is_whole)

    def cache(self, engine: EngineSample, settings: WarmthSettings) -> Cache:
        """Return whose prompt the engine's cache holds, and whether that can be replayed."""
        cache = self.turns.cache(engine.key, is_adopted=self._gate.is_adopted)
        last = self.turns.last
        can_replay = (
            last is not None and self._is_replayable(last, engine) and self.turns.taken_whole == (engine.key, True)
        )
        if cache is Cache.KNOWN and not can_replay:
            return Cache.UNKNOWN
        # In a new engine nothing can be lost, and the last turn can be brought back.
        return Cache.KNOWN if cache is Cache.EMPTY and can_replay and settings.reprime else cache

    def _is_replayable(self, turn: Turn, engine: EngineSample) -> bool:
        barred = self.turns.ledger(engine.key).barred
        if barred - self._said_barred:
            self._log.warning("replays_barred", kinds=sorted(barred))
        self._said_barred = barred
        if turn.kind in barred:
            return False
        return is_replayable(turn, self._gate.engine.name, keeps_state=engine.keeps_state)

    async def _replay(self, *, is_thorough: bool) -> dict[str, Any] | None:
        """Replay the conversations that fit into the cache together; end with the first that is not there.

        Where that is not the latest one, it may just have pushed that out, which is sent once more.

        Args:
            is_thorough: the latest one first without its last words, which the second request has to process.
        """
        port, key = self._gate.port, self._gate.sample().key
        if port is None:
            return None
        continues = await self._gate.engine.continues_turns(port, ASK_S)
        to_send = [each.turn for each in self.turns.to_replay(key)]
        first_s, has_missed = None, False
        while to_send:
            turn = to_send.pop(0)
            is_first = first_s is None
            parts = [shortened(turn), turn] if is_thorough and turn.reply and is_first else [turn]
            made = [make_replay(each, self._gate.engine.name, continues_turn=continues) for each in parts]
            for request in (each for each in made if each is not None):
                sent = await self._send(request)
                if sent is None:
                    return None
                took_s, counts = sent
                first_s = took_s if first_s is None else first_s  # the others have more to process
                # What another one's miss has pushed out is no miss of its own.
                if self._judge(key, turn, counts, may_be_gone=has_missed) is Verdict.MISS:
                    has_missed, to_send = True, [] if turn is self.turns.last else to_send[-1:]
                    break
        return None if first_s is None or has_missed else {"replay_ratio": self.forecaster.note_replay(first_s)}

    def _judge(self, key: str | None, turn: Turn, counts: PromptCounts, *, may_be_gone: bool) -> Verdict:
        """Hold what the engine told of a replay against what it should have found."""
        # An engine that loads its model again in place (KoboldCPP's reload) keeps its process, and no cache.
        has_loaded_again = self._gate.since_s > max(self.turns.ended_s or 0.0, self._replayed_s)
        self._replayed_s = time.monotonic()
        verdict = self.turns.replayed(key, turn, counts, may_be_gone=may_be_gone or has_loaded_again)
        self.has_primed = self.has_primed or verdict is Verdict.PRIMED
        if verdict is Verdict.MISS:
            is_barred = turn.kind in self.turns.ledger(key).barred
            self._log.warning(
                "replay_missed",
                kind=turn.kind,
                reused_tokens=counts.reused,
                processed_tokens=counts.processed,
                is_latest=turn is self.turns.last,
                is_barred=is_barred,
            )
        return verdict

    async def _send(self, request: Replay) -> tuple[float, PromptCounts] | None:
        """Send a generation of one token, given up at once when a user comes.

        Returns:
            How long it took in seconds, and what the engine told of it; None if it was given up or failed.
        """
        port, engine = self._gate.port, self._gate.engine
        if port is None or not self.is_free:
            return None  # since the pass began
        began_s = time.monotonic()
        self._gate.forget_counts()
        sending, coming = asyncio.create_task(engine.send(port, request, _REPLAY_LIMIT_S)), self._interruption()
        try:
            await asyncio.wait({sending, coming}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                await engine.abort(port, GENKEY, ASK_S)
                return None
        finally:
            for task in (sending, coming):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(sending, coming, return_exceptions=True)
        took_s, told = time.monotonic() - began_s, sending.result()
        counts = UNTOLD if told is None else engine.counts_in_reply(told)
        counts = self._gate.counts_in_log() if counts == UNTOLD else counts
        cost = WarmthCost(engine_ms=round(took_s * 1000), processed_tokens=counts.processed or 0)
        self.spending.add(cost)
        return None if told is None else (took_s, counts)


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


def _ratio(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else part / whole
