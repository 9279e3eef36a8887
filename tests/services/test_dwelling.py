"""Keep-warm between looks and within one: what it watches, when it touches, how it gives way, what it replays."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from emberd.core.errors import RequestRefused
from emberd.core.lifecycle import State
from emberd.core.lock import LockState
from emberd.core.memory import EngineMemory, Power, PowerSource, Pressure, SystemMemory
from emberd.core.reuse import CacheRoom
from emberd.core.settings import Settings, WarmthSettings
from emberd.core.tally import Tally
from emberd.core.thrash import HoldLevel, ThrashGuard
from emberd.core.turn import UNTOLD, PromptCounts, Turn
from emberd.core.types import EngineSample
from emberd.core.warmth import Reason, Trigger
from emberd.core.wishes import OwnerWishes
from emberd.host import ThisHost
from emberd.host.toucher import Locked, Touched, Toucher, ToucherRefused
from emberd.services import places, pressure_watch, touching
from emberd.services.accounts import Accounts, Spending
from emberd.services.forecaster import Forecaster
from emberd.services.keepwarm import KeepWarm
from emberd.services.model_use import ModelUse
from emberd.services.observer import Observer
from emberd.services.places import Places
from emberd.services.pressure_watch import PressureWatch
from emberd.services.replays import Replays
from emberd.services.turns import Knocks, Turns
from emberd.services.warming import Warming
from emberd.services.weights import Weights
from page_cache import MIB, write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from emberd.core.replay import Replay
    from emberd.core.reuse import Conversation

LIMIT_S = 20


class ReadyEngine:
    """A supervisor and a gate whose engine is ready and idle."""

    port: int | None = 1
    is_adopted = is_empty = False
    lock_state = LockState.ABSENT
    will_lock = False
    engine_key = "1:a"
    is_idle = True

    def __init__(self, model: Path) -> None:
        parts = {"name": "koboldcpp", "most_connections": 4, "most_at_work": 1}
        self.engine: Any = type(
            "Engine",
            (),
            {**parts, "send": self._send, "took_whole": self._agree, "wishes": lambda _: OwnerWishes()},
        )()
        self.engine.counts_in_reply = lambda told: told.get("counts", UNTOLD)
        self.in_log = UNTOLD
        self.tally = Tally()
        self._model = model

    @staticmethod
    async def _send(*_: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    async def _agree(*_: Any) -> bool:
        return True

    since_s = 0.0

    def forget_counts(self) -> None:
        self.in_log = UNTOLD

    def counts_in_log(self) -> PromptCounts:
        return self.in_log

    def sample(self) -> EngineSample:
        return EngineSample(self.engine_key, (os.getpid(),), is_idle=self.is_idle, requests=1, model=self._model)

    async def wait_for_change(self) -> None:
        await asyncio.Event().wait()

    def restart_without_lock(self) -> None:
        raise AssertionError("nobody asked for that")

    state = State.READY
    woken_s = None

    def wake(self) -> bool:
        return False

    async def ensure_ready(self, timeout_s: float, **_: bool) -> int:
        assert timeout_s >= 0
        return 1

    @contextlib.contextmanager
    def admitted(self) -> Iterator[Callable[[int], None]]:
        yield lambda _: None

    async def is_alive(self, port: int, _: str | None) -> bool:
        return port == 1

    def doubt(self, port: int) -> None:
        raise AssertionError(port)


class DictatedStalls:
    """A watch for stalls that wakes when a test says so."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.is_closed = False

    async def wait(self) -> None:
        await self.news.wait()
        self.news.clear()

    def close(self) -> None:
        self.is_closed = True


class DictatedHost(ThisHost):
    """This computer, but for the readings of memory that a test dictates."""

    def __init__(self) -> None:
        super().__init__()
        self.of_engine = EngineMemory(resident_bytes=100 * MIB, swapped_bytes=0)
        self.of_system = SystemMemory(swapped_out_bytes=0, pressure=Pressure.NORMAL)
        self.recalled = self.readings = 0
        self.read = asyncio.Event()
        self.stalls: DictatedStalls | None = None

    def watch_stalls(self, longest_s: int) -> Any:
        assert longest_s > pressure_watch.WATCH_INTERVAL_S
        return self.stalls

    def engine_memory(self, pids: Sequence[int]) -> EngineMemory:
        assert list(pids) == [os.getpid()]
        return self.of_engine

    def system_memory(self) -> SystemMemory:
        self.readings += 1
        self.read.set()
        return self.of_system

    async def has_read(self, count: int) -> None:
        """Wait until memory has been read so often."""
        while self.readings < count:
            self.read.clear()
            await self.read.wait()

    def recall_own_memory(self) -> None:
        self.recalled += 1


class Rig:
    """The service on a real toucher and a real file."""

    def __init__(self, folder: Path) -> None:
        model = write(folder / "model", 4 * MIB)
        engine, host = ReadyEngine(model), DictatedHost()
        self.engine, self.host = engine, host
        self.log = structlog.testing.CapturingLogger()
        log: Any = structlog.wrap_logger(self.log, processors=[])
        self.toucher = Toucher(host.paging)
        self.toucher.use([model])
        self.room = CacheRoom()
        self.turns = turns = Turns(lambda: MIB, lambda: self.room)
        self.places = Places(engine, lambda: 4)

        async def nothing() -> None:
            return None

        self.settings, accounts = Settings().warmth, Accounts(folder / "history.db", log)
        observer = Observer(host, log, engine.sample)
        self.use = ModelUse(engine, self.places)
        forecaster, self.spending = Forecaster(log, observer, turns, nothing), Spending(accounts)
        self.weights = Weights(host, log, engine, self.toucher, self.use, forecaster, self.spending)
        replays = Replays(log, engine, turns, self.use, forecaster, self.spending)
        self.watch = PressureWatch(host, log, lambda: self.settings, engine, observer, self.weights, self.use)
        warming = Warming(log, engine, self.use, self.weights, replays, forecaster, self.spending)
        self.service = KeepWarm(log, lambda: self.settings, engine, observer, warming, self.watch, Knocks())
        self.touching = self.service._touching

    def hears(self, *told: Turn, counts: Sequence[PromptCounts] = ()) -> list[str]:
        """Have users' turns in the engine's cache; return a list to which the prompts of replays will be added.

        Args:
            told: the turns.
            counts: what the engine tells of each replay, nothing when they are used up.
        """
        prompts: list[str] = []
        left = list(counts)

        async def send(_: int, request: Replay, __: float) -> Mapping[str, Any]:
            prompts.append(request.body["prompt"])
            return {"counts": left.pop(0)} if left else {}

        self.engine.engine.send = send
        for turn in told:
            self.turns.begin(self.engine.engine_key)
            self.turns.end(self.engine.engine_key, lambda turn=turn: turn)  # type: ignore[misc]  # the loop's variable
        return prompts

    async def is_watching(self) -> None:
        """Wait until the service waits for somebody to come."""
        while not self.places.next_arrival._waiters:
            await asyncio.sleep(0)

    def dwelt(self) -> dict[str, Any] | None:
        """Return the event that tells how it went."""
        found = [call.kwargs for call in self.log.calls if call.kwargs.get("event") == "keepwarm_dwelt"]
        return found[-1] if found else None


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path)
    yield made
    await made.toucher.close()


async def test_it_ends_when_nothing_has_been_taken_for_a_while(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(touching, "PAUSE_S", 0.001)
    async with asyncio.timeout(LIMIT_S):
        await rig.touching.run()
    told = rig.dwelt()
    assert told is not None
    assert 25 <= told["rounds"] <= 26


@pytest.mark.parametrize("reason", ["hold", "pause", "cool", "engine", "battery"])
async def test_it_ends_when_it_may_no_longer(rig: Rig, reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(touching, "PAUSE_S", 0.001)
    if reason == "hold":
        rig.watch.guard = replace(ThrashGuard(), hold=HoldLevel.NO_WARMING)
    elif reason == "engine":
        rig.engine.port = None
    elif reason == "battery":
        rig.watch._power = (time.monotonic(), Power(source=PowerSource.BATTERY))
    else:
        await (rig.service.cool(60) if reason == "cool" else rig.service.pause(60))
    async with asyncio.timeout(LIMIT_S):
        await rig.touching.run()
    told = rig.dwelt()
    assert told is not None
    assert told["rounds"] == 0


async def test_it_goes_on_while_a_user_is_served(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(touching, "PAUSE_S", 0.001)
    rig.engine.is_idle = False
    async with asyncio.timeout(LIMIT_S):
        await rig.touching.run()
    told = rig.dwelt()
    assert told is not None
    assert told["rounds"] >= 25


async def test_what_the_engine_does_for_a_user_meanwhile_is_not_its_cost(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(touching, "PAUSE_S", 0.001)
    touch = rig.toucher.touch

    async def touch_beside_a_busy_engine() -> Touched:
        ends_s = time.thread_time() + 0.02  # the engine of this test is its own process
        while time.thread_time() < ends_s:
            pass
        return await touch()

    monkeypatch.setattr(rig.toucher, "touch", touch_beside_a_busy_engine)
    async with asyncio.timeout(LIMIT_S):
        await rig.touching.run()
    told = rig.dwelt()
    assert told is not None
    assert told["cpu_s"] < 25 * 0.02


async def test_a_user_who_comes_stops_a_touch_and_not_those_after_it(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(touching, "PAUSE_S", 0.001)
    begun, stopped, touch = asyncio.Event(), asyncio.Event(), rig.toucher.touch

    async def stopped_touch() -> Touched:
        begun.set()
        await stopped.wait()
        return replace(await touch(), is_complete=False)

    monkeypatch.setattr(rig.toucher, "touch", stopped_touch)
    monkeypatch.setattr(rig.toucher, "stop", stopped.set)
    async with asyncio.timeout(LIMIT_S):
        dwelling = asyncio.create_task(rig.touching.run())
        await begun.wait()
        await rig.is_watching()
        async with rig.places.taken(places.Patience(LIMIT_S), is_work=True, goes_first=False):
            await stopped.wait()
            monkeypatch.setattr(rig.toucher, "touch", touch)
            await dwelling
    told = rig.dwelt()
    assert told is not None
    assert told["rounds"] >= 25


async def test_it_goes_on_while_a_pass_sends_its_replay(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(touching, "PAUSE_S", 0.001)
    rig.hears(Turn("/api/v1/generate", {"prompt": "Once"}, " upon a time"))
    touch, is_sending, touched = rig.toucher.touch, False, asyncio.Event()

    async def seen_touch(*args: Any) -> Touched:
        if is_sending:
            touched.set()
        return await touch(*args)

    async def send(*_: Any) -> dict[str, Any] | None:
        nonlocal is_sending
        is_sending = True
        await touched.wait()
        return {}

    monkeypatch.setattr(rig.toucher, "touch", seen_touch)
    rig.engine.engine.send = send
    rig.host.of_system = SystemMemory(pressure=Pressure.WARN)
    await rig.watch.read()
    async with asyncio.timeout(LIMIT_S):
        dwelling = asyncio.create_task(rig.touching.run())
        assert "replay" in (await rig.service.warm())["steps"]
        dwelling.cancel()


async def test_a_replay_that_the_engine_refuses_is_logged_once_and_named(rig: Rig):
    rig.hears(Turn("/api/v1/generate", {"prompt": "Once"}, " upon a time"))

    async def refuse(*_: Any) -> dict[str, Any] | None:
        raise RequestRefused(401)

    sends, rig.engine.engine.send = rig.engine.engine.send, refuse
    async with asyncio.timeout(LIMIT_S):
        found = [await rig.service.warm() for _ in range(2)]
        assert [(each["refused"], "replay" in each["steps"]) for each in found] == [(401, False)] * 2
        rig.engine.engine.send = sends
        assert "refused" not in await rig.service.warm()
    told = [call.kwargs for call in rig.log.calls if call.kwargs.get("event") == "replay_refused"]
    assert [each["status"] for each in told] == [401]


async def test_it_stays_while_there_is_pressure(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(touching, "PAUSE_S", 0.001)
    rig.host.of_system = SystemMemory(pressure=Pressure.WARN)
    await rig.watch.read()
    touch, rounds = rig.toucher.touch, 0

    async def counted() -> Touched:
        nonlocal rounds
        rounds += 1
        if rounds == 60:
            rig.host.of_system = SystemMemory(pressure=Pressure.NORMAL)
            await rig.watch.read()
        return await touch()

    monkeypatch.setattr(rig.toucher, "touch", counted)
    async with asyncio.timeout(LIMIT_S):
        await rig.touching.run()
    assert 60 + 24 <= rounds <= 60 + 26


@pytest.mark.parametrize(
    ("memory", "is_evicting"),
    [
        (EngineMemory(resident_bytes=90 * MIB, swapped_bytes=0), True),
        (EngineMemory(resident_bytes=100 * MIB, swapped_bytes=10 * MIB), True),
        (EngineMemory(resident_bytes=99 * MIB, swapped_bytes=0), False),
    ],
)
async def test_a_look_is_taken_at_once_when_memory_of_the_idle_engine_is_taken(
    rig: Rig, memory: EngineMemory, is_evicting: bool
):
    await rig.watch.read()
    rig.service._schedule._trigger = Trigger.TIMER  # the first look is for the new engine
    rig.host.of_engine = memory
    await rig.watch.read()
    assert rig.service._schedule._trigger is (Trigger.EVICTING if is_evicting else Trigger.TIMER)


async def test_what_a_generation_needed_and_gave_back_is_no_loss(rig: Rig):
    await rig.watch.read()
    rig.service._schedule._trigger = Trigger.TIMER
    rig.engine.is_idle = False
    rig.host.of_engine = EngineMemory(resident_bytes=300 * MIB)
    await rig.watch.read()
    rig.engine.is_idle = True
    rig.host.of_engine = EngineMemory(resident_bytes=100 * MIB)
    await rig.watch.read()
    assert rig.service._schedule._trigger is Trigger.TIMER


async def test_what_a_pass_of_emberds_own_needed_is_no_loss(rig: Rig):
    await rig.watch.read()
    rig.service._schedule._trigger = Trigger.TIMER
    async with rig.use.passing:
        rig.host.of_engine = EngineMemory(resident_bytes=300 * MIB)
        await rig.watch.read()
    rig.host.of_engine = EngineMemory(resident_bytes=100 * MIB)
    await rig.watch.read()
    assert rig.service._schedule._trigger is Trigger.TIMER


async def test_a_new_engine_is_not_held_against_the_old_one(rig: Rig):
    await rig.watch.read()
    rig.engine.engine_key = "2:b"
    rig.host.of_engine = EngineMemory(resident_bytes=MIB)
    await rig.watch.read()
    assert rig.service._schedule._trigger is Trigger.RESTARTED


async def test_a_loss_that_comes_too_soon_is_looked_after_when_that_is_due(rig: Rig):
    rig.use.last_pass_s = time.monotonic()
    rig.service._schedule._trigger = Trigger.EVICTING
    await rig.service._look()
    assert rig.service._schedule._trigger is Trigger.EVICTING
    rig.use.last_pass_s -= Settings().warmth.min_interval_s
    await rig.service._look()
    told = [call.kwargs for call in rig.log.calls if call.kwargs.get("event") == "keepwarm"]
    assert [each["reason"] for each in told] == [Reason.EVICTING.value]


@pytest.mark.parametrize("is_dwelling", [True, False])
async def test_a_loss_that_the_touching_kept_away_makes_no_later_one_wait(rig: Rig, *, is_dwelling: bool):
    if is_dwelling:
        rig.touching.begin()
    rig.service._schedule._trigger = Trigger.EVICTING
    await rig.service._look()
    shortest_s = Settings().warmth.min_interval_s
    assert rig.service._loss_wait_s == (shortest_s if is_dwelling else 2 * shortest_s)
    rig.touching.stop()


@contextlib.asynccontextmanager
async def watching(rig: Rig) -> AsyncIterator[None]:
    task = asyncio.create_task(rig.watch.run(rig.service._after_reading))
    try:
        async with asyncio.timeout(LIMIT_S):
            yield
    finally:
        task.cancel()


async def test_a_calm_computer_is_looked_at_when_programs_wait_for_memory_and_then_all_the_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pressure_watch, "WATCH_INTERVAL_S", 0.001)
    monkeypatch.setattr(pressure_watch, "_CALM_AFTER_S", 0)
    stalls = rig.host.stalls = DictatedStalls()
    async with watching(rig):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await rig.host.has_read(1)
        monkeypatch.setattr(pressure_watch, "_CALM_AFTER_S", LIMIT_S)
        stalls.news.set()
        await rig.host.has_read(5)
    assert stalls.is_closed


async def test_where_the_kernel_tells_of_no_stalls_a_calm_computer_is_looked_at_all_the_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pressure_watch, "WATCH_INTERVAL_S", 0.001)
    monkeypatch.setattr(pressure_watch, "_CALM_AFTER_S", 0)
    async with watching(rig):
        await rig.host.has_read(5)


async def test_a_computer_is_looked_at_all_the_time_for_a_while_after_something_has_happened(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pressure_watch, "WATCH_INTERVAL_S", 0.001)
    rig.host.stalls = DictatedStalls()
    async with watching(rig):
        await rig.host.has_read(5)


async def test_a_reading_that_fails_is_logged_and_the_watch_goes_on(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pressure_watch, "WATCH_INTERVAL_S", 0.001)
    read = rig.host.system_memory

    def fail() -> SystemMemory:
        read()
        raise AttributeError("no such call on this system")

    monkeypatch.setattr(rig.host, "system_memory", fail)
    async with watching(rig):
        await rig.host.has_read(3)
    bugs = [call for call in rig.log.calls if call.kwargs.get("event") == "keepwarm_bug"]
    assert len(bugs) >= 2


async def test_a_new_engine_is_noticed_at_once(rig: Rig):
    changed = asyncio.Event()
    rig.engine.wait_for_change = changed.wait
    following = asyncio.create_task(rig.watch._follow_engine())
    rig.service._schedule._trigger = Trigger.TIMER
    await asyncio.sleep(0)
    changed.set()
    rig.engine.wait_for_change = asyncio.Event().wait
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    following.cancel()
    assert rig.service._schedule._trigger is Trigger.RESTARTED


TURN = Turn(
    "/v1/completions", {"prompt": "Once upon a time"}, " there was a model that was always there, and never slept"
)


@pytest.mark.parametrize(
    ("pressure", "swapped_bytes", "count"),
    [
        (Pressure.NORMAL, 0, 1),
        (Pressure.WARN, 2 * MIB, 1),
        (Pressure.NORMAL, 3 * MIB, 2),
        (Pressure.NORMAL, None, 1),
        (Pressure.WARN, None, 2),
    ],
)
async def test_a_replay_has_several_tokens_to_process_where_the_buffers_for_them_are_taken(
    rig: Rig, pressure: Pressure, swapped_bytes: int | None, count: int
):
    prompts = rig.hears(TURN)
    rig.host.of_system = SystemMemory(pressure=pressure)
    rig.host.of_engine = EngineMemory(swapped_bytes=swapped_bytes, footprint_bytes=100 * MIB)
    told = await rig.service.warm()
    assert told["steps"] == ["touch", "replay"]
    whole = TURN.body["prompt"] + TURN.reply
    assert prompts == [whole[:-12], whole][-count:]


async def test_buffers_that_are_taken_a_little_at_a_time_are_used_again_too(rig: Rig):
    prompts = rig.hears(TURN)
    sent = []
    for swapped in (1, 3, 4, 6, 7):
        rig.host.of_engine = EngineMemory(swapped_bytes=swapped * MIB, footprint_bytes=100 * MIB)
        before = len(prompts)
        await rig.service.warm()
        sent.append(len(prompts) - before)
    assert sent == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(("answer", "asked"), [(True, 1), (False, 1), (None, 2)])
async def test_the_engine_is_asked_once_for_each_turn_whether_it_took_all_of_the_prompt(
    rig: Rig, answer: bool | None, asked: int
):
    prompts, turns = rig.hears(TURN), []

    async def took_whole(_: int, turn: Turn, __: float) -> bool | None:
        turns.append(turn)
        return answer

    rig.engine.engine.took_whole = took_whole
    for _ in range(2):
        steps = (await rig.service.warm())["steps"]
        assert steps == (["touch", "replay"] if answer else ["touch"])
    assert turns == [TURN] * asked
    assert len(prompts) == (2 if answer else 0)
    rig.turns.begin(rig.engine.engine_key)
    rig.turns.end(rig.engine.engine_key, lambda: replace(TURN, reply=" another"))
    await rig.service.warm()
    assert turns[-1].reply == " another"


async def test_a_turn_that_came_while_the_engine_was_asked_about_another_is_not_sent(rig: Rig):
    prompts = rig.hears(TURN)

    async def took_whole(*_: Any) -> bool:
        rig.turns.begin(rig.engine.engine_key)
        rig.turns.end(rig.engine.engine_key, lambda: replace(TURN, reply=" another"))
        return True

    rig.engine.engine.took_whole = took_whole
    assert (await rig.service.warm())["steps"] == ["touch"]
    assert prompts == []


async def test_what_a_replay_leaves_in_swap_is_a_loss_only_once(rig: Rig):
    rig.hears(TURN)

    async def has_lost(swapped_bytes: int) -> bool:
        rig.host.of_engine = EngineMemory(
            100 * MIB, swapped_bytes=swapped_bytes, footprint_bytes=200 * MIB, major_faults=0
        )
        rig.watch._watch_engine(rig.watch._observer.look())
        return bool((await rig.service.warm())["had_lost"])

    assert await has_lost(96 * MIB)
    assert not await has_lost(96 * MIB)
    assert await has_lost(98 * MIB)
    assert not await has_lost(50 * MIB)
    assert await has_lost(60 * MIB), "a user's generation had brought some of it back"
    rig.engine.engine_key = "2:b"
    rig.turns.begin("2:b")
    rig.turns.end("2:b", lambda: TURN)
    assert await has_lost(60 * MIB), "of another engine nothing is known"


async def test_a_user_who_comes_before_the_replay_is_on_its_way_is_seen(rig: Rig):
    prompts, to_replay = rig.hears(TURN), rig.turns.to_replay

    def chosen(key: str | None) -> list[Conversation]:
        rig.engine.is_idle = False
        return to_replay(key)

    rig.turns.to_replay = chosen  # type: ignore[method-assign]  # the last look before the request
    assert (await rig.service.warm())["steps"] == ["touch"]
    assert not prompts


async def test_a_user_who_comes_at_the_moment_of_the_replay_is_seen(rig: Rig):
    rig.hears(TURN)
    users: list[asyncio.Task[None]] = []
    aborted = asyncio.Event()

    async def come() -> None:
        async with rig.places.taken(places.Patience(LIMIT_S), is_work=True, goes_first=False):
            pass

    def forget_counts() -> None:
        users.append(asyncio.create_task(come()))  # its first step comes before those of what is created next

    async def send(*_: Any) -> dict[str, Any] | None:
        await aborted.wait()
        return None

    async def abort(*_: Any) -> bool:
        aborted.set()
        return True

    rig.engine.forget_counts = forget_counts  # type: ignore[method-assign]
    rig.engine.engine.send, rig.engine.engine.abort = send, abort
    async with asyncio.timeout(LIMIT_S):
        assert (await rig.service.warm())["steps"] == ["touch"]
        await users[0]


async def test_a_page_that_polls_does_not_end_a_replay(rig: Rig):
    rig.hears(TURN)

    async def send(*_: Any) -> dict[str, Any] | None:
        async with rig.places.taken(places.Patience(LIMIT_S), is_work=False, goes_first=False, uses_model=False):
            await asyncio.sleep(0)
        return {}

    rig.engine.engine.send = send
    assert (await rig.service.warm())["steps"] == ["touch", "replay"]


def endless_replay(rig: Rig) -> asyncio.Event:
    """Let a replay last until it is aborted; return what is set when it has begun."""
    rig.hears(TURN)
    begun = asyncio.Event()

    async def send(*_: Any) -> dict[str, Any] | None:
        begun.set()
        await asyncio.sleep(LIMIT_S)
        return {}

    async def abort(*_: Any) -> bool:
        return True

    rig.engine.engine.send, rig.engine.engine.abort = send, abort
    return begun


async def test_a_pass_under_way_ends_under_critical_pressure(rig: Rig):
    begun = endless_replay(rig)
    async with asyncio.timeout(LIMIT_S / 2):
        warming = asyncio.create_task(rig.service.warm())
        await begun.wait()
        rig.host.of_system = SystemMemory(swapped_out_bytes=0, pressure=Pressure.CRITICAL)
        await rig.watch.read()
        assert (await warming)["steps"] == ["touch"]
    rig.host.of_system = SystemMemory(swapped_out_bytes=0, pressure=Pressure.NORMAL)
    await rig.watch.read()
    assert not rig.use.letting_go.is_set()


@pytest.mark.parametrize("verb", ["pause", "cool"])
async def test_a_pass_under_way_ends_for_a_pause_and_for_a_cool_spell(rig: Rig, verb: str):
    begun = endless_replay(rig)
    async with asyncio.timeout(LIMIT_S / 2):
        warming = asyncio.create_task(rig.service.warm())
        await begun.wait()
        await getattr(rig.service, verb)(60)
        assert (await warming)["steps"] == ["touch"]
    assert not rig.use.letting_go.is_set()


@pytest.mark.parametrize("trigger", [Trigger.KNOCK, Trigger.RELIEVED, Trigger.EVICTING])
@pytest.mark.parametrize("obstacle", ["user", "pressure"])
async def test_what_woke_it_outlasts_an_obstacle_that_passes(rig: Rig, trigger: Trigger, obstacle: str):
    rig.host.of_system = SystemMemory(pressure=Pressure.NORMAL)
    if obstacle == "user":
        rig.engine.is_idle = False
    else:
        rig.watch.last_critical_s = time.monotonic()
    rig.service._schedule._trigger = trigger
    await rig.service._look()
    assert rig.service._last is None
    rig.engine.is_idle, rig.watch.last_critical_s = True, None
    await rig.service._look()
    assert rig.service._last is not None
    assert rig.service._last["reason"] == trigger.value


async def test_the_hours_of_the_settings_count_again_when_a_verb_has_ended(rig: Rig):
    rig.settings = replace(WarmthSettings(), cool_hours=("00:00-12:00", "12:00-00:00"))
    rig.service._pauses.cool_until_s = time.monotonic() - 1
    assert (await rig.service._snapshot()).cool_until_s is not None
    assert (await rig.service._snapshot()).cool_until_s > time.monotonic()


async def test_a_clock_that_is_set_back_puts_off_no_look(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    planned: list[float] = []
    monkeypatch.setattr(rig.service._schedule, "plan", planned.append)
    await rig.watch.read()
    planned.clear()
    monkeypatch.setattr(pressure_watch, "clock_gap_s", lambda: rig.watch._gap_s - 7200)
    await rig.watch.read()
    assert planned == [0], "a look that is not due plans the next one by the clock as it is now"


async def test_a_lock_that_a_user_ends_is_not_kept_in_part(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    unlocked = asyncio.Event()

    async def lock(*_: Any) -> Locked:
        async with rig.places.taken(places.Patience(LIMIT_S), is_work=True, goes_first=False):
            pass
        return Locked(False, MIB, 4 * MIB, 0, 0.1, None)

    async def unlock() -> None:
        unlocked.set()

    monkeypatch.setattr(rig.toucher, "lock", lock)
    monkeypatch.setattr(rig.toucher, "unlock", unlock)
    assert await rig.weights.lock() is None
    assert unlocked.is_set()
    assert not rig.weights.is_locked_outside


async def test_a_lock_on_a_file_that_was_replaced_is_none(rig: Rig):
    assert await rig.weights.lock() is not None
    assert rig.weights.is_locked_outside
    model = rig.engine.sample().model
    assert model is not None
    os.utime(model, (1, 1))
    assert not rig.weights.is_locked_outside


async def test_a_pass_under_way_ends_when_the_guard_lets_go(rig: Rig):
    begun, ended = asyncio.Event(), asyncio.Event()

    async def send(*_: Any) -> dict[str, Any] | None:
        begun.set()
        try:
            await asyncio.sleep(LIMIT_S)
        finally:
            ended.set()
        return {}

    async def abort(*_: Any) -> None:
        return None

    rig.engine.engine.send, rig.engine.engine.abort = send, abort
    await rig.watch.read()
    async with asyncio.timeout(LIMIT_S / 2):
        looking = asyncio.create_task(rig.service._look())
        await begun.wait()
        rig.use.last_pass_s = time.monotonic()
        rig.host.of_system = SystemMemory(swapped_out_bytes=1024 * MIB, pressure=Pressure.WARN)
        await rig.watch.read()
        await looking
    assert ended.is_set()
    assert rig.watch.guard.hold is not HoldLevel.ALL
    assert rig.service._last is not None
    assert rig.service._last["steps"] == ["touch"]


async def test_a_look_that_is_asked_for_during_another_one_comes_after_it(rig: Rig):
    async def send(*_: Any) -> dict[str, Any] | None:
        rig.service.wake(Trigger.KNOCK)
        return {}

    rig.engine.engine.send = send
    await rig.service._look()
    status = await rig.service.status()
    assert status.next_look_in_s is None or status.next_look_in_s < 1
    assert rig.service._schedule._trigger is Trigger.KNOCK


@pytest.mark.parametrize(("pressure", "times"), [(Pressure.NORMAL, 0), (Pressure.UNKNOWN, 0), (Pressure.WARN, 1)])
async def test_emberds_own_memory_is_recalled_while_there_is_pressure(rig: Rig, pressure: Pressure, times: int):
    rig.host.of_system = SystemMemory(swapped_out_bytes=0, pressure=pressure)
    await rig.watch.read()
    if rig.watch._recalling is not None:
        await rig.watch._recalling
    assert rig.host.recalled == times


# --- what the engine tells of replays -----------------------------------------------------------------------------

HIT, MISS = PromptCounts(500, 1, 1), PromptCounts(0, 501, 1)


def tale(name: str, tokens: int) -> Turn:
    return Turn("/completion", {"prompt": name}, "", PromptCounts(0, tokens, 0))


def missed(rig: Rig) -> list[dict[str, Any]]:
    return [call.kwargs for call in rig.log.calls if call.kwargs.get("event") == "replay_missed"]


async def test_a_replay_that_found_nothing_ends_the_pass_is_said_once_and_never_sent_again(rig: Rig):
    rig.engine.engine.name = "llama-server"
    prompts = rig.hears(tale("a", 500), counts=[MISS])
    assert (await rig.service.warm())["steps"] == ["touch"]
    for _ in range(3):
        assert (await rig.service.warm())["steps"] == ["touch"]
    assert prompts == ["a"]
    assert [(each["kind"], each["processed_tokens"], each["is_barred"]) for each in missed(rig)] == [
        ("llama", 501, True)
    ]
    status = await rig.service.status()
    assert status.reuse.last_replay.processed == 501
    assert (status.reuse.misses, status.reuse.barred) == (1, ("llama",))
    assert status.cost.processed_tokens == 501


async def test_a_new_engine_may_be_sent_what_another_one_did_not_keep(rig: Rig):
    rig.engine.engine.name = "llama-server"
    prompts = rig.hears(tale("a", 500), counts=[MISS])
    await rig.service.warm()
    rig.engine.engine_key = "2:b"
    assert (await rig.service.warm())["steps"] == ["touch", "replay"]
    assert prompts == ["a", "a"]


async def test_the_latest_conversation_is_sent_again_when_another_one_may_have_pushed_it_out(rig: Rig):
    rig.room, rig.engine.engine.name = CacheRoom(4, 4096), "llama-server"
    prompts = rig.hears(tale("a", 500), tale("b", 500), tale("c", 500), counts=[HIT, HIT, MISS, HIT])
    assert (await rig.service.warm())["steps"] == ["touch"]
    assert prompts == ["c", "a", "b", "c"]
    prompts.clear()
    assert (await rig.service.warm())["steps"] == ["touch", "replay"]
    assert prompts == ["c", "a", "c"], "b is not there any more"
    assert len(missed(rig)) == 1


async def test_conversations_that_do_not_fit_together_are_not_replayed_together(rig: Rig):
    rig.room, rig.engine.engine.name = CacheRoom(4, 4096), "llama-server"
    prompts = rig.hears(tale("a", 3400), tale("b", 3400), tale("c", 1100))
    await rig.service.warm()
    assert prompts == ["c"]


async def test_a_new_engine_gets_the_latest_conversation_only(rig: Rig):
    rig.room, rig.engine.engine.name = CacheRoom(4, 4096), "llama-server"
    prompts = rig.hears(tale("a", 500), tale("b", 500))
    rig.engine.engine_key = "2:b"
    await rig.service.warm()
    await rig.service.warm()
    assert prompts == ["b", "b"], "a is not in the new engine's cache"


async def test_the_latest_that_another_one_has_pushed_out_has_missed_nothing(rig: Rig):
    rig.room, rig.engine.engine.name = CacheRoom(4, 4096), "llama-server"
    cut = replace(tale("b", 500), was_cut=True)
    prompts = rig.hears(tale("a", 500), cut, counts=[MISS, MISS, MISS, HIT])
    await rig.service.warm()
    assert prompts == ["b", "a", "b"]
    assert [each["is_latest"] for each in missed(rig)] == [False]
    assert (await rig.service.warm())["steps"] == ["touch", "replay"]


async def test_an_engine_that_loads_again_in_place_has_lost_its_cache_and_missed_nothing(rig: Rig):
    rig.engine.engine.name = "llama-server"
    rig.hears(tale("a", 500), counts=[MISS, HIT])
    rig.engine.since_s = time.monotonic()
    for _ in range(2):
        assert (await rig.service.warm())["steps"] == ["touch", "replay"]
    assert not missed(rig)
    rig.engine.engine_key = "2:b"
    rig.hears(tale("b", 500), counts=[MISS])
    assert (await rig.service.warm())["steps"] == ["touch"], "nothing has loaded since that turn"


async def test_that_turns_of_a_kind_are_replayed_no_more_is_said_once(rig: Rig):
    rig.engine.engine.name = "llama-server"
    rig.hears(tale("a", 500), counts=[MISS])
    for _ in range(3):
        await rig.service.warm()
    told = [call.kwargs for call in rig.log.calls if call.kwargs.get("event") == "replays_barred"]
    assert [each["kinds"] for each in told] == [["llama"]]


async def test_what_the_engines_log_tells_counts_where_its_replies_tell_nothing(rig: Rig):
    rig.hears(TURN)

    async def send(*_: Any) -> Mapping[str, Any]:
        rig.engine.in_log = MISS
        return {}

    rig.engine.engine.send = send
    await rig.service.warm()
    assert missed(rig)[0]["processed_tokens"] == MISS.processed


async def test_users_who_twice_did_not_find_what_was_kept_end_the_replays(rig: Rig):
    rig.engine.engine.name = "llama-server"

    async def next_turn(number: int) -> list[str]:
        turn = Turn("/completion", {"prompt": "Once" + " more" * number}, "", PromptCounts(0, 500, 0))
        rig.hears(turn, counts=[HIT] * 2)
        steps: list[str] = (await rig.service.warm())["steps"]
        return steps

    steps = [await next_turn(number) for number in range(3)]
    assert steps == [["touch", "replay"], ["touch", "replay"], ["touch"]]
    assert (await rig.service.status()).reuse.lost_turns == 2


async def test_passes_that_take_too_much_of_a_processor_for_nothing_are_made_less_often(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    used_s = iter(range(0, 10_000, 20))
    monkeypatch.setattr(Warming, "cpu_s", lambda _: next(used_s))
    rig.service._schedule._trigger = Trigger.KNOCK
    await rig.service._look()
    rig.use.last_pass_s = time.monotonic() - 3600
    for _ in range(2):
        rig.service._schedule._trigger = Trigger.KNOCK
        await rig.service._look()
    told = [call.kwargs for call in rig.log.calls if call.kwargs.get("event") == "keepwarm_over_budget"]
    assert len(told) == 1
    assert 590 < told[0]["wait_s"] <= 600
    assert (await rig.service.status()).over_budget_for_s > 590
    rig.service._schedule._trigger = Trigger.EVICTING
    await rig.service._look()
    assert rig.service._last is not None
    assert rig.service._last["reason"] == "losing", "what was taken is brought back all the same"


async def test_what_a_storm_cost_does_not_put_off_what_comes_after_it(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(touching, "PAUSE_S", 0.001)
    used_s = itertools.count()
    monkeypatch.setattr(rig.weights, "cpu_s", lambda: next(used_s))
    async with asyncio.timeout(LIMIT_S):
        await rig.touching.run()
    told = rig.dwelt()
    assert told is not None
    assert told["cpu_s"] > 20
    assert rig.spending.wait_s == 0
    much_s = itertools.count(0, 50)
    monkeypatch.setattr(Warming, "cpu_s", lambda _: next(much_s))
    rig.host.of_engine = EngineMemory(swapped_bytes=50 * MIB, footprint_bytes=100 * MIB)
    assert (await rig.service.warm())["had_lost"]
    assert rig.spending.wait_s == 0, "it brought back what had been taken"


async def test_after_critical_pressure_a_storm_is_not_touched_against_for_a_while(rig: Rig):
    await rig.watch.read()
    rig.watch.last_critical_s = time.monotonic()
    rig.host.of_system = SystemMemory(swapped_out_bytes=32 * MIB, pressure=Pressure.WARN)
    await rig.watch.read()
    await rig.service._after_reading()
    assert not rig.touching.is_on


@pytest.mark.parametrize("is_swapping", [True, False])
async def test_after_a_long_time_it_rests_unless_the_computer_writes_to_swap(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, *, is_swapping: bool
):
    monkeypatch.setattr(touching, "PAUSE_S", 0.001)
    monkeypatch.setattr(touching, "_LONGEST_S", 0)
    if is_swapping:
        await rig.watch.read()
        rig.host.of_system = SystemMemory(swapped_out_bytes=32 * MIB)
        await rig.watch.read()
        monkeypatch.setattr(PressureWatch, "is_tight", False)
    async with asyncio.timeout(LIMIT_S):
        await rig.touching.run()
    told = rig.dwelt()
    assert told is not None
    assert (told["rounds"] >= 25) is is_swapping
    rig.touching.begin()
    assert rig.touching.is_on is is_swapping
    rig.touching.stop()


async def test_touching_that_cannot_be_done_rests_before_the_next_try(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(touching, "PAUSE_S", 0.001)

    async def refuse(*_: Any) -> Touched:
        raise ToucherRefused("unreadable", "no")

    monkeypatch.setattr(rig.toucher, "touch", refuse)
    async with asyncio.timeout(LIMIT_S):
        await rig.touching.run()
    rig.touching.begin()
    assert not rig.touching.is_on


async def test_a_storm_makes_it_touch_at_once_and_all_the_time_before_anything_is_missing(rig: Rig):
    await rig.watch.read()
    rig.host.of_system = SystemMemory(swapped_out_bytes=1024 * MIB, pressure=Pressure.NORMAL)
    await rig.watch.read()
    await rig.service._after_reading()
    assert rig.touching.is_on
    assert (await rig.service._snapshot()).is_storming
    rig.touching.stop()


@pytest.mark.parametrize("obstacle", ["lock", "pause", "machine-first"])
async def test_in_a_storm_nothing_is_touched_where_it_would_be_wrong(rig: Rig, obstacle: str):
    if obstacle == "lock":
        rig.engine.lock_state = LockState.HELD
    elif obstacle == "pause":
        await rig.service.pause(60)
    else:
        rig.settings = replace(rig.settings, priority="machine-first")
    await rig.watch.read()
    rig.host.of_system = SystemMemory(swapped_out_bytes=32 * MIB, pressure=Pressure.NORMAL)
    await rig.watch.read()
    await rig.service._after_reading()
    assert not rig.touching.is_on


async def test_beside_a_lock_that_stays_the_cache_is_kept_and_it_is_said_that_nothing_helps(rig: Rig):
    rig.engine.lock_state = LockState.HELD
    rig.hears(TURN)
    await rig.watch.read()
    rig.host.of_system = SystemMemory(swapped_out_bytes=1024 * MIB, pressure=Pressure.NORMAL)
    await rig.watch.read()
    assert (await rig.service.warm())["steps"] == ["replay"]
    status = await rig.service.status()
    assert (status.hold, status.is_helpless) == ("all", True)
    told = [call.kwargs for call in rig.log.calls if call.kwargs.get("event") == "thrash_guard"]
    assert [(each["hold"], each["is_helpless"]) for each in told] == [("all", True)]


async def test_each_replay_has_a_key_of_its_own_and_is_aborted_by_that(rig: Rig):
    """KoboldCPP keeps the key of an abort that came too late, and does nothing for the next request with it."""
    rig.hears(Turn("/api/v1/generate", {"prompt": "Once"}, " upon a time"))
    sent, aborted, is_sending = list[str](), list[str](), asyncio.Event()

    async def send(_: int, request: Replay, __: float) -> Mapping[str, Any]:
        sent.append(request.body["genkey"])
        is_sending.set()
        if len(sent) > 1:
            await asyncio.Event().wait()
        return {}

    async def abort(_: int, key: str, __: float) -> bool:
        aborted.append(key)
        return True

    rig.engine.engine.send, rig.engine.engine.abort = send, abort
    assert "replay" in (await rig.service.warm())["steps"]
    is_sending.clear()
    async with asyncio.timeout(LIMIT_S):
        warming = asyncio.create_task(rig.service.warm())
        await is_sending.wait()
        async with rig.places.taken(places.Patience(LIMIT_S), is_work=True, goes_first=False):
            await warming
    assert len(set(sent)) == 2
    assert aborted == [sent[1]]
