"""The supervisor with its real engine process, where a test must hold one of its hands."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from emberd.core import lifecycle
from emberd.core.errors import NotReady
from emberd.core.lifecycle import State
from emberd.core.memory import SystemMemory
from emberd.core.settings import EngineSettings, LifecycleSettings, ModelSettings, Settings
from emberd.engine.choose import choose_engine
from emberd.host import ThisHost
from emberd.host.paths import StatePaths, prepare
from emberd.services import engine_run
from emberd.services import supervisor as supervisor_module
from emberd.services.engine_run import Paths
from emberd.services.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

LIMIT_S = 30


class WiredHost(ThisHost):
    """This computer, but for the figure of locked memory, which a test dictates."""

    def __init__(self) -> None:
        super().__init__()
        self.wired: int | None = None

    def system_memory(self) -> SystemMemory:
        return SystemMemory(wired_bytes=self.wired)


class Rig:
    """A supervisor on the stand-in, in this process."""

    def __init__(self, folder: Path, standin: Path, model: Path) -> None:
        self.host = WiredHost()
        self.paths = StatePaths(folder / "state")
        prepare(self.paths)
        self.settings = Settings(
            model=ModelSettings(path=str(model)),
            engine=EngineSettings(path=str(standin)),
            lifecycle=LifecycleSettings(stop_timeout_s=2, backoff_initial_s=0.05, backoff_max_s=0.1, crash_limit=4),
        )
        self.events: list[dict[str, Any]] = []
        log = structlog.wrap_logger(None, processors=[self._keep], wrapper_class=structlog.BoundLogger)
        self.supervisor = Supervisor(
            self.settings,
            choose_engine(self.settings, self.host, self.paths),
            self.host,
            Paths(self.paths.record, self.paths.output, self.paths.scratch),
            log,
        )
        self.owner: asyncio.Task[None] | None = None

    def _keep(self, _: object, __: str, event: Any) -> Any:
        self.events.append(dict(event))
        raise structlog.DropEvent

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    def begin(self) -> None:
        self.owner = asyncio.create_task(self.supervisor.run())
        self.supervisor.post(lifecycle.Start())

    async def reach(self, *states: State) -> None:
        async with asyncio.timeout(LIMIT_S):
            await self.supervisor.gate.wait_for(*states)

    async def pid(self) -> int:
        await self.reach(State.READY)
        pid: int = self.supervisor.status().engine.pid
        return pid

    async def close(self) -> None:
        if self.owner is not None:
            async with asyncio.timeout(LIMIT_S):
                await self.supervisor.shut_down()
            self.owner.cancel()
            await asyncio.gather(self.owner, return_exceptions=True)


@pytest.fixture
async def rig(tmp_path: Path, standin: Path, model: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path, standin, model)
    yield made
    await made.close()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which another program listens and says nothing."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def choose_first(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Let the supervisor choose `port` for its first engine, as if it had been free a moment ago."""
    rest, ports = supervisor_module.free_port, iter([port])
    monkeypatch.setattr(supervisor_module, "free_port", lambda: next(ports, None) or rest())


async def test_an_engine_that_cannot_bind_is_stopped_and_gets_another_port(
    rig: Rig, taken_port: int, monkeypatch: pytest.MonkeyPatch
):
    """It would spin for ever without serving (KoboldCPP up to 1.104)."""
    choose_first(monkeypatch, taken_port)
    rig.begin()
    await rig.pid()
    status = rig.supervisor.status()
    assert status.engine.port != taken_port
    assert status.starts == 2
    assert any("cannot serve" in event.get("reason", "") for event in rig.events)


async def test_a_stranger_that_answers_on_the_port_is_not_taken_for_the_engine(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    """Another KoboldCPP with the same model: only the owner of the listening socket tells them apart."""

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # http.server's name
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"result": "koboldcpp/small-model"}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        choose_first(monkeypatch, server.server_address[1])
        rig.begin()
        await rig.pid()
        assert rig.supervisor.status().engine.port != server.server_address[1]
        server.shutdown()
        thread.join()


async def test_the_next_start_waits_until_locked_memory_has_fallen(rig: Rig):
    gib = 1024**3
    rig.host.wired = 2 * gib
    rig.begin()
    await rig.reach(State.LOADING)
    rig.host.wired = 10 * gib
    pid = await rig.pid()
    os.kill(pid, signal.SIGKILL)
    await rig.reach(State.STARTING)
    await asyncio.sleep(0.3)
    assert rig.supervisor.state is State.STARTING
    assert rig.supervisor.status().starts == 1
    rig.host.wired = 2 * gib
    assert await rig.pid() != pid
    assert "wired_memory_released" in rig.names()


async def test_memory_that_never_comes_back_is_said_and_does_not_block_for_ever(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_run, "_RELEASE_LIMIT_S", 0.2)
    rig.host.wired = 0
    rig.begin()
    await rig.reach(State.LOADING)
    rig.host.wired = 10 * 1024**3
    os.kill(await rig.pid(), signal.SIGKILL)
    await rig.reach(State.STARTING)
    await rig.pid()
    assert "wired_memory_not_released" in rig.names()


async def test_a_refused_connection_makes_the_supervisor_look_again(rig: Rig):
    rig.begin()
    pid = await rig.pid()
    rig.supervisor.gate.doubt(rig.supervisor.status().engine.port)
    await rig.reach(State.LOADING)
    assert await rig.pid() == pid
    rig.supervisor.gate.doubt(1)
    await asyncio.sleep(0)
    assert rig.supervisor.state is State.READY


async def test_a_load_that_takes_too_long_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STANDIN_LOAD_SECONDS", "60")
    settings = dataclasses.replace(
        rig.settings, lifecycle=dataclasses.replace(rig.settings.lifecycle, load_timeout_s=1, crash_limit=2)
    )
    rig.supervisor._settings = settings
    rig.begin()
    await rig.reach(State.FAILED)
    assert "not ready 1 s after its start" in rig.supervisor.status().reason


async def test_every_waiter_is_woken_when_the_engine_is_stopped(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STANDIN_LOAD_SECONDS", "60")
    rig.begin()
    await rig.reach(State.LOADING)
    waiters = [asyncio.create_task(rig.supervisor.gate.ensure_ready(LIMIT_S)) for _ in range(5)]
    await asyncio.sleep(0)
    rig.supervisor.post(lifecycle.Stop())
    async with asyncio.timeout(LIMIT_S):
        refused = await asyncio.gather(*waiters, return_exceptions=True)
    assert all(isinstance(error, NotReady) for error in refused)
    assert rig.supervisor.status().requests_held == 0


async def test_a_stop_during_the_start_leaves_no_process(rig: Rig):
    rig.begin()
    await rig.reach(State.STARTING)
    rig.supervisor.post(lifecycle.Stop())
    await rig.reach(State.STOPPED)
    assert not rig.paths.record.exists()
    assert rig.supervisor.status().engine is None


async def test_a_state_file_that_cannot_be_written_does_not_take_the_engine_away(rig: Rig):
    rig.paths.record.mkdir()  # a rename onto a folder fails, as on a broken disk
    rig.begin()
    await rig.pid()
    assert "state_not_saved" in rig.names()
    rig.paths.record.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the descriptors")
async def test_engines_that_die_leave_no_descriptor_behind(rig: Rig):
    def watches() -> int:
        found = 0
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found += "pidfd" in str(descriptor.readlink())
        return found

    rig.begin()
    pid = await rig.pid()
    before = watches()
    for _ in range(2):
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(LIMIT_S):
            while (engine := rig.supervisor.status().engine) is None or engine.pid == pid:
                await rig.supervisor.gate.wait_for_change()
        pid = await rig.pid()
    assert watches() == before


async def test_a_bug_in_a_piece_of_work_does_not_strand_the_state_machine(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    calls = iter([ZeroDivisionError("a bug")])
    real = rig.supervisor.gate.engine.plan

    async def plan(port: int, *, will_lock: bool) -> Any:
        for error in calls:
            raise error
        return await real(port, will_lock=will_lock)

    monkeypatch.setattr(rig.supervisor.gate.engine, "plan", plan)
    rig.begin()
    await rig.pid()
    assert "supervisor_bug" in rig.names()


async def test_a_reading_that_fails_costs_neither_the_start_nor_the_engine(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> None:
        raise AttributeError("no such call on this system")

    for name in ("system_memory", "lock_limits", "engine_memory"):
        monkeypatch.setattr(rig.host, name, fails)
    rig.begin()
    await rig.pid()
    assert rig.supervisor.status().starts == 1
    assert rig.names().count("lock_meter_bug") == 2
    assert "--usemlock" in rig.supervisor.status().engine.command


async def test_an_engine_with_a_request_is_not_stopped_for_other_work(rig: Rig):
    rig.begin()
    pid = await rig.pid()
    gate = rig.supervisor.gate
    with gate.admitted():
        assert not await gate.cool()
        await rig.supervisor.prove_alive()
        assert gate.state is State.READY
    assert await gate.cool()
    assert gate.wake()
    assert await rig.pid() != pid


async def test_a_restart_that_comes_while_emberd_ends_starts_no_engine(rig: Rig):
    """It would be READY and refuse every request, and the end would be waited for without end."""
    rig.begin()
    await rig.pid()
    ending = asyncio.create_task(rig.supervisor.shut_down())
    await rig.reach(State.DRAINING, State.STOPPING)
    rig.supervisor.post(lifecycle.Restart("asked in the last moment"))
    async with asyncio.timeout(LIMIT_S):
        await ending
    assert rig.supervisor.state is State.STOPPED
    assert rig.supervisor.status().starts == 1
