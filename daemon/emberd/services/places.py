"""The engine's connections: few, given in order of arrival, and only while an engine is ready."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from emberd.core.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from emberd.services.exchange import Gate

_RETRY_BUSY_S = 1


class Places:
    """A bounded number of places at the engine, and a bounded queue before them.

    Args:
        gate: the supervisor.
        limit: places.
        most_waiting: tells how many requests may wait for an engine or for a place.
    """

    def __init__(self, gate: Gate, limit: int, most_waiting: Callable[[], int]) -> None:
        self._gate = gate
        self._limit = limit
        self._most_waiting = most_waiting
        self._free = asyncio.Semaphore(limit)
        self._taken = 0
        self._since: dict[object, float] = {}
        self._open = asyncio.Event()
        self._open.set()
        self._arrived = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Requests that wait for a ready engine or for a place."""
        return len(self._since)

    @property
    def longest_wait_s(self) -> float:
        """How long the first of them has waited."""
        return time.monotonic() - min(self._since.values()) if self._since else 0.0

    async def arrival(self) -> None:
        """Return when the next request comes."""
        self._arrived.clear()
        await self._arrived.wait()

    async def take(self, deadline_s: float) -> int:
        """Wait for a ready engine and for a place, first come first served; return the engine's port.

        Raises:
            NotReady: one of the two did not come before `deadline_s` (monotonic), or too many wait already.
        """
        self._arrived.set()
        ticket = object()
        self._since[ticket] = time.monotonic()
        try:
            return await self._wait(deadline_s)
        finally:
            del self._since[ticket]

    def give_back(self) -> None:
        """Leave the place."""
        self._taken -= 1
        self._free.release()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[bool]:
        """Let nobody in for a moment; yields whether nobody is in."""
        self._open.clear()
        try:
            yield self._taken == 0
        finally:
            self._open.set()

    async def _wait(self, deadline_s: float) -> int:
        while True:
            port = await self._ready(deadline_s)
            was_free = not self._free.locked() and self._open.is_set()
            if not was_free:
                self._refuse_a_crowd()
            try:
                async with asyncio.timeout(left(deadline_s)):
                    await self._open.wait()
                    await self._free.acquire()
            except TimeoutError:
                raise NotReady("BUSY", "the engine is busy with other requests", _RETRY_BUSY_S) from None
            self._taken += 1
            if was_free:
                return port
            # The engine may have gone, or be draining, since this request took its place in the queue.
            try:
                return await self._gate.ensure_ready(0)
            except NotReady:
                self.give_back()
            except BaseException:
                self.give_back()
                raise

    async def _ready(self, deadline_s: float) -> int:
        try:
            return await self._gate.ensure_ready(0)
        except NotReady:
            self._refuse_a_crowd()
        return await self._gate.ensure_ready(left(deadline_s))

    def _refuse_a_crowd(self) -> None:
        """Refuse a request that would have to wait behind too many others."""
        others = len(self._since) - 1
        if others >= self._most_waiting():
            raise NotReady("BUSY", f"{others} requests wait already", _RETRY_BUSY_S)


def left(deadline_s: float) -> float:
    """Return the seconds until a deadline on the monotonic clock, never negative."""
    return max(deadline_s - time.monotonic(), 0.0)
