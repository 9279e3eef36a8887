"""What the history keeps: one row a minute, and each first token. Pure. Unknown is None, never zero."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from emberd.core.forecast import Temperature
from emberd.core.memory import Pressure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from emberd.core.memory import Observation

MINUTE_S = 60
HOUR_S = 3600
LONG_IDLE_S = 300.0
"""A first token after so much idleness shows what keeping warm has brought."""
PRESSURES = (Pressure.NORMAL, Pressure.WARN, Pressure.CRITICAL)
"""A row holds the place of the worst one in here."""
_STEPS_S = (60, 120, 300, 600, 1800, 3600, 6 * 3600, 24 * 3600)
_MOST_POINTS = 1024


def _kept(how: str) -> Any:
    """Declare a column; `how` several rows become one: sum, min, max or words (a set of words, with commas)."""
    return field(default=None, metadata={"how": how})


@dataclass(frozen=True, slots=True)
class Minute:
    """What happened in a minute, or in a longer time made of several.

    Attributes:
        at_s: its beginning, in seconds since the epoch.
        observed_s: how much of it emberd has seen; 60 in a whole minute.
        ready_s: of that, the engine was ready.
        warm_s: of that, the next first token would have found everything in memory.
        state_changes: of the engine.
        starts: of engines.
        resident_bytes: of the engine in memory; the least, at readings a minute apart.
        locked_bytes: of the engine, locked; the least.
        swapped_bytes: of the engine in swap (macOS: compressed or in swap, an estimate); the most.
        missing_bytes: of the weights, not in memory; the most.
        lost_bytes: by how much the idle engine's resident memory shrank.
        pressure: the worst memory pressure, as its place in PRESSURES.
        stall_some_share: the largest share of 10 s in which some task waited for memory (Linux).
        available_bytes: memory that programs could get without swapping; the least.
        swap_engine_bytes: written to swap and charged to the engine; see core/swap_account.py.
        swap_other_bytes: by others. swap_unknown_bytes: by unknown programs.
        passes: of keep-warm. pass_reasons: why. pass_ms: how long they took.
        pass_cpu_ms: processor time of engine and toucher. pass_read_bytes: brought back from the disk.
        pass_tokens: tokens of prompts that replays made the engine compute.
        requests: sent to the engine.
        first_tokens: streamed replies that began.
        reused_tokens: of users' prompts, found in the prompt cache. processed_tokens: computed.
        cuts: replies that were cut by the end of an engine. continuations: of them, asked for the rest.
        lettings_go: how often the thrash guard or the owner let go of memory.
    """

    at_s: int
    observed_s: int | None = _kept("sum")
    ready_s: int | None = _kept("sum")
    warm_s: int | None = _kept("sum")
    state_changes: int | None = _kept("sum")
    starts: int | None = _kept("sum")
    resident_bytes: int | None = _kept("min")
    locked_bytes: int | None = _kept("min")
    swapped_bytes: int | None = _kept("max")
    missing_bytes: int | None = _kept("max")
    lost_bytes: int | None = _kept("sum")
    pressure: int | None = _kept("max")
    stall_some_share: float | None = _kept("max")
    available_bytes: int | None = _kept("min")
    swap_engine_bytes: int | None = _kept("sum")
    swap_other_bytes: int | None = _kept("sum")
    swap_unknown_bytes: int | None = _kept("sum")
    passes: int | None = _kept("sum")
    pass_reasons: str | None = _kept("words")
    pass_ms: int | None = _kept("sum")
    pass_cpu_ms: int | None = _kept("sum")
    pass_read_bytes: int | None = _kept("sum")
    pass_tokens: int | None = _kept("sum")
    requests: int | None = _kept("sum")
    first_tokens: int | None = _kept("sum")
    reused_tokens: int | None = _kept("sum")
    processed_tokens: int | None = _kept("sum")
    cuts: int | None = _kept("sum")
    continuations: int | None = _kept("sum")
    lettings_go: int | None = _kept("sum")


COLUMNS: Mapping[str, str] = {each.name: each.metadata.get("how", "time") for each in fields(Minute)}
"""How several values of each column become one; `time` for the beginning."""


@dataclass(slots=True)
class FirstToken:
    """A user's first token. Its token counts come later than the rest.

    Attributes:
        at_s: when it came, in seconds since the epoch.
        idle_s: how long no user had used the model; at least so long if emberd started meanwhile.
        temperature: how the request found the model: hot, warm, cold or unknown.
        forecast_s: what was foretold, None for nothing.
        took_s: from the request to the first words.
        missing_bytes: of the model, not in memory when the request came.
        reused: tokens of the prompt, found in the prompt cache. processed: computed.
    """

    at_s: float = 0.0
    idle_s: float = 0.0
    temperature: str = Temperature.UNKNOWN.value
    forecast_s: float | None = None
    took_s: float = 0.0
    missing_bytes: int | None = None
    reused: int | None = None
    processed: int | None = None

    @property
    def was_idle(self) -> bool:
        """Whether it shows what keeping warm has brought."""
        return self.idle_s >= LONG_IDLE_S


def worth_keeping(tokens: Iterable[FirstToken]) -> list[FirstToken]:
    """Return those of a minute that came after long idleness, and the slowest of the others.

    People read a reply before they ask again; programs that do not would fill the disk.
    """
    by_time = sorted(tokens, key=lambda token: token.took_s)
    others = [token for token in by_time if not token.was_idle]
    return [token for token in by_time if token.was_idle] + others[-1:]


def step_for(span_s: float) -> int:
    """Return the shortest step, in seconds, that shows a span in at most _MOST_POINTS points."""
    return next((step for step in _STEPS_S if span_s / step <= _MOST_POINTS), _STEPS_S[-1])


def fold(rows: Iterable[Minute], step_s: int) -> list[Minute]:
    """Return rows joined to steps of a length, in order of time."""
    ordered = sorted(rows, key=lambda row: row.at_s)
    return [
        _join(at_step * step_s, list(several))
        for at_step, several in itertools.groupby(ordered, lambda row: row.at_s // step_s)
    ]


def _join(at_s: int, rows: Sequence[Minute]) -> Minute:
    if len(rows) == 1:
        return replace(rows[0], at_s=at_s)
    joined = {name: _joined(how, [getattr(row, name) for row in rows]) for name, how in COLUMNS.items()}
    return Minute(**{**joined, "at_s": at_s})


def _joined(how: str, values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known or how == "time":
        return None
    if how == "words":
        return unique_words(",".join(known))
    return sum(known) if how == "sum" else min(known) if how == "min" else max(known)


def unique_words(words: str | None) -> str | None:
    """Return words with commas between them, each once and in order."""
    return ",".join(sorted({*words.split(",")} - {""})) or None if words is not None else None


def lost_bytes(before: Observation | None, now: Observation) -> int | None:
    """Return by how much the resident memory of an engine shrank that was idle all the time, None if unknown."""
    if before is None or before.engine.key is None:
        return None
    was, is_ = before.memory.resident_bytes, now.memory.resident_bytes
    if (before.engine.key, before.engine.requests) != (now.engine.key, now.engine.requests):
        return 0
    if not (before.engine.is_idle and now.engine.is_idle):
        return 0
    return None if was is None or is_ is None else max(was - is_, 0)


# --- what it brought ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Brought:
    """What keeping warm has brought in some time, and an estimate of what it has spared.

    Attributes:
        warm_share: of the time that emberd was there, the next first token would have found everything in memory.
        first_tokens: that came after LONG_IDLE_S of idleness.
        median_s: their median; None without any. forecast_median_s: the median of what was foretold of them.
        cold_s: median of the first tokens that this computer gave when the model was cold, None for never.
        spared_s: estimate: what these first tokens would have taken longer, had each met a cold model.
        spared_bytes: estimate: what would have been read from the disk for them.
        read_bytes: what passes have read from it instead.
        swap_bytes: written to swap by all programs; None if the system tells nothing.
    """

    warm_share: float | None = None
    first_tokens: int = 0
    median_s: float | None = None
    forecast_median_s: float | None = None
    cold_s: float | None = None
    spared_s: float | None = None
    spared_bytes: int | None = None
    read_bytes: int = 0
    swap_bytes: int | None = None


def what_it_brought(rows: Iterable[Minute], tokens: Iterable[FirstToken], cold: Sequence[FirstToken]) -> Brought:
    """Return what the time of these rows and first tokens has brought.

    Args:
        rows: of that time.
        tokens: first tokens of that time.
        cold: first tokens that met a cold model, of any time; without one there is no estimate.
    """
    observed_s = warm_s = read_bytes = 0
    swapped: list[int] = []
    for row in rows:
        observed_s += row.observed_s or 0
        warm_s += row.warm_s or 0
        read_bytes += row.pass_read_bytes or 0
        by_whom = (row.swap_engine_bytes, row.swap_other_bytes, row.swap_unknown_bytes)
        swapped += [written for written in by_whom if written is not None]
    after_idle = [token for token in tokens if token.was_idle]
    spared = [token for token in after_idle if token.temperature != Temperature.COLD.value]
    cold_s = median(token.took_s for token in cold) if cold else None
    missing = [token.missing_bytes for token in cold if token.missing_bytes is not None]
    foretold = [token.forecast_s for token in after_idle if token.forecast_s is not None]
    return Brought(
        warm_share=warm_s / observed_s if observed_s else None,
        first_tokens=len(after_idle),
        median_s=median(token.took_s for token in after_idle) if after_idle else None,
        forecast_median_s=median(foretold) if foretold else None,
        cold_s=cold_s,
        spared_s=None if cold_s is None else sum(max(cold_s - token.took_s, 0.0) for token in spared),
        spared_bytes=int(median(missing)) * len(spared) if missing else None,
        read_bytes=read_bytes,
        swap_bytes=sum(swapped) if swapped else None,
    )
