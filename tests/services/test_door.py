"""The door: what pages, keys and browsers meet, of the whole daemon, and compared with the engine itself."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import structlog

from daemon_process import WAIT_S, is_alive
from emberd.core.access import AccessRules
from emberd.services import door as door_module
from emberd.services.door import Door, delay_s

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

KEY = "correct-horse-battery"
LITE = "https://lite.koboldai.net"
GENERATE = "/api/v1/generate"


def send(daemon: Daemon, method: str, path: str, **headers: str) -> httpx.Response:
    """Send a request as a client with these headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"prompt": "x", "max_length": 1} if method == "POST" else None
    return httpx.request(
        method, daemon.url + path, json=body, headers=named, timeout=WAIT_S, trust_env=False, follow_redirects=False
    )


def direct(daemon: Daemon, path: str) -> httpx.Response:
    """Ask the engine itself."""
    port = daemon.status()["engine"]["port"]
    return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=WAIT_S, trust_env=False)


@pytest.fixture
def keyed(make_daemon: MakeDaemon, tmp_path: Path) -> Daemon:
    """A ready daemon that asks for a key and lets one page in."""
    path = tmp_path / "key"
    path.write_text(KEY)
    path.chmod(0o600)
    daemon = make_daemon(
        {"endpoint.api_key_file": str(path), "endpoint.origins": [LITE + "/", "chrome-extension://*"]}
    )
    daemon.start()
    daemon.wait_ready()
    return daemon


def test_a_page_that_is_let_in_sees_every_answer_and_one_that_is_not_sees_none(keyed: Daemon):
    for origin in (LITE, "chrome-extension://abcdef", "http://localhost:3000"):
        asked = send(keyed, "OPTIONS", GENERATE, origin=origin, access_control_request_method="POST")
        assert (asked.status_code, asked.content) == (200, b"")
        refused = send(keyed, "POST", GENERATE, origin=origin)
        answered = send(keyed, "POST", GENERATE, origin=origin, authorization=f"Bearer {KEY}")
        assert (refused.status_code, answered.status_code) == (401, 200)
        for answer in (asked, refused, answered):
            assert answer.headers.get_list("access-control-allow-origin") == [origin], "the engine's * is narrowed"
            assert "origin" in answer.headers["vary"].lower()
    for method in ("OPTIONS", "POST"):
        foreign = send(
            keyed,
            method,
            GENERATE,
            origin="https://evil.example",
            access_control_request_method="POST",
            authorization=f"Bearer {KEY}",
        )
        assert foreign.status_code == 403
        assert not [name for name in foreign.headers if name.startswith("access-control")]
    plain = send(keyed, "GET", "/api/v1/model", authorization=f"Bearer {KEY}")
    assert "access-control-allow-origin" not in plain.headers, "another page could find it in a cache"
    assert plain.json() == direct(keyed, "/api/v1/model").json()


def test_a_preflight_is_answered_with_what_was_asked_for_and_for_a_private_network(keyed: Daemon):
    asked = send(
        keyed,
        "OPTIONS",
        "/v1/chat/completions",
        origin=LITE,
        access_control_request_method="POST",
        access_control_request_headers="authorization,x-stainless-os",
        access_control_request_private_network="true",
    )
    assert asked.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert asked.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in asked.headers
    other = send(keyed, "OPTIONS", "/v1/models", origin=LITE, access_control_request_method="GET")
    assert "access-control-allow-private-network" not in other.headers


def test_every_clients_way_of_sending_the_key_is_understood(keyed: Daemon):
    basic = base64.b64encode(f"me:{KEY}".encode()).decode()
    for headers in (
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"Basic {basic}"},
        {"authorization": KEY},
        {"x_api_key": KEY},
        {"api_key": KEY},
        {"authorization": "Bearer sk-none", "x_api_key": KEY},
    ):
        assert send(keyed, "POST", GENERATE, **headers).status_code == 200, headers
    assert send(keyed, "POST", GENERATE, x_api_key="wrong").status_code == 401
    refused = send(keyed, "POST", GENERATE)
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Bearer realm="emberd"')
    assert KEY not in keyed.log.read_text() + keyed.state.output.read_text()


def test_the_engines_page_opens_without_the_key_and_a_browser_logs_in_for_the_rest(keyed: Daemon):
    page = send(keyed, "GET", "/", accept="text/html", sec_fetch_mode="navigate", sec_fetch_site="none")
    assert (page.status_code, page.content) == (200, direct(keyed, "/").content)
    assert send(keyed, "GET", "/api/v1/model").status_code == 401
    visit = send(keyed, "GET", "/noscript?a=1", accept="text/html,*/*", sec_fetch_site="none")
    assert (visit.status_code, visit.headers["location"]) == (303, "/emberd/login?to=/noscript%3Fa%3D1")
    origin = keyed.url
    with httpx.Client(base_url=origin, timeout=WAIT_S, trust_env=False) as browser:
        form = browser.get(visit.headers["location"])
        assert "default-src 'none'" in form.headers["content-security-policy"]
        assert 'value="/noscript?a=1"' in form.text
        assert "<script" not in form.text
        wrong = browser.post("/emberd/login", data={"key": "wrong", "to": "/x"}, headers={"origin": origin})
        assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
        foreign = browser.post("/emberd/login", data={"key": KEY}, headers={"origin": "https://evil.example"})
        assert (foreign.status_code, "set-cookie" in foreign.headers) == (403, False)
        right = browser.post("/emberd/login", data={"key": KEY, "to": "/api"}, headers={"origin": origin})
        assert (right.status_code, right.headers["location"]) == (303, "/api")
        assert re.search(
            rf"^emberd_session_{keyed.port}=\d+\.[0-9a-f]{{64}}; .*HttpOnly; SameSite=Strict$",
            right.headers["set-cookie"],
        )
        body = {"prompt": "x", "max_length": 1}
        assert browser.post(GENERATE, json=body, headers={"origin": origin}).status_code == 200
        other = browser.post(GENERATE, json=body, headers={"origin": "http://127.0.0.1:3000"})
        assert other.status_code == 401, "a page of another port is not logged in"
        browser.post("/emberd/logout", headers={"origin": origin})
        assert browser.get("/api/v1/model").status_code == 401


def test_a_login_leads_to_no_other_site(keyed: Daemon):
    for to in ("//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", ""):
        done = httpx.post(
            f"{keyed.url}/emberd/login",
            data={"key": KEY, "to": to},
            headers={"origin": keyed.url},
            timeout=WAIT_S,
            trust_env=False,
        )
        assert (done.status_code, done.headers["location"]) == (303, "/")


def test_a_page_whose_name_was_pointed_to_this_computer_reaches_nothing(make_daemon: MakeDaemon):
    """DNS rebinding, as in CVE-2024-28224 of Ollama: the page is of the same origin, and reads what it likes."""
    daemon = make_daemon({"endpoint.origins": [LITE]})
    daemon.start()
    daemon.wait_ready()
    known = daemon.status()["requests_in_flight"], direct(daemon, "/api/extra/perf").json()["total_gens"]
    for name in (
        "evil.example",
        "EVIL.example.",
        "127.0.0.1.nip.io",
        "localhost.evil.example",
        "lite.koboldai.net",
        "host.docker.internal.evil.example",
    ):
        host = f"{name}:{daemon.port}"
        for method, path in (
            ("GET", "/"),
            ("GET", "/api/tags"),
            ("GET", "/api/v1/model"),
            ("POST", GENERATE),
            ("POST", "/api/pull"),
            ("POST", "/api/chat"),
            ("DELETE", "/api/delete"),
            ("POST", "/emberd/login"),
            ("OPTIONS", GENERATE),
        ):
            sent: dict[str, Any] = {"host": host, "sec_fetch_site": "same-origin"}
            if method != "GET":
                sent |= {"origin": f"http://{host}", "access_control_request_method": "POST"}
            answer = send(daemon, method, path, **sent)
            assert answer.status_code == 403, (name, method, path)
            assert not [each for each in answer.headers if each.startswith("access-control")]
    after = daemon.status()["requests_in_flight"], direct(daemon, "/api/extra/perf").json()["total_gens"]
    assert after == known


# --- while no engine is ready -----------------------------------------------------------------------------------


def test_while_the_engine_loads_again_questions_are_answered_and_polls_take_no_place(make_daemon: MakeDaemon):
    daemon = make_daemon(
        {"endpoint.max_waiting": 1, "endpoint.origins": [LITE], "lifecycle.stop_timeout_s": 1.0},
        STANDIN_LOAD_SECONDS="3",
    )
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "LOADING", "loading")
    for path in ("/health", "/v1/health"):
        health = send(daemon, "GET", path, origin=LITE)
        assert (health.status_code, health.json()["error"]["message"]) == (503, "Loading model")
        assert (health.headers["retry-after"], health.headers["access-control-allow-origin"]) == ("5", LITE)
    asked = send(daemon, "OPTIONS", "/v1/models", origin=LITE, access_control_request_method="GET")
    assert asked.status_code == 200
    assert daemon.status()["state"] == "LOADING", "none of them waited"
    daemon.wait_ready()
    told = (
        "/.well-known/serviceinfo",
        "/v1/models",
        "/api/tags",
        "/api/v1/model",
        "/api/extra/version",
        "/api/v1/config/max_context_length",
    )
    answers = {path: direct(daemon, path) for path in told}
    wait_until((daemon.state.directory / "engine-told.json").exists)
    daemon.kill()
    end_engine(daemon)
    daemon.start()  # a computer that starts: another emberd, and its engine loads
    daemon.wait_for(lambda status: status["state"] == "LOADING", "loading")
    for path in told:
        said = send(daemon, "GET", path)
        assert said.headers["emberd-answer"] == "remembered; state=LOADING"
        assert (said.status_code, _timeless(said.text)) == (
            answers[path].status_code,
            _timeless(answers[path].text),
        )
        assert said.headers["content-type"] == answers[path].headers["content-type"]
    assert send(daemon, "HEAD", "/v1/models").status_code == 200
    with httpx.Client(base_url=daemon.url, timeout=WAIT_S, trust_env=False) as client:
        polls = [Poll(daemon.url) for _ in range(8)]
        daemon.wait_for(lambda status: status["requests_held"] == 8, "eight polls")
        chat = client.post(GENERATE, json={"prompt": "x", "max_length": 1})
        assert chat.status_code == 200, "the one waiting place was free"
        assert [poll.status() for poll in polls] == [200] * 8
    ready = send(daemon, "GET", "/v1/models")
    assert "emberd-answer" not in ready.headers


def test_what_another_model_said_is_not_told(make_daemon: MakeDaemon, tmp_path: Path, model: Path):
    daemon = make_daemon(STANDIN_LOAD_SECONDS="1")
    daemon.start()
    daemon.wait_ready()
    wait_until((daemon.state.directory / "engine-told.json").exists)
    daemon.kill()
    end_engine(daemon)
    other = tmp_path / "another.gguf"
    other.write_bytes(model.read_bytes())
    daemon.settings["model.path"] = str(other)
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "LOADING", "loading")
    assert send(daemon, "GET", "/api/v1/model").json() == {"result": "koboldcpp/another"}


class Poll:
    """A GET that waits, on a raw socket of its own."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._socket = socket.create_connection((host, int(port)), WAIT_S)
        self._socket.sendall(b"GET /api/extra/perf HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")

    def status(self) -> int:
        """Return the answer's status."""
        with self._socket, self._socket.makefile("rb") as answer:
            return int(answer.readline().split()[1])


def end_engine(daemon: Daemon) -> None:
    for pid in daemon.engine_pids:
        os.killpg(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_alive(pid))
    daemon.engine_pids.clear()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def _timeless(text: str) -> str:
    return re.sub(r'"created": \d+', "", text)


# --- those who guess --------------------------------------------------------------------------------------------


def test_each_wrong_key_in_a_row_waits_longer_up_to_a_limit():
    assert [delay_s(count) for count in (1, 2, 3, 4, 5, 6, 100)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


async def ask(door: Door, **headers: str) -> int:
    """Return the status with which the door answers, 0 if it lets in."""
    said = []

    async def answered(message: Any) -> None:
        said.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"method": "GET", "path": "/v1/models", "query_string": b"", "headers": [(b"host", b"localhost"), *raw]}
    shown = await door.admit(scope, answered)
    assert b"right" not in str(scope["headers"]).encode() or shown is None, "the key goes no further"
    return 0 if shown is not None else said[0]["status"]


async def test_wrong_keys_are_held_back_a_right_one_never_and_a_crowd_is_told_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
):
    delays: list[float] = []
    free = asyncio.Event()

    async def sleep(seconds: float) -> None:
        delays.append(seconds)
        await free.wait()

    monkeypatch.setattr(door_module.asyncio, "sleep", sleep)
    door = Door(lambda: AccessRules(key="right"), structlog.get_logger())
    waiting = [asyncio.create_task(ask(door, x_api_key=f"wrong{number}")) for number in range(16)]
    while len(delays) < 16:
        await asyncio.wait(waiting, timeout=0)
    assert await ask(door, x_api_key="wrong") == 429
    assert await ask(door, x_api_key="right") == 0, "nobody is locked out"
    assert await ask(door) == 401, "no key is no guess"
    assert delays == sorted(delays)
    free.set()
    assert await asyncio.gather(*waiting) == [401] * 16
