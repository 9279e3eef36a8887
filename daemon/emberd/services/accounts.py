"""The daily accounts as the services use them: off the event loop, and opened when there is something in them."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from emberd.core.swap_account import SwapWrites
    from emberd.core.warmth_cost import WarmthCost
    from emberd.services.history import Account, History


class Accounts:
    """Opens its file when something is added, or when there is one and somebody asks.

    Args:
        path: the SQLite file.
        log: events go here.
    """

    def __init__(self, path: Path, log: FilteringBoundLogger) -> None:
        self._path = path
        self._log = log
        self._history: History | None = None

    async def add(self, account: SwapWrites | WarmthCost) -> None:
        """Add to today's account."""
        if account.total:
            await asyncio.to_thread(self._open().add, _today(), account)

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
