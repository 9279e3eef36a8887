"""The whole daemon on the stand-in engine: real processes, real sockets, real signals."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from daemon_process import group_members, is_alive, read_text_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

FOLK_RECIPE = ["--usemlock", "--noblas", "--gpulayers"]


class Background(threading.Thread):
    """A client's call that runs beside the test."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.result: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except Exception as error:  # noqa: BLE001  # handed to the test
            self.error = error

    def get(self) -> Any:
        self.join(40)
        assert not self.is_alive(), "the call did not end"
        if self.error is not None:
            raise self.error
        return self.result


# --- starting -----------------------------------------------------------------------------------------------


def test_a_request_that_comes_while_the_model_loads_is_answered_when_it_has(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_LOAD_SECONDS="1.5")
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "LOADING")
    answer = Background(daemon.complete)
    daemon.wait_for(lambda status: status["requests_held"] == 1)
    assert answer.get()
    assert daemon.status()["state"] == "READY"


def test_a_request_that_waits_too_long_gets_503_with_the_state(make_daemon: MakeDaemon):
    daemon = make_daemon({"endpoint.hold_timeout_s": 0.2}, STANDIN_LOAD_SECONDS="20")
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "LOADING")
    answer = httpx.post(f"{daemon.url}/v1/completions", json={"prompt": "x"}, timeout=20, trust_env=False)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["state"] == "LOADING"
    assert answer.json()["detail"]["msg"]


@pytest.mark.parametrize("version", ["1.76", "1.104"])
def test_the_folk_recipe_works_on_old_and_new_builds(make_daemon: MakeDaemon, version: str):
    daemon = make_daemon({"engine.extra_args": FOLK_RECIPE}, STANDIN_VERSION=version)
    daemon.start()
    engine = daemon.wait_ready()["engine"]
    assert engine["command"].count("--usemlock") == 1
    assert ("--usemmap" in engine["command"]) == (version == "1.104")
    locked_kib = int(read_status(engine["pid"])["VmLck"].split()[0])
    assert locked_kib * 1024 >= 0.9 * Path(daemon.settings["model.path"]).stat().st_size


def read_status(pid: int) -> dict[str, str]:
    with Path(f"/proc/{pid}/status").open() as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def test_the_engine_listens_on_loopback_only_and_its_temp_folder_is_its_own(make_daemon: MakeDaemon):
    daemon = make_daemon({"engine.extra_args": ["--host", "0.0.0.0"]}, STANDIN_FROZEN="1")
    daemon.start()
    status = daemon.wait_ready()
    command = status["engine"]["command"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "public_host" in [notice["code"] for notice in status["notices"]]
    assert [path.name[:4] for path in daemon.state.scratch.iterdir()] == ["_MEI"]
    assert daemon.complete()


def test_a_kcpps_file_is_merged_and_its_conflicts_are_named(make_daemon: MakeDaemon, tmp_path: Path):
    kcpps = tmp_path / "mine.kcpps"
    kcpps.write_text(json.dumps({"port": 5001, "contextsize": 1024, "quiet": False, "host": "0.0.0.0"}))
    daemon = make_daemon({"engine.kcpps": str(kcpps)})
    daemon.start()
    status = daemon.wait_ready()
    assert {"public_host", "kcpps_conflict"} & {notice["code"] for notice in status["notices"]}
    limit = httpx.get(f"{daemon.url}/api/extra/true_max_context_length", trust_env=False).json()["value"]
    assert limit == 1024
    assert daemon.state.kcpps.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("settings", "exit_code", "words"),
    [
        ({"model.path": "/nonexistent/model.gguf"}, 66, "model not found"),
        ({"model.path": "/etc/passwd"}, 66, "not a GGUF"),
        ({"model.path": "/etc"}, 66, "is a folder"),
        ({"engine.path": "/nonexistent/koboldcpp"}, 72, "engine not found"),
        ({"engine.path": "/etc/passwd"}, 72, "not executable"),
        ({"engine.extra_args": ["--usemlok"]}, 78, "--usemlock"),
        ({"engine.extra_args": ["--noblas", "--usecpu"]}, 78, "not allowed with"),
        ({"engine.extra_args": ["--benchmark"]}, 78, "--benchmark"),
        ({"engine.kcpps": "/etc/passwd"}, 78, "is not JSON"),
        ({"endpoint.prot": 1}, 78, "did you mean port"),
    ],
)
def test_a_wrong_setting_is_one_clear_error_with_its_exit_code(
    make_daemon: MakeDaemon, settings: dict[str, Any], exit_code: int, words: str
):
    daemon = make_daemon(settings)
    daemon.start()
    assert daemon.end() == exit_code
    text = daemon.log.read_text()
    assert words in text
    assert "Traceback" not in text
    checked = daemon.verb("config", "check")
    assert (checked.returncode, words in checked.stderr) == (exit_code, True)


def test_an_unreadable_model_is_one_clear_error(make_daemon: MakeDaemon):
    """A folder on the way that may not be entered; for root the nearest thing is a socket in the file's place."""
    daemon = make_daemon()
    sealed = daemon.folder / "sealed.gguf"
    with socket.socket(socket.AF_UNIX) as odd:
        odd.bind(str(sealed))
        daemon.settings["model.path"] = str(sealed)
        daemon.start()
        assert daemon.end() == 66
    assert "cannot read the model" in daemon.log.read_text()


def test_a_taken_endpoint_port_names_its_holder(make_daemon: MakeDaemon):
    daemon = make_daemon()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", daemon.port))
        holder.listen()
        daemon.start()
        assert daemon.end() == 69
    assert f"(pid {os.getpid()})" in daemon.log.read_text()


def test_a_second_emberd_on_the_same_state_is_refused(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    second = daemon.verb("run")
    assert second.returncode == 4
    assert f"pid {daemon.child.pid}" in second.stderr  # type: ignore[union-attr]
    assert daemon.complete()


# --- crashes ------------------------------------------------------------------------------------------------


def test_a_killed_engine_is_replaced_and_the_next_request_is_answered(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    first = daemon.wait_ready()["engine"]["pid"]
    os.kill(first, signal.SIGKILL)
    assert daemon.complete()
    assert daemon.wait_ready(other_than=first)["last_exit"].startswith("SIGKILL: perhaps out of memory")
    assert daemon.events("engine_restarted")


def test_a_request_whose_engine_dies_before_it_answers_is_sent_again(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_TOKEN_MS="300")
    daemon.start()
    first = daemon.wait_ready()["engine"]["pid"]
    answer = Background(lambda: daemon.complete(length=8))
    daemon.wait_for(lambda status: status["requests_in_flight"] == 1)
    os.kill(first, signal.SIGKILL)
    assert answer.get()


def test_a_stream_that_cannot_be_continued_is_seen_as_broken_and_the_next_is_whole(
    make_daemon: MakeDaemon, tmp_path: Path
):
    """KoboldCPP's streams end by closing: a death must not look like a normal end."""
    daemon = make_daemon(STANDIN_CRASH_AFTER_TOKENS="3", STANDIN_ONCE_FILE=str(tmp_path / "once"))
    daemon.start()
    first = daemon.wait_ready()["engine"]["pid"]
    body = {"prompt": "Hello", "max_length": 10, "grammar": "root ::= [a-z ]*"}
    url = f"{daemon.url}/api/extra/generate/stream"
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream("POST", url, json=body, timeout=30, trust_env=False) as broken,
    ):
        broken.read()
    with httpx.stream("POST", url, json=body, timeout=30, trust_env=False) as whole:
        assert b'"finish_reason": "length"' in whole.read()
    assert daemon.status()["engine"]["pid"] != first


def test_a_crash_loop_ends_in_failed_with_the_engines_last_words(make_daemon: MakeDaemon):
    daemon = make_daemon({"lifecycle.crash_limit": 3}, STANDIN_CRASH_AT_START="SIGSEGV")
    daemon.start()
    status = daemon.wait_for(lambda status: status["state"] == "FAILED")
    assert status["starts"] == 3
    assert "SIGSEGV" in status["reason"]
    assert "  | " in status["reason"]
    refused = httpx.get(f"{daemon.url}/api/v1/model", timeout=20, trust_env=False)
    assert (refused.status_code, refused.json()["error"]["state"]) == (503, "FAILED")


def test_a_broken_model_ends_in_failed_and_restart_tries_again(make_daemon: MakeDaemon):
    daemon = make_daemon({"lifecycle.crash_limit": 2}, STANDIN_CRASH_AT_START="3")
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "FAILED")
    tried = daemon.verb("restart")
    assert tried.returncode == 5
    assert "exit code 3" in tried.stderr


def test_a_worker_that_outlives_a_killed_parent_is_ended_before_the_next_start(
    make_daemon: MakeDaemon, tmp_path: Path
):
    daemon = make_daemon({"engine.extra_args": ["--admin", "--admindir", str(tmp_path)]})
    daemon.start()
    parent = daemon.wait_ready()["engine"]["pid"]
    tree = group_members(parent)
    assert len(tree) > 1
    os.kill(parent, signal.SIGKILL)
    daemon.wait_ready(other_than=parent)
    assert not any(is_alive(pid) for pid in tree)
    assert daemon.complete()


def hanging_once(make_daemon: MakeDaemon, tmp_path: Path) -> tuple[Daemon, int]:
    """Return a ready daemon whose engine hangs in its first generation, and the engine's pid."""
    daemon = make_daemon(
        {"lifecycle.hang_after_s": 1, "lifecycle.stop_timeout_s": 1},
        STANDIN_HANG="generation",
        STANDIN_ONCE_FILE=str(tmp_path / "once"),
    )
    daemon.start()
    first = daemon.wait_ready()["engine"]["pid"]
    return daemon, first


def test_a_hung_engine_is_restarted(make_daemon: MakeDaemon, tmp_path: Path):
    daemon, first = hanging_once(make_daemon, tmp_path)
    answer = Background(daemon.complete)
    assert daemon.wait_ready(other_than=first)
    assert answer.get()
    assert any("hung" in event.get("reason", "") for event in daemon.events("engine_state"))


def test_a_page_that_polls_does_not_hide_a_hung_engine(make_daemon: MakeDaemon, tmp_path: Path):
    daemon, first = hanging_once(make_daemon, tmp_path)
    answer, is_over = Background(daemon.complete), threading.Event()

    def poll() -> None:
        while not is_over.wait(0.1):
            httpx.get(f"{daemon.url}/api/extra/perf", trust_env=False, timeout=40)

    page = Background(poll)
    try:
        assert daemon.wait_ready(other_than=first)
        assert answer.get()
    finally:
        is_over.set()
        page.get()


def test_a_long_generation_is_no_hang(make_daemon: MakeDaemon):
    daemon = make_daemon({"lifecycle.hang_after_s": 1}, STANDIN_TOKEN_MS="200")
    daemon.start()
    first = daemon.wait_ready()["engine"]["pid"]
    assert daemon.complete(length=20)
    assert daemon.status()["engine"]["pid"] == first


# --- stopping -----------------------------------------------------------------------------------------------


def test_sigterm_lets_a_running_request_finish_and_leaves_nothing_behind(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_TOKEN_MS="150")
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    answer = Background(lambda: daemon.complete(length=10))
    daemon.wait_for(lambda status: status["requests_in_flight"] == 1)
    daemon.signal(signal.SIGTERM)
    assert len(answer.get()) > 10
    assert daemon.end() == 0
    assert group_members(engine) == []
    assert not daemon.state.control.exists()
    assert not daemon.state.record.exists()


def test_a_second_interrupt_does_not_wait_for_running_requests(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_TOKEN_MS="1000")
    daemon.start()
    daemon.wait_ready()
    Background(lambda: daemon.complete(length=1000))
    daemon.wait_for(lambda status: status["requests_in_flight"] == 1)
    daemon.signal(signal.SIGINT)
    daemon.wait_for(lambda status: status["state"] == "DRAINING")
    daemon.signal(signal.SIGINT)
    assert daemon.end() == 0


def test_an_engine_that_ignores_signals_is_killed_and_that_is_said(make_daemon: MakeDaemon):
    daemon = make_daemon({"lifecycle.stop_timeout_s": 0.5}, STANDIN_IGNORE_SIGTERM="1", STANDIN_IGNORE_SIGINT="1")
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    assert daemon.verb("stop").returncode == 0
    assert daemon.end() == 0
    assert group_members(engine) == []
    assert "can leak it" in daemon.wait_event("engine_killed")["message"]


def test_the_workers_of_admin_mode_end_with_a_stop(make_daemon: MakeDaemon, tmp_path: Path):
    daemon = make_daemon({"engine.extra_args": ["--admin", "--admindir", str(tmp_path)]})
    daemon.start()
    tree = group_members(daemon.wait_ready()["engine"]["pid"])
    assert daemon.verb("stop", "--json").returncode == 0
    assert not any(is_alive(pid) for pid in tree)
    assert not daemon.events("engine_killed")


def test_restart_gives_a_fresh_engine_and_waits_for_it(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    first = daemon.wait_ready()["engine"]["pid"]
    answer = json.loads(daemon.verb("restart", "--json").stdout)
    assert answer["ready"]
    assert answer["pid"] != first
    assert daemon.complete()


def test_a_closed_terminal_ends_emberd_in_order(make_daemon: MakeDaemon):
    """SIGHUP reloads; but when the terminal that emberd was started on has gone, it means the end."""
    daemon = make_daemon()
    daemon.write_settings()
    leader, terminal = os.openpty()
    daemon.child = subprocess.Popen(
        daemon.command("run"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, **daemon.environment},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  # no threads yet
    )
    os.close(terminal)
    reader = Background(lambda: os.read(leader, 100))
    daemon.log.touch()
    engine = daemon.wait_ready()["engine"]["pid"]
    assert reader.get()
    daemon.signal(signal.SIGHUP)  # the terminal is there: a reload
    assert daemon.complete()
    os.close(leader)  # the kernel sends SIGHUP
    assert daemon.end() == 0
    assert group_members(engine) == []


# --- settings while running ---------------------------------------------------------------------------------


def test_sighup_restarts_the_engine_only_if_its_command_line_changes(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    first = daemon.wait_ready()["engine"]["pid"]
    daemon.write_settings(endpoint__hold_timeout_s=77)
    daemon.signal(signal.SIGHUP)
    assert daemon.wait_event("reloaded")["engine_restarts"] is False
    assert daemon.status()["engine"]["pid"] == first
    daemon.write_settings(engine__context_size=512)
    daemon.signal(signal.SIGHUP)
    assert daemon.wait_event("reloaded", 2)["engine_restarts"] is True
    command = daemon.wait_ready(other_than=first)["engine"]["command"]
    assert command[command.index("--contextsize") + 1] == "512"


def test_wrong_settings_on_reload_change_nothing(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    first = daemon.wait_ready()["engine"]["pid"]
    daemon.write_settings(engine__extra_args=["--nosuchflag"])
    refused = daemon.verb("reload")
    assert (refused.returncode, "--nosuchflag" in refused.stderr) == (78, True)
    assert daemon.status()["engine"]["pid"] == first
    assert daemon.complete()


# --- adoption -----------------------------------------------------------------------------------------------


def test_an_engine_that_outlived_emberd_is_adopted_in_the_middle_of_a_generation(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_TOKEN_MS="100")
    daemon.start()
    engine = daemon.wait_ready()["engine"]
    Background(lambda: daemon.complete(length=30))
    daemon.wait_for(lambda status: status["requests_in_flight"] == 1)
    daemon.kill()
    daemon.start()
    status = daemon.wait_ready()
    assert status["engine"]["adopted"]
    assert (status["engine"]["pid"], status["engine"]["port"]) == (engine["pid"], engine["port"])
    assert status["starts"] == 0
    assert daemon.complete()
    os.kill(engine["pid"], signal.SIGKILL)
    replaced = daemon.wait_ready(other_than=engine["pid"])
    assert not replaced["engine"]["adopted"]
    assert "adopted" in replaced["last_exit"]


def test_an_adopted_engine_is_stopped_like_any_other(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    daemon.kill()
    daemon.start()
    daemon.wait_ready()
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0
    assert not is_alive(engine)


def test_an_adopted_engine_is_replaced_if_the_settings_have_changed(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    daemon.kill()
    daemon.settings["engine.context_size"] = 512
    daemon.start()
    assert daemon.wait_ready(other_than=engine)
    assert not is_alive(engine)


def test_wrong_settings_do_not_take_an_adopted_engine_away(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    daemon.kill()
    daemon.settings["engine.extra_args"] = ["--nosuchflag"]
    daemon.start()
    assert "--nosuchflag" in daemon.wait_event("settings_not_usable")["error"]
    assert daemon.wait_ready()["engine"]["pid"] == engine
    assert daemon.complete()


def test_a_stranger_with_the_recorded_pid_is_neither_adopted_nor_touched(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    daemon.kill()
    os.kill(engine, signal.SIGKILL)
    stranger = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    try:
        record = json.loads(daemon.state.record.read_text())
        daemon.state.record.write_text(json.dumps({**record, "pid": stranger.pid}))
        daemon.start()
        assert daemon.wait_ready()["engine"]["pid"] not in {stranger.pid, engine}
        assert "another process" in daemon.wait_event("engine_not_adopted")["reason"]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', '{"format": 1, "pid": "x"}'])
def test_a_state_file_that_cannot_be_understood_is_set_aside(make_daemon: MakeDaemon, content: str):
    daemon = make_daemon()
    daemon.state.directory.mkdir()
    daemon.state.record.write_text(content)
    daemon.start()
    assert daemon.wait_ready()
    assert daemon.state.record.with_suffix(".unreadable").read_text() == content


# --- privacy and robustness ---------------------------------------------------------------------------------


def test_neither_prompts_nor_passwords_stay_in_any_file(make_daemon: MakeDaemon):
    """--quiet is not private: the password is printed at the start, an unparsable body in full."""
    daemon = make_daemon({"engine.extra_args": ["--password", "SECRETWORD"]})
    daemon.start()
    daemon.wait_ready()
    headers = {"authorization": "Bearer SECRETWORD"}
    with httpx.Client(base_url=daemon.url, headers=headers, timeout=20, trust_env=False) as client:
        asked = {"prompt": "SECRETPROMPT", "max_length": 2}
        assert client.post("/api/v1/generate", json=asked).status_code == 200
        assert client.post("/api/v1/generate", content=b'{"prompt": "SECRETBODY').status_code == 500
        assert client.post("/api/v1/generate", json=asked).status_code == 200
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0
    merged = daemon.state.kcpps  # the one place for the password
    assert merged.stat().st_mode & 0o777 == 0o600
    merged.unlink()
    everything = daemon.log.read_text() + read_text_files(daemon.state.directory)
    assert "CtxLimit" in everything
    for secret in ("SECRETWORD", "SECRETPROMPT", "SECRETBODY"):
        assert secret not in everything


def test_silent_clients_do_not_block_the_engine(make_daemon: MakeDaemon):
    """KoboldCPP has 24 threads without time-outs; 40 connections that say nothing, or half, must not reach it."""
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    silent = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(20)]
    for _ in range(20):
        half = socket.create_connection(("127.0.0.1", daemon.port))
        half.sendall(b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        silent.append(half)
    try:
        began_s = time.monotonic()
        assert daemon.complete(timeout_s=10)
        assert time.monotonic() - began_s < 5
    finally:
        for connection in silent:
            connection.close()


def test_as_many_are_let_in_as_the_engine_works_on_at_once_also_after_a_reload(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_VERSION="1.115.1", STANDIN_TOKEN_MS="10")
    daemon.start()
    pid = daemon.wait_ready()["engine"]["pid"]

    def seconds_of_four() -> float:
        began_s = time.monotonic()
        four = [Background(lambda number=number: daemon.complete(f"story {number}", 100)) for number in range(4)]
        assert len({each.get() for each in four}) == 4
        return time.monotonic() - began_s

    assert seconds_of_four() > 4.0
    daemon.write_settings(engine__extra_args=["--parallelrequests", "4"])
    daemon.signal(signal.SIGHUP)
    daemon.wait_ready(other_than=pid)
    assert seconds_of_four() < 3.0


def test_who_leaves_an_engine_that_works_on_several_takes_nobody_along(make_daemon: MakeDaemon):
    daemon = make_daemon(
        {"engine.extra_args": ["--parallelrequests", "2"]}, STANDIN_VERSION="1.115.1", STANDIN_TOKEN_MS="20"
    )
    daemon.start()
    daemon.wait_ready()
    body = {"prompt": "one who leaves", "max_length": 900, "stream": True, "genkey": "K"}
    stays = Background(lambda: daemon.complete("one who stays", 100))
    with (
        httpx.Client(timeout=30, trust_env=False) as leaver,
        leaver.stream("POST", f"{daemon.url}/api/extra/generate/stream", json=body) as reply,
    ):
        next(reply.iter_text())
    began_s = time.monotonic()
    daemon.complete("one who comes", 4)
    assert time.monotonic() - began_s < 1.0, "the place of who left is free, though the other one still works"
    assert not stays.result
    assert len(stays.get().split()) == 100


def test_status_is_for_people_and_for_machines(make_daemon: MakeDaemon):
    daemon = make_daemon()
    assert daemon.verb("--version").stdout.startswith("emberd ")
    daemon.write_settings()
    assert daemon.verb("status").returncode == 3
    daemon.start()
    daemon.wait_ready()
    assert "READY" in daemon.verb("status").stdout
    assert json.loads(daemon.verb("status", "--json").stdout)["state"] == "READY"
    assert daemon.state.control.stat().st_mode & 0o777 == 0o600
    assert daemon.state.directory.stat().st_mode & 0o777 == 0o700


def test_emberds_own_paths_never_reach_the_engine(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_LOAD_SECONDS="1")
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "LOADING")
    with httpx.Client(base_url=daemon.url, timeout=20, trust_env=False) as client:
        assert client.get("/emberd/healthz").json() == {"status": "live"}
        loading = client.get("/emberd/readyz")
        assert (loading.status_code, loading.json()["status"]) == (503, "LOADING")
        daemon.wait_ready()
        assert client.get("/emberd/readyz").status_code == 200
        assert client.get("/emberd/api/v1/model").status_code == 404


def test_engine_lines_are_events_and_loading_is_recognised(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    assert {event["category"] for event in daemon.events("engine_line")} == {"engine"}
    assert "reading the model" in {event["phase"] for event in daemon.events("engine_loading")}


# --- leftovers ----------------------------------------------------------------------------------------------


def test_failed_leaves_no_worker_behind(make_daemon: MakeDaemon, tmp_path: Path):
    daemon = make_daemon(
        {"engine.extra_args": ["--admin", "--admindir", str(tmp_path)], "lifecycle.crash_limit": 1}
    )
    daemon.start()
    parent = daemon.wait_ready()["engine"]["pid"]
    tree = group_members(parent)
    assert len(tree) > 1
    os.kill(parent, signal.SIGKILL)
    daemon.wait_for(lambda status: status["state"] == "FAILED")
    daemon.wait_event("engine_stopped")
    assert not any(is_alive(pid) for pid in tree)


def test_workers_of_an_engine_that_died_with_emberd_are_ended_before_the_next_load(
    make_daemon: MakeDaemon, tmp_path: Path
):
    daemon = make_daemon({"engine.extra_args": ["--admin", "--admindir", str(tmp_path)]})
    daemon.start()
    parent = daemon.wait_ready()["engine"]["pid"]
    tree = group_members(parent)
    daemon.kill()
    os.kill(parent, signal.SIGKILL)
    daemon.start()
    daemon.wait_ready(other_than=parent)
    assert "it has ended" in daemon.wait_event("engine_not_adopted")["reason"]
    assert not any(is_alive(pid) for pid in tree)


def test_an_engine_behind_a_wrapper_script_is_adopted(make_daemon: MakeDaemon, standin: Path):
    """The wrapper becomes the engine by exec: the command line changes, the process does not."""
    daemon = make_daemon()
    wrapper = daemon.folder / "koboldcpp"
    wrapper.write_text(f'#!/bin/sh\nsleep 0.3\nexec {sys.executable} {standin}/koboldcpp.py "$@"\n')
    wrapper.chmod(0o755)
    daemon.settings["engine.path"] = str(wrapper)
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    daemon.kill()
    daemon.start()
    status = daemon.wait_ready()
    assert (status["engine"]["pid"], status["engine"]["adopted"]) == (engine, True)


def test_an_engine_that_had_yet_to_replace_its_wrapper_when_emberd_died_is_adopted(
    make_daemon: MakeDaemon, standin: Path
):
    daemon = make_daemon()
    wrapper, gate = daemon.folder / "koboldcpp", daemon.folder / "gate"
    os.mkfifo(gate)
    wrapper.write_text(f"""#!/bin/sh
case "$*" in *--port*) read -r _ < {gate} ;; esac
exec {sys.executable} {standin}/koboldcpp.py "$@"
""")
    wrapper.chmod(0o755)
    daemon.settings["engine.path"] = str(wrapper)
    daemon.start()
    engine = daemon.wait_for(lambda status: status["state"] == "LOADING")["engine"]["pid"]
    daemon.kill()
    gate.write_text("\n")
    daemon.start()
    status = daemon.wait_ready()
    assert (status["engine"]["pid"], status["engine"]["adopted"]) == (engine, True)


def test_a_stop_does_not_wait_for_a_program_that_does_not_answer(make_daemon: MakeDaemon):
    daemon = make_daemon()
    silent = daemon.folder / "koboldcpp"
    silent.write_text("#!/bin/sh\nexec sleep 100\n")
    silent.chmod(0o755)
    daemon.settings["engine.path"] = str(silent)
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "STARTING")
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0


def test_a_program_that_failed_once_is_asked_again(make_daemon: MakeDaemon, standin: Path):
    daemon = make_daemon()
    flaky = daemon.folder / "koboldcpp"
    broken = daemon.folder / "broken"
    broken.touch()
    flaky.write_text(
        f'#!/bin/sh\n[ -e {broken} ] && {{ echo "No module named x" >&2; exit 1; }}\n'
        f'exec {sys.executable} {standin}/koboldcpp.py "$@"\n'
    )
    flaky.chmod(0o755)
    daemon.settings["engine.path"] = str(flaky)
    daemon.start()
    assert daemon.end() == 72
    broken.unlink()
    daemon.start()
    assert daemon.wait_ready()


def test_reload_takes_over_the_log_level(make_daemon: MakeDaemon):
    daemon = make_daemon({"log.level": "error"})
    daemon.start()
    daemon.wait_ready()
    assert not daemon.events("engine_line")
    daemon.write_settings(log__level="info")
    assert daemon.verb("reload").returncode == 0
    for _ in range(2):  # the next one ends the line of the first
        daemon.complete()
    assert daemon.wait_event("engine_line")


def test_a_reload_names_what_needs_a_restart_each_time_and_refuses_a_lost_file(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    daemon.write_settings(endpoint__port=daemon.port + 1)
    for _ in range(2):
        answer = json.loads(daemon.verb("reload", "--json").stdout)
        assert answer["needs_emberd_restart"] == ["endpoint.port"]
    daemon.config.unlink()
    daemon.signal(signal.SIGHUP)
    assert "not found" in daemon.wait_event("reload_refused")["error"]
    assert daemon.complete()
