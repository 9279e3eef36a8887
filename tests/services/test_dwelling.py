"""Touching the weights without a pause while something takes them: it ends by itself, and for who comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from emberd.core.lock import LockState
from emberd.core.settings import Settings
from emberd.core.thrash import Guard, Hold
from emberd.core.types import EngineSample
from emberd.host import ThisHost
from emberd.host.toucher import Toucher
from emberd.services import keepwarm
from emberd.services.accounts import Accounts
from emberd.services.forecaster import Forecaster
from emberd.services.keepwarm import KeepWarm
from emberd.services.knocks import Knocks
from emberd.services.places import Places
from emberd.services.turns import Turns
from page_cache import MIB, write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

LIMIT_S = 20


class ReadyEngine:
    """A supervisor and a gate whose engine is ready and idle."""

    port: int | None = 1
    is_adopted = False
    lock_state = LockState.ABSENT
    will_lock = False
    engine_key = "1:a"
    is_idle = True

    def __init__(self, model: Path) -> None:
        self.engine: Any = type("Engine", (), {"most_connections": 4, "most_at_work": 1})()
        self._model = model

    def sample(self) -> EngineSample:
        return EngineSample("1:a", (os.getpid(),), is_idle=self.is_idle, requests=1, model=self._model)

    def restart_without_lock(self) -> None:
        raise AssertionError("nobody asked for that")

    async def ensure_ready(self, timeout_s: float) -> int:
        assert timeout_s >= 0
        return 1

    @contextlib.contextmanager
    def admitted(self) -> Iterator[Callable[[int], None]]:
        yield lambda _: None

    async def is_alive(self, port: int) -> bool:
        return port == 1

    def doubt(self, port: int) -> None:
        raise AssertionError(port)


class Rig:
    """The service on a real toucher and a real file."""

    def __init__(self, folder: Path) -> None:
        model = write(folder / "model", 4 * MIB)
        engine, host = ReadyEngine(model), ThisHost()
        self.engine = engine
        self.log = structlog.testing.CapturingLogger()
        log: Any = structlog.wrap_logger(self.log, processors=[])
        self.toucher = Toucher(host.paging)
        self.toucher.use([model])
        turns = Turns(lambda: 0)
        self.places = Places(engine, lambda: 4)

        async def nothing() -> None:
            return None

        self.service = KeepWarm(
            host,
            log,
            Settings,
            engine,
            self.toucher,
            turns,
            Knocks(),
            self.places,
            Accounts(folder / "history.db", log),
            Forecaster(host, log, engine.sample, turns, nothing),
        )

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
    monkeypatch.setattr(keepwarm, "_DWELL_PAUSE_S", 0.001)
    async with asyncio.timeout(LIMIT_S):
        await rig.service._dwell()
    told = rig.dwelt()
    assert told is not None
    assert 25 <= told["rounds"] <= 26


@pytest.mark.parametrize("reason", ["hold", "pause", "cool", "engine", "user"])
async def test_it_ends_when_it_may_no_longer(rig: Rig, reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keepwarm, "_DWELL_PAUSE_S", 0.001)
    if reason == "hold":
        rig.service._guard = replace(Guard(), hold=Hold.NO_WARMING)
    elif reason == "engine":
        rig.engine.port = None
    elif reason == "user":
        rig.engine.is_idle = False
    else:
        await rig.service.cool(60) if reason == "cool" else rig.service.pause(60)
    async with asyncio.timeout(LIMIT_S):
        await rig.service._dwell()
    told = rig.dwelt()
    assert told is not None
    assert told["rounds"] == 0
