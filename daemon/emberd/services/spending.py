"""What keeping warm has cost: since emberd's start, today, and within the last ten minutes."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from emberd.core.status import CostStatus
from emberd.core.warmth_cost import BUDGET_WINDOW_S, WarmthCost, budget_wait_s

if TYPE_CHECKING:
    from emberd.services.accounts import Accounts

_SAVE_S = 3600.0
"""The cost goes to disk so often, and at the end."""


class Spending:
    """Adds up the cost, and holds the processor time against a budget.

    Args:
        accounts: keep it by day.
    """

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._total = self._unsaved = WarmthCost()
        self._saved_s = time.monotonic()
        self._recent: deque[tuple[float, float]] = deque()

    def add(self, cost: WarmthCost, *, counts: bool = True) -> None:
        """Add a cost.

        Args:
            cost: what it was.
            counts: against the budget, too; not where memory had been taken.
        """
        self._total += cost
        self._unsaved += cost
        if cost.cpu_ms and counts:
            now_s = time.monotonic()
            self._recent.append((now_s, cost.cpu_ms / 1000))
            while now_s - self._recent[0][0] > BUDGET_WINDOW_S:
                self._recent.popleft()

    def excuse(self) -> None:
        """Memory was taken from the model: what was spent before was not for nothing."""
        self._recent.clear()

    @property
    def wait_s(self) -> float:
        """How long keep-warm has to wait until it is within its budget again."""
        return budget_wait_s(self._recent, time.monotonic())

    async def save(self, *, is_due: bool = True) -> None:
        """Put what is not on disk yet there; without `is_due` only once an hour."""
        if is_due or time.monotonic() - self._saved_s > _SAVE_S:
            unsaved, self._unsaved, self._saved_s = self._unsaved, WarmthCost(), time.monotonic()
            await self._accounts.add(unsaved)

    async def status(self) -> tuple[CostStatus, CostStatus]:
        """Return what it was since emberd's start, and today."""
        return _describe(self._total), _describe(await self._accounts.today(WarmthCost) + self._unsaved)


def _describe(cost: WarmthCost) -> CostStatus:
    return CostStatus(
        passes=cost.passes,
        read_bytes=cost.read_bytes,
        engine_s=cost.engine_ms / 1000,
        cpu_s=cost.cpu_ms / 1000,
        processed_tokens=cost.processed_tokens,
    )
