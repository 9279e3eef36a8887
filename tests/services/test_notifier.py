"""What a service manager hears of a real emberd, and what it does when it hears nothing."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from service_manager_standin import ServiceManagerStandin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

WATCHDOG_S = 2.0
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
STUCK_OWNER = """
import asyncio, signal
from emberd.services.supervisor import Supervisor
plain = Supervisor._apply
def apply(self, event):
    plain(self, event)
    if self.state.value == "READY":
        raise asyncio.CancelledError
Supervisor._apply = apply
async def run(self, plain=Supervisor.run):
    try:
        await plain(self)
    except asyncio.CancelledError:
        await asyncio.Event().wait()
Supervisor.run = run
"""
"""A bug that the tests plant: the owner task stands still when the engine is ready; the event loop goes on."""
STUCK_LOOP = """
import time
from emberd.services.supervisor import Supervisor
plain = Supervisor._apply
def apply(self, event):
    plain(self, event)
    if self.state.value == "READY":
        time.sleep(3600)
Supervisor._apply = apply
"""
"""Another: the event loop stands still."""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManagerStandin]:
    with ServiceManagerStandin(tmp_path / "notify", WATCHDOG_S) as standin:
        yield standin


def start(daemon: Daemon, manager: ServiceManagerStandin, bug: str = "") -> None:
    daemon.environment.update(manager.environment)
    plain = daemon.command

    def command(*words: str) -> list[str]:
        first, option, code, *rest = plain(*words)
        return [first, option, bug + code, *rest]

    daemon.command = command  # type: ignore[method-assign]
    daemon.start()
    assert daemon.child is not None
    manager.main_pid = daemon.child.pid


def test_ready_is_said_when_clients_are_served_and_long_before_the_model_is_loaded(
    make_daemon: MakeDaemon, manager: ServiceManagerStandin
):
    daemon = make_daemon(STANDIN_LOAD_SECONDS="3")
    start(daemon, manager)
    manager.wait_for(lambda lines: "READY=1" in lines)
    assert httpx.get(f"{daemon.url}/emberd/healthz", trust_env=False).status_code == 200
    assert httpx.get(f"{daemon.url}/emberd/readyz", trust_env=False).status_code == 503
    lines = manager.wait_for(lambda lines: any(line.startswith("STATUS=engine READY") for line in lines))
    states = [line.split()[1].strip(":,") for line in lines if line.startswith("STATUS=")]
    assert states[-3:] == ["STARTING", "LOADING", "READY"]
    assert lines.count("READY=1") == 1


def test_the_watchdog_is_fed_at_half_of_its_limit_while_emberd_works(
    make_daemon: MakeDaemon, manager: ServiceManagerStandin
):
    daemon = make_daemon()
    start(daemon, manager)
    manager.wait_for(lambda lines: lines.count("WATCHDOG=1") >= 5)
    times_s = [at_s for at_s, lines in manager.said if "WATCHDOG=1" in lines]
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    assert max(gaps_s) < WATCHDOG_S
    assert sum(gaps_s) / len(gaps_s) > WATCHDOG_S * 0.4
    assert manager.killed_s is None
    assert daemon.wait_ready()


@pytest.mark.parametrize("bug", [STUCK_OWNER, STUCK_LOOP], ids=["owner task", "event loop"])
def test_an_emberd_that_stands_still_is_killed_and_the_next_one_adopts_the_engine(
    make_daemon: MakeDaemon, manager: ServiceManagerStandin, bug: str
):
    daemon = make_daemon()
    start(daemon, manager, bug)
    assert daemon.child is not None
    assert daemon.end() == -signal.SIGABRT
    assert manager.killed_s is not None
    manager.main_pid = None
    del daemon.command  # the one without the bug
    daemon.environment.pop("NOTIFY_SOCKET")
    daemon.environment.pop("WATCHDOG_USEC")
    daemon.start()
    assert daemon.wait_ready()["engine"]["adopted"]


def test_a_replaced_emberd_goes_on_under_the_same_pid(make_daemon: MakeDaemon, manager: ServiceManagerStandin):
    manager.watchdog_s = 30.0  # on a busy computer the next emberd was killed at 2 s, while it started
    daemon = make_daemon()
    start(daemon, manager)
    pid = daemon.wait_ready()["pid"]
    assert daemon.verb("restart", "--daemon").returncode == 0
    lines = manager.wait_for(lambda lines: "WATCHDOG=1" in lines[lines.index("RELOADING=1") :])
    begun = lines.index("RELOADING=1")
    assert lines[begun + 1].startswith("MONOTONIC_USEC=")
    assert "READY=1" in lines[begun:]
    assert daemon.wait_ready()["pid"] == pid
    assert manager.killed_s is None


def test_a_stop_is_said_with_the_time_that_it_may_take(make_daemon: MakeDaemon, manager: ServiceManagerStandin):
    daemon = make_daemon({"lifecycle.drain_timeout_s": 200.0})
    start(daemon, manager)
    daemon.wait_ready()
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0
    lines = manager.lines()
    extended = next(line for line in lines if line.startswith("EXTEND_TIMEOUT_USEC="))
    assert lines.index("STOPPING=1") < lines.index(extended)
    assert int(extended.partition("=")[2]) >= 205_000_000


def test_a_waiting_emberd_is_ready_fed_and_says_why(make_daemon: MakeDaemon, manager: ServiceManagerStandin):
    daemon = make_daemon()
    daemon.state.directory.write_text("a file where the folder should be")
    start(daemon, manager)
    lines = manager.wait_for(lambda lines: lines.count("WATCHDOG=1") >= 3)
    assert "READY=1" in lines
    assert any(line.startswith("STATUS=waiting: ") and "state directory" in line for line in lines)
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0
    assert "STOPPING=1" in manager.lines()


@on_linux
def test_the_engine_does_not_inherit_the_way_to_the_manager(
    make_daemon: MakeDaemon, manager: ServiceManagerStandin
):
    daemon = make_daemon()
    start(daemon, manager)
    engine = daemon.wait_ready()["engine"]["pid"]
    for process in [psutil.Process(engine), *psutil.Process(engine).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & process.environ().keys()
