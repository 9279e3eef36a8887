"""A report to paste into an issue: what emberd sees, without paths, names, addresses and texts. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.words import duration, seconds, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from emberd.core.status import MemoryStatus, ResidencyStatus, Status, WarmthStatus


def make_report(status: Status, codes: Iterable[str], system: str) -> str:
    """Return lines of text; each names what it tells.

    Only figures, states and codes are taken over: reasons, evidence and command lines may hold a person's paths.

    Args:
        status: of the daemon.
        codes: of the doctor's conditions.
        system: the operating system, in a word or two.
    """
    engine = status.engine
    kind = f"{engine.kind}, adopted" if engine and engine.adopted else engine.kind if engine else "none"
    rows = [
        ("emberd", f"{status.version}, up {duration(status.uptime_s)}"),
        ("system", system),
        ("engine", f"{kind}, {status.state} for {duration(status.state_for_s)}"),
        ("starts", f"{max(status.starts, 0)}, crashes in a row {status.crashes_in_a_row}"),
        ("lock", status.lock.state.value if status.lock else "unknown"),
        *(_of_residency(status.residency) if status.residency else ()),
        *(_of_memory(status.memory) if status.memory else ()),
        *(_of_warmth(status.warmth) if status.warmth else ()),
        ("requests", f"{status.requests_in_flight} running, {status.requests_waiting} waiting"),
        ("swap", f"{size(status.swap.written_today_bytes)} written today" if status.swap else "unknown"),
        ("notices", ", ".join(each.code for each in status.notices) or "none"),
        ("doctor", ", ".join(codes) or "nothing"),
    ]
    return "".join(f"{name + ':':<12}{words}\n" for name, words in rows)


def _of_residency(seen: ResidencyStatus) -> Iterator[tuple[str, str]]:
    share = seen.unknown or "unknown" if seen.share is None else f"{seen.share:.1%}"
    total = "" if seen.total_bytes is None else f" of {size(seen.total_bytes)}"
    yield "resident", f"{share}{total}, by {seen.source or 'nothing'}"


def _of_memory(memory: MemoryStatus) -> Iterator[tuple[str, str]]:
    engine, system = memory.engine, memory.system
    parts = (
        ("resident", engine.resident_bytes),
        ("locked", engine.locked_bytes),
        ("swapped", engine.swapped_bytes),
        ("footprint", engine.footprint_bytes),
    )
    yield "memory", ", ".join(f"{size(value)} {name}" for name, value in parts if value is not None) or "unknown"
    known = (
        ("available", system.available_bytes),
        ("total", system.total_bytes),
        ("swap used", system.swap_used_bytes),
    )
    words = [f"{size(value)} {name}" for name, value in known if value is not None]
    yield "pressure", ", ".join((system.pressure.value, *words))


def _of_warmth(warmth: WarmthStatus) -> Iterator[tuple[str, str]]:
    told, cost = warmth.forecast, warmth.cost_today
    next_reply = "unknown" if told.first_token_s is None else f"about {seconds(told.first_token_s)}"
    yield "warmth", f"{warmth.mode}, {told.temperature}, holds {warmth.hold}, next reply {next_reply}"
    if told.last is not None:
        foretold = "nothing" if told.last.forecast_s is None else seconds(told.last.forecast_s)
        yield "last reply", f"after {seconds(told.last.took_s)}, forecast {foretold}, {told.last.temperature}"
    yield "cost today", f"{cost.passes} passes, {cost.cpu_s:.1f} s of processor time, {size(cost.read_bytes)} read"
