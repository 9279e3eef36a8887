"""`emberd status`: how the engine is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from emberd.cli.talk import as_json, ask_daemon, file_words, gib, given_back_words, residency_words, show
from emberd.core.memory import Pressure
from emberd.core.status import Status, from_plain
from emberd.core.words import duration
from emberd.host import ThisHost

if TYPE_CHECKING:
    from rich.table import Table

    from emberd.core.lock import LockVerdict
    from emberd.core.status import (
        ContextStatus,
        EngineMemoryStatus,
        MemoryStatus,
        ReuseStatus,
        SwapStatus,
        SystemMemoryStatus,
        WarmthStatus,
    )

_COLOURS = {"READY": "green", "FAILED": "red", "BACKOFF": "yellow", "STOPPED": "red"}


@click.command("status")
@click.option("--watch", "is_watched", is_flag=True, help="Go on until Ctrl-C, with the last hour as small charts.")
@as_json
@click.pass_obj
def command(config: str | None, *, is_json: bool, is_watched: bool) -> None:
    """Show the engine's state; exit code 3 if emberd is not running.

    With --watch it is shown anew every two seconds, also after emberd was away; with --json as a line each time.
    """
    if is_watched:
        from emberd.cli.watch import watch  # noqa: PLC0415  # only for this

        watch(config, status_table, is_json=is_json)
        return
    show(ask_daemon(config, "status"), is_json, lambda plain: print_status(from_plain(Status, plain)))


def print_status(status: Status) -> None:
    """Print a status for a person."""
    from rich.console import Console  # noqa: PLC0415  # heavy, and not needed for --json

    Console(highlight=False).print(status_table(status))


def status_table(status: Status) -> Table:
    """Return a status for a person."""
    from rich.table import Table  # noqa: PLC0415  # heavy, and not needed for --json
    from rich.text import Text  # noqa: PLC0415

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value, style in (_standby_rows if status.state == "STANDBY" else _rows)(status):
        table.add_row(name, Text(value, style=style))
    return table


def _rows(status: Status) -> list[tuple[str, str, str]]:
    rows = [
        ("engine", f"{status.state} for {duration(status.state_for_s)}", _COLOURS.get(status.state, "cyan")),
        ("", status.reason, "red" if status.state == "FAILED" else "dim"),
    ]
    if status.loading:
        rows.append(("loading", f"{status.loading.phase} {status.loading.detail}".strip(), ""))
    if status.next_start_in_s is not None:
        rows.append(("next start", f"in {duration(max(status.next_start_in_s, 0))}", ""))
    rows.append(("endpoint", ", ".join(status.endpoints) or status.endpoint or "", ""))
    rows.append(("", status.endpoint_lacks, "yellow"))
    rows += _model_rows(status)
    if status.engine:
        age = duration(time.time() - status.engine.started_at)
        adopted = ", adopted" if status.engine.adopted else ""
        rows.append(("process", f"{status.engine.kind}, pid {status.engine.pid}, up {age}{adopted}", ""))
    if status.lock:
        rows += _lock_rows(status.lock)
    rows.append(("context", _context_words(status.context), ""))
    if status.residency:
        style = "dim" if status.residency.share is None else ""
        rows.append(("resident", residency_words(status.residency), style))
    if status.warmth:
        rows.append(("warmth", _warmth_words(status.warmth), ""))
        rows += _reuse_rows(status.warmth.reuse)
        rows += _forecast_rows(status.warmth)
    if status.memory:
        rows += _memory_rows(status.memory)
    rows += [("sleep", "prevented while on mains (power.prevent_sleep)", "")] * status.prevents_sleep
    if status.metal_heartbeat:
        heartbeat = status.metal_heartbeat
        words = (heartbeat.state.value, heartbeat.message, heartbeat.remedy)
        rows.append(("heartbeat", ". ".join(word for word in words if word), "dim"))
    if status.swap and status.swap.written_today_bytes:
        rows.append(("swap", _swap_words(status.swap), ""))
    rows.append(("requests", _request_words(status), ""))
    rows.append(("last exit", status.last_exit or "", "dim"))
    rows += [("notice", f"{notice.message} ({notice.code})", "yellow") for notice in status.notices]
    rows.append(("emberd", _daemon_words(status), "dim"))
    return [row for row in rows if row[1]]


def _model_rows(status: Status) -> list[tuple[str, str, str]]:
    """Say which model serves, and which one the settings name."""
    named = Path(status.model).name if status.model else "named in engine.kcpps"
    serving = status.serving
    rows = [("model", named, "")]
    if serving is not None and not serving.is_of_settings:
        now = Path(serving.model).name if serving.model else serving.name or "none, it was unloaded"
        how = f"switched by {serving.switched_by}; " if serving.switched_by else ""
        then = "keeps it" if serving.survives_restart else "ends that"
        rows = [("model", f"{now} ({how}a restart of the engine {then})", "yellow")]
        rows.append(("", f"the settings: {named}", "dim"))
    elif serving is not None and serving.model:
        rows = [("model", Path(serving.model).name, "")]
    if len(status.files) > 1 or any(each.held != "mapped" for each in status.files):
        rows += [("files" if number == 0 else "", file_words(each), "") for number, each in enumerate(status.files)]
    return rows


def _standby_rows(status: Status) -> list[tuple[str, str, str]]:
    """Say why there is no engine: emberd stands by."""
    next_try = f"in {duration(status.next_start_in_s or 0)}, when a file changes, or: emberd restart"
    rows = [
        ("emberd", f"has waited for {duration(status.state_for_s)}: it cannot start", "red"),
        ("", status.reason, "red"),
        ("", status.remedy or "", ""),
        ("next try", next_try, ""),
        ("endpoint", f"{status.endpoint}, answers 503" if status.endpoint else "not held", ""),
        ("settings", status.settings_file, ""),
        ("version", _daemon_words(status), "dim"),
    ]
    return [row for row in rows if row[1]]


def _daemon_words(status: Status) -> str:
    return f"{status.version}, pid {status.pid}, up {duration(status.uptime_s)}"


def _context_words(context: ContextStatus | None) -> str:
    if context is None or context.tokens is None:
        return ""
    words = f"{context.tokens:,} tokens"
    if context.conversations > 1:
        words += f", {context.conversations} conversations"
    if context.kv_cache_bytes is not None:
        words += f", KV cache {gib(context.kv_cache_bytes)} GiB" + ("" if context.is_measured else " (estimated)")
    return words


def _warmth_words(warmth: WarmthStatus) -> str:
    if warmth.mode == "off":
        return "off"
    words = []
    if warmth.cool_for_s and warmth.given_back:
        words.append(given_back_words(warmth.given_back))
    for left_s, word in ((warmth.cool_for_s, "cool for"), (warmth.paused_for_s, "paused for")):
        if left_s:
            words.append(f"{word} {duration(left_s)}")
    if warmth.is_helpless:
        words.append("the computer swaps, and nothing that emberd may let go would help")
    if warmth.over_budget_for_s:
        words.append(f"over its budget for {duration(warmth.over_budget_for_s)}")
    if warmth.hold != "all":
        words.append(f"let go ({warmth.hold.replace('_', ' ')}): the computer needs the memory")
    if warmth.last:
        last = warmth.last
        ago = "" if warmth.warm_for_s is None else f" {duration(warmth.warm_for_s)} ago"
        words.append(f"{', '.join(last.steps) or 'nothing'}{ago} in {last.seconds:.2f} s ({last.reason})")
    if warmth.next_look_in_s is not None:
        words.append(f"next in {duration(warmth.next_look_in_s)}")
    return "; ".join(words) or "not yet"


def _reuse_rows(reuse: ReuseStatus) -> list[tuple[str, str, str]]:
    """Return rows on the engine's counts of its prompt cache, none before there are any."""
    words = [
        f"{name} {counts.reused} tokens reused, {counts.processed} processed"
        for name, counts in (("last turn:", reuse.last_turn), ("last replay:", reuse.last_replay))
        if counts.prompt is not None
    ]
    rows = [("cache", "; ".join(words), "")] if words else []
    if reuse.barred:
        rows.append(("", "replays save nothing on this engine, and are sent no more", "yellow"))
    return rows


def _forecast_rows(warmth: WarmthStatus) -> list[tuple[str, str, str]]:
    rows = []
    told, cost = warmth.forecast, warmth.cost_today
    if told.first_token_s is not None:
        words = f"{told.temperature}, first token after about {told.first_token_s:.2g} s"
        if told.last and told.last.forecast_s is not None:
            words += f" (last time: {told.last.forecast_s:.2g} s foretold, {told.last.took_s:.2g} s taken)"
        rows.append(("next", words, ""))
    if cost.passes:
        passes = "pass" if cost.passes == 1 else "passes"
        words = f"{cost.passes} {passes} today, {cost.cpu_s:.1f} s of processor time"
        if cost.processed_tokens:
            words += f", {cost.processed_tokens} tokens of prompts"
        if cost.read_bytes:
            words += f", {cost.read_bytes / 1e9:.2f} GB read"
        rows.append(("cost", words, "dim"))
    return rows


def _request_words(status: Status) -> str:
    words = f"{status.requests_in_flight} running, {status.requests_waiting} waiting"
    if status.requests_waiting:
        words += f" for up to {duration(status.longest_wait_s)}"
    return words


def _lock_rows(lock: LockVerdict) -> list[tuple[str, str, str]]:
    sizes = ""
    if lock.locked_bytes is not None and lock.needed_bytes:
        sizes = f", {lock.locked_bytes >> 20} of {lock.needed_bytes >> 20} MiB"
    style = {"HELD": "green", "PARTIAL": "yellow", "ABSENT": "yellow"}.get(lock.state.value, "dim")
    rows = [("lock", f"{lock.state.value}{sizes}", style)]
    rows += [("", text, "dim") for text in (lock.message, lock.remedy)]
    return rows


def _memory_rows(memory: MemoryStatus) -> list[tuple[str, str, str]]:
    style = {Pressure.WARN: "yellow", Pressure.CRITICAL: "red"}.get(memory.system.pressure, "")
    rows = [("memory", _engine_words(memory.engine), ""), ("pressure", _system_words(memory.system), style)]
    power, gpu = memory.power, memory.gpu
    if power.battery_share is not None or power.is_low_power:
        charge = "" if power.battery_share is None else f", {power.battery_share:.0%} charged"
        saving = ", low power mode" if power.is_low_power else ""
        rows.append(("power", f"{power.source.value}{charge}{saving}", ""))
    if gpu:
        limit = gpu.wired_limit_bytes
        words = "unknown" if limit is None else f"{gib(limit)} GiB" if limit else "the system's default"
        collector = {True: ", collector off", False: ", collector on", None: ""}[gpu.is_collector_off]
        rows.append(("GPU", f"wired limit {words}{collector}", ""))
    return rows


def _engine_words(engine: EngineMemoryStatus) -> str:
    parts = (
        (engine.resident_bytes, "resident"),
        (engine.locked_bytes, "locked"),
        (engine.swapped_bytes, "compressed or swapped" if ThisHost.name == "darwin" else "swapped"),
        (engine.footprint_bytes, "footprint"),
    )
    return ", ".join(f"{gib(size_bytes)} GiB {word}" for size_bytes, word in parts if size_bytes is not None)


def _system_words(system: SystemMemoryStatus) -> str:
    words = [system.pressure.value]
    if system.available_bytes is not None and system.total_bytes is not None:
        words.append(f"{gib(system.available_bytes)} of {gib(system.total_bytes)} GiB available")
    if system.swap_used_bytes is not None and system.swap_total_bytes:
        words.append(f"{gib(system.swap_used_bytes)} of {gib(system.swap_total_bytes)} GiB swap used")
    traffic = ((system.swap_in_bytes_per_s, "from"), (system.swap_out_bytes_per_s, "to"))
    words += [f"{rate / 1e6:.1f} MB/s {way} swap" for rate, way in traffic if rate]
    return ", ".join(words)


def _swap_words(swap: SwapStatus) -> str:
    engine_bytes = swap.engine_idle_bytes + swap.engine_busy_bytes
    return (
        f"{swap.written_today_bytes / 1e9:.2f} GB written today ({swap.share_of_endurance:.4%} of the SSD's "
        f"endurance), {engine_bytes / 1e9:.2f} GB by the engine, {swap.engine_idle_bytes / 1e9:.2f} GB while idle"
    )
