"""The history: accounts by day, rows by minute and hour, and first tokens, in a small SQLite file.

Nothing here may stop the daemon. What cannot be written stays in memory and is written with the next
batch. A file that cannot be understood is set aside, never deleted. All methods block: call them off the event
loop.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from dataclasses import astuple, dataclass, fields
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from emberd.core.minute import fold
from emberd.core.swap_account import SwapWrites
from emberd.core.warmth_cost import WarmthCost
from emberd.host.files import PRIVATE_FILE_MODE
from emberd.services import series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from emberd.core.minute import FirstToken, Minute

KEPT_DAYS = 366
"""Days with writes, not calendar days: a clock that is wrong for an hour must not delete a year."""
_BUSY_TIMEOUT_S = 2.0
_PAGE_LIMIT = 4096
"""16 MiB with SQLite's pages of 4 KiB; a week of minutes and a year of hours take 3, and a year of first tokens 7
if there were one each five minutes."""
_MOST_PENDING = 24 * 60
"""So many minutes and first tokens wait in memory for a disk that takes nothing."""
COLD_KEPT = 9
"""The last first tokens of a cold model tell how slow it is; as many as core/forecast.py keeps."""
_CACHE_KIB = 64
_JOURNAL_PAGES = 200
"""A busy day's: the journal is brought into the file about once a day, and no day has a week's at once."""
Account = TypeVar("Account", SwapWrites, WarmthCost)
Row = TypeVar("Row")
_MIGRATIONS = (
    """
    CREATE TABLE swap_writes (
        day TEXT PRIMARY KEY,
        engine_idle INTEGER NOT NULL,
        engine_busy INTEGER NOT NULL,
        other_idle INTEGER NOT NULL,
        other_busy INTEGER NOT NULL,
        unknown_idle INTEGER NOT NULL,
        unknown_busy INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE warmth_costs (
        day TEXT PRIMARY KEY,
        passes INTEGER NOT NULL,
        read_bytes INTEGER NOT NULL,
        engine_ms INTEGER NOT NULL,
        cpu_ms INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    "ALTER TABLE warmth_costs ADD COLUMN processed_tokens INTEGER NOT NULL DEFAULT 0",
    *series.TABLES,
)
"""Step n brings a file of user_version n to n + 1. Only ever append."""


@dataclass(frozen=True, slots=True)
class _Book:
    """The statements of one kind of account."""

    add: str
    read: str
    forget: str


def _book(table: str, kind: type[SwapWrites | WarmthCost]) -> _Book:
    names = [each.name for each in fields(kind)]
    columns, places = ", ".join(names), ", ?" * len(names)
    sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in names)
    return _Book(
        f"INSERT INTO {table} (day, {columns}) VALUES (?{places}) ON CONFLICT (day) DO UPDATE SET {sums}",  # noqa: S608
        f"SELECT day, {columns} FROM {table} WHERE day >= ? ORDER BY day",  # noqa: S608
        f"DELETE FROM {table} WHERE day NOT IN (SELECT day FROM {table} ORDER BY day DESC LIMIT ?)",  # noqa: S608
    )


_BOOKS: dict[type[Any], _Book] = {
    SwapWrites: _book("swap_writes", SwapWrites),
    WarmthCost: _book("warmth_costs", WarmthCost),
}


class _NotUnderstood(Exception):
    """The file is no history that this emberd understands."""


class History:
    """Accounts, minutes and first tokens, kept across restarts.

    Opens its file when it is first used. Safe to call from several threads.

    Args:
        path: the SQLite file; its folder must exist.
        page_limit: bound on the size of the file, in SQLite's pages.
    """

    def __init__(self, path: Path, log: FilteringBoundLogger, page_limit: int = _PAGE_LIMIT) -> None:
        self._path = path
        self._log = log
        self._page_limit = page_limit
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pending: dict[type[Any], dict[date, Any]] = {kind: {} for kind in _BOOKS}
        self._minutes: list[Minute] = []
        self._tokens: list[FirstToken] = []
        self._trouble = ""
        self._inode = 0

    def add(self, day: date, account: SwapWrites | WarmthCost) -> bool:
        """Add to the account of a day.

        Returns:
            True if all accounts are on disk; False if they wait in memory, which is logged once.
        """
        return self.write([(day, account)])

    def write(
        self,
        accounts: Iterable[tuple[date, SwapWrites | WarmthCost]],
        minutes: Iterable[Minute] = (),
        tokens: Iterable[FirstToken] = (),
    ) -> bool:
        """Add a batch, and write it; returns what `add` returns."""
        self.keep(accounts, minutes, tokens)
        return self.flush()

    def keep(
        self,
        accounts: Iterable[tuple[date, SwapWrites | WarmthCost]],
        minutes: Iterable[Minute] = (),
        tokens: Iterable[FirstToken] = (),
    ) -> None:
        """Add a batch, in memory: nothing is opened or written before `flush`."""
        with self._lock:
            for day, account in accounts:
                if account.total:
                    pending = self._pending[type(account)]
                    pending[day] = pending.get(day, type(account)()) + account
                    if len(pending) > KEPT_DAYS:
                        del pending[min(pending)]
            self._minutes = [*self._minutes, *minutes][-_MOST_PENDING:]
            self._tokens = [*self._tokens, *tokens][-_MOST_PENDING:]

    def flush(self) -> bool:
        """Write what waits in memory, all in one transaction; returns what `add` returns."""
        with self._lock:
            return self._flush()

    def minutes(self, since_s: float, until_s: float, step_s: int) -> list[Minute]:
        """Return the rows between two times, joined to steps of whole minutes, also those that wait in memory.

        Args:
            since_s: seconds since the epoch; the step that holds it is the first.
            until_s: the same; excluded.
            step_s: length of a step. From an hour on a year is known, below it a week.
        """
        with self._lock:
            found = self._read(lambda connection: series.read(connection, since_s, until_s, step_s))
            first_s = since_s // step_s * step_s
            return fold([*found, *(row for row in self._minutes if first_s <= row.at_s < until_s)], step_s)

    def first_tokens(self, since_s: float, until_s: float) -> list[FirstToken]:
        """Return the first tokens between two times, the oldest first."""
        with self._lock:
            found = self._read(lambda connection: series.read_tokens(connection, since_s, until_s))
            return [*found, *(token for token in self._tokens if since_s <= token.at_s < until_s)]

    def cold_first_tokens(self) -> list[FirstToken]:
        """Return the last first tokens that met a cold model, however long ago."""
        with self._lock:
            found = self._read(lambda connection: series.read_cold(connection, COLD_KEPT))
            return [*found, *(token for token in self._tokens if token.temperature == "cold")][-COLD_KEPT:]

    def days(self, since: date, kind: type[Account]) -> Mapping[date, Account]:
        """Return the accounts of a kind from a day on, also those that wait in memory."""
        with self._lock:
            found = dict(
                self._read(
                    lambda connection: [
                        (date.fromisoformat(day), kind(*counts))
                        for day, *counts in connection.execute(_BOOKS[kind].read, (since.isoformat(),))
                    ]
                )
            )
            for day, account in self._pending[kind].items():
                if day >= since:
                    found[day] = found.get(day, kind()) + account
            return dict(sorted(found.items()))

    def close(self) -> None:
        """Write what waits, if possible, and close the file. It opens again at the next use."""
        with self._lock:
            if self._has_pending:
                self._flush()
            self._disconnect()

    # --- inside the lock ------------------------------------------------------------------------------------

    @property
    def _has_pending(self) -> bool:
        return any(self._pending.values()) or bool(self._minutes) or bool(self._tokens)

    def _read(self, read: Callable[[sqlite3.Connection], list[Row]]) -> list[Row]:
        connection = self._ready()
        if connection is None:
            return []
        try:
            return read(connection)
        except (sqlite3.Error, ValueError, TypeError) as error:
            self._stumble(error)
            return []

    def _flush(self) -> bool:
        # The second try is for a damaged file that was set aside.
        if self._has_pending and not self._write_pending() and not self._write_pending():
            return False
        if self._trouble and self._connection is not None:
            self._log.info("history_written_again", path=str(self._path))
            self._trouble = ""
        return True

    def _write_pending(self) -> bool:
        connection = self._ready()
        if connection is None:
            return False
        try:
            # One transaction: after an error nothing is written, and everything is still pending.
            with connection:
                for kind, pending in self._pending.items():
                    accounts = [(day.isoformat(), *astuple(account)) for day, account in pending.items()]
                    if accounts:
                        connection.executemany(_BOOKS[kind].add, accounts)
                        connection.execute(_BOOKS[kind].forget, (KEPT_DAYS,))
                series.write(connection, self._minutes, self._tokens)
        except sqlite3.Error as error:
            self._stumble(error)
            return False
        for pending in self._pending.values():
            pending.clear()
        self._minutes, self._tokens = [], []
        return True

    def _ready(self) -> sqlite3.Connection | None:
        """Return an open connection, None if there can be none now."""
        if self._connection is not None and not self._is_our_file():
            # The file was deleted or replaced: writes to the old one would be lost.
            self._disconnect()
        if self._connection is None:
            try:
                self._connection = self._open_or_set_aside()
            except (_NotUnderstood, sqlite3.Error, OSError) as error:
                self._stumble(error)
        return self._connection

    def _is_our_file(self) -> bool:
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False

    def _open_or_set_aside(self) -> sqlite3.Connection:
        try:
            return self._open()
        except (_NotUnderstood, sqlite3.DatabaseError) as error:
            if not _is_damage(error):
                raise
            self._set_aside(str(error))
            return self._open()

    def _open(self) -> sqlite3.Connection:
        # SQLite would make the file with the umask's mode; -wal and -shm take over the file's mode. An existing
        # file is not opened here: closing it would drop locks on it (sqlite.org/howtocorrupt.html).
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE_FILE_MODE))
        with contextlib.suppress(PermissionError):
            self._path.chmod(PRIVATE_FILE_MODE)
        self._inode = self._path.stat().st_ino
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_TIMEOUT_S, isolation_level="IMMEDIATE", check_same_thread=False
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        connection.execute(f"PRAGMA max_page_count = {self._page_limit}")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise _NotUnderstood(f"it was written by a newer emberd (format {version})")
        (finding,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if finding != "ok":
            raise _NotUnderstood(finding)
        if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
            raise _NotUnderstood("it is another program's database")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_JOURNAL_PAGES}")
        for step, statement in enumerate(_MIGRATIONS[version:], start=version + 1):
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {step}")

    def _set_aside(self, reason: str) -> None:
        """Rename the file and its journal."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        aside = self._path.with_name(f"{self._path.name}.unreadable-{stamp}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).replace(aside.with_name(aside.name + suffix))
        self._log.warning("history_set_aside", path=str(self._path), kept_as=str(aside), reason=reason)

    def _stumble(self, error: Exception) -> None:
        """Go on without the file; say so once until it works again."""
        self._disconnect()
        if _is_damage(error):
            with contextlib.suppress(OSError):
                self._set_aside(str(error))
            return
        if str(error) != self._trouble:
            self._trouble = str(error)
            self._log.warning("history_not_written", path=str(self._path), reason=self._trouble)

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _is_damage(error: Exception) -> bool:
    """Return True if the file is damaged, not just unusable now (full disk, no permission, busy)."""
    if isinstance(error, _NotUnderstood):
        return True
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
