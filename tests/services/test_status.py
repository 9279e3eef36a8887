"""`emberd status --json` keeps the keys, and their order, that it had before the status became a type."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

BEFORE = """
version pid uptime_s endpoint endpoints endpoint_lacks
model settings_file state state_for_s reason crashes_in_a_row next_start_in_s starts
last_exit requests_in_flight requests_held
loading: phase detail
engine: kind pid port adopted started_at command
lock: state locked_bytes needed_bytes reason message remedy notes
metal_heartbeat
notices[]: code message
output_file requests_waiting longest_wait_s seconds_since_knock remembers_turn
memory
memory.engine: resident_bytes anonymous_bytes file_bytes locked_bytes swapped_bytes is_swap_estimated
memory.engine: footprint_bytes major_faults read_bytes proportional_bytes
memory.system: total_bytes available_bytes wired_bytes compressed_bytes swap_total_bytes swap_used_bytes
memory.system: swapped_in_bytes swapped_out_bytes pressure stall_some_share stall_full_share
memory.system: swap_in_bytes_per_s swap_out_bytes_per_s
memory.power: source battery_share is_low_power
memory.gpu
prevents_sleep
residency: share at_least at_most resident_bytes total_bytes source unknown message age_s
warmth: mode hold is_locked_outside paused_for_s cool_for_s interval_s next_look_in_s warm_for_s
warmth.last: reason steps is_complete seconds had_lost cold_share swapped_bytes cpu_s
warmth.progress warmth.hot_replay_s
warmth.forecast: temperature first_token_s
warmth.forecast.last: temperature forecast_s took_s
warmth.cost: passes read_bytes engine_s cpu_s
warmth.cost_today: passes read_bytes engine_s cpu_s
swap: written_today_bytes engine_idle_bytes engine_busy_bytes other_bytes unknown_bytes share_of_endurance
log
"""
"""Recorded from the daemon of commit 21eed80 on Linux. `a: b` is the keys `a` and `a.b`; `a[]`, items of a list."""
BEFORE_STANDBY = """
version pid uptime_s endpoint endpoints endpoint_lacks
model settings_file state state_for_s reason remedy exit_code failures next_start_in_s
starts engine
"""
NEW = """
remedy exit_code failures requests swap.endurance_bytes
serving: name model is_of_settings switched_by survives_restart
files[]: path role size_bytes held resident_bytes locked_bytes
warmth.is_helpless warmth.is_storming warmth.over_budget_for_s warmth.given_back
warmth.relief: bytes_per_s_before bytes_per_s_after
context: tokens conversations kv_cache_bytes is_measured
warmth.reuse: replays misses wasted_tokens lost_turns barred
warmth.reuse.last_turn: reused processed generated
warmth.reuse.last_replay: reused processed generated
warmth.cost.processed_tokens warmth.cost_today.processed_tokens
"""
NEW_STANDBY = """
crashes_in_a_row last_exit requests_in_flight requests_held loading lock metal_heartbeat notices output_file
requests_waiting longest_wait_s seconds_since_knock remembers_turn memory prevents_sleep residency warmth swap log
serving files context requests
"""
"""One that cannot start has all keys of one that can, with nothing in them."""
PASSING = {"warmth.progress.done_bytes", "warmth.progress.total_bytes"}
"""While a pass runs; it had them before, too."""


def keys_in(table: str, *nothing_in: str) -> list[str]:
    """Return the keys of a table, but for those below the keys that have nothing in them."""
    keys: list[str] = []
    for line in table.strip().splitlines():
        at, _, names = line.rpartition(": ")
        keys += [at.removesuffix("[]")] * bool(at)
        keys += [f"{at}.{name}" if at else name for name in names.split()]
    below = tuple(f"{each}{sign}" for each in nothing_in for sign in ".[")
    return [key for key in dict.fromkeys(keys) if not key.startswith(below)]


def keys_of(value: Any, at: str = "") -> Iterator[str]:
    """Yield each key of an answer."""
    if isinstance(value, list):
        for each in value:
            yield from keys_of(each, f"{at}[]")
    if isinstance(value, dict):
        for name, each in value.items():
            path = f"{at}.{name}" if at else name
            yield path
            yield from keys_of(each, path)


def compare(daemon: Daemon, before: list[str], new: list[str]) -> None:
    """Fail if a key is missing, has another place, or is new and not named here."""
    now = list(dict.fromkeys(keys_of(json.loads(daemon.verb("status", "--json").stdout))))
    assert [key for key in now if key in before] == before
    assert set(now) - set(before) - PASSING == set(new)


def test_an_engine_that_is_up_has_the_keys_that_it_had(make_daemon: MakeDaemon):
    settings = {"warmth.mode": "auto", "warmth.min_interval_s": 1, "warmth.max_interval_s": 2}
    daemon = make_daemon({**settings, "engine.extra_args": ["--host", "0.0.0.0"]})
    daemon.start()
    daemon.wait_ready()
    body = {"prompt": "Once upon a time", "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{daemon.url}/v1/completions", json=body, timeout=40, trust_env=False) as reply:
        assert reply.read()
    daemon.wait_for(lambda status: status["warmth"]["last"] and status["warmth"]["forecast"]["last"])
    compare(daemon, keys_in(BEFORE, "loading"), keys_in(NEW))


def test_an_engine_that_loads_has_the_keys_that_it_had(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_LOAD_SECONDS="20")
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "LOADING" and bool(status["loading"]))
    nothing_in = ("lock", "notices", "warmth.last", "warmth.forecast.last")
    compare(daemon, keys_in(BEFORE, *nothing_in), keys_in(NEW, "serving", "files", "context"))


def test_an_engine_that_has_failed_has_the_keys_that_it_had(make_daemon: MakeDaemon):
    daemon = make_daemon({"lifecycle.crash_limit": 1}, STANDIN_CRASH_AT_START="3")
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "FAILED")
    nothing_in = ("loading", "engine", "lock", "notices", "residency", "warmth.last", "warmth.forecast.last")
    compare(daemon, keys_in(BEFORE, *nothing_in), keys_in(NEW, "serving", "files", "context"))


def test_an_emberd_that_cannot_start_has_the_keys_that_it_had(make_daemon: MakeDaemon):
    daemon = make_daemon({"model.path": "/nowhere/model.gguf"})
    daemon.environment["XPC_SERVICE_NAME"] = "io.github.emberd.test"
    for _ in range(2):
        daemon.start()
        assert daemon.end() == 66
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "STANDBY")
    compare(daemon, keys_in(BEFORE_STANDBY), keys_in(NEW_STANDBY))
