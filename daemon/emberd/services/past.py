"""Tells the past as JSON: for the page, for `emberd history` and for who reads the file without a daemon."""

from __future__ import annotations

import contextlib
import datetime as dt
import sqlite3
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from emberd.core.errors import EmberdError
from emberd.core.minute import COLUMNS, HOUR_S, MINUTE_S, FirstToken, step_for, what_it_brought
from emberd.services import series
from emberd.services.history import COLD_KEPT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emberd.core.minute import Minute
    from emberd.services.history import History

    Row = TypeVar("Row")

DEFAULT_SPAN_S = 24 * 3600.0
_LONGEST_SPAN_S = 367 * 24 * 3600.0
_BUSY_S = 2.0


def tell_past(
    history: History | File, since_s: float, until_s: float, step_s: float | None = None
) -> dict[str, Any]:
    """Return what happened between two times; blocks.

    Args:
        history: where it is kept.
        since_s: seconds since the epoch; at most a year before `until_s`.
        until_s: the same; excluded.
        step_s: length of a step, rounded to whole minutes; None for the shortest that gives some 1000 points.

    Returns:
        `since_s`, `until_s`, `step_s`; each column of `Minute` as a list with one value a step, by its name;
        `tokens`, each attribute of `FirstToken` as a list; and `days`, for each calendar day in that time `day` and
        what `Brought` has. A day counts as a whole.
    """
    since_s = max(since_s, until_s - _LONGEST_SPAN_S, 0.0)
    step = step_for(until_s - since_s) if step_s is None else max(int(step_s) // MINUTE_S, 1) * MINUTE_S
    rows = history.minutes(since_s, until_s, step)
    tokens = history.first_tokens(since_s, until_s)
    return {
        "since_s": since_s,
        "until_s": until_s,
        "step_s": step,
        **{name: [getattr(row, name) for row in rows] for name in COLUMNS},
        "tokens": {each.name: [getattr(token, each.name) for token in tokens] for each in fields(FirstToken)},
        "days": _days(history, since_s, until_s),
    }


def _days(history: History | File, since_s: float, until_s: float) -> list[dict[str, Any]]:
    first_s = dt.datetime.combine(_day_of(since_s), dt.time()).astimezone().timestamp()
    cold = history.cold_first_tokens()
    rows: dict[dt.date, list[Minute]] = {}
    for row in history.minutes(first_s, until_s, HOUR_S):
        rows.setdefault(_day_of(max(row.at_s, first_s)), []).append(row)
    tokens: dict[dt.date, list[FirstToken]] = {}
    for token in history.first_tokens(first_s, until_s):
        tokens.setdefault(_day_of(token.at_s), []).append(token)
    return [
        {"day": day.isoformat(), **asdict(what_it_brought(rows.get(day, ()), tokens.get(day, ()), cold))}
        for day in sorted({*rows, *tokens})
    ]


def _day_of(at_s: float) -> dt.date:
    return dt.datetime.fromtimestamp(at_s).astimezone().date()


@dataclass(frozen=True, slots=True)
class File:
    """The history's file, read without a daemon; nothing in it changes.

    Attributes:
        path: the file.
    """

    path: Path

    def minutes(self, since_s: float, until_s: float, step_s: int) -> list[Minute]:
        """Return what `History.minutes` returns."""
        return self._read(lambda connection: series.read(connection, since_s, until_s, step_s))

    def first_tokens(self, since_s: float, until_s: float) -> list[FirstToken]:
        """Return what `History.first_tokens` returns."""
        return self._read(lambda connection: series.read_tokens(connection, since_s, until_s))

    def cold_first_tokens(self) -> list[FirstToken]:
        """Return what `History.cold_first_tokens` returns."""
        return self._read(lambda connection: series.read_cold(connection, COLD_KEPT))

    def _read(self, read: Callable[[sqlite3.Connection], list[Row]]) -> list[Row]:
        try:
            connection = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)
            with contextlib.closing(connection):
                tables = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'first_tokens'")
                return read(connection) if tables.fetchone() == (1,) else []
        except (sqlite3.Error, TypeError) as error:
            raise EmberdError(
                f"cannot read the history {self.path}: {error}", "Move it away; emberd begins a new one."
            ) from error
