"""The history, used off the event loop, and what keeping warm has cost."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections import deque
from typing import TYPE_CHECKING, TypeVar

import psutil

from emberd.core.status import CostStatus
from emberd.core.warmth_cost import BUDGET_WINDOW_S, WarmthCost, budget_wait_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from emberd.core.minute import FirstToken, Minute
    from emberd.core.swap_account import SwapWrites
    from emberd.services.history import Account, History

    T = TypeVar("T")


class Accounts:
    """Keeps accounts and rows in memory until `flush`. Opens its file then, or when it exists and somebody asks."""

    def __init__(self, path: Path, log: FilteringBoundLogger) -> None:
        self._path = path
        self._log = log
        self._history: History | None = None

    async def add(self, account: SwapWrites | WarmthCost) -> None:
        """Add to today's account, in memory."""
        if account.total:
            await asyncio.to_thread(self._open().keep, [(_today(), account)])

    async def keep_rows(self, minutes: Sequence[Minute], tokens: Sequence[FirstToken]) -> None:
        """Add minutes and first tokens, in memory."""
        await asyncio.to_thread(self._open().keep, (), minutes, tokens)

    async def flush(self) -> None:
        """Write what is in memory; what cannot be written stays there."""
        if self._history is not None:
            await asyncio.to_thread(self._history.flush)

    async def ask(self, question: Callable[[History], T]) -> T:
        """Return the answer to a question to the history; opens its file."""
        return await asyncio.to_thread(lambda: question(self._open()))

    async def today(self, kind: type[Account]) -> Account:
        """Return today's account."""
        if self._history is None and not self._path.exists():
            return kind()
        days = await asyncio.to_thread(self._open().days, _today(), kind)
        return days.get(_today(), kind())

    async def close(self) -> None:
        """Write what waits and close the file."""
        if self._history is not None:
            await asyncio.to_thread(self._history.close)

    def _open(self) -> History:
        if self._history is None:
            from emberd.services.history import History  # noqa: PLC0415  # sqlite3 costs 1 MiB: only when needed

            self._history = History(self._path, self._log)
        return self._history


def _today() -> dt.date:
    return dt.datetime.now().astimezone().date()


class Spending:
    """Adds up what keeping warm costs: since the start, today, and against the budget of ten minutes."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self.total = self._unsaved = WarmthCost()
        self._recent: deque[tuple[float, float]] = deque()

    def add(self, cost: WarmthCost, *, counts: bool = True) -> None:
        """Add a cost; `counts` is False where memory had been taken: the budget then does not change."""
        self.total += cost
        self._unsaved += cost
        if cost.cpu_ms and counts:
            now_s = time.monotonic()
            self._recent.append((now_s, cost.cpu_ms / 1000))
            while now_s - self._recent[0][0] > BUDGET_WINDOW_S:
                self._recent.popleft()

    def excuse(self) -> None:
        """Memory was taken from the model, so earlier costs no longer count against the budget."""
        self._recent.clear()

    @property
    def wait_s(self) -> float:
        """Seconds until keep-warm is within its budget again."""
        return budget_wait_s(self._recent, time.monotonic())

    async def save(self) -> None:
        """Add costs that are not in the account yet to it."""
        unsaved, self._unsaved = self._unsaved, WarmthCost()
        await self.accounts.add(unsaved)

    async def status(self) -> tuple[CostStatus, CostStatus]:
        """Return the cost since emberd's start, and today's."""
        return _describe(self.total), _describe(await self.accounts.today(WarmthCost) + self._unsaved)


def cpu_s(*pids: int | None) -> float:
    """Return the processor time of these processes so far, in seconds; 0 for one that does not exist."""
    return sum(_cpu_s(pid) for pid in pids if pid is not None)


def _cpu_s(pid: int) -> float:
    try:
        return sum(psutil.Process(pid).cpu_times()[:2])
    except psutil.Error:
        return 0.0


def _describe(cost: WarmthCost) -> CostStatus:
    return CostStatus(
        passes=cost.passes,
        read_bytes=cost.read_bytes,
        engine_s=cost.engine_ms / 1000,
        cpu_s=cost.cpu_ms / 1000,
        processed_tokens=cost.processed_tokens,
    )
