"""`emberd status`: how the engine is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from emberd.cli.talk import as_json, ask_daemon, duration, gib, residency_words, show
from emberd.host import ThisHost

_COLOURS = {"READY": "green", "FAILED": "red", "BACKOFF": "yellow", "STOPPED": "red"}


@click.command("status")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Show the engine's state; exit code 3 if emberd is not running."""
    show(ask_daemon(config, "status"), is_json, print_status)


def print_status(status: dict[str, Any]) -> None:
    """Print a status for a person."""
    from rich.console import Console  # noqa: PLC0415  # heavy, and not needed for --json
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value, style in (_standby_rows if status["state"] == "STANDBY" else _rows)(status):
        table.add_row(name, Text(value, style=style))
    Console(highlight=False).print(table)


def _rows(status: dict[str, Any]) -> list[tuple[str, str, str]]:
    state = status["state"]
    rows = [("engine", f"{state} for {duration(status['state_for_s'])}", _COLOURS.get(state, "cyan"))]
    if status["reason"]:
        rows.append(("", status["reason"], "red" if state == "FAILED" else "dim"))
    if status["loading"]:
        loading = status["loading"]
        rows.append(("loading", " ".join(filter(None, (loading["phase"], loading["detail"]))), ""))
    if status["next_start_in_s"] is not None:
        rows.append(("next start", f"in {duration(max(status['next_start_in_s'], 0))}", ""))
    rows.append(("endpoint", status["endpoint"], ""))
    rows.append(("model", Path(status["model"]).name if status["model"] else "named in engine.kcpps", ""))
    engine = status["engine"]
    if engine:
        age = duration(time.time() - engine["started_at"])
        adopted = ", adopted" if engine["adopted"] else ""
        rows.append(("process", f"{engine['kind']}, pid {engine['pid']}, up {age}{adopted}", ""))
    if status["lock"]:
        rows += _lock_rows(status["lock"])
    if status["residency"]:
        seen = status["residency"]
        rows.append(("resident", residency_words(seen), "dim" if seen["share"] is None else ""))
    rows.append(("warmth", _warmth_words(status["warmth"]), ""))
    rows += _reuse_rows(status["warmth"]["reuse"])
    rows += _forecast_rows(status["warmth"])
    rows += _memory_rows(status["memory"])
    rows += [("sleep", "prevented while on mains (power.prevent_sleep)", "")] * status["prevents_sleep"]
    heartbeat = status["metal_heartbeat"]
    if heartbeat:
        words = (heartbeat["state"], heartbeat["message"], heartbeat["remedy"])
        rows.append(("heartbeat", ". ".join(word for word in words if word), "dim"))
    if status["swap"] and status["swap"]["written_today_bytes"]:
        rows.append(("swap", _swap_words(status["swap"]), ""))
    rows.append(("requests", _request_words(status), ""))
    if status["last_exit"]:
        rows.append(("last exit", status["last_exit"], "dim"))
    rows += [("notice", f"{notice['message']} ({notice['code']})", "yellow") for notice in status["notices"]]
    rows.append(("emberd", f"{status['version']}, pid {status['pid']}, up {duration(status['uptime_s'])}", "dim"))
    return rows


def _standby_rows(status: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Say why there is no engine: emberd itself cannot start, and waits."""
    rows = [
        ("emberd", f"has waited for {duration(status['state_for_s'])}: it cannot start", "red"),
        ("", status["reason"], "red"),
        ("", status["remedy"], ""),
        ("next try", f"in {duration(status['next_start_in_s'])}, when a file changes, or: emberd restart", ""),
        ("endpoint", f"{status['endpoint']}, answers 503" if status["endpoint"] else "not held", ""),
        ("settings", status["settings_file"], ""),
        ("version", f"{status['version']}, pid {status['pid']}, up {duration(status['uptime_s'])}", "dim"),
    ]
    return [row for row in rows if row[1]]


def _warmth_words(warmth: dict[str, Any]) -> str:
    if warmth["mode"] == "off":
        return "off"
    words = []
    for key, word in (("cool_for_s", "cool for"), ("paused_for_s", "paused for")):
        if warmth[key]:
            words.append(f"{word} {duration(warmth[key])}")
    if warmth["is_helpless"]:
        words.append("the computer swaps, and nothing that emberd may let go would help")
    if warmth["over_budget_for_s"]:
        words.append(f"over its budget for {duration(warmth['over_budget_for_s'])}")
    if warmth["hold"] != "all":
        words.append(f"let go ({warmth['hold'].replace('_', ' ')}): the computer needs the memory")
    if warmth["last"]:
        last = warmth["last"]
        ago = "" if warmth["warm_for_s"] is None else f" {duration(warmth['warm_for_s'])} ago"
        words.append(f"{', '.join(last['steps']) or 'nothing'}{ago} in {last['seconds']:.2f} s ({last['reason']})")
    if warmth["next_look_in_s"] is not None:
        words.append(f"next in {duration(warmth['next_look_in_s'])}")
    return "; ".join(words) or "not yet"


def _reuse_rows(reuse: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Say what the engine told of its prompt cache; nothing before it has told anything."""
    words = [
        f"{name} {counts['reused']} tokens reused, {counts['processed']} processed"
        for name, counts in (("last turn:", reuse["last_turn"]), ("last replay:", reuse["last_replay"]))
        if counts["reused"] is not None and counts["processed"] is not None
    ]
    rows = [("cache", "; ".join(words), "")] if words else []
    if reuse["barred"]:
        rows.append(("", "replays save nothing on this engine, and are sent no more", "yellow"))
    return rows


def _forecast_rows(warmth: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    told, cost = warmth["forecast"], warmth["cost_today"]
    if told["first_token_s"] is not None:
        words = f"{told['temperature']}, first token after about {told['first_token_s']:.2g} s"
        if told["last"] and told["last"]["forecast_s"] is not None:
            words += (
                f" (last time: {told['last']['forecast_s']:.2g} s foretold, {told['last']['took_s']:.2g} s taken)"
            )
        rows.append(("next", words, ""))
    if cost["passes"]:
        words = f"{cost['passes']} passes today, {cost['cpu_s']:.1f} s of processor time"
        if cost["processed_tokens"]:
            words += f", {cost['processed_tokens']} tokens of prompts"
        if cost["read_bytes"]:
            words += f", {cost['read_bytes'] / 1e9:.2f} GB read"
        rows.append(("cost", words, "dim"))
    return rows


def _request_words(status: dict[str, Any]) -> str:
    words = f"{status['requests_in_flight']} running, {status['requests_waiting']} waiting"
    if status["requests_waiting"]:
        words += f" for up to {duration(status['longest_wait_s'])}"
    return words


def _lock_rows(lock: dict[str, Any]) -> list[tuple[str, str, str]]:
    sizes = ""
    if lock["locked_bytes"] is not None and lock["needed_bytes"]:
        sizes = f", {lock['locked_bytes'] >> 20} of {lock['needed_bytes'] >> 20} MiB"
    style = {"HELD": "green", "PARTIAL": "yellow", "ABSENT": "yellow"}.get(lock["state"], "dim")
    rows = [("lock", f"{lock['state']}{sizes}", style)]
    rows += [("", text, "dim") for text in (lock["message"], lock["remedy"]) if text]
    return rows


def _memory_rows(memory: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    engine, system = _engine_words(memory["engine"]), memory["system"]
    if engine:
        rows.append(("memory", engine, ""))
    style = {"warn": "yellow", "critical": "red"}.get(system["pressure"], "")
    rows.append(("pressure", _system_words(system), style))
    power, gpu = memory["power"], memory["gpu"]
    if power["battery_share"] is not None or power["is_low_power"]:
        charge = "" if power["battery_share"] is None else f", {power['battery_share']:.0%} charged"
        saving = ", low power mode" if power["is_low_power"] else ""
        rows.append(("power", f"{power['source']}{charge}{saving}", ""))
    if gpu:
        limit = gpu["wired_limit_bytes"]
        words = "unknown" if limit is None else f"{gib(limit)} GiB" if limit else "the system's default"
        collector = {True: ", collector off", False: ", collector on"}.get(gpu["is_collector_off"], "")
        rows.append(("GPU", f"wired limit {words}{collector}", ""))
    return rows


def _engine_words(engine: dict[str, Any]) -> str:
    parts = (
        ("resident_bytes", "resident"),
        ("locked_bytes", "locked"),
        ("swapped_bytes", "compressed or swapped" if ThisHost.name == "darwin" else "swapped"),
        ("footprint_bytes", "footprint"),
    )
    return ", ".join(f"{gib(engine[key])} GiB {word}" for key, word in parts if engine[key] is not None)


def _system_words(system: dict[str, Any]) -> str:
    words = [system["pressure"]]
    if system["available_bytes"] is not None and system["total_bytes"] is not None:
        words.append(f"{gib(system['available_bytes'])} of {gib(system['total_bytes'])} GiB available")
    if system["swap_used_bytes"] is not None and system["swap_total_bytes"]:
        words.append(f"{gib(system['swap_used_bytes'])} of {gib(system['swap_total_bytes'])} GiB swap used")
    traffic = (("swap_in_bytes_per_s", "from"), ("swap_out_bytes_per_s", "to"))
    words += [f"{system[key] / 1e6:.1f} MB/s {way} swap" for key, way in traffic if system[key]]
    return ", ".join(words)


def _swap_words(swap: dict[str, Any]) -> str:
    engine = swap["engine_idle_bytes"] + swap["engine_busy_bytes"]
    return (
        f"{swap['written_today_bytes'] / 1e9:.2f} GB written today ({swap['share_of_endurance']:.4%} of the SSD's "
        f"endurance), {engine / 1e9:.2f} GB by the engine, {swap['engine_idle_bytes'] / 1e9:.2f} GB while idle"
    )
