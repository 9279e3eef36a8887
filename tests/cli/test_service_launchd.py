"""install, start, stop, upgrade and uninstall through the stand-in of launchctl, with real daemons and sockets."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from daemon_process import is_alive
from service_home import LaunchdHome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemon_process import Daemon

LABEL = "io.github.emberd"
LIMIT_S = 40.0


@pytest.fixture
def home(tmp_path: Path, make_daemon: Callable[..., Daemon]) -> Iterator[LaunchdHome]:
    made = LaunchdHome(tmp_path / "home", make_daemon)
    yield made
    made.close()


def until(is_so: Callable[[], Any], what: str) -> Any:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        if found := is_so():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come")


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_print_shows_the_property_list_and_changes_nothing(home: LaunchdHome):
    said = home.run("install", "--print")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("<?xml")
    assert str(home.daemon.config) in said.stdout
    assert home.done("install", "--print")["files"] == {str(home.plist()): said.stdout}
    assert not home.plist().exists()
    assert not list(home.state.iterdir()), "launchctl was run"


def test_install_makes_emberd_run_and_a_second_one_changes_nothing(home: LaunchdHome):
    first = home.done("install")
    assert (first["changed"], first["label"]) == (True, LABEL)
    status = home.daemon.wait_ready()
    assert status["endpoint"] == home.daemon.url
    facts = home.plist().stat()
    assert stat.S_IMODE(facts.st_mode) == 0o644
    assert facts.st_uid == os.geteuid()
    assert stat.S_IMODE((home.folder / "Library/Logs/emberd").stat().st_mode) == 0o700
    again = home.run("install")
    assert again.returncode == 0
    assert "nothing has changed" in again.stdout
    assert "engine READY" in again.stdout
    assert home.plist().stat().st_mtime_ns == facts.st_mtime_ns
    assert home.daemon.status()["pid"] == status["pid"]


def test_the_daemon_has_the_lists_environment_limits_and_socket(home: LaunchdHome):
    home.done("install", XDG_STATE_HOME="/somewhere")
    pid = home.daemon.wait_ready()["pid"]
    variables = psutil.Process(pid).environ()
    assert variables["EMBERD_SERVICE"] == LABEL
    assert variables["XDG_STATE_HOME"] == "/somewhere"
    assert variables["PATH"].startswith("/opt/homebrew/bin:")
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max core file size        0                    0" in limits
    assert "Max open files            4096                 10240" in limits
    os.kill(pid, signal.SIGSTOP)
    try:
        assert accepts(home.daemon.port), "launchd's socket takes connections while emberd does not"
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_crash_is_followed_by_a_new_emberd_that_takes_the_engine_over(home: LaunchdHome):
    home.switch(speed=10)
    home.done("install")
    before = home.daemon.wait_ready()
    os.kill(before["pid"], signal.SIGKILL)
    after = home.daemon.wait_for(lambda status: status["pid"] != before["pid"] and status["state"] == "READY")
    assert (after["engine"]["pid"], after["engine"]["adopted"]) == (before["engine"]["pid"], True)


@pytest.mark.parametrize(
    "interruption", ["written", "booted out", "leftover", "wrong mode", "wrong content", "junk"]
)
def test_an_interrupted_or_damaged_install_is_mended_by_the_next(home: LaunchdHome, interruption: str):
    home.done("install")
    home.daemon.wait_ready()
    leftover = home.plist().with_name(f".{home.plist().name}.12345.tmp")
    match interruption:
        case "written" | "booted out":
            home.launchctl("bootout", home.target())  # does not wait: the next install meets the old job's end
            if interruption == "written":
                until(lambda: home.launchctl("print", home.target()).returncode, "the end of the job")
        case "leftover":
            leftover.write_text("<?xml half a")
        case "wrong mode":
            home.plist().chmod(0o666)
        case "wrong content":
            home.plist().write_text(home.plist().read_text().replace("Interactive", "Background"))
        case "junk":
            home.plist().write_bytes(b"<?xml half a")
    assert home.done("install")["changed"] is True
    assert home.daemon.wait_ready()["state"] == "READY"
    assert home.is_loaded()
    assert home.job()["ProcessType"] == "Interactive"
    assert stat.S_IMODE(home.plist().stat().st_mode) == 0o644
    assert not leftover.exists()
    assert home.done("install")["changed"] is False


def test_on_demand_the_first_connection_starts_it_and_a_second_install_keeps_that(home: LaunchdHome):
    home.daemon.write_settings()
    assert home.done("install", "--on-demand")["daemon"] is None
    assert "pid =" not in home.launchctl("print", home.target()).stdout
    assert home.daemon.complete().strip(), "the request waited for emberd and its engine"
    assert home.done("install")["changed"] is False
    assert home.done("install", "--at-login")["changed"] is True
    assert home.job()["KeepAlive"] == {"SuccessfulExit": False}


def test_stop_unloads_what_a_connection_would_start_again_and_start_brings_it_back(home: LaunchdHome):
    home.done("install")
    status = home.daemon.wait_ready()
    stopped = home.done("stop")
    assert (stopped["pid"], stopped["label"]) == (status["pid"], LABEL)
    assert not is_alive(status["engine"]["pid"])
    assert not accepts(home.daemon.port)
    assert home.plist().exists(), "the next login starts it"
    assert home.run("stop").returncode == 3
    home.launchctl("disable", home.target())  # as the switch in Login Items does
    started = home.done("start")
    assert started["started"] is True
    assert home.daemon.wait_ready()["pid"] == started["pid"]
    assert home.done("start")["started"] is False


def test_stop_until_asked_leaves_the_socket_which_starts_it_again(home: LaunchdHome):
    home.done("install")
    status = home.daemon.wait_ready()
    assert home.done("stop", "--until-asked")["label"] is None
    assert not is_alive(status["pid"])
    until(lambda: "state = not running" in home.launchctl("print", home.target()).stdout, "a job at rest")
    assert home.daemon.complete().strip()


def test_uninstall_leaves_nothing_but_settings_and_state(home: LaunchdHome):
    home.done("install")
    engine = home.daemon.wait_ready()["engine"]["pid"]
    leftover = home.plist().with_name(f".{home.plist().name}.12345.tmp")
    leftover.touch()
    gone = home.done("uninstall")
    assert gone["uninstalled"] is True
    assert str(home.daemon.config) in gone["kept"]
    assert not home.is_loaded()
    assert not is_alive(engine)
    assert not list(home.plist().parent.iterdir())
    assert home.done("uninstall")["uninstalled"] is False


def test_uninstall_unloads_a_job_whose_list_was_deleted_by_hand(home: LaunchdHome):
    home.done("install")
    home.daemon.wait_ready()
    home.plist().unlink()
    assert home.done("uninstall")["uninstalled"] is True
    assert not home.is_loaded()


def test_upgrade_writes_a_stale_list_and_replaces_emberd_without_touching_the_engine(home: LaunchdHome):
    home.done("install")
    before = home.daemon.wait_ready()
    home.plist().write_text(home.plist().read_text().replace("<integer>50</integer>", "<integer>20</integer>"))
    done = home.done("upgrade")
    assert done["written"] is True
    assert done["stale"] == ["ExitTimeOut"]
    after = home.daemon.wait_ready()
    assert after["pid"] == before["pid"] == done["daemon"]["pid"], "launchd sees the same process"
    assert after["uptime_s"] < before["uptime_s"] + 5
    assert (after["engine"]["pid"], done["daemon"]["engine_adopted"]) == (before["engine"]["pid"], True)
    assert home.done("upgrade")["written"] is False


def test_upgrade_from_another_environment_takes_its_python(home: LaunchdHome, tmp_path: Path):
    environment = tmp_path / "environment"
    here = Path(home.daemon.command()[0])
    environment.symlink_to(here.parent.parent)
    python = str(environment / "bin" / here.name)
    # Named by the settings, it stays a word of the command line although emberd's own Python becomes the same.
    home.daemon.write_settings(engine__python=str(here))
    assert home.run("install", python=python).returncode == 0
    before = home.daemon.wait_ready()
    assert psutil.Process(before["pid"]).cmdline()[0] == python
    done = home.done("upgrade")
    assert done["stale"] == ["ProgramArguments"]
    assert psutil.Process(before["pid"]).cmdline()[0] == str(here)
    assert home.daemon.wait_ready()["engine"]["pid"] == before["engine"]["pid"]


def test_upgrade_of_what_is_neither_installed_nor_running_says_so(home: LaunchdHome):
    said = home.run("upgrade")
    assert (said.returncode, "emberd install" in said.stderr) == (3, True)


@pytest.mark.parametrize("code", [112, 125])
def test_without_a_login_at_the_screen_the_users_domain_is_taken(home: LaunchdHome, code: int):
    home.switch(gui_absent=code)
    home.done("install")
    home.daemon.wait_ready()
    assert home.is_loaded(domain="user")
    assert home.done("install")["changed"] is False
    assert home.done("stop")["label"] == LABEL
    assert not home.is_loaded(domain="user")


def test_a_job_of_a_session_by_ssh_is_found_from_the_screen(home: LaunchdHome):
    home.switch(gui_absent=125)
    home.done("install")
    home.daemon.wait_ready()
    home.switch(gui_absent=0)
    assert home.done("install")["changed"] is False
    assert home.done("uninstall")["uninstalled"] is True
    assert not home.is_loaded(domain="user")


@pytest.mark.parametrize(
    "switches",
    [{"bootstrap_fails": 2}, {"loaded_code": 37, "bootout_lingers_s": 1.5}, {"bootout_code": 36}],
    ids=["fails", "lingers", "36"],
)
def test_launchds_passing_refusals_are_waited_out(home: LaunchdHome, switches: dict[str, Any]):
    home.done("install")
    home.daemon.wait_ready()
    home.switch(**switches)
    home.daemon.write_settings(lifecycle__drain_timeout_s=1.0)
    said = home.run("install")
    assert said.returncode == 0, said.stderr
    assert home.job()["ExitTimeOut"] == 21
    assert home.daemon.wait_ready()


@pytest.mark.parametrize("code", [5, 119])
def test_a_disabled_job_is_enabled_by_install(home: LaunchdHome, code: int):
    home.switch(disabled_code=code)
    home.launchctl("disable", home.target())
    home.done("install")
    assert home.daemon.wait_ready()


def test_an_emberd_started_by_hand_is_not_pushed_aside(home: LaunchdHome):
    home.daemon.start()
    pid = home.daemon.wait_ready()["pid"]
    said = home.run("install")
    assert (said.returncode, str(pid) in said.stderr) == (4, True)
    assert not home.plist().exists()
    assert home.done("stop")["pid"] == pid


def test_a_port_that_another_program_has_is_named_before_anything_is_written(home: LaunchdHome):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", home.daemon.port))
        taken.listen()
        said = home.run("install")
    assert (said.returncode, str(home.daemon.port) in said.stderr) == (69, True)
    assert not home.plist().exists()


def test_two_instances_live_side_by_side_and_are_told_apart_by_their_settings(home: LaunchdHome):
    small = home.another()
    home.done("install")
    refused = home.run("install", daemon=small)
    assert (refused.returncode, "--label" in refused.stderr) == (78, True)
    assert home.done("install", "--label", "small", daemon=small)["label"] == f"{LABEL}.small"
    first, second = home.daemon.wait_ready(), small.wait_ready()
    assert first["endpoint"] != second["endpoint"]
    assert home.done("stop", daemon=small)["label"] == f"{LABEL}.small"
    assert home.daemon.status()["pid"] == first["pid"]
    assert home.done("uninstall", daemon=small)["label"] == f"{LABEL}.small"
    assert home.plist().exists()


def test_a_service_that_ends_at_once_is_reported_with_what_it_said(home: LaunchdHome):
    home.daemon.write_settings(model__path="/nowhere/model.gguf")
    said = home.run("install")
    assert said.returncode == 71
    assert "/nowhere/model.gguf" in said.stderr
    assert "Traceback" not in said.stderr
    assert home.run("uninstall").returncode == 0


def test_what_only_this_shell_knows_is_pointed_out(home: LaunchdHome):
    home.daemon.write_settings(engine__path="koboldcpp")
    (home.folder / "koboldcpp").write_text("#!/bin/sh\n")
    (home.folder / "koboldcpp").chmod(0o755)
    path = f"{home.folder}:{home.environment['PATH']}"
    home.daemon.write_settings(engine__path="koboldcpp", warmth__mode="off")
    said = home.done("install", "--on-demand", PATH=path, EMBERD_API_KEY="secret-of-the-shell")
    assert any(f"set engine.path to {home.folder}/koboldcpp" in notice for notice in said["notices"])
    assert any("EMBERD_API_KEY" in notice for notice in said["notices"])
    assert "secret-of-the-shell" not in home.plist().read_text()


def test_without_settings_or_a_service_manager_the_remedy_is_named(home: LaunchdHome, tmp_path: Path):
    home.environment["PATH"] = str(tmp_path)
    said = home.run("install")
    assert (said.returncode, "launchctl was not found" in said.stderr) == (71, True)
    home.daemon.config.unlink()
    assert home.run("install").returncode == 78


def test_sudo_is_refused(home: LaunchdHome):
    if os.geteuid():
        pytest.skip("needs root")
    said = home.run("install", SUDO_USER="somebody")
    assert (said.returncode, "without sudo" in said.stderr) == (1, True)
