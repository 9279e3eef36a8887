"""install, start, stop, upgrade and uninstall with a real user manager of systemd."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from daemon_process import is_alive
from service_home import SystemdHome, can_run_systemd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemon_process import Daemon

pytestmark = pytest.mark.skipif(not can_run_systemd(), reason="no user manager of systemd can run here")
UNITS = ("emberd.service", "emberd.socket")


@pytest.fixture
def home(tmp_path: Path, make_daemon: Callable[..., Daemon]) -> Iterator[SystemdHome]:
    made = SystemdHome(tmp_path / "home", make_daemon)
    if not made.is_up:
        pytest.skip(f"systemd does not start: {made.log.read_text()}")
    yield made
    made.close()


def test_print_shows_both_units_and_changes_nothing(home: SystemdHome):
    said = home.run("install", "--print")
    assert said.returncode == 0
    assert "ListenStream=127.0.0.1:" in said.stdout
    assert "ExecStart=" in said.stdout
    assert not home.unit("emberd.service").exists()


def test_install_makes_emberd_run_and_a_second_one_changes_nothing(home: SystemdHome):
    assert home.done("install")["changed"] is True
    status = home.daemon.wait_ready()
    assert home.show("emberd.service", "MainPID") == str(status["pid"])
    assert [home.show(unit, "UnitFileState") for unit in UNITS] == ["enabled", "enabled"]
    assert home.show("emberd.service", "LimitCORE") == "0"
    written = home.unit("emberd.service").stat().st_mtime_ns
    assert home.done("install")["changed"] is False
    assert home.unit("emberd.service").stat().st_mtime_ns == written
    assert home.daemon.status()["pid"] == status["pid"]


def test_a_crash_is_followed_by_a_new_emberd_that_takes_the_engine_over(home: SystemdHome):
    home.done("install")
    before = home.daemon.wait_ready()
    os.kill(before["pid"], signal.SIGKILL)
    after = home.daemon.wait_for(lambda status: status["pid"] != before["pid"] and status["state"] == "READY")
    assert (after["engine"]["pid"], after["engine"]["adopted"]) == (before["engine"]["pid"], True)


def test_upgrade_replaces_emberd_in_the_same_process_and_touches_no_engine(home: SystemdHome):
    home.done("install")
    before = home.daemon.wait_ready()
    unit = home.unit("emberd.service")
    unit.write_text(unit.read_text().replace("RestartSec=1", "RestartSec=7"))
    done = home.done("upgrade")
    assert (done["written"], done["stale"]) == (True, ["Service.RestartSec"])
    assert (done["daemon"]["pid"], done["daemon"]["engine_pid"]) == (before["pid"], before["engine"]["pid"])
    assert home.show("emberd.service", "NeedDaemonReload") == "no"
    assert home.show("emberd.service", "RestartUSec") == "1s"


def test_stop_stops_the_socket_too_and_start_brings_both_back(home: SystemdHome):
    home.done("install")
    status = home.daemon.wait_ready()
    assert home.done("stop")["label"] == "io.github.emberd"
    assert not is_alive(status["engine"]["pid"])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", home.daemon.port)), "nobody listens"
    assert home.run("stop").returncode == 3
    assert home.done("start")["started"] is True
    assert home.daemon.wait_ready()["pid"] != status["pid"]
    assert home.done("start")["started"] is False


def test_on_demand_the_first_connection_starts_it(home: SystemdHome):
    assert home.done("install", "--on-demand")["daemon"] is None
    assert [home.show(unit, "UnitFileState") for unit in UNITS] == ["static", "enabled"]
    assert home.show("emberd.service", "ActiveState") == "inactive"
    assert home.daemon.complete().strip()
    assert home.done("install")["changed"] is False
    assert home.done("install", "--at-login")["changed"] is True
    assert home.show("emberd.service", "UnitFileState") == "enabled"
    assert home.done("install", "--on-demand")["changed"] is True
    assert [home.show(unit, "UnitFileState") for unit in UNITS] == ["static", "enabled"]


def test_a_new_port_is_listened_on_after_the_next_install(home: SystemdHome):
    home.done("install")
    home.daemon.wait_ready()
    other = home.another().port
    home.daemon.write_settings(endpoint__port=other)
    assert home.done("install")["changed"] is True
    assert home.daemon.wait_ready()["endpoint"] == f"http://127.0.0.1:{other}"


@pytest.mark.parametrize("interruption", ["not read", "not enabled", "leftover", "half", "wrong mode"])
def test_an_interrupted_install_is_mended_by_the_next(home: SystemdHome, interruption: str):
    home.done("install")
    home.daemon.wait_ready()
    unit = home.unit("emberd.service")
    match interruption:
        case "not read":
            home.done("uninstall")
            unit.write_text(home.done("install", "--print")["files"][str(unit)])
        case "not enabled":
            home.systemctl("disable", "--now", *UNITS)
        case "leftover":
            unit.with_name(f".{unit.name}.12345.tmp").touch()
        case "half":
            home.unit("emberd.socket").unlink()
        case "wrong mode":
            unit.chmod(0o666)
    assert home.done("install")["changed"] is True
    home.daemon.wait_ready()
    assert [home.show(each, "UnitFileState") for each in UNITS] == ["enabled", "enabled"]
    assert home.show("emberd.socket", "ActiveState") == "active"
    assert not list(unit.parent.glob(".*"))
    assert home.done("install")["changed"] is False


def test_uninstall_leaves_no_unit(home: SystemdHome):
    home.done("install")
    engine = home.daemon.wait_ready()["engine"]["pid"]
    assert home.done("uninstall")["uninstalled"] is True
    assert not is_alive(engine)
    assert [path for path in home.unit("x").parent.rglob("*") if not path.is_dir()] == []
    assert home.show("emberd.service", "LoadState") == "not-found"
    assert home.done("uninstall")["uninstalled"] is False


def test_two_instances_live_side_by_side(home: SystemdHome):
    small = home.another()
    home.done("install")
    assert home.run("install", daemon=small).returncode == 78
    home.done("install", "--label", "small", daemon=small)
    assert home.daemon.wait_ready()["endpoint"] != small.wait_ready()["endpoint"]
    assert home.done("uninstall", daemon=small)["label"] == "io.github.emberd.small"
    assert home.daemon.status()["state"] == "READY"


def test_a_service_that_ends_at_once_is_reported(home: SystemdHome):
    home.daemon.write_settings(model__path="/nowhere/model.gguf")
    said = home.run("install")
    assert said.returncode == 71
    assert "it ended" in said.stderr or "does not run" in said.stderr
    assert "journalctl --user -u emberd" in said.stderr


def test_without_a_user_manager_the_remedy_is_named(home: SystemdHome, tmp_path: Path):
    said = home.run("install", XDG_RUNTIME_DIR=str(tmp_path / "nowhere"))
    assert (said.returncode, "enable-linger" in said.stderr) == (71, True)
    assert not home.unit("emberd.service").exists()
