"""Keeping the computer awake on mains: with stand-ins for caffeinate and systemd-inhibit, and real processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import structlog

import caffeinate_standin
from emberd.core.lifecycle import State
from emberd.core.memory import Power, PowerSource
from emberd.core.settings import PowerSettings, Settings
from emberd.host import ThisHost
from emberd.host.darwin import DarwinHost
from emberd.host.linux import LinuxHost
from emberd.services import sleep_blocker
from emberd.services.sleep_blocker import SleepBlocker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

LIMIT_S = 20.0
MAINS, BATTERY = Power(PowerSource.MAINS), Power(PowerSource.BATTERY)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in reads /proc")


class DictatedHost(ThisHost):
    """A computer whose power is dictated, with the other system's command lines if need be."""

    seen = MAINS
    blockers: Sequence[tuple[str, ...]] = ()

    def power(self) -> Power:
        return self.seen

    def sleep_blockers(self) -> Sequence[tuple[str, ...]]:
        return self.blockers or super().sleep_blockers()


class DictatedSupervisor:
    """Tells the state that a test sets."""

    def __init__(self) -> None:
        self.state = State.READY
        self._changed = asyncio.Event()

    async def wait_for_change(self) -> None:
        await self._changed.wait()

    def change(self, state: State) -> None:
        self.state = state
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


@pytest.fixture
def assertions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is held, with both tools on PATH."""
    caffeinate_standin.install(tmp_path / "bin", "caffeinate", "systemd-inhibit")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    folder = tmp_path / "assertions"
    folder.mkdir()
    monkeypatch.setenv("EMBERD_TEST_ASSERTIONS", str(folder))
    monkeypatch.setattr(sleep_blocker, "LOOK_S", 0.1)
    return folder


async def until(is_so: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.02)


class Running:
    """A sleep blocker at work."""

    def __init__(self, host: DictatedHost, *, is_wanted: bool = True) -> None:
        self.settings = replace(Settings(), power=PowerSettings(prevent_sleep=is_wanted))
        self.supervisor = DictatedSupervisor()
        self.blocker = SleepBlocker(host, structlog.get_logger(), lambda: self.settings, self.supervisor)  # type: ignore[arg-type]
        self._task = asyncio.create_task(self.blocker.run())

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def follow(host: DictatedHost, folder: Path, expected: list[str]) -> None:
    """See it held on mains, let go on battery, in low power mode, without a ready engine, and at the end."""
    running = Running(host)
    for away, back in (
        (lambda: setattr(host, "seen", BATTERY), lambda: setattr(host, "seen", MAINS)),
        (lambda: setattr(host, "seen", replace(MAINS, is_low_power=True)), lambda: setattr(host, "seen", MAINS)),
        (lambda: running.supervisor.change(State.FAILED), lambda: running.supervisor.change(State.READY)),
    ):
        await until(lambda: running.blocker.is_held, "it is not held")
        assert caffeinate_standin.held(folder) == expected
        away()
        await until(lambda: not caffeinate_standin.held(folder), "it is still held")
        back()
    await until(lambda: caffeinate_standin.held(folder) == expected, "it is not held again")
    await running.end()
    assert not caffeinate_standin.held(folder)
    assert not running.blocker.is_held


def test_caffeinate_is_bound_to_emberds_pid_and_ends_when_the_reason_does(assertions: Path):
    host = DictatedHost()
    host.blockers = DarwinHost.sleep_blockers(host)  # type: ignore[arg-type]  # needs nothing of macOS
    asyncio.run(follow(host, assertions, [f"caffeinate -i -w {os.getpid()}"]))


def test_systemd_inhibit_holds_while_a_pipe_of_emberds_is_open(assertions: Path):
    host = DictatedHost()
    host.blockers = LinuxHost.sleep_blockers(host)
    words = "--what=idle:sleep --who=emberd --why=The model is kept ready --mode=block cat"
    asyncio.run(follow(host, assertions, [f"systemd-inhibit {words}"]))


def test_where_sleep_is_refused_idle_is_prevented(assertions: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EMBERD_TEST_REFUSES", "idle:sleep")
    host = DictatedHost()
    host.blockers = LinuxHost.sleep_blockers(host)

    async def scenario() -> None:
        running = Running(host)
        await until(lambda: bool(caffeinate_standin.held(assertions)), "it is not held")
        await running.end()

    asyncio.run(scenario())


def test_what_is_refused_altogether_is_said_once_and_tried_again_only_after_a_change(
    assertions: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EMBERD_TEST_REFUSES", "idle")
    host = DictatedHost()
    host.blockers = LinuxHost.sleep_blockers(host)

    async def scenario(said: list[dict[str, object]]) -> None:
        running = Running(host)
        await until(lambda: any(each["event"] == "sleep_not_prevented" for each in said), "it is not said")
        await asyncio.sleep(5 * sleep_blocker.LOOK_S)
        assert sum(each["event"] == "sleep_not_prevented" for each in said) == 1
        monkeypatch.delenv("EMBERD_TEST_REFUSES")
        host.seen = BATTERY
        await asyncio.sleep(3 * sleep_blocker.LOOK_S)
        host.seen = MAINS
        await until(lambda: bool(caffeinate_standin.held(assertions)), "it is not held")
        await running.end()

    with structlog.testing.capture_logs() as said:
        asyncio.run(scenario(said))  # type: ignore[arg-type]


def test_nothing_is_started_and_power_is_not_read_unless_it_is_wanted(assertions: Path):
    host = DictatedHost()
    host.power = None  # type: ignore[assignment,method-assign]  # calling it would fail

    async def scenario() -> None:
        running = Running(host, is_wanted=False)
        await asyncio.sleep(5 * sleep_blocker.LOOK_S)
        assert not caffeinate_standin.held(assertions)
        await running.end()

    with structlog.testing.capture_logs() as said:
        asyncio.run(scenario())
    assert not said


def test_a_tool_that_is_killed_is_started_again(assertions: Path):
    host = DictatedHost()
    host.blockers = DarwinHost.sleep_blockers(host)  # type: ignore[arg-type]

    async def scenario() -> None:
        running = Running(host)
        await until(lambda: running.blocker.is_held, "it is not held")
        (mark,) = assertions.iterdir()
        os.kill(int(mark.name), 9)
        mark.unlink()
        await until(lambda: bool(caffeinate_standin.held(assertions)), "it is not held again")
        await running.end()

    asyncio.run(scenario())


def on_mains(daemon: Daemon, folder: Path, assertions: Path) -> None:
    """Give the daemon a computer on mains: an adapter in another /sys."""
    adapter = folder / "sys/class/power_supply/AC"
    adapter.mkdir(parents=True)
    (adapter / "type").write_text("Mains\n")
    (adapter / "online").write_text("1\n")
    plain = daemon.command
    prelude = (
        "import pathlib; from emberd.host.linux import LinuxHost; from emberd.host.linux import read_power; "
        f"LinuxHost.power = lambda _: read_power(pathlib.Path({str(folder / 'sys')!r})); "
        "from emberd.services import sleep_blocker; sleep_blocker.LOOK_S = 0.2; "
    )

    def command(*words: str) -> list[str]:
        first, option, code, *rest = plain(*words)
        return [first, option, prelude + code, *rest]

    daemon.command = command  # type: ignore[method-assign]
    daemon.environment.update({"EMBERD_TEST_ASSERTIONS": str(assertions), "PATH": os.environ["PATH"]})


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_assertion_ends_with_the_daemon_however_that_ends(
    make_daemon: MakeDaemon, tmp_path: Path, assertions: Path, is_killed: bool
):
    daemon = make_daemon({"power.prevent_sleep": True})
    on_mains(daemon, tmp_path, assertions)
    daemon.start()
    daemon.wait_for(lambda status: status.get("prevents_sleep") is True, "sleep is prevented")
    assert len(caffeinate_standin.held(assertions)) == 1
    assert "prevented" in daemon.verb("status").stdout
    if is_killed:
        daemon.kill()
    else:
        assert daemon.verb("stop").returncode == 0
    deadline_s = time.monotonic() + LIMIT_S
    while caffeinate_standin.held(assertions) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not caffeinate_standin.held(assertions)


def test_a_replaced_emberd_holds_it_once(make_daemon: MakeDaemon, tmp_path: Path, assertions: Path):
    daemon = make_daemon({"power.prevent_sleep": True})
    on_mains(daemon, tmp_path, assertions)
    daemon.start()
    daemon.wait_for(lambda status: status.get("prevents_sleep") is True, "sleep is prevented")
    assert daemon.verb("restart", "--daemon").returncode == 0
    daemon.wait_for(lambda status: status.get("prevents_sleep") is True, "sleep is prevented again")
    assert len(caffeinate_standin.held(assertions)) == 1
    daemon.write_settings(power__prevent_sleep=False)
    assert daemon.verb("reload").returncode == 0
    deadline_s = time.monotonic() + 60
    while caffeinate_standin.held(assertions) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not caffeinate_standin.held(assertions)


def test_the_stand_in_ends_when_the_process_that_it_watches_does(tmp_path: Path, assertions: Path):
    watched = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    tool = subprocess.Popen([tmp_path / "bin" / "caffeinate", "-i", "-w", str(watched.pid)])
    try:
        asyncio.run(until(lambda: bool(caffeinate_standin.held(assertions)), "it is not held"))
        watched.kill()
        watched.wait(LIMIT_S)
        assert tool.wait(LIMIT_S) == 0
    finally:
        for process in (watched, tool):
            process.kill()
            process.wait(LIMIT_S)
