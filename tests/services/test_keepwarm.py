"""Keeping warm, of the whole daemon: the cache is kept, users are never in each other's way, and it lets go."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from emberd.host import ThisHost
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

may_lock = pytest.mark.skipif(
    os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] not in {-1, resource.RLIM_INFINITY},
    reason="this user may not lock a model",
)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
WARM = {"warmth.mode": "auto", "warmth.min_interval_s": 1.0, "warmth.max_interval_s": 2.0}
STORY = " ".join(["ba", "ke", "li", "mo"] * 75)
"""300 tokens: at 5 ms each, 1.5 s to process."""


def warm_daemon(make_daemon: MakeDaemon, settings: dict[str, Any] | None = None, **switches: str) -> Daemon:
    daemon = make_daemon({**WARM, **(settings or {})}, **{"STANDIN_PROMPT_MS_PER_TOKEN": "5", **switches})
    daemon.start()
    daemon.wait_ready()
    return daemon


def passes(daemon: Daemon, step: str) -> int:
    return sum(step in event["steps"] for event in daemon.events("keepwarm"))


def wait_for_pass(daemon: Daemon, step: str, count: int = 1) -> None:
    daemon.wait_for(lambda _: passes(daemon, step) >= count, f"a pass with {step}")


def timed(daemon: Daemon, prompt: str, length: int = 1) -> tuple[float, str]:
    began_s = time.monotonic()
    text = daemon.complete(prompt, length)
    return time.monotonic() - began_s, text


def test_before_any_user_a_tiny_generation_warms_the_engine(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon)
    wait_for_pass(daemon, "tiny")
    status = daemon.status()["warmth"]
    assert status["last"]["reason"] in {"due", "restarted"}
    assert status["cost"]["passes"] >= 1
    assert "tiny" in daemon.verb("status").stdout


def test_replays_keep_the_cache_of_prompt_and_reply(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon)
    cold_s, reply = timed(daemon, STORY, 12)
    assert cold_s > 1.5
    done = passes(daemon, "replay")
    wait_for_pass(daemon, "replay", done + 2)
    warm_s, _ = timed(daemon, f"{STORY}{reply} and then", 1)
    assert warm_s < 0.6, "the whole prompt was processed again"
    log = daemon.log.read_text() + json.dumps(daemon.status())
    assert STORY[:30] not in log
    assert reply not in log


def test_a_prompt_that_cannot_be_replayed_is_never_replaced_by_a_foreign_one(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon, {"endpoint.remember_kib": 0, "engine.lock": "never"})
    wait_for_pass(daemon, "tiny")
    timed(daemon, STORY)
    tinies, touches = passes(daemon, "tiny"), passes(daemon, "touch")
    wait_for_pass(daemon, "touch", touches + 2)
    assert passes(daemon, "tiny") == tinies
    assert timed(daemon, STORY)[0] < 0.6


def test_a_prompt_that_did_not_fit_is_kept_by_no_replay_for_that_would_begin_elsewhere(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon, {"engine.context_size": 512, "engine.lock": "never"})
    prompt, length = STORY + STORY, 12
    timed(daemon, prompt, length)
    touches = passes(daemon, "touch")
    wait_for_pass(daemon, "touch", touches + 2)
    assert not passes(daemon, "replay")
    assert timed(daemon, prompt, length)[0] < 0.6, "the prompt was processed again"


def test_a_model_that_keeps_a_state_is_touched_and_never_sent_a_replay(make_daemon: MakeDaemon, tmp_path: Path):
    model = write_gguf(tmp_path / "state.gguf", architecture="mamba").path
    daemon = warm_daemon(make_daemon, {"model.path": str(model), "engine.lock": "never"})
    _, reply = timed(daemon, STORY, 4)
    touches = passes(daemon, "touch")
    wait_for_pass(daemon, "touch", touches + 2)
    assert not passes(daemon, "replay")
    assert timed(daemon, f"{STORY}{reply} and then", 1)[0] < 0.6, "the conversation was processed again"


def test_a_user_who_comes_during_a_replay_is_answered_as_if_there_were_none(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon, STANDIN_TOKEN_MS="300")
    timed(daemon, "ba ke li mo", 2)
    done = passes(daemon, "replay")
    wait_for_pass(daemon, "replay", done + 1)
    worst_s = max(timed(daemon, "ba ke li mo", 1)[0] for _ in range(6))
    assert worst_s < 1.2, "one token of the user's, not a replay's too"


def test_a_replay_that_was_given_up_holds_up_nobody(make_daemon: MakeDaemon):
    rare = {"warmth.min_interval_s": 300.0, "warmth.max_interval_s": 300.0}
    daemon = warm_daemon(make_daemon, rare, STANDIN_TOKEN_MS="1500")  # 300 ms passed before the user came
    timed(daemon, "ba ke li mo", 2)
    perf = f"http://127.0.0.1:{daemon.status()['engine']['port']}/api/extra/perf"
    warming = threading.Thread(target=lambda: daemon.verb("warm"))
    warming.start()
    daemon.wait_for(lambda _: httpx.get(perf, trust_env=False).json()["idle"] == 0, "the replay")
    timed(daemon, "ba ke li mo", 1)
    warming.join(60)
    assert not daemon.events("keepwarm")[-1]["is_complete"]
    timed(daemon, "ba ke li mo", 1)
    assert "could not be sent" not in daemon.state.output.read_text(), "the next request waits for that"


def test_nothing_is_sent_while_a_request_runs(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon, STANDIN_TOKEN_MS="60")
    timed(daemon, "ba ke", 1)
    asking = threading.Thread(target=lambda: daemon.complete("ba ke", 60))
    asking.start()
    daemon.wait_for(lambda status: status["requests_in_flight"] == 1)
    before = len(daemon.events("keepwarm"))
    asking.join(60)
    assert len(daemon.events("keepwarm")) == before


def test_after_a_crash_the_last_turn_is_processed_again_in_the_background(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon)
    _, reply = timed(daemon, STORY, 4)
    first = daemon.status()["engine"]["pid"]
    psutil.Process(first).kill()
    daemon.wait_ready(other_than=first)
    done = passes(daemon, "replay")
    wait_for_pass(daemon, "replay", done + 1)
    assert timed(daemon, STORY + reply, 1)[0] < 0.6


@may_lock
@on_linux
def test_where_the_engines_lock_fails_emberd_locks_the_pages_itself_and_lets_go_when_told(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon, {"engine.lock": "always"}, STANDIN_MLOCK_FAILS="1")
    status = daemon.wait_for(lambda status: bool(status["warmth"]["is_locked_outside"]), "a lock from outside")
    assert daemon.child is not None
    touchers = [
        child.pid for child in psutil.Process(daemon.child.pid).children() if child.pid != status["engine"]["pid"]
    ]
    size = status["residency"]["total_bytes"]
    assert (ThisHost().engine_memory(touchers).locked_bytes or 0) >= size
    assert "let go for" in daemon.verb("cool", "10m").stdout
    assert ThisHost().engine_memory(touchers).locked_bytes == 0
    assert not daemon.status()["warmth"]["is_locked_outside"]
    daemon.complete("ba ke", 1)
    daemon.wait_for(lambda status: bool(status["warmth"]["is_locked_outside"]), "the next request ends it")


def test_a_pause_is_kept_until_its_end_or_until_told(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon)
    wait_for_pass(daemon, "tiny")
    assert "for 30" in daemon.verb("pause", "30m").stdout
    assert daemon.status()["warmth"]["paused_for_s"] > 1700
    assert json.loads(daemon.verb("resume", "--json").stdout)["was_paused"]
    assert daemon.status()["warmth"]["paused_for_s"] is None
    assert daemon.verb("pause", "soon").returncode == 2
    said = daemon.verb("warm")
    assert said.returncode == 0
    assert "tiny" in said.stdout


def test_switched_off_it_does_nothing(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon, {"warmth.mode": "off"})
    assert json.loads(daemon.verb("warm", "--json").stdout)["reason"] == "off"
    assert not daemon.events("keepwarm")
    assert httpx.get(f"{daemon.url}/emberd/warmz", timeout=5, trust_env=False).status_code == 503


def test_warmz_tells_of_a_warm_model(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon)
    wait_for_pass(daemon, "tiny")
    assert httpx.get(f"{daemon.url}/emberd/warmz", timeout=5, trust_env=False).status_code == 200


def test_a_turn_that_cannot_be_replayed_leaves_the_cache_alone_and_nothing_is_tried_in_vain(
    make_daemon: MakeDaemon,
):
    daemon = warm_daemon(make_daemon, {"engine.lock": "never"})
    wait_for_pass(daemon, "tiny")
    body = {"prompt": STORY, "max_length": 1, "images": ["aGk="]}
    httpx.post(f"{daemon.url}/api/v1/generate", json=body, timeout=60, trust_env=False).raise_for_status()
    before, touches = len(daemon.events("keepwarm")), passes(daemon, "touch")
    wait_for_pass(daemon, "touch", touches + 2)
    assert all(event["steps"] == ["touch"] and event["is_complete"] for event in daemon.events("keepwarm")[before:])
    assert timed(daemon, STORY)[0] < 0.6


def stream(daemon: Daemon, prompt: str, length: int = 4) -> None:
    body = {"prompt": prompt, "max_length": length}
    answer = httpx.post(f"{daemon.url}/api/extra/generate/stream", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200


def test_the_next_first_token_is_foretold_and_held_against_what_came(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon)
    stream(daemon, "ba ke li mo")
    wait_for_pass(daemon, "replay", 2)
    told = daemon.wait_for(lambda status: status["warmth"]["forecast"]["first_token_s"] is not None)
    assert told["warmth"]["forecast"]["temperature"] == "hot"
    judged = len(daemon.events("first_token"))
    stream(daemon, "ba ke li mo")
    seen = daemon.wait_event("first_token", judged + 1)
    assert seen["temperature"] == "hot"
    assert 0 < seen["forecast_s"] < 2
    assert 0.3 < seen["took_s"] < 2, "the stand-in looks for the first words after 0.35 s, as the original does"
    assert "hot, first token after about" in daemon.verb("status").stdout


def test_what_keeping_warm_cost_today_survives_a_restart(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon)
    timed(daemon, "ba ke", 1)
    wait_for_pass(daemon, "replay", 2)
    before = daemon.status()["warmth"]["cost_today"]
    assert before["passes"] >= 2
    assert before["engine_s"] > 0
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0
    daemon.write_settings(warmth__mode="off")
    daemon.start()
    after = daemon.wait_ready()["warmth"]
    assert after["cost"]["passes"] == 0
    assert after["cost_today"]["passes"] >= before["passes"]


def test_in_the_hours_for_other_work_nothing_is_warmed_until_somebody_asks(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon, {"warmth.cool_hours": ["00:00-24:00"], "engine.lock": "never"})
    said = json.loads(daemon.verb("warm", "--json").stdout)
    assert (said["steps"], said["reason"]) == ([], "cool")
    timed(daemon, "ba ke", 1)
    wait_for_pass(daemon, "replay")


def test_without_reprime_a_new_engine_gets_no_user_s_prompt_from_emberd(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon, {"warmth.reprime": False})
    timed(daemon, STORY, 2)
    first = daemon.status()["engine"]["pid"]
    psutil.Process(first).kill()
    daemon.wait_ready(other_than=first)
    tinies = passes(daemon, "tiny")
    wait_for_pass(daemon, "tiny", tinies + 1)
    assert timed(daemon, STORY, 1)[0] > 1.4


# --- proven by the engine's own counts ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.76", "1.104", "1.115.1"])
def test_the_status_tells_what_koboldcpp_reused_for_a_user_and_for_a_replay(make_daemon: MakeDaemon, version: str):
    daemon = warm_daemon(make_daemon, STANDIN_VERSION=version)
    _, reply = timed(daemon, STORY, 4)
    told = daemon.status()["warmth"]["reuse"]["last_turn"]
    assert told["processed"] == pytest.approx(301, abs=3)
    done = passes(daemon, "replay")
    wait_for_pass(daemon, "replay", done + 1)
    reuse = daemon.status()["warmth"]["reuse"]
    assert reuse["last_replay"]["processed"] <= 3
    assert reuse["last_replay"]["reused"] > 290
    assert (reuse["misses"], reuse["barred"]) == (0, [])
    timed(daemon, f"{STORY}{reply} and then", 1)
    status = daemon.status()["warmth"]
    assert status["reuse"]["last_turn"]["processed"] < 10
    assert status["reuse"]["lost_turns"] == 0
    assert 300 < status["cost"]["processed_tokens"] + 300 < 400
    assert "tokens reused" in daemon.verb("status").stdout


def test_an_engine_that_keeps_no_prompt_is_sent_one_replay_and_no_more(make_daemon: MakeDaemon):
    settings = {"engine.extra_args": ["--parallelrequests", "4"], "engine.lock": "never"}
    daemon = warm_daemon(make_daemon, settings, STANDIN_VERSION="1.115.1")
    timed(daemon, STORY, 4)
    seen = daemon.wait_event("replay_missed")
    assert seen["processed_tokens"] > 300
    assert seen["is_barred"]
    touches = passes(daemon, "touch")
    wait_for_pass(daemon, "touch", touches + 2)
    assert not passes(daemon, "replay")
    assert len(daemon.events("replay_missed")) == 1
    timed(daemon, STORY, 4)
    touches = passes(daemon, "touch")
    wait_for_pass(daemon, "touch", touches + 2)
    assert len(daemon.events("replay_missed")) == 1
    codes = {each["code"]: each for each in json.loads(daemon.verb("doctor", "--json").stdout)["conditions"]}
    assert "1 of 1 replays" in codes["WARMTH_WASTED"]["evidence"]
    assert "sent no more" in daemon.verb("status").stdout


def test_a_user_who_left_while_the_prompt_was_processed_makes_no_replay_miss(make_daemon: MakeDaemon):
    daemon = warm_daemon(make_daemon)
    with pytest.raises(httpx.ReadTimeout):
        daemon.complete(STORY, 4, timeout_s=0.4)
    done = passes(daemon, "replay")
    wait_for_pass(daemon, "replay", done + 2)
    reuse = daemon.status()["warmth"]["reuse"]
    assert (reuse["misses"], reuse["barred"]) == (0, [])
    assert timed(daemon, STORY)[0] < 0.6, "the rest was processed in the background"
