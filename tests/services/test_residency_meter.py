"""The residency of a running model: from its mapped pages, from the engine's swap, and unknown with a reason."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import structlog

from emberd.core.types import EngineSample
from emberd.host import ThisHost
from emberd.services.observer import Observer
from emberd.services.residency_meter import ResidencyMeter
from page_cache import MIB, evict, on_linux, read, write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from daemon_process import Daemon
    from emberd.core.status import ResidencyStatus

    MakeDaemon = Callable[..., Daemon]

pytestmark = on_linux


class Rig:
    """A meter on an engine that a test describes; this process plays the engine."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.engine = EngineSample(None, (), is_idle=False, requests=0)
        log = structlog.wrap_logger(None, processors=[self._keep], wrapper_class=structlog.BoundLogger)
        host = ThisHost()
        self.meter = ResidencyMeter(host.paging, log, Observer(host, log, lambda: self.engine))

    def _keep(self, _: Any, __: str, event: dict[str, Any]) -> Any:
        self.events.append(event)
        raise structlog.DropEvent

    def run(self, model: Path | None, weights_bytes: int | None = None, *, is_mapped: bool | None = True) -> None:
        self.engine = EngineSample(
            f"{os.getpid()}:{model}", (os.getpid(),), True, 0, model, weights_bytes, is_mapped=is_mapped
        )

    async def status(self) -> ResidencyStatus:
        await self.meter.tick()
        status = await self.meter.status()
        assert status is not None
        return status


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    await made.meter.close()


async def test_without_an_engine_there_is_no_residency(rig: Rig):
    assert await rig.meter.tick() is None
    assert await rig.meter.status() is None


async def test_a_mapped_models_pages_are_told_within_bounds(rig: Rig, tmp_path: Path):
    path = write(tmp_path / "model.gguf", 16 * MIB)
    evict(path)
    read(path, 0, 8 * MIB)
    rig.run(path)
    seen = await rig.status()
    assert seen.source == "mincore"
    assert seen.share == pytest.approx(0.5, abs=0.02)
    assert seen.at_least < 0.5 < seen.at_most
    assert seen.total_bytes == 16 * MIB
    assert seen.age_s < 5


async def test_all_parts_of_a_split_model_count(rig: Rig, tmp_path: Path):
    paths = [write(tmp_path / f"model-0000{number}-of-00002.gguf", 4 * MIB) for number in (1, 2)]
    for path in paths:
        evict(path)
    read(paths[1], 0, 4 * MIB)
    rig.run(paths[0])
    seen = await rig.status()
    assert (seen.share, seen.total_bytes) == (pytest.approx(0.5, abs=0.02), 8 * MIB)


async def test_an_engine_that_copied_its_weights_is_told_from_its_swap(rig: Rig, tmp_path: Path):
    path = write(tmp_path / "model.gguf", MIB)
    evict(path)
    rig.run(path, MIB, is_mapped=False)
    seen = await rig.status()
    assert (seen.source, seen.share, seen.total_bytes) == ("process", 1, MIB)
    assert "copy of the weights" in seen.message


async def test_a_model_that_is_gone_is_unknown_with_the_reason_and_found_again(rig: Rig, tmp_path: Path):
    path = tmp_path / "model.gguf"
    rig.run(path)
    for _ in range(2):
        seen = await rig.status()
        assert (seen.share, seen.unknown) == (None, "unreadable")
        assert "No such file" in seen.message
    assert [event["event"] for event in rig.events] == ["residency_unknown"], "told once"
    write(path, MIB)
    assert (await rig.status()).share == 1


async def test_a_killed_toucher_costs_nothing(rig: Rig, tmp_path: Path):
    rig.run(write(tmp_path / "model.gguf", MIB))
    assert (await rig.status()).share == 1
    toucher = psutil.Process(rig.meter.toucher.pid)
    toucher.send_signal(signal.SIGKILL)
    async with asyncio.timeout(10):
        while psutil.pid_exists(toucher.pid):  # until this process has heard of it
            await asyncio.sleep(0.01)
    assert (await rig.status()).share == 1


async def test_a_toucher_that_dies_at_every_reading_is_unknown_by_name(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rig.run(write(tmp_path / "model.gguf", MIB))
    dying = tmp_path / "dying.py"
    dying.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGBUS)\n")
    monkeypatch.setattr("emberd.host.toucher._PROCESS", dying)
    seen = await rig.status()
    assert seen.unknown == "toucher_lost"
    assert "SIGBUS" in seen.message
    assert "toucher_lost" in [event["event"] for event in rig.events]
    monkeypatch.undo()
    assert (await rig.status()).share == 1


async def test_an_engine_without_a_known_model_is_unknown(rig: Rig):
    rig.run(None)
    assert (await rig.status()).unknown == "no_model"


def _is_toucher(process: psutil.Process) -> bool:
    try:
        return any("toucher_process" in word for word in process.cmdline())
    except psutil.Error:
        return False


def test_the_status_shows_a_running_models_residency(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    # The first reading may be of the time when it was loading.
    seen = daemon.wait_for(lambda status: status["residency"]["share"] == 1, "a resident model")["residency"]
    assert seen["source"] == "mincore"
    said = daemon.verb("status").stdout
    assert "resident" in said
    touchers = [child for child in psutil.Process(daemon.child.pid).children() if _is_toucher(child)]
    assert len(touchers) == 1
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0
    assert not touchers[0].is_running(), "it ends with its daemon"


def test_without_mmap_residency_is_told_from_the_engines_memory(make_daemon: MakeDaemon):
    daemon = make_daemon({"engine.extra_args": ["--nommap"], "engine.lock": "never"})
    daemon.start()
    status = daemon.wait_for(lambda status: (status["residency"] or {}).get("source") == "process", "residency")
    assert status["residency"]["share"] == 1
    daemon.kill()
    daemon.start()
    status = daemon.wait_ready()
    assert status["engine"]["adopted"]
    assert status["residency"]["source"] == "process", "it was written down"


def test_the_memory_of_an_engine_that_still_loads_is_its_own(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_LOAD_SECONDS="3")
    daemon.start()
    status = daemon.wait_for(lambda status: status["state"] == "LOADING" and bool(status["engine"]), "a start")
    first = status["engine"]["pid"]
    daemon.wait_ready()
    os.kill(first, signal.SIGKILL)
    status = daemon.wait_for(
        lambda status: status["state"] == "LOADING" and status["engine"]["pid"] != first, "the next start"
    )
    assert status["memory"]["engine"]["resident_bytes"], "not that of the process that is gone"
