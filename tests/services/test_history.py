"""The history on real SQLite files: it outlives restarts, and nothing that happens to its file stops the daemon."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import fields, replace
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import structlog

from emberd.core.minute import HOUR_S, FirstToken, Minute, fold
from emberd.core.swap_account import SwapWrites
from emberd.core.warmth_cost import WarmthCost
from emberd.services import series
from emberd.services.history import _MIGRATIONS, KEPT_DAYS, History
from emberd.services.past import tell_past

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DAY = date(2026, 5, 1)
WRITES = SwapWrites(1, 2, 3, 4, 5, 6)
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None,
    reason="mounting a file system needs root on Linux",
)


class Book:
    """Makes histories of one file and keeps what they log."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "history.db"
        self.events: list[dict[str, object]] = []
        self._made: list[History] = []

    def open(self, **options: int) -> History:
        """Return a history of the file, as after a restart of emberd."""
        log = structlog.wrap_logger(None, processors=[self._keep], wrapper_class=structlog.BoundLogger)
        history = History(self.path, log, **options)
        self._made.append(history)
        return history

    def names(self) -> list[object]:
        """Return the names of what was logged."""
        return [event["event"] for event in self.events]

    def close(self) -> None:
        for history in self._made:
            history.close()

    def _keep(self, _logger: object, _method: str, event: dict[str, object]) -> dict[str, object]:
        self.events.append(event)
        raise structlog.DropEvent


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    made = Book(tmp_path)
    yield made
    made.close()


def run(program: str, *arguments: str) -> None:
    """Run one of the system's own programs."""
    subprocess.run([shutil.which(program) or program, *arguments], check=True, timeout=10)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\x00" * 4096)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Give a small file system of its own; called with other options, it is mounted anew."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder))
    except subprocess.CalledProcessError:
        pytest.skip("root may not mount here (a container)")

    def remount(options: str) -> Path:
        run("mount", "-o", f"remount,{options}", str(folder))
        return folder

    yield remount
    run("umount", "-l", str(folder))


def test_accounts_of_a_day_add_up_and_outlive_a_restart(book: Book):
    first = book.open()
    assert first.add(DAY, WRITES)
    assert first.add(DAY, WRITES)
    assert first.add(DAY + timedelta(days=1), WRITES)
    first.close()
    assert book.open().days(DAY, SwapWrites) == {DAY: WRITES + WRITES, DAY + timedelta(days=1): WRITES}
    assert book.events == []


def test_a_daemon_that_is_killed_loses_nothing_that_was_added(book: Book):
    code = """
import os, sys, structlog
from datetime import date
from pathlib import Path
from emberd.core.swap_account import SwapWrites
from emberd.core.warmth_cost import WarmthCost
from emberd.services import series
from emberd.services.history import History
history = History(Path(sys.argv[1]), structlog.get_logger())
assert history.add(date(2026, 5, 1), SwapWrites(1, 2, 3, 4, 5, 6))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, book.path], check=False, timeout=60)
    assert book.open().days(DAY, SwapWrites) == {DAY: WRITES}


def test_nothing_is_opened_before_there_is_something_to_write(book: Book):
    assert book.open().add(DAY, SwapWrites())
    assert not book.path.exists()


def test_the_file_and_its_journal_are_private(book: Book):
    before = os.umask(0)
    try:
        book.open().add(DAY, WRITES)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in book.path.parent.iterdir()}
    assert modes == {"history.db": 0o600, "history.db-wal": 0o600, "history.db-shm": 0o600}


def test_only_days_from_the_one_asked_for_on_are_returned(book: Book):
    history = book.open()
    for back in range(3):
        history.add(DAY - timedelta(days=back), WRITES)
    assert list(history.days(DAY - timedelta(days=1), SwapWrites)) == [DAY - timedelta(days=1), DAY]


def test_a_year_of_days_is_kept(book: Book):
    history = book.open()
    for back in range(KEPT_DAYS + 5):
        history.add(DAY + timedelta(days=back), WRITES)
    kept = list(history.days(date.min, SwapWrites))
    assert len(kept) == KEPT_DAYS
    assert kept[0] == DAY + timedelta(days=5)
    history.close()
    assert book.path.stat().st_size <= 128 * 1024


def test_a_clock_that_is_wrong_for_a_while_does_not_delete_the_past(book: Book):
    history = book.open()
    history.add(DAY, WRITES)
    history.add(date(2099, 1, 1), WRITES)
    assert DAY in history.days(date.min, SwapWrites)


def test_an_empty_file_of_version_0_is_migrated(book: Book):
    with sqlite3.connect(book.path) as made:
        made.execute("PRAGMA user_version = 0")
        made.execute("VACUUM")
    made.close()
    assert book.path.stat().st_size > 0
    assert book.open().add(DAY, WRITES)
    assert version_of(book.path) == len(_MIGRATIONS)


def test_the_file_of_an_older_emberd_is_brought_up_to_date_and_loses_nothing(book: Book):
    with sqlite3.connect(book.path) as made:
        made.execute(_MIGRATIONS[0])
        made.execute("INSERT INTO swap_writes VALUES (?, 1, 2, 3, 4, 5, 6)", (DAY.isoformat(),))
        made.execute("PRAGMA user_version = 1")
    made.close()
    history = book.open()
    cost = WarmthCost(passes=3, read_bytes=5, engine_ms=7, cpu_ms=11)
    assert history.add(DAY, cost)
    assert history.add(DAY, cost)
    assert history.days(DAY, SwapWrites) == {DAY: SwapWrites(1, 2, 3, 4, 5, 6)}
    assert history.days(DAY, WarmthCost) == {DAY: cost + cost}
    assert version_of(book.path) == len(_MIGRATIONS)
    assert book.events == []


def version_of(path: Path) -> int:
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return int(version)


def set_aside(book: Book) -> list[Path]:
    return sorted(book.path.parent.glob("history.db.unreadable-*"))


def test_a_file_of_a_newer_emberd_is_set_aside_and_said_once(book: Book):
    made = sqlite3.connect(book.path)
    made.execute("CREATE TABLE future (secret TEXT)")
    made.execute("PRAGMA user_version = 99")
    made.close()
    history = book.open()
    assert history.add(DAY, WRITES)
    assert history.days(DAY, SwapWrites) == {DAY: WRITES}
    assert book.names() == ["history_set_aside"]
    assert "newer emberd (format 99)" in str(book.events[0]["reason"])
    assert version_of(set_aside(book)[0]) == 99


def test_another_programs_database_is_set_aside(book: Book):
    made = sqlite3.connect(book.path)
    made.execute("CREATE TABLE theirs (text TEXT)")
    made.close()
    assert book.open().add(DAY, WRITES)
    assert book.names() == ["history_set_aside"]


@pytest.mark.parametrize("content", [b"not a database at all" * 500, b"SQLite format 3\x00" + b"\xff" * 8192])
def test_a_file_that_is_no_database_is_set_aside_whole(book: Book, content: bytes):
    book.path.write_bytes(content)
    assert book.open().add(DAY, WRITES)
    assert book.names() == ["history_set_aside"]
    assert set_aside(book)[0].read_bytes() == content


def test_a_file_that_is_damaged_while_it_is_open_costs_nothing_that_comes_after(book: Book):
    history = book.open()
    for day in range(200):
        history.add(DAY + timedelta(days=day), WRITES)
    history.close()
    with book.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (book.path.stat().st_size - 4096))
    assert history.add(DAY, WRITES)
    assert history.days(DAY, SwapWrites) == {DAY: WRITES}
    assert book.names() == ["history_set_aside"]


def test_two_files_that_are_set_aside_do_not_overwrite_each_other(book: Book):
    for text in (b"one" * 500, b"two" * 500):
        book.path.write_bytes(text)
        history = book.open()
        history.add(DAY, WRITES)
        history.close()
    assert [path.read_bytes()[:3] for path in set_aside(book)] == [b"one", b"two"]


def test_a_file_that_is_deleted_under_our_feet_is_made_again(book: Book):
    history = book.open()
    history.add(DAY, WRITES)
    for path in list(book.path.parent.iterdir()):
        path.unlink()
    assert history.add(DAY, WRITES)
    history.close()
    assert book.open().days(DAY, SwapWrites) == {DAY: WRITES}


def test_what_a_full_file_cannot_take_waits_in_memory_and_is_said_once(book: Book):
    history = book.open(page_limit=6)
    days = [DAY + timedelta(days=number) for number in range(200)]
    outcomes = [history.add(day, WRITES) for day in days]
    assert outcomes[0] is True
    assert outcomes[-1] is False
    assert history.days(DAY, SwapWrites) == dict.fromkeys(days, WRITES)
    assert book.names() == ["history_not_written"]
    history.close()
    roomy = book.open()
    assert len(roomy.days(DAY, SwapWrites)) == outcomes.count(True)


@needs_root
def test_a_full_disk_loses_nothing(book: Book, mounted: Callable[[str], Path]):
    folder = mounted("size=256k")
    book.path = folder / "history.db"
    history = book.open()
    assert history.add(DAY, WRITES)
    filler = folder / "filler"
    with pytest.raises(OSError, match="No space left"):
        fill(filler)
    days = [DAY + timedelta(days=number) for number in range(300)]
    outcomes = [history.add(day, WRITES) for day in days]
    assert not all(outcomes)
    assert set(book.names()) == {"history_not_written"}
    assert len(book.events) <= 2
    expected = {**dict.fromkeys(days, WRITES), DAY: WRITES + WRITES}
    assert history.days(DAY, SwapWrites) == expected
    filler.unlink()
    assert history.add(DAY, WRITES)
    assert book.names()[-1] == "history_written_again"
    history.close()
    assert book.open().days(DAY, SwapWrites) == {**expected, DAY: WRITES + WRITES + WRITES}


@needs_root
def test_a_disk_that_is_full_from_the_start_is_no_reason_to_stop(book: Book, mounted: Callable[[str], Path]):
    folder = mounted("size=4k")
    (folder / "filler").write_bytes(b"\x00" * 4096)
    book.path = folder / "history.db"
    history = book.open()
    assert not history.add(DAY, WRITES)
    assert history.days(DAY, SwapWrites) == {DAY: WRITES}
    mounted("size=256k")
    assert history.add(DAY, SwapWrites())
    history.close()
    assert book.open().days(DAY, SwapWrites) == {DAY: WRITES}


@needs_root
def test_a_disk_that_becomes_read_only_is_no_reason_to_stop(book: Book, mounted: Callable[[str], Path]):
    book.path = mounted("rw") / "history.db"
    history = book.open()
    history.add(DAY, WRITES)
    history.close()
    mounted("ro")
    assert not history.add(DAY, WRITES)
    assert "history_not_written" in book.names()
    mounted("rw")
    assert history.add(DAY, SwapWrites())
    assert history.days(DAY, SwapWrites) == {DAY: WRITES + WRITES}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into any folder")
def test_a_folder_that_may_not_be_written_is_no_reason_to_stop(book: Book):
    book.path.parent.chmod(0o500)
    try:
        history = book.open()
        assert not history.add(DAY, WRITES)
        assert history.days(DAY, SwapWrites) == {DAY: WRITES}
        assert book.names() == ["history_not_written"]
    finally:
        book.path.parent.chmod(0o700)
    assert history.add(DAY, WRITES)


def test_a_folder_that_is_missing_is_no_reason_to_stop(book: Book):
    book.path = book.path.parent / "missing" / "history.db"
    history = book.open()
    assert not history.add(DAY, WRITES)
    assert not history.add(DAY, WRITES)
    assert book.names() == ["history_not_written"]
    book.path.parent.mkdir()
    assert history.add(DAY, WRITES)
    assert history.days(DAY, SwapWrites) == {DAY: WRITES + WRITES + WRITES}
    assert book.names()[-1] == "history_written_again"


def test_a_reader_sees_whole_days_while_they_are_written(book: Book):
    writer, reader = book.open(), book.open()
    writer.add(DAY, WRITES)
    seen: list[SwapWrites] = []
    has_ended = threading.Event()

    def read() -> None:
        while not has_ended.is_set():
            seen.append(reader.days(DAY, SwapWrites)[DAY])

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(200):
        assert writer.add(DAY, WRITES)
    has_ended.set()
    thread.join(10)
    assert seen
    assert all(each.engine_busy == 2 * each.engine_idle for each in seen)
    assert [each.total for each in seen] == sorted(each.total for each in seen)
    assert book.events == []


def test_several_threads_may_write(book: Book):
    history = book.open()
    threads = [
        threading.Thread(target=lambda: [history.add(DAY, SwapWrites(engine_idle=1)) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert history.days(DAY, SwapWrites) == {DAY: SwapWrites(engine_idle=200)}


def test_a_writer_that_holds_the_file_only_delays_an_account(book: Book):
    history = book.open()
    history.add(DAY, WRITES)
    other = sqlite3.connect(book.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        assert not history.add(DAY, WRITES)
        assert book.names() == ["history_not_written"]
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert history.add(DAY, SwapWrites())
    assert history.days(DAY, SwapWrites) == {DAY: WRITES + WRITES}


# --- minutes, hours and first tokens ----------------------------------------------------------------------------

AT_S = 1_780_000_000 // HOUR_S * HOUR_S


def minutes(number: int, begin_s: int = AT_S, **values: object) -> list[Minute]:
    """Return as many minutes in a row."""
    return [Minute(begin_s + 60 * each, observed_s=60, **values) for each in range(number)]  # type: ignore[arg-type]


def test_minutes_outlive_a_restart_and_unknown_stays_unknown(book: Book):
    rows = minutes(3, resident_bytes=5 << 30, pass_reasons="timer", stall_some_share=0.125)
    first = book.open()
    assert first.write([], rows)
    first.close()
    assert book.open().minutes(AT_S, AT_S + HOUR_S, 60) == rows
    assert rows[0].locked_bytes is None


@pytest.mark.parametrize("step_s", [60, 300, 3600])
@pytest.mark.parametrize("written", [0, 50, 97, 120])
def test_what_waits_in_memory_is_joined_with_what_is_written(book: Book, step_s: int, written: int):
    rows = [
        Minute(
            AT_S + 60 * number,
            requests=number,
            resident_bytes=None if number % 3 else number,
            swapped_bytes=number % 17,
            pass_reasons=[None, "timer", "evicting", "knock"][number % 4],
        )
        for number in range(120)
    ]
    history = book.open()
    assert history.write([], rows[:written])
    history._path = book.path.with_name("gone") / "history.db"  # a disk that has gone
    history._disconnect()
    history.write([], rows[written:])
    history._path = book.path
    assert history.minutes(AT_S, AT_S + 2 * HOUR_S, step_s) == fold(rows, step_s)
    assert history.write([])
    assert history.minutes(AT_S, AT_S + 2 * HOUR_S, step_s) == fold(rows, step_s)


def test_a_minute_that_two_daemons_saw_is_one_row(book: Book):
    history = book.open()
    history.write([], [Minute(AT_S, observed_s=20, resident_bytes=7, pass_reasons="timer", cuts=None)])
    history.write([], [Minute(AT_S, observed_s=30, resident_bytes=None, pass_reasons="knock", cuts=2)])
    expected = Minute(AT_S, observed_s=50, resident_bytes=7, pass_reasons="knock,timer", cuts=2)
    assert history.minutes(AT_S, AT_S + 60, 60) == [expected]
    assert history.minutes(AT_S, AT_S + 60, HOUR_S) == [expected]


def test_the_newest_minutes_and_hours_are_kept_each_for_a_time_of_its_own(
    book: Book, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(series, "_MINUTES", replace(series._MINUTES, kept=150))
    monkeypatch.setattr(series, "_HOURS", replace(series._HOURS, kept=20))
    history, rows = book.open(), minutes(25 * 60)
    for number in range(0, len(rows), 60):
        assert history.write([], rows[number : number + 60])
    end_s = rows[-1].at_s + 60
    assert history.minutes(0, end_s, 60) == rows[-150:]
    assert history.minutes(0, end_s, HOUR_S) == fold(rows, HOUR_S)[-20:]
    assert history.minutes(end_s - 600, end_s - 300, 60) == rows[-10:-5]
    assert history.minutes(end_s - 5 * HOUR_S, end_s - HOUR_S, HOUR_S) == fold(rows, HOUR_S)[-5:-1]


def test_first_tokens_are_kept_with_what_was_foretold(book: Book):
    history = book.open()
    tokens = [
        FirstToken(AT_S + 1.5, 30.0, "hot", None, 0.2),
        FirstToken(AT_S + 900.5, 600.0, "cold", 9.0, 12.5, 4 << 30, 100, 7),
    ]
    history.write([], [], tokens)
    assert history.first_tokens(AT_S, AT_S + HOUR_S) == tokens
    assert history.first_tokens(AT_S + 2, AT_S + HOUR_S) == tokens[1:]
    assert history.cold_first_tokens() == tokens[1:]


def test_a_disk_that_takes_nothing_for_days_fills_no_memory(book: Book):
    book.path = book.path.parent / "missing" / "history.db"
    history = book.open()
    rows = minutes(3 * 24 * 60)
    assert not history.write([], rows)
    assert history.minutes(AT_S, rows[-1].at_s + 60, 60) == rows[-24 * 60 :]
    book.path.parent.mkdir()
    assert history.write([])
    assert history.minutes(AT_S, rows[-1].at_s + 60, 60) == rows[-24 * 60 :]


def test_the_tables_have_the_columns_of_a_minute(book: Book):
    history = book.open()
    history.write([], minutes(1))
    connection = sqlite3.connect(book.path)
    for table in ("minutes", "hours"):
        columns = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
        assert columns[1:] == [each.name for each in fields(Minute)]
    connection.close()


def test_the_first_day_counts_as_a_whole_with_what_it_wrote_to_swap(book: Book):
    history = book.open()
    midnight = datetime(2026, 5, 1).astimezone().timestamp()
    early, late = int(midnight) + HOUR_S, int(midnight) + 13 * HOUR_S
    history.write([], [Minute(early, swap_other_bytes=5), Minute(late, swap_engine_bytes=2), Minute(late + 86_400)])
    told = tell_past(history, midnight + 12 * HOUR_S, midnight + 48 * HOUR_S)
    assert [(day["day"], day["swap_bytes"]) for day in told["days"]] == [("2026-05-01", 7), ("2026-05-02", None)]
