"""The tables of the history's minutes, hours and first tokens: their statements, and what they read and write.

All functions block, and take an open connection; errors are those of `sqlite3`.
"""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import TYPE_CHECKING

from emberd.core.minute import COLUMNS, HOUR_S, LONG_IDLE_S, FirstToken, Minute, fold, unique_words

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

KEPT_MINUTES = 7 * 24 * 60
KEPT_HOURS = 366 * 24
KEPT_FIRST_TOKENS = 10_000
"""Of those after long idleness, and as many others: 27 a day for a year, and 1400 a day for a week."""
_ROW = """
    at_s INTEGER PRIMARY KEY,
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
    "sum": "sum({0})",
    "min": "min({0})",
    "max": "max({0})",
    "words": "group_concat(DISTINCT {0})",
}
_OF_TWO = {
    "sum": "CASE WHEN {0} IS NULL THEN excluded.{0} ELSE {0} + coalesce(excluded.{0}, 0) END",
    "min": "min(coalesce({0}, excluded.{0}), coalesce(excluded.{0}, {0}))",
    "max": "max(coalesce({0}, excluded.{0}), coalesce(excluded.{0}, {0}))",
    "words": "coalesce({0} || ',' || excluded.{0}, {0}, excluded.{0})",
}
_ADD = (
    f"INSERT INTO minutes ({_NAMES}) VALUES (?{', ?' * (len(COLUMNS) - 1)}) ON CONFLICT (at_s) DO UPDATE SET "  # noqa: S608
    + ", ".join(f"{name} = {_OF_TWO[how].format(name)}" for name, how in COLUMNS.items() if how != "time")
)
"""A minute that an emberd before this one has begun is added to."""
_ADD_TOKEN = f"INSERT INTO first_tokens ({_TOKEN_NAMES}) VALUES (?{', ?' * (len(fields(FirstToken)) - 1)})"  # noqa: S608


def _select(table: str) -> str:
    joined = ", ".join(_OF_SEVERAL[how].format(name) for name, how in COLUMNS.items())
    # The sum over no row is NULL, as unknown is.
    return f"SELECT {joined} FROM {table} WHERE at_s >= :since AND at_s < :until GROUP BY at_s / :step"  # noqa: S608


_ROLL_UP = f"INSERT OR REPLACE INTO hours ({_NAMES}) {_select('minutes')}"


def write(connection: sqlite3.Connection, minutes: Iterable[Minute], tokens: Iterable[FirstToken]) -> None:
    """Add minutes and first tokens, and bring their hours up to date."""
    rows = [astuple(minute) for minute in minutes]
    connection.executemany(_ADD, rows)
    for hour_s in sorted({row[0] // HOUR_S * HOUR_S for row in rows}):
        connection.execute(_ROLL_UP, {"since": hour_s, "until": hour_s + HOUR_S, "step": HOUR_S})
    connection.executemany(_ADD_TOKEN, [astuple(token) for token in tokens])


def forget(connection: sqlite3.Connection) -> None:
    """Delete what is too old; by number, because a clock that is wrong for an hour must not delete a year."""
    for table, kept in (("minutes", KEPT_MINUTES), ("hours", KEPT_HOURS)):
        newest = f"SELECT at_s FROM {table} ORDER BY at_s DESC LIMIT ?"  # noqa: S608  # names from above
        connection.execute(f"DELETE FROM {table} WHERE at_s < (SELECT min(at_s) FROM ({newest}))", (kept,))  # noqa: S608
    for which in (f"idle_s >= {LONG_IDLE_S}", f"idle_s < {LONG_IDLE_S}"):
        newest = f"SELECT rowid FROM first_tokens WHERE {which} ORDER BY rowid DESC LIMIT ?"  # noqa: S608
        connection.execute(
            f"DELETE FROM first_tokens WHERE {which} AND rowid NOT IN ({newest})",  # noqa: S608
            (KEPT_FIRST_TOKENS,),
        )


def read(connection: sqlite3.Connection, since_s: float, until_s: float, step_s: int) -> list[Minute]:
    """Return what is between two times (seconds since the epoch), joined to steps of whole minutes.

    From steps of an hour on, the hours are read, which are kept longer.
    """
    table = "hours" if step_s % HOUR_S == 0 else "minutes"
    first_s = int(since_s // step_s * step_s)
    rows = connection.execute(_select(table), {"since": first_s, "until": until_s, "step": step_s})
    place = list(COLUMNS).index("pass_reasons")
    found = ([*row[:place], unique_words(row[place]), *row[place + 1 :]] for row in rows)
    return fold((Minute(*row) for row in found), step_s)


def read_tokens(connection: sqlite3.Connection, since_s: float, until_s: float) -> list[FirstToken]:
    """Return the first tokens between two times, the oldest first."""
    statement = f"SELECT {_TOKEN_NAMES} FROM first_tokens WHERE at_s >= ? AND at_s < ? ORDER BY at_s"  # noqa: S608
    return [FirstToken(*row) for row in connection.execute(statement, (since_s, until_s))]


def read_cold(connection: sqlite3.Connection, most: int) -> list[FirstToken]:
    """Return the last first tokens that met a cold model, the oldest first."""
    statement = f"SELECT {_TOKEN_NAMES} FROM first_tokens WHERE temperature = 'cold' ORDER BY rowid DESC LIMIT ?"  # noqa: S608
    return [FirstToken(*row) for row in connection.execute(statement, (most,))][::-1]
