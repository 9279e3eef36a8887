"""Replies that are cut by an engine's death, as a client of the whole daemon sees them: unbroken, or the truth."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from llama_server_standin import write_program
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

LENGTH = 24
PROMPT = "ba ke li mo"
PATHS = ["/api/extra/generate/stream", "/v1/completions", "/v1/chat/completions"]
LIMIT_S = 60
MANY = 4000
"""More tokens than are generated before the engine is killed."""
needs_xllamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="the embedded engine's wheel is not installed"
)


def body_of(path: str, **more: Any) -> dict[str, Any]:
    if path.startswith("/api"):
        return {"prompt": PROMPT, "max_length": LENGTH, **more}
    asked = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
    return {**asked, "max_tokens": LENGTH, "stream": True, **more}


def events_of(daemon: Daemon, path: str, **more: Any) -> list[dict[str, Any]]:
    """Ask for a stream and return its objects; `[DONE]` is an empty one."""
    with httpx.stream(
        "POST", daemon.url + path, json=body_of(path, **more), timeout=LIMIT_S, trust_env=False
    ) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    return [{} if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(events: list[dict[str, Any]]) -> str:
    def one(event: dict[str, Any]) -> str:
        if "token" in event:
            return str(event["token"])
        choice = (event.get("choices") or [{}])[0]
        return str(choice.get("text") or choice.get("delta", {}).get("content") or "")

    return "".join(one(event) for event in events)


def crashing(make_daemon: MakeDaemon, tmp_path: Any, after: int = 9) -> Daemon:
    """Start a daemon whose engine crashes once, in the middle of a reply."""
    once = tmp_path / "crashed"
    return make_daemon(
        STANDIN_CRASH_AFTER_TOKENS=str(after), STANDIN_CRASH_WITH="SIGKILL", STANDIN_ONCE_FILE=str(once)
    )


@pytest.fixture
def whole(make_daemon: MakeDaemon) -> Callable[..., list[dict[str, Any]]]:
    """Ask an engine that does not crash."""
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    return lambda path, **more: events_of(daemon, path, **more)


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_is_cut_goes_on_as_if_nothing_had_been(
    make_daemon: MakeDaemon, tmp_path: Any, whole: Callable[..., list[dict[str, Any]]], path: str
):
    daemon = crashing(make_daemon, tmp_path)
    daemon.start()
    first = daemon.wait_ready()["engine"]["pid"]
    seen, expected = events_of(daemon, path), whole(path)
    assert daemon.wait_ready(other_than=first), "it did crash"
    assert text_of(seen) == text_of(expected)
    assert len(text_of(seen).split()) == LENGTH
    assert seen[-1].get("token") == expected[-1].get("token")
    assert len({event.get("id") for event in seen if event}) == 1
    assert (
        sum("role" in (event.get("choices") or [{}])[0].get("delta", {}) for event in seen)
        == sum("role" in (event.get("choices") or [{}])[0].get("delta", {}) for event in expected[:1])
        or "chat" not in path
    )
    assert daemon.events("reply_continued")[0]["tokens_so_far"] == 9
    log = daemon.log.read_text()
    assert PROMPT not in log
    assert text_of(seen)[:20] not in log


def test_a_reply_that_is_cut_again_and_again_still_ends(make_daemon: MakeDaemon, whole: Any):
    daemon = make_daemon(
        {"lifecycle.crash_limit": 100}, STANDIN_CRASH_AFTER_TOKENS="7", STANDIN_CRASH_WITH="SIGKILL"
    )
    daemon.start()
    daemon.wait_ready()
    assert text_of(events_of(daemon, PATHS[0])) == text_of(whole(PATHS[0]))
    assert len(daemon.events("reply_continued")) == 3


def test_a_reply_cut_behind_its_last_token_is_only_ended(make_daemon: MakeDaemon, tmp_path: Any, whole: Any):
    daemon = crashing(make_daemon, tmp_path, LENGTH)
    daemon.start()
    daemon.wait_ready()
    seen = events_of(daemon, PATHS[0])
    assert text_of(seen) == text_of(whole(PATHS[0]))
    assert seen[-1]["finish_reason"] == "length"


def test_a_reply_that_is_not_streamed_is_asked_for_again(make_daemon: MakeDaemon, tmp_path: Any):
    daemon = crashing(make_daemon, tmp_path)
    daemon.start()
    daemon.wait_ready()
    assert len(daemon.complete(PROMPT, LENGTH).split()) == LENGTH


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        ("/v1/completions", {"n": 2}, "several replies"),
        ("/v1/chat/completions", {"logprobs": True}, "token probabilities"),
        ("/api/extra/generate/stream", {"grammar": 'root ::= "x"'}, "a grammar"),
    ],
)
def test_what_cannot_be_continued_honestly_ends_with_an_event_that_says_so(
    make_daemon: MakeDaemon, tmp_path: Any, path: str, more: dict[str, Any], words: str
):
    daemon = crashing(make_daemon, tmp_path)
    daemon.start()
    daemon.wait_ready()
    last = json.loads(lines_until_cut(daemon, path, **more)[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_died"
    assert words in last["error"]["message"]


def lines_until_cut(daemon: Daemon, path: str, **more: Any) -> list[str]:
    """Return the lines with something in them of a reply that breaks off."""
    lines: list[str] = []
    address, body = daemon.url + path, body_of(path, **more)
    with httpx.stream("POST", address, json=body, timeout=LIMIT_S, trust_env=False) as answer:
        arriving = answer.iter_lines()
        with pytest.raises(httpx.RemoteProtocolError):
            lines.extend(line for line in arriving if line)
    return lines


@needs_xllamacpp
@pytest.mark.parametrize(
    ("path", "asked", "named", "kind"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": MANY}, "error", "error"),
        ("/v1/responses", {"input": PROMPT, "max_output_tokens": MANY}, "response.failed", "response.failed"),
    ],
)
def test_a_cut_reply_of_other_apis_ends_in_their_own_words(
    make_daemon: MakeDaemon, tmp_path: Path, path: str, asked: dict[str, Any], named: str, kind: str
):
    program = write_program(tmp_path)
    daemon = make_daemon({"engine.kind": "llama-server", "engine.path": str(program), "warmth.mode": "off"})
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    body = {**asked, "stream": True, "ignore_eos": True}
    lines: list[str] = []
    with httpx.stream("POST", daemon.url + path, json=body, timeout=LIMIT_S, trust_env=False) as answer:
        arriving = answer.iter_lines()
        lines.extend(itertools.islice((line for line in arriving if line), 20))
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            lines.extend(line for line in arriving if line)
    assert lines[-2] == f"event: {named}"
    said = json.loads(lines[-1].removeprefix("data: "))
    assert said["type"] == kind
    if kind == "response.failed":
        assert said["sequence_number"] > 2
        assert said["response"].keys() >= {"id", "object", "created_at", "model", "status", "output"}
        assert abs(said["response"]["created_at"] - time.time()) < LIMIT_S
    error = said.get("response", said)["error"]
    assert "cannot be continued" in error["message"]
    assert daemon.wait_ready(other_than=engine)


@needs_xllamacpp
def test_a_cut_infill_ends_with_the_servers_own_error_event_and_a_whole_one_is_kept_warm(
    make_daemon: MakeDaemon, tmp_path: Path
):
    model = write_gguf(tmp_path / "fills.gguf", target_bytes=12 << 20, fills_in=True).path
    engine = {"engine.kind": "llama-server", "engine.path": str(write_program(tmp_path)), "model.path": str(model)}
    daemon = make_daemon({**engine, "warmth.mode": "auto"})
    daemon.start()
    pid = daemon.wait_ready()["engine"]["pid"]
    body = {"input_prefix": PROMPT, "input_suffix": PROMPT, "n_predict": MANY, "ignore_eos": True, "stream": True}
    lines: list[str] = []
    with httpx.stream("POST", f"{daemon.url}/infill", json=body, timeout=LIMIT_S, trust_env=False) as answer:
        arriving = answer.iter_lines()
        lines.extend(itertools.islice((line for line in arriving if line), 9))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            lines.extend(line for line in arriving if line)
    assert "content" in json.loads(lines[0].removeprefix("data: "))
    assert "cannot be continued" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
    daemon.wait_ready(other_than=pid)
    whole = {**body, "n_predict": 4, "stream": False}
    assert httpx.post(f"{daemon.url}/infill", json=whole, timeout=LIMIT_S, trust_env=False).json()["content"]
    told = json.loads(daemon.verb("warm", "--json").stdout)
    assert told["steps"] == ["replay"]
    assert daemon.status()["warmth"]["reuse"]["last_replay"]["processed"] == 1


REFUSES = (
    "{% for each in messages %}<{{ each.role }}>{{ each.content }}</{{ each.role }}>{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no assistant at the end') }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@needs_xllamacpp
def test_no_flag_and_no_template_makes_a_cut_chat_begin_anew(make_daemon: MakeDaemon, tmp_path: Path):
    daemon = make_daemon(
        {
            "engine.kind": "llama-server",
            "engine.path": str(write_program(tmp_path)),
            "engine.extra_args": ["--no-prefill-assistant", "--chat-template", REFUSES],
            "warmth.mode": "off",
        }
    )
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    chat = {"messages": [{"role": "user", "content": PROMPT}], "ignore_eos": True, "temperature": 0}
    whole = text_of(events_of(daemon, "/v1/chat/completions", **chat, max_tokens=60))
    seen: list[dict[str, Any]] = []
    body, url = {**chat, "max_tokens": MANY, "stream": True}, daemon.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=LIMIT_S, trust_env=False) as answer:
        for line in answer.iter_lines():
            seen += [json.loads(line.removeprefix("data: "))] if line.startswith("data: {") else []
            if len(seen) == 8 and line:
                os.kill(engine, signal.SIGKILL)
            # Before the kill no time is lost with the log: this model writes a whole reply within seconds.
            if len(seen) > 8 and daemon.events("reply_continued") and len(text_of(seen)) >= len(whole):
                break
    (continued,) = daemon.events("reply_continued")
    assert continued["tokens_so_far"] > 0
    assert text_of(seen)[: len(whole)] == whole
    assert len({event["id"] for event in seen}) == 1


def test_a_chat_that_koboldcpp_writes_by_a_template_ends_in_place_of_beginning_anew(
    make_daemon: MakeDaemon, tmp_path: Path
):
    once = {"STANDIN_ONCE_FILE": str(tmp_path / "crashed"), "STANDIN_CRASH_WITH": "SIGKILL"}
    daemon = make_daemon({"engine.extra_args": ["--jinja"]}, STANDIN_CRASH_AFTER_TOKENS="9", **once)
    daemon.start()
    daemon.wait_ready()
    assert "which this engine cannot continue" in lines_until_cut(daemon, PATHS[2])[-1]


def test_an_old_engine_cannot_continue_a_chat_and_the_client_is_told(make_daemon: MakeDaemon, tmp_path: Any):
    daemon = crashing(make_daemon, tmp_path)
    daemon.environment["STANDIN_VERSION"] = "1.76"
    daemon.start()
    daemon.wait_ready()
    assert "which this engine cannot continue" in lines_until_cut(daemon, PATHS[2])[-1]


# --- clients that leave -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "KCPP77"])
def test_a_client_that_leaves_frees_the_engine_at_once_also_of_a_reply_that_is_not_streamed(
    make_daemon: MakeDaemon, key: str
):
    daemon = make_daemon(STANDIN_TOKEN_MS="50")
    daemon.start()
    status = daemon.wait_ready()
    port = status["engine"]["port"]
    body = {"prompt": PROMPT, "max_length": 1000, "genkey": key}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{daemon.url}/api/v1/generate", json=body, timeout=0.5, trust_env=False)
    answered = threading.Event()

    def ask() -> None:
        daemon.complete("x", 1)
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    assert answered.wait(1.5), "the generation of 50 s went on"
    assert httpx.get(f"http://127.0.0.1:{port}/api/extra/perf", timeout=5, trust_env=False).json()["queue"] == 0
    assert "could not be sent" not in daemon.state.output.read_text(), "the next request waits for that"


def test_a_client_that_leaves_does_not_cost_another_its_reply(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_TOKEN_MS="20")
    daemon.start()
    daemon.wait_ready()
    replies: list[str] = []
    other = threading.Thread(target=lambda: replies.append(daemon.complete("first", 60)))
    other.start()
    daemon.wait_for(lambda status: status["requests_in_flight"] == 1)
    body = {"prompt": PROMPT, "max_length": 1000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{daemon.url}/api/v1/generate", json=body, timeout=0.3, trust_env=False)
    other.join(LIMIT_S)
    assert len(replies[0].split()) == 60


# --- the queue ----------------------------------------------------------------------------------------------------


def test_a_crowd_is_refused_at_once_and_the_queue_is_shown(make_daemon: MakeDaemon):
    daemon = make_daemon({"endpoint.max_waiting": 2}, STANDIN_LOAD_SECONDS="4")
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "LOADING")
    threads = [threading.Thread(target=daemon.complete, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    status = daemon.wait_for(lambda status: status["requests_waiting"] == 2)
    assert status["longest_wait_s"] >= 0
    answer = httpx.post(f"{daemon.url}/api/generate", json={"prompt": "x"}, timeout=5, trust_env=False)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json() == {"error": "2 requests wait already"}
    for thread in threads:
        thread.join(LIMIT_S)
    assert daemon.status()["requests_waiting"] == 0


# --- the memory of the last turn ----------------------------------------------------------------------------------


def test_the_last_turn_is_remembered_forgotten_on_demand_and_never_written(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    assert not daemon.status()["remembers_turn"]
    marker = "zanzibarmarker"
    text = daemon.complete(f"{marker} ba ke", 8)
    assert daemon.status()["remembers_turn"]
    assert json.loads(daemon.verb("forget", "--json").stdout) == {"ok": True, "had_turn": True}
    assert "nothing to forget" in daemon.verb("forget").stdout
    assert not daemon.status()["remembers_turn"]
    daemon.complete(f"{marker} ba ke", 8)
    assert daemon.child is not None
    if sys.platform == "linux":
        limits = Path(f"/proc/{daemon.child.pid}/limits").read_text()
        assert re.search(r"Max core file size +0 ", limits)
    daemon.signal(signal.SIGABRT)
    assert daemon.end() == -signal.SIGABRT
    kept = [path for path in daemon.folder.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if marker.encode() in path.read_bytes() or text.encode() in path.read_bytes()]


def test_nothing_is_remembered_where_that_is_not_wanted(make_daemon: MakeDaemon):
    daemon = make_daemon({"endpoint.remember_kib": 0})
    daemon.start()
    daemon.wait_ready()
    daemon.complete()
    assert not daemon.status()["remembers_turn"]


def test_a_knock_is_told_from_a_generation_and_from_a_balancer(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    httpx.get(f"{daemon.url}/emberd/healthz", timeout=5, trust_env=False)
    daemon.complete()
    assert daemon.status()["seconds_since_knock"] is None
    httpx.get(f"{daemon.url}/api/v1/model", timeout=5, trust_env=False)
    assert daemon.status()["seconds_since_knock"] < 5
