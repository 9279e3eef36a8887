"""`emberd cool` and `warmth.cool_hours` where the engine holds the lock: it is stopped, and started when needed."""

from __future__ import annotations

import concurrent.futures
import json
import os
import resource
import signal
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from daemon_process import is_alive
from emberd.services.control import ask

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] not in {-1, resource.RLIM_INFINITY},
    reason="this user may not lock a model",
)
SETTINGS = {
    "engine.lock": "always",
    "warmth.mode": "auto",
    "warmth.min_interval_s": 1.0,
    "warmth.max_interval_s": 2.0,
}
STORY = " ".join(["ba", "ke", "li", "mo"] * 40)


def locked_daemon(make_daemon: MakeDaemon, settings: dict[str, Any] | None = None, **switches: str) -> Daemon:
    daemon = make_daemon({**SETTINGS, **(settings or {})}, **switches)
    daemon.start()
    return daemon


def wait_held(daemon: Daemon) -> dict[str, Any]:
    status = daemon.wait_for(lambda status: status["state"] == "READY" and status["lock"] is not None)
    assert status["lock"]["state"] == "HELD"
    return status


def wait_cool(daemon: Daemon) -> dict[str, Any]:
    return daemon.wait_for(lambda status: status["state"] == "COOL", "a cool engine")


def get(daemon: Daemon, path: str) -> httpx.Response:
    return httpx.get(f"{daemon.url}{path}", timeout=40, trust_env=False)


def test_a_held_lock_is_given_back_and_the_next_request_is_held_while_the_model_loads(make_daemon: MakeDaemon):
    daemon = locked_daemon(
        make_daemon, {"warmth.max_interval_s": 900.0}
    )  # no look starts it in the request's place
    before = wait_held(daemon)
    needed = before["lock"]["needed_bytes"]
    _ = daemon.complete("ba ke", 2)
    said = json.loads(daemon.verb("cool", "10m", "--json").stdout)["given_back"]
    assert said["engine_stopped"]
    assert said["locked_before_bytes"] >= needed
    assert said["resident_before_bytes"] > said["resident_after_bytes"] == said["locked_after_bytes"] == 0
    assert not is_alive(before["engine"]["pid"])
    cool = daemon.status()
    assert (cool["state"], cool["engine"], cool["warmth"]["given_back"]) == ("COOL", None, said)
    assert 500 < cool["warmth"]["cool_for_s"] <= 600
    shown = daemon.verb("status").stdout
    assert "given back" in shown
    assert "COOL" in shown
    assert {name: daemon.events("cooled")[-1][name] for name in said} == said
    assert get(daemon, "/emberd/readyz").json() == {"status": "COOL"}
    assert get(daemon, "/emberd/readyz").status_code == 200
    refused = get(daemon, "/api/extra/perf")
    assert refused.status_code == 503
    assert "starts it" in refused.text
    assert daemon.status()["state"] == "COOL"
    assert daemon.complete("ba ke", 2)
    after = wait_held(daemon)
    assert (after["starts"], after["warmth"]["cool_for_s"]) == (2, None)


def test_at_the_end_of_the_time_the_engine_is_started_and_the_last_turn_processed_again(make_daemon: MakeDaemon):
    daemon = locked_daemon(make_daemon)
    wait_held(daemon)
    reply = daemon.complete(STORY, 4)
    done = len(daemon.events("keepwarm"))
    text = daemon.verb("cool", "2s").stdout
    assert "let go for 2 s" in text
    assert "given back" in text
    daemon.wait_for(lambda status: status["starts"] == 2, "a second engine")
    wait_held(daemon)
    daemon.wait_for(
        lambda _: any("replay" in event["steps"] for event in daemon.events("keepwarm")[done:]), "a replay"
    )
    daemon.complete(f"{STORY}{reply} and then", 1)
    assert daemon.status()["warmth"]["reuse"]["last_turn"]["processed"] < 12


def test_a_request_at_any_moment_of_a_stop_is_answered(make_daemon: MakeDaemon):
    daemon = locked_daemon(make_daemon)
    wait_held(daemon)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for pause_s in (0.0, 0.05, 0.2):
            cooling = pool.submit(daemon.verb, "cool", "10m")
            asked = []
            for _ in range(5):
                asked.append(pool.submit(daemon.complete, "ba ke li", 2))
                concurrent.futures.wait(asked, timeout=pause_s)
            assert all(each.result() for each in asked)
            assert cooling.result().returncode == 0
    # The last verb may have been heard after the last request.
    assert daemon.complete("ba ke", 1)
    assert wait_held(daemon)["warmth"]["cool_for_s"] is None


def test_a_request_that_runs_is_not_cut_and_does_not_end_the_cool_spell(make_daemon: MakeDaemon):
    daemon = locked_daemon(make_daemon, STANDIN_TOKEN_MS="40")
    wait_held(daemon)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(daemon.complete, "ba ke", 150)
        daemon.wait_for(lambda status: status["requests_in_flight"] == 1)
        # Without a process of its own, which a busy computer may start only after the reply.
        assert ask(daemon.state.control, "cool", seconds=600)["is_put_off"]
        assert asked.result()
    assert wait_cool(daemon)["starts"] == 1


def test_in_the_hours_for_other_work_the_engine_rests_until_somebody_needs_it(make_daemon: MakeDaemon):
    daemon = locked_daemon(make_daemon, {"warmth.cool_hours": ["00:00-24:00"]})
    cool = wait_cool(daemon)
    assert cool["warmth"]["given_back"]["engine_stopped"]
    assert cool["warmth"]["cool_for_s"] > 0
    assert "the engine goes on" in daemon.verb("reload").stdout
    assert daemon.status()["state"] == "COOL"
    assert "start" in daemon.verb("warm").stdout
    wait_held(daemon)
    looks = daemon.status()["warmth"]["cost"]["passes"]
    daemon.wait_for(lambda status: status["warmth"]["cost"]["passes"] > looks + 1, "passes in spite of the hour")
    assert daemon.status()["state"] == "READY"


@pytest.mark.parametrize("verb", ["resume", "restart", "GET"])
def test_the_owner_and_a_page_that_is_opened_start_it_too(make_daemon: MakeDaemon, verb: str):
    daemon = locked_daemon(make_daemon, {"warmth.mode": "off"})
    wait_held(daemon)
    daemon.verb("cool", "10m")
    if verb == "GET":
        assert get(daemon, "/api/v1/model").status_code == 200
    else:
        assert daemon.verb(verb).returncode == 0
    assert wait_held(daemon)["warmth"]["cool_for_s"] is None


def test_a_page_that_polls_does_not_start_it(make_daemon: MakeDaemon):
    daemon = locked_daemon(make_daemon)
    wait_held(daemon)
    assert get(daemon, "/api/v1/model").status_code == 200
    daemon.verb("cool", "10m")
    said = get(daemon, "/api/v1/model")
    assert (said.status_code, said.headers["emberd-answer"]) == (200, "remembered; state=COOL")
    assert get(daemon, "/api/extra/preloadstory").status_code == 503
    assert get(daemon, "/health").status_code == 503
    assert daemon.status()["state"] == "COOL"


def test_emberd_ends_and_begins_as_usual_while_the_engine_rests(make_daemon: MakeDaemon):
    daemon = locked_daemon(make_daemon)
    wait_held(daemon)
    daemon.verb("cool", "10m")
    daemon.kill()
    daemon.start()
    wait_held(daemon)
    daemon.verb("cool", "10m")
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0
