"""Readings while the kernel really takes memory away: a swap file and a memory cgroup that is too small."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from emberd.core.residency import Source, from_process
from emberd.core.types import EngineSample
from emberd.host.linux import LinuxHost
from emberd.host.toucher import Toucher
from emberd.services.accounts import Accounts
from emberd.services.observer import Observer
from emberd.services.swap_meter import SwapMeter
from memory_holder import holding
from memory_squeeze import can_squeeze, squeeze
from page_cache import MIB, evict, write

if TYPE_CHECKING:
    from emberd.core.memory import EngineMemory

pytestmark = can_squeeze
SLACK_BYTES = 4 * MIB
LONGEST_S = 60
HUNGRY = """
memory = bytearray(256 << 20)
while True:
    memory[::4096] = bytes(len(memory) // 4096)
"""


def swapped_by_the_page_tables(pid: int) -> int:
    """Return what smaps_rollup counts, page by page, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Swap:"))


async def test_a_program_that_waits_for_memory_wakes_who_watches_for_stalls(tmp_path: Path):
    watch = LinuxHost().watch_stalls(LONGEST_S)
    if watch is None:
        pytest.skip("no pressure/memory to be asked here")
    with squeeze(tmp_path, 512 * MIB) as group:
        group.limit(64 * MIB)
        hungry = await asyncio.create_subprocess_exec(*group.joining(sys.executable, "-c", HUNGRY))
        try:
            async with asyncio.timeout(LONGEST_S / 2):
                await watch.wait()
            assert hungry.returncode is None
        finally:
            hungry.kill()
            await hungry.wait()
    watch.close()


async def test_what_an_idle_engine_loses_to_swap_is_seen_counted_and_charged_to_it(tmp_path: Path):
    host, accounts = LinuxHost(), Accounts(tmp_path / "history.db", structlog.get_logger())
    engine = EngineSample(None, (), is_idle=False, requests=0)
    log = structlog.get_logger()
    swap = SwapMeter(Observer(host, log, lambda: engine), accounts)
    with squeeze(tmp_path, 256 * MIB) as group, holding("anonymous", 128 * MIB, within=group.joining) as pid:
        engine = EngineSample(f"{pid}:a", (pid,), is_idle=True, requests=1)
        await swap.tick()
        before = host.system_memory()
        assert host.engine_memory([pid]).swapped_bytes == 0

        group.limit(64 * MIB)

        writes, after, memory = await swap.tick(), host.system_memory(), host.engine_memory([pid])
        swapped = memory.swapped_bytes or 0
        assert swapped > 56 * MIB
        assert abs(swapped - swapped_by_the_page_tables(pid)) < SLACK_BYTES
        assert abs((memory.footprint_bytes or 0) - 128 * MIB) < 16 * MIB, "it is as large as before"
        assert (memory.resident_bytes or 0) < 80 * MIB
        written = (after.swapped_out_bytes or 0) - (before.swapped_out_bytes or 0)
        assert written > swapped - SLACK_BYTES
        assert abs(writes.engine_idle - swapped) < SLACK_BYTES
        assert writes.engine_busy == 0
        assert (after.swap_used_bytes or 0) > 56 * MIB
        assert after.swap_total_bytes is not None
        told = tell(memory)
        assert told is not None
        assert abs(told - (1 - swapped / 128 / MIB)) < 0.1
    await accounts.close()


def tell(memory: EngineMemory) -> float | None:
    seen = from_process(128 * MIB, memory)
    assert seen.source is Source.PROCESS
    return seen.share


async def test_a_mapped_model_loses_pages_to_pressure_and_nothing_is_written(tmp_path: Path):
    host, path = LinuxHost(), write(tmp_path / "weights", 128 * MIB)
    evict(path)
    toucher = Toucher(host.paging)
    toucher.use([path])
    with squeeze(tmp_path, 64 * MIB) as group, holding("file", 128 * MIB, path, within=group.joining) as pid:
        assert await share(toucher) == 1
        before = host.system_memory().swapped_out_bytes
        faults = host.engine_memory([pid]).major_faults

        group.limit(64 * MIB)

        assert await share(toucher) < 0.55
        memory = host.engine_memory([pid])
        assert (memory.file_bytes or 0) < 72 * MIB
        assert (memory.swapped_bytes or 0) < 16 * MIB
        assert (host.system_memory().swapped_out_bytes or 0) - (before or 0) < 16 * MIB
        assert memory.major_faults == faults, "nobody asked for a page yet"
    await toucher.close()


async def share(toucher: Toucher) -> float:
    _, _, ((resident, total),) = await toucher.count()
    return resident / total


async def test_locked_memory_stays_where_its_neighbour_goes_to_swap(tmp_path: Path):
    host = LinuxHost()
    with (
        squeeze(tmp_path, 256 * MIB) as group,
        holding("locked", 48 * MIB, within=group.joining) as locked,
        holding("anonymous", 96 * MIB, within=group.joining) as loose,
    ):
        group.limit(80 * MIB)
        assert host.engine_memory([locked]).locked_bytes == 48 * MIB
        assert (host.engine_memory([locked]).anonymous_bytes or 0) >= 48 * MIB
        assert (host.engine_memory([loose]).swapped_bytes or 0) > 56 * MIB
