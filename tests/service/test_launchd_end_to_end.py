"""emberd installed, crashed, stopped, upgraded and removed through the launchctl stand-in, with real processes."""

from __future__ import annotations

import json
import os
import plistlib
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
import pytest

from daemon_process import WAIT_S, is_alive
from launchctl_process import FOLDER

sys.path.insert(0, str(FOLDER))

import schema

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Service

    MakeService = Callable[..., Service]

LABEL = "io.github.emberd"


class Load:
    """Clients that ask without a pause; what goes wrong is kept."""

    def __init__(self, service: Service, clients: int = 3) -> None:
        self.service = service
        self.failures: list[str] = []
        self.done = 0
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self.stop.is_set():
            try:
                self.service.complete(length=6)
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
            with self.lock:
                self.done += 1

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(WAIT_S)

    def more(self, count: int = 6) -> None:
        """Wait until so many more requests are through."""
        wanted = self.done + count
        self.service.launchctl.wait(lambda: self.done >= wanted, "more replies")


def refuses(service: Service) -> bool:
    """Return True if nobody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", service.port)) != 0


def test_an_installed_emberd_answers_and_a_second_install_changes_nothing(make_service: MakeService):
    service = make_service()
    said = service.do("install")
    assert str(service.list) in said
    assert service.complete()
    job = plistlib.loads(service.list.read_bytes())
    assert schema.errors(job) == []
    assert schema.warnings(job) == []
    assert service.list.stat().st_mode & 0o777 == 0o644
    assert service.launchctl.value(LABEL, "spawn type") == "interactive (4)"
    pid = service.pid
    assert service.status()["pid"] == pid
    answer = json.loads(service.do("install", "--json"))
    assert answer["changed"] is False
    assert service.pid == pid
    assert service.launchctl.value(LABEL, "runs") == "1"


def test_a_killed_emberd_comes_back_adopts_its_engine_and_refuses_nobody(make_service: MakeService):
    service = make_service()
    service.do("install")
    engine, pid = service.engine_pid(), service.pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    assert service.complete()
    assert service.status()["pid"] == service.pid != pid
    assert service.engine_pid() == engine
    assert service.launchctl.value(LABEL, "last terminating signal") == "Killed: 9"
    assert service.launchctl.value(LABEL, "immediate reason") == "inefficient"


def test_a_stopped_emberd_stays_down_until_it_is_started(make_service: MakeService):
    service = make_service()
    service.do("install")
    engine, pid = service.engine_pid(), service.pid
    assert pid
    service.do("stop")
    assert not is_alive(pid)
    assert not is_alive(engine)
    assert refuses(service)
    assert service.launchctl.call("print", f"{service.launchctl.gui}/{LABEL}").returncode == 113
    service.do("start")
    assert service.complete()
    assert service.pid != pid


def test_a_clean_end_is_not_undone_but_by_a_connection(make_service: MakeService):
    service = make_service()
    service.do("install")
    service.engine_pid()
    service.launchctl.do("kill", "TERM", f"{service.launchctl.gui}/{LABEL}")
    service.launchctl.wait(lambda: service.launchctl.value(LABEL, "last exit code") == "0", "the end")
    assert service.launchctl.value(LABEL, "state") == "not running"
    assert service.launchctl.value(LABEL, "runs") == "1"
    assert service.complete()
    assert service.launchctl.value(LABEL, "runs") == "2"


def test_on_demand_the_first_connection_starts_emberd(make_service: MakeService):
    service = make_service()
    service.do("install", "--on-demand")
    assert service.pid is None
    assert service.complete()
    engine, pid = service.engine_pid(), service.pid
    service.do("stop", "--until-asked")
    assert not is_alive(engine)
    service.launchctl.wait(lambda: service.launchctl.value(LABEL, "state") == "not running", "the end")
    assert service.complete()
    assert service.pid not in {None, pid}


def test_an_on_demand_emberd_that_crashes_is_back_with_the_next_connection(make_service: MakeService):
    service = make_service()
    service.do("install", "--on-demand")
    service.complete()
    engine, pid = service.engine_pid(), service.pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    service.launchctl.wait(lambda: service.launchctl.value(LABEL, "state") == "not running", "the end")
    assert service.complete()
    assert service.engine_pid() == engine


def test_an_upgrade_under_load_refuses_nobody_and_keeps_the_engine(make_service: MakeService):
    service = make_service()
    service.do("install")
    engine, pid = service.engine_pid(), service.pid
    with Load(service) as load:
        load.more()
        answer = json.loads(service.do("upgrade", "--json"))
        load.more()
    assert load.failures == []
    assert answer["daemon"]["engine_pid"] == engine
    assert service.engine_pid() == engine
    assert service.pid == pid
    assert service.launchctl.value(LABEL, "runs") == "1"


def test_kickstart_k_kills_emberd_and_the_engine_is_adopted(make_service: MakeService):
    service = make_service()
    service.do("install")
    engine = service.engine_pid()
    service.launchctl.do("kickstart", "-k", f"{service.launchctl.gui}/{LABEL}")
    assert service.complete()
    assert service.engine_pid() == engine


def test_an_uninstalled_emberd_leaves_no_process_no_file_and_no_socket(make_service: MakeService):
    service = make_service()
    service.do("install")
    service.engine_pid()
    assert service.leftovers()
    service.do("uninstall")
    assert [each for each in service.leftovers() if "launchd.py" not in " ".join(each.cmdline())] == []
    assert refuses(service)
    assert list(service.list.parent.iterdir()) == []
    assert not service.state.control.exists()
    assert not service.state.record.exists()
    assert service.launchctl.call("print", f"{service.launchctl.gui}/{LABEL}").returncode == 113
    assert '"uninstalled": false' in service.do("uninstall", "--json")


# --- installs that did not come to their end ---------------------------------------------------------------------


def test_an_install_that_was_killed_before_it_loaded_is_completed_by_the_next(make_service: MakeService):
    service = make_service()
    service.launchctl.switch(bootstrap_fails=1000)
    child = subprocess.Popen(
        service.command("install", "--manager", "launchd"),
        env={**service.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    service.launchctl.wait(lambda: "bootstrap: 5" in service.launchctl.log(), "a bootstrap that fails")
    child.kill()
    child.wait(WAIT_S)
    assert service.list.exists()
    assert service.pid is None
    service.launchctl.switch(bootstrap_fails=0)
    service.do("install")
    assert service.complete()


def test_bootstraps_that_fail_for_no_reason_are_tried_again(make_service: MakeService):
    service = make_service()
    service.launchctl.switch(bootstrap_fails=2)
    service.do("install")
    assert service.complete()


@pytest.mark.parametrize("code", [5, 37])
def test_an_install_during_a_bootout_waits_for_its_end(make_service: MakeService, code: int):
    service = make_service()
    service.launchctl.switch(loaded_code=code, bootout_lingers_s=1.0, bootout_code=36)
    service.do("install")
    pid = service.pid
    service.launchctl.call("bootout", f"{service.launchctl.gui}/{LABEL}")
    service.do("install")
    assert service.complete()
    assert service.pid not in {None, pid}


def test_a_list_that_others_could_write_or_that_is_cut_off_is_mended(make_service: MakeService):
    service = make_service()
    service.do("install")
    content = service.list.read_bytes()
    service.list.chmod(0o666)
    service.do("install")
    assert service.list.stat().st_mode & 0o777 == 0o644
    service.list.write_bytes(content[:200])
    service.do("install")
    assert plistlib.loads(service.list.read_bytes())["Label"] == LABEL
    assert service.complete()


def test_a_changed_port_moves_the_socket(make_service: MakeService):
    service = make_service()
    service.do("install")
    engine = service.engine_pid()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        other = probe.getsockname()[1]
    service.write_settings(endpoint__port=other)
    service.do("install")
    assert refuses(service)
    service.port = other
    assert service.complete()
    assert not is_alive(engine) or service.engine_pid() == engine


# --- without a GUI, disabled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [112, 125])
def test_without_a_gui_login_emberd_lives_in_the_users_domain(make_service: MakeService, code: int):
    service = make_service()
    service.launchctl.switch(gui_absent=code)
    service.do("install")
    assert service.complete()
    assert service.launchctl.pid(LABEL, service.launchctl.user)
    service.do("stop")
    assert refuses(service)
    service.do("start")
    assert service.complete()
    service.do("uninstall")
    assert service.launchctl.call("print", f"{service.launchctl.user}/{LABEL}").returncode == 113


@pytest.mark.parametrize("code", [5, 119])
def test_a_service_that_was_disabled_is_enabled_by_install(make_service: MakeService, code: int):
    service = make_service()
    service.launchctl.switch(disabled_code=code)
    service.launchctl.do("disable", f"{service.launchctl.gui}/{LABEL}")
    service.do("install")
    assert service.complete()
    assert f'"{LABEL}" => enabled' in service.launchctl.do("print-disabled", service.launchctl.gui)


def test_a_login_brings_emberd_back(make_service: MakeService):
    service = make_service()
    service.do("install")
    service.engine_pid()
    service.launchctl.do("standin-end")
    assert refuses(service)
    service.launchctl.do("standin-login", service.list.parent)
    assert service.complete()


# --- emberd that hangs -------------------------------------------------------------------------------------------


def test_an_emberd_that_hangs_is_killed_after_the_exit_timeout_and_nothing_is_left(make_service: MakeService):
    service = make_service(speed=60.0)
    service.do("install")
    engine, pid = service.engine_pid(), service.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    began_s = time.monotonic()
    service.do("uninstall")
    assert time.monotonic() - began_s > 0.5
    assert not is_alive(pid)
    assert "sending SIGKILL" in service.launchctl.log()
    assert not is_alive(engine)


def test_a_stop_lets_a_running_request_end(make_service: MakeService):
    service = make_service()
    service.do("install")
    service.engine_pid()
    replies: list[str] = []
    asking = threading.Thread(target=lambda: replies.append(service.complete(length=100)))
    asking.start()
    service.wait_for(lambda status: status["requests_in_flight"] > 0, "the request")
    service.do("stop")
    asking.join(WAIT_S)
    assert len(replies) == 1
    assert replies[0]


def test_a_stop_ends_the_engine_that_a_killed_emberd_has_left(make_service: MakeService):
    service = make_service()
    service.do("install", "--on-demand")
    service.complete()
    engine, pid = service.engine_pid(), service.pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    service.launchctl.wait(lambda: service.launchctl.value(LABEL, "state") == "not running", "the end")
    assert is_alive(engine)
    answer = json.loads(service.do("stop", "--json"))
    assert answer["ended_engine"] == engine
    assert not is_alive(engine)
    assert not service.state.record.exists()


def test_an_upgrade_that_brings_another_python_keeps_the_engine_too(make_service: MakeService):
    service = make_service()
    environment = service.folder / "older"
    here = Path(service.command()[0])
    environment.symlink_to(here.parent.parent)
    words = [str(environment / "bin" / here.name), *service.command("install", "--manager", "launchd")[1:]]
    subprocess.run(words, env={**service.environment}, check=True, capture_output=True, timeout=WAIT_S)
    engine = service.engine_pid()
    answer = json.loads(service.do("upgrade", "--json"))
    assert answer["stale"] == ["ProgramArguments"]
    assert answer["daemon"]["engine_pid"] == engine
    assert service.complete(), "a restart of the engine would have begun by now"
    assert service.engine_pid() == engine
    assert len(service.events("engine_started")) == 1
