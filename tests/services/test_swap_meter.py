"""Bytes written to swap: from counters to a daily account that outlives the daemon."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import structlog

from emberd.core.types import EngineSample
from emberd.host.linux import LinuxHost
from emberd.services.accounts import Accounts
from emberd.services.observer import Observer
from emberd.services.swap_meter import SwapMeter

if TYPE_CHECKING:
    from pathlib import Path

PAGE = os.sysconf("SC_PAGESIZE")
PID = 77


class Kernel:
    """A /proc of a test's making: pages written to swap by all, and what one process has there."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        (self.proc / str(PID)).mkdir(parents=True)
        self.set(pages_out=0, engine_kib=0)

    def set(self, *, pages_out: int, engine_kib: int) -> None:
        (self.proc / "vmstat").write_text(f"pswpin 5\npswpout {pages_out}\n")
        (self.proc / str(PID) / "status").write_text(f"Name:\tengine\nVmSwap:\t{engine_kib} kB\n")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def meter(kernel: Kernel, tmp_path: Path, samples: list[EngineSample]) -> SwapMeter:
    last = samples[-1]
    left = iter(samples)
    log = structlog.get_logger()
    observer = Observer(LinuxHost(kernel.proc), log, lambda: next(left, last))
    return SwapMeter(observer, Accounts(tmp_path / "history.db", log))


IDLE = EngineSample("77:a", (PID,), is_idle=True, requests=3)
AFTER_A_REQUEST = EngineSample("77:a", (PID,), is_idle=True, requests=4)
AT_WORK = EngineSample("77:a", (PID,), is_idle=False, requests=4)
LOADING = EngineSample("77:a", (PID,), is_idle=False, requests=3)
NONE = EngineSample(None, (), is_idle=False, requests=4)


async def test_what_an_idle_engine_loses_to_swap_is_charged_to_it(kernel: Kernel, tmp_path: Path):
    swap = meter(kernel, tmp_path, [IDLE])
    await swap.tick()
    kernel.set(pages_out=1000, engine_kib=PAGE * 600 // 1024)
    writes = await swap.tick()
    assert (writes.engine_idle, writes.other_idle) == (600 * PAGE, 400 * PAGE)
    await swap._accounts.close()


@pytest.mark.parametrize(
    "seen",
    [[IDLE, AFTER_A_REQUEST], [AT_WORK, AFTER_A_REQUEST], [LOADING, IDLE]],
    ids=["came and went", "went", "was loading"],
)
async def test_an_engine_that_worked_between_two_readings_was_not_idle(
    kernel: Kernel, tmp_path: Path, seen: list[EngineSample]
):
    swap = meter(kernel, tmp_path, seen)
    await swap.tick()
    kernel.set(pages_out=10, engine_kib=0)
    writes = await swap.tick()
    assert (writes.other_idle, writes.other_busy) == (0, 10 * PAGE)
    await swap._accounts.close()


async def test_without_writes_no_file_is_made(kernel: Kernel, tmp_path: Path):
    swap = meter(kernel, tmp_path, [IDLE])
    for _ in range(3):
        await swap.tick()
    status = await swap.status(600)
    assert status is not None
    assert status.written_today_bytes == 0
    assert not (tmp_path / "history.db").exists()


async def test_the_account_of_a_day_survives_a_restart(kernel: Kernel, tmp_path: Path):
    for pages in (100, 300):
        swap = meter(kernel, tmp_path, [NONE])
        await swap.tick()
        kernel.set(pages_out=pages, engine_kib=0)
        await swap.tick()
        await swap._accounts.close()
    after = meter(kernel, tmp_path, [NONE])
    status = await after.status(0.001)
    assert status is not None
    assert status.written_today_bytes == status.other_bytes == 300 * PAGE
    assert status.share_of_endurance == pytest.approx(300 * PAGE / 1e9)
    assert (tmp_path / "history.db").stat().st_mode & 0o777 == 0o600
    await after._accounts.close()


async def test_a_reboot_starts_the_count_afresh(kernel: Kernel, tmp_path: Path):
    swap = meter(kernel, tmp_path, [IDLE])
    kernel.set(pages_out=5000, engine_kib=0)
    await swap.tick()
    kernel.set(pages_out=10, engine_kib=0)
    assert (await swap.tick()).total == 0
    await swap._accounts.close()


async def test_where_the_system_tells_nothing_nothing_is_claimed(tmp_path: Path):
    log = structlog.get_logger()
    observer = Observer(LinuxHost(tmp_path / "nowhere"), log, lambda: NONE)
    swap = SwapMeter(observer, Accounts(tmp_path / "h.db", log))
    await swap.tick()
    await swap.tick()
    assert await swap.status(600) is None
