"""A daemon that cannot start, under a service manager: real processes that are started again as launchd would."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from emberd.core.errors import EmberdError
from emberd.host import ThisHost
from emberd.host.start_history import StartHistory
from engine_process import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

ACTIVATE = shutil.which("systemd-socket-activate") or ""
LIMIT_S = 60.0
LAUNCHD = {"XPC_SERVICE_NAME": "io.github.emberd.test"}
BRIEF_WAITS = "import emberd.core.start_limit as limit; limit.FIRST_WAIT_S = 1.0; "
"""For tests that wait for the next try: a prelude of the command line, which a replaced process keeps."""


def start_until_it_stays(daemon: Daemon, most: int = 4) -> tuple[list[int], dict[str, Any]]:
    """Start emberd again after each failure, as launchd does; return exit codes and status when it stays."""
    codes: list[int] = []
    daemon.environment.update(LAUNCHD)
    daemon.write_settings()
    while len(codes) < most:
        daemon.start()
        assert daemon.child is not None
        deadline_s = time.monotonic() + LIMIT_S
        while daemon.child.poll() is None and time.monotonic() < deadline_s:
            with contextlib.suppress(EmberdError):
                status = daemon.status()
                if status["state"] == "STANDBY":
                    return codes, status
            time.sleep(0.02)
        codes.append(daemon.child.wait(0))
    raise AssertionError(f"it never stayed: {codes}, {daemon.log.read_text()[-3000:]}")


def ask(daemon: Daemon, path: str, method: str = "GET") -> httpx.Response:
    body = {"prompt": "x", "messages": []} if method == "POST" else None
    return httpx.request(method, f"{daemon.url}{path}", json=body, timeout=20, trust_env=False)


def test_a_person_who_starts_it_by_hand_gets_the_error_each_time(make_daemon: MakeDaemon):
    daemon = make_daemon({"model.path": "/nowhere/model.gguf"})
    for _ in range(4):
        daemon.start()
        assert daemon.end() == 66
    assert not daemon.state.starts.exists()


def test_the_third_failed_start_stays_and_tells_everybody_why(make_daemon: MakeDaemon, tmp_path: Path):
    missing = tmp_path / "late.gguf"
    daemon = make_daemon({"model.path": str(missing)})
    codes, status = start_until_it_stays(daemon)
    assert codes == [66, 66]
    assert "late.gguf" in status["reason"]
    assert status["remedy"]
    assert (status["exit_code"], len(status["failures"])) == (66, 3)
    assert 30 < status["next_start_in_s"] <= 60
    assert (ask(daemon, "/emberd/healthz").status_code, ask(daemon, "/emberd/readyz").status_code) == (200, 503)
    for path in ("/v1/chat/completions", "/api/v1/generate"):
        answer = ask(daemon, path, "POST")
        assert answer.status_code == 503
        assert 0 < int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["state"] == "STANDBY"
        assert "late.gguf" in answer.json()["detail"]["msg"]
    assert "late.gguf" in ask(daemon, "/api/chat", "POST").json()["error"], "Ollama's dialect"
    view = ask(daemon, "/emberd/status").json()
    assert view["sentence"]["text"].startswith("emberd cannot start. The next try is in")
    assert "late.gguf" in view["sentence"]["why"]
    assert ask(daemon, "/emberd/layers").json()["unknown"] == "there is no engine"
    assert ask(daemon, "/emberd/doctor").json()["shown"][0]["code"] == "MODEL_MISSING"
    pressed = httpx.post(f"{daemon.url}/emberd/do/warm", headers={"x-emberd": "x"}, timeout=20, trust_env=False)
    assert (pressed.status_code, "late.gguf" in pressed.json()["error"]) == (409, True)
    said = daemon.verb("status")
    words = "".join(said.stdout.split())  # a narrow terminal folds the lines anywhere
    assert (said.returncode, "late.gguf" in words, "emberdrestart" in words) == (0, True, True)
    examined = json.loads(daemon.verb("doctor", "--all", "--json").stdout)
    codes_found = {each["code"] for each in examined["conditions"]}
    assert examined["asked"] == "the daemon"
    assert "MODEL_MISSING" in codes_found
    assert not {"PORT_TAKEN", "NOT_RUNNING"} & codes_found
    refused = daemon.verb("warm")
    assert (refused.returncode, "late.gguf" in refused.stderr) == (66, True)
    assert len(daemon.events("standby")) == 1
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0


def test_a_page_of_another_site_does_not_learn_why(make_daemon: MakeDaemon):
    daemon = make_daemon({"model.path": "/nowhere/model.gguf"})
    start_until_it_stays(daemon)
    answer = httpx.get(f"{daemon.url}/api/v1/model", headers={"Host": "evil.example"}, timeout=20, trust_env=False)
    assert (answer.status_code, "nowhere" in answer.text) == (403, False)


def test_a_model_that_arrives_is_served_within_seconds(make_daemon: MakeDaemon, tmp_path: Path, model: Path):
    late = tmp_path / "late.gguf"
    daemon = make_daemon({"model.path": str(late)})
    _, status = start_until_it_stays(daemon)
    late.write_bytes(model.read_bytes())
    began_s = time.monotonic()
    ready = daemon.wait_ready()
    assert time.monotonic() - began_s < 10
    assert ready["pid"] == status["pid"], "the same process, a new program"
    assert daemon.events("standby_ended")[0]["why"] == "asked"
    assert daemon.complete()


def test_settings_that_are_mended_take_effect_within_seconds_on_another_port_too(make_daemon: MakeDaemon):
    daemon = make_daemon({"engine.kind": "no such engine"})
    codes, status = start_until_it_stays(daemon)
    assert codes == [78, 78]
    assert "engine.kind" in status["reason"]
    assert ask(daemon, "/v1/models").status_code == 503, "the port is known although the file is wrong"
    before = daemon.port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        daemon.port = probe.getsockname()[1]
    daemon.write_settings(engine__kind="koboldcpp", endpoint__port=daemon.port)
    began_s = time.monotonic()
    assert daemon.wait_ready()["endpoint"] == daemon.url
    assert time.monotonic() - began_s < 10
    assert daemon.complete()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{before}/", trust_env=False)


def test_a_file_that_is_no_toml_still_tells_where_emberd_is(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.write_settings()
    good = daemon.config.read_text()
    daemon.config.write_text(good.replace('path = "', "path = ", 1))
    daemon.write_settings = lambda **_: None  # type: ignore[method-assign]
    codes, status = start_until_it_stays(daemon)
    assert codes == [78, 78]
    assert "not valid TOML" in status["reason"]
    assert "not valid TOML" in ask(daemon, "/v1/models").text
    assert "notvalidTOML" in "".join(daemon.verb("status").stdout.split())
    refused = daemon.verb("reload")
    assert (refused.returncode, "not valid TOML" in refused.stderr) == (78, True)
    daemon.config.write_text(good)
    daemon.wait_ready()


def wait_for_standby(daemon: Daemon) -> dict[str, Any]:
    return daemon.wait_for(lambda status: status["state"] == "STANDBY", "standby")


def test_a_port_that_becomes_free_is_taken(make_daemon: MakeDaemon):
    daemon = make_daemon()
    taker = socket.socket()
    taker.bind(("127.0.0.1", daemon.port))
    taker.listen()
    codes, status = start_until_it_stays(daemon)
    assert codes == [69, 69]
    assert (status["endpoint"], "is taken by" in status["reason"]) == (None, True)
    taker.close()
    daemon.wait_ready()
    assert daemon.complete()


def test_a_job_waits_for_the_emberd_that_was_started_by_hand_and_takes_over_behind_it(make_daemon: MakeDaemon):
    by_hand = make_daemon()
    by_hand.start()
    engine = by_hand.wait_ready()["engine"]["pid"]
    job = make_daemon()
    job.state, job.environment = by_hand.state, {**by_hand.environment, **LAUNCHD}
    job.settings["state.directory"] = str(by_hand.state.directory)
    for _ in range(2):
        job.start()
        assert job.end() == 4
    job.start()
    assert "already running" in job.wait_event("standby")["reason"]
    assert "already running" in ask(job, "/v1/models").text
    assert by_hand.status()["engine"]["pid"] == engine, "its control socket is left to it"
    by_hand.signal(signal.SIGTERM)
    assert by_hand.end() == 0
    assert job.child is not None
    assert job.wait_ready()["pid"] == job.child.pid
    assert job.complete()


def test_emberd_restart_tries_again_and_says_what_is_still_wrong(make_daemon: MakeDaemon):
    daemon = make_daemon({"model.path": "/nowhere/model.gguf"})
    _, status = start_until_it_stays(daemon)
    said = daemon.verb("restart")
    assert (said.returncode, "still cannot start" in said.stderr) == (5, True), said
    again = wait_for_standby(daemon)
    assert again["pid"] == status["pid"]
    assert 30 < again["next_start_in_s"] <= 60, "a person's try does not lengthen the wait"
    refused = daemon.verb("reload")
    assert refused.returncode == 0, refused.stderr


def test_emberd_restart_brings_up_what_has_been_mended(make_daemon: MakeDaemon, tmp_path: Path, standin: Path):
    engine = tmp_path / "engine"
    daemon = make_daemon({"engine.path": str(engine)})
    codes, _ = start_until_it_stays(daemon)
    assert codes == [72, 72]
    engine.symlink_to(standin)
    said = daemon.verb("restart")
    assert (said.returncode, "ready (pid" in said.stdout) == (0, True), said
    daemon.wait_ready()


def test_it_tries_again_by_itself_and_waits_longer_each_time(make_daemon: MakeDaemon):
    daemon = make_daemon({"model.path": "/nowhere/model.gguf"})
    brief(daemon)
    start_until_it_stays(daemon)
    third = daemon.wait_event("standby", 3)
    waits = [event["next_try_in_s"] for event in daemon.events("standby")]
    assert waits[:3] == [1, 2, 4]
    assert "model.gguf" in third["reason"]
    assert daemon.child is not None
    assert daemon.child.poll() is None


def brief(daemon: Daemon) -> None:
    """Make the first wait one second long."""
    plain = daemon.command

    def command(*words: str) -> list[str]:
        first, option, code, *rest = plain(*words)
        return [first, option, BRIEF_WAITS + code, *rest]

    daemon.command = command  # type: ignore[method-assign]


def test_an_emberd_that_dies_without_a_word_waits_before_the_fourth_start(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_LOAD_SECONDS="60")
    brief(daemon)
    daemon.environment.update(LAUNCHD)
    engines = set()
    for _ in range(3):
        daemon.start()
        status = daemon.wait_for(lambda status: status["state"] == "LOADING")
        engines.add(status["engine"]["pid"])
        daemon.kill()
    daemon.start()
    status = wait_for_standby(daemon)
    assert "without saying why" in status["reason"]
    assert len(engines) == 1
    os.kill(next(iter(engines)), 0)  # left alone
    daemon.wait_event("engine_adopted", 3)
    assert daemon.events("standby_ended")[0]["why"] == "due"


def test_an_emberd_that_served_may_be_killed_as_often_as_it_likes(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.environment.update(LAUNCHD)
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    for _ in range(4):
        daemon.kill()
        daemon.start()
        daemon.wait_for(lambda status: status["state"] == "READY")
    assert daemon.wait_ready()["engine"]["pid"] == engine
    assert not daemon.events("standby")


def test_a_stop_in_order_forgives_earlier_failures(make_daemon: MakeDaemon, tmp_path: Path, model: Path):
    late = tmp_path / "late.gguf"
    daemon = make_daemon({"model.path": str(late)})
    daemon.environment.update(LAUNCHD)
    for _ in range(2):
        daemon.start()
        assert daemon.end() == 66
    late.write_bytes(model.read_bytes())
    daemon.start()
    daemon.wait_ready()
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0
    assert json.loads(daemon.state.starts.read_text())["runs"] == []
    late.unlink()
    daemon.start()
    assert daemon.end() == 66, "the first failure of a new row"


def test_a_state_directory_that_cannot_be_used_is_waited_for_at_once(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.environment.update(LAUNCHD)
    daemon.state.directory.write_text("a file stands where the folder should be")
    daemon.start()
    said = daemon.wait_event("standby")
    assert str(daemon.state.directory) in said["reason"]
    deadline_s = time.monotonic() + LIMIT_S
    while ask(daemon, "/emberd/healthz").status_code != 200 and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert str(daemon.state.directory) in ask(daemon, "/v1/models").text
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0


@pytest.mark.skipif(not ACTIVATE, reason="systemd-socket-activate is not installed")
def test_a_service_managers_socket_is_kept_through_the_waiting_and_nobody_is_refused(
    make_daemon: MakeDaemon, tmp_path: Path, model: Path
):
    late = tmp_path / "late.gguf"
    daemon = make_daemon({"model.path": str(late)})
    daemon.write_settings()
    daemon.state.directory.mkdir(mode=0o700)
    for _ in range(2):
        starts = StartHistory(daemon.state.starts, ThisHost().start_token(1))
        starts.begin()
        starts.failed("no model")
    daemon.port = free_port()  # of the socket, not of the settings
    environment = {**daemon.environment, "INVOCATION_ID": "1"}
    with daemon.log.open("ab") as log:
        daemon.child = subprocess.Popen(
            [
                ACTIVATE,
                f"--listen=127.0.0.1:{daemon.port}",
                *(f"--setenv={name}={value}" for name, value in environment.items()),
                sys.executable,
                *daemon.command("run")[1:],
            ],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    first = ask(daemon, "/v1/models")
    assert (first.status_code, "late.gguf" in first.text) == (503, True), "the client that started it is told why"
    assert wait_for_standby(daemon)["endpoint"] == daemon.url
    late.write_bytes(model.read_bytes())
    codes = set()
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s and 200 not in codes:
        codes.add(ask(daemon, "/api/v1/model").status_code)  # a refused connection would raise
    assert codes == {503, 200}
    assert daemon.wait_ready()["endpoint"] == daemon.url


def test_waiting_costs_next_to_nothing(make_daemon: MakeDaemon):
    daemon = make_daemon({"model.path": "/nowhere/model.gguf"})
    _, status = start_until_it_stays(daemon)
    process = psutil.Process(status["pid"])
    ask(daemon, "/emberd/healthz")  # what is imported late is there now
    before, began_s = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(5)  # what passes in this time is measured
    share = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began_s)
    assert share <= 0.004, "within 5 s a tick of the clock is 0.2 %"
    if sys.platform == "linux":
        assert process.memory_full_info().pss < 40 << 20
