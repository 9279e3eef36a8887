"""The tables of the history's minutes, hours and first tokens: their statements, and what they read and write.

All functions block, and take an open connection; errors are those of `sqlite3`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import TYPE_CHECKING

from emberd.core.minute import COLUMNS, HOUR_S, LONG_IDLE_S, MINUTE_S, FirstToken, Minute, fold, unique_words

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

KEPT_MINUTES = 7 * 24 * 60
KEPT_HOURS = 366 * 24
_ROW = """
    slot INTEGER PRIMARY KEY, at_s INTEGER NOT NULL,
    observed_s INTEGER, ready_s INTEGER, warm_s INTEGER, state_changes INTEGER, starts INTEGER,
    resident_bytes INTEGER, locked_bytes INTEGER, swapped_bytes INTEGER, missing_bytes INTEGER, lost_bytes INTEGER,
    pressure INTEGER, stall_some_share NUMERIC, available_bytes INTEGER,
    swap_engine_bytes INTEGER, swap_other_bytes INTEGER, swap_unknown_bytes INTEGER,
    passes INTEGER, pass_reasons TEXT, pass_ms INTEGER, pass_cpu_ms INTEGER, pass_read_bytes INTEGER,
    pass_tokens INTEGER, requests INTEGER, first_tokens INTEGER, reused_tokens INTEGER, processed_tokens INTEGER,
    cuts INTEGER, continuations INTEGER, lettings_go INTEGER
"""
TABLES = (
    f"CREATE TABLE minutes ({_ROW})",
    f"CREATE TABLE hours ({_ROW})",
    """
    CREATE TABLE first_tokens (
        slot INTEGER PRIMARY KEY,
        at_s REAL NOT NULL,
        idle_s REAL NOT NULL,
        temperature TEXT NOT NULL,
        forecast_s REAL,
        took_s REAL NOT NULL,
        missing_bytes INTEGER,
        reused INTEGER,
        processed INTEGER
    )
    """,
)
"""Migrations 4 to 6 of the history; they never change. A column more is a migration more."""

_NAMES = ", ".join(COLUMNS)
_TOKEN_NAMES = ", ".join(each.name for each in fields(FirstToken))
_OF_SEVERAL = {
    "time": "min({0}) / :step * :step",
    "sum": "sum({0})",  # of nothing it is NULL, as unknown is
    "min": "min({0})",
    "max": "max({0})",
    "words": "group_concat(DISTINCT {0})",
}
_JOINED = ", ".join(_OF_SEVERAL[how].format(name) for name, how in COLUMNS.items())


@dataclass(frozen=True, slots=True)
class _Ring:
    """A table of rows of a length, the oldest of which is overwritten.

    Nothing is deleted: to free a page and to take it again also writes the list of free pages, the page above it
    and the first one, 4 KiB each.
    """

    table: str
    step_s: int
    kept: int

    def slot(self, at_s: float) -> int:
        """Return the place of a time in the table."""
        return int(at_s // self.step_s) % self.kept

    def write(self, connection: sqlite3.Connection, rows: Iterable[Minute]) -> None:
        """Write rows; those of the same time replace what is there."""
        statement = f"INSERT OR REPLACE INTO {self.table} (slot, {_NAMES}) VALUES (?{', ?' * len(COLUMNS)})"  # noqa: S608
        connection.executemany(statement, [(self.slot(row.at_s), *astuple(row)) for row in rows])

    def read(self, connection: sqlite3.Connection, since_s: float, until_s: float, step_s: int) -> list[Minute]:
        """Return the rows between two times, joined to steps."""
        first, last = self.slot(since_s), self.slot(until_s)
        place = "slot BETWEEN :first AND :last" if first <= last else "(slot >= :first OR slot <= :last)"
        if until_s - since_s >= (self.kept - 1) * self.step_s:
            place = "1"
        where = f"{place} AND at_s >= :since AND at_s < :until GROUP BY at_s / :step"
        values = {"since": since_s, "until": until_s, "step": step_s, "first": first, "last": last}
        rows = [
            Minute(*each)
            for each in connection.execute(f"SELECT {_JOINED} FROM {self.table} WHERE {where}", values)  # noqa: S608
        ]
        return [replace(row, pass_reasons=unique_words(row.pass_reasons)) for row in rows]


_MINUTES = _Ring("minutes", MINUTE_S, KEPT_MINUTES)
_HOURS = _Ring("hours", HOUR_S, KEPT_HOURS)
_LONG_IDLE = _Ring("first_tokens", int(LONG_IDLE_S), KEPT_HOURS * HOUR_S // int(LONG_IDLE_S))
"""After so long idleness there is at most one in this time."""


def _token_slot(token: FirstToken) -> int:
    """Return a place of their own for those after long idleness, and a place a minute, below zero, for others."""
    return _LONG_IDLE.slot(token.at_s) if token.was_idle else -1 - _MINUTES.slot(token.at_s)


def write(connection: sqlite3.Connection, minutes: Sequence[Minute], tokens: Sequence[FirstToken]) -> None:
    """Add minutes and first tokens, of which one a minute is kept besides those after long idleness."""
    if minutes:
        since_s, until_s = min(row.at_s for row in minutes), max(row.at_s for row in minutes) + 1
        # An emberd before this one may have begun a minute.
        begun = _MINUTES.read(connection, since_s, since_s + 1, MINUTE_S)
        _MINUTES.write(connection, fold([*begun, *minutes], MINUTE_S))
        _HOURS.write(connection, _MINUTES.read(connection, since_s // HOUR_S * HOUR_S, until_s, HOUR_S))
    statement = (
        f"INSERT OR REPLACE INTO first_tokens (slot, {_TOKEN_NAMES}) VALUES (?{', ?' * len(fields(FirstToken))})"  # noqa: S608
    )
    connection.executemany(statement, [(_token_slot(token), *astuple(token)) for token in tokens])


def read(connection: sqlite3.Connection, since_s: float, until_s: float, step_s: int) -> list[Minute]:
    """Return what is between two times (seconds since the epoch), joined to steps of whole minutes.

    From steps of an hour on, the hours are read, which are kept longer.
    """
    ring = _HOURS if step_s % HOUR_S == 0 else _MINUTES
    return ring.read(connection, since_s // step_s * step_s, until_s, step_s)


def read_tokens(connection: sqlite3.Connection, since_s: float, until_s: float) -> list[FirstToken]:
    """Return the first tokens between two times, the oldest first."""
    statement = f"SELECT {_TOKEN_NAMES} FROM first_tokens WHERE at_s >= ? AND at_s < ? ORDER BY at_s"  # noqa: S608
    return [FirstToken(*row) for row in connection.execute(statement, (since_s, until_s))]


def read_cold(connection: sqlite3.Connection, most: int) -> list[FirstToken]:
    """Return the last first tokens that met a cold model, the oldest first."""
    statement = f"SELECT {_TOKEN_NAMES} FROM first_tokens WHERE temperature = 'cold' ORDER BY at_s DESC LIMIT ?"  # noqa: S608
    return [FirstToken(*row) for row in connection.execute(statement, (most,))][::-1]
