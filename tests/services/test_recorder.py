"""The recorder: a row a minute, written so that a day costs the disk little and a crash no more than a batch."""

from __future__ import annotations

import datetime as dt
import sqlite3
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from emberd.core.memory import EngineMemory, Pressure, SystemMemory
from emberd.core.minute import HOUR_S, FirstToken, Minute
from emberd.core.swap_account import SwapWrites
from emberd.core.turn import PromptCounts
from emberd.core.warmth_cost import WarmthCost
from emberd.services.history import History
from emberd.services.recorder import BATCH_S
from recorder_rig import ENGINE, GIB, LOG, DictatedHost, Rig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    made = Rig(tmp_path, 1_780_000_000.0 // HOUR_S * HOUR_S, monkeypatch.setattr)
    assert await made.recorder.tick() is None, "the first reading is what the next is compared with"
    return made


async def test_a_row_has_what_happened_within_its_minute(rig: Rig):
    tally = rig.gate.tally
    rig.gate.requests, tally.cuts, tally.continuations, tally.state_changes = 3, 2, 1, 4
    tally.pass_reasons |= {"timer", "evicting"}
    rig.spending.add(WarmthCost(passes=2, read_bytes=7, cpu_ms=30, processed_tokens=5))
    rig.host.system = replace(rig.host.system, pressure=Pressure.CRITICAL, available_bytes=GIB)
    rig.observer.look()
    rig.host.system = DictatedHost.system
    rig.host.engine = replace(rig.host.engine, resident_bytes=3 * GIB)
    made = await rig.minute()
    assert (made.requests, made.cuts, made.continuations, made.state_changes) == (3, 2, 1, 4)
    assert (made.passes, made.pass_reasons, made.pass_read_bytes, made.pass_tokens) == (2, "evicting,timer", 7, 5)
    assert (made.pressure, made.available_bytes) == (2, GIB), "the worst between two rows counts"
    assert (made.resident_bytes, made.lost_bytes) == (3 * GIB, 2 * GIB)
    assert (made.observed_s, made.ready_s, made.warm_s) == (60, 60, 60)
    after = await rig.minute()
    assert (after.requests, after.cuts, after.passes, after.pass_reasons, after.lost_bytes) == (0, 0, 0, None, 0)
    assert (after.pressure, after.at_s) == (0, made.at_s + 60)


async def test_what_the_system_does_not_tell_stays_unknown(rig: Rig):
    rig.host.engine, rig.host.system, rig.gate.port = EngineMemory(), SystemMemory(), None
    await rig.minute()
    made = await rig.minute()
    assert (made.resident_bytes, made.lost_bytes, made.pressure, made.swap_other_bytes) == (None, None, None, None)
    assert (made.ready_s, made.warm_s) == (0, 0)


async def test_nothing_is_written_before_a_batch_is_full_and_all_of_it_then(rig: Rig):
    for _ in range(int(BATCH_S) // 60):
        await rig.minute()
        assert not rig.path.exists()
    await rig.recorder.save()
    assert len(rig.kept().minutes(0, rig.now_s, 60)) == BATCH_S / 60


async def test_an_end_writes_the_minute_that_has_begun(rig: Rig):
    await rig.minute()
    rig.now_s += 20
    rig.spending.add(WarmthCost(passes=1))
    await rig.recorder.close()
    assert [row.observed_s for row in rig.kept().minutes(0, rig.now_s, 60)] == [60, 20]
    assert (await rig.spending.accounts.today(WarmthCost)).passes == 1
    await rig.spending.accounts.close()


async def test_a_first_token_after_long_idleness_keeps_its_counts_although_another_turn_follows(rig: Rig):
    rig.turns.first_tokens.foretell = lambda: FirstToken(temperature="hot", forecast_s=0.2)
    rig.now_s += 600
    rig.turn(0.25, PromptCounts(reused=990, processed=10))
    rig.now_s += 5
    rig.turn(0.5, PromptCounts(reused=1000, processed=20))
    rig.now_s += 5
    rig.turn(0.75, PromptCounts(reused=1020, processed=30))
    made = await rig.minute()
    first, third = await rig.spending.accounts.ask(lambda history: history.first_tokens(0, rig.now_s))
    assert (first.idle_s, first.temperature, first.forecast_s, first.took_s) == (600, "hot", 0.2, 0.25)
    assert (first.reused, first.processed, first.was_idle) == (990, 10, True)
    assert (third.took_s, third.reused, third.processed, third.was_idle) == (0.75, 1020, 30, False)
    assert made.first_tokens == 3


async def test_what_was_foretold_is_what_the_request_met(rig: Rig):
    told = iter([FirstToken(temperature="cold", forecast_s=9.0), FirstToken(temperature="hot", forecast_s=0.1)])
    rig.turns.first_tokens.foretell = lambda: next(told)
    first = rig.turns.begin(ENGINE)
    other = rig.turns.begin(ENGINE)
    rig.turns.first_tokens.spoke(8.0, first)
    await rig.forecaster.learn(may_look=False)
    judged = rig.forecaster.status().last
    assert judged is not None
    assert (judged.temperature, judged.forecast_s, judged.took_s) == ("cold", 9.0, 8.0)
    assert other.idle_s == 0, "another user was being served"


async def test_a_disk_that_takes_nothing_stops_no_rows(rig: Rig):
    rig.path.mkdir()
    await rig.minute()
    await rig.recorder.save()
    await rig.minute()
    rig.path.rmdir()
    await rig.recorder.close()
    assert len(rig.kept().minutes(0, rig.now_s, 60)) == 2


def pages_of(wal: Path) -> list[int]:
    """Return the pages that a journal holds, in order (sqlite.org/fileformat2.html#the_write_ahead_log)."""
    content = wal.read_bytes()
    size = struct.unpack_from(">I", content, 8)[0]
    return [struct.unpack_from(">I", content, at)[0] for at in range(32, len(content), 24 + size)]


def test_a_day_costs_the_disk_at_most_a_mebibyte(tmp_path: Path):
    path = tmp_path / "history.db"
    history = History(path, LOG)
    busy: dict[str, Any] = {
        "observed_s": 60,
        "ready_s": 60,
        "warm_s": 60,
        "resident_bytes": 40 * GIB + 12345,
        "locked_bytes": 39 * GIB,
        "swapped_bytes": 123_456_789,
        "missing_bytes": 1_234_567,
        "lost_bytes": 5_000_000,
        "pressure": 1,
        "stall_some_share": 0.123,
        "available_bytes": 7 * GIB,
        "swap_engine_bytes": 99_999_999,
        "swap_other_bytes": 999_999_999,
        "pass_reasons": "evicting,timer",
        "passes": 2,
        "pass_ms": 900,
        "pass_cpu_ms": 300,
        "pass_read_bytes": GIB,
        "pass_tokens": 64,
        "requests": 4,
        "first_tokens": 3,
        "reused_tokens": 12_000,
        "processed_tokens": 400,
    }
    at_s, each = 1_780_000_000 // HOUR_S * HOUR_S, int(BATCH_S) // 60

    def live(batches: int) -> None:
        nonlocal at_s
        for _ in range(batches):
            tokens = [
                FirstToken(at_s + 60 * number, 20.0, "hot", 0.2, 0.25, 0, 4000, 100) for number in range(0, each, 2)
            ]
            rows = [Minute(at_s + 60 * number, **busy) for number in range(each)]
            day = dt.datetime.fromtimestamp(at_s, dt.UTC).date()
            assert history.write([(day, WarmthCost(passes=60)), (day, SwapWrites(1, 2, 3))], rows, tokens)
            at_s += 60 * each

    # 720 replies, passes and swap in each minute.
    live(9 * 24 * 3600 // int(BATCH_S))  # the file is as full as it gets
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    live(24 * 3600 // int(BATCH_S))
    pages = pages_of(path.with_name("history.db-wal"))
    written_bytes = len(pages) * (4096 + 24) + len(set(pages)) * 4096
    assert 0 < written_bytes <= 1 << 20
    assert path.stat().st_size < 4 << 20
    history.close()
