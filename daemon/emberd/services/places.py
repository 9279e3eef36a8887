"""The engine's connections: few, given in order of arrival, and only while an engine is ready."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from emberd.core.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from emberd.services.gate import Gate

_RETRY_BUSY_S = 1
_LONGEST_IN_LINE_S = 3600.0
"""An engine may let a request wait for its turn without end; the supervisor ends engines that hang."""


class Patience:
    """How long a request still waits for an engine that is not ready; time in line does not count."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        """Start the time again."""
        self._end_s = time.monotonic() + self._seconds

    @property
    def left_s(self) -> float:
        """Seconds left, never negative."""
        return max(self._end_s - time.monotonic(), 0.0)


class Line:
    """First come, first served; a request whose engine died goes to the front. `limit` returns how many at once."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._served = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_free(self) -> bool:
        """Whether a newcomer is served at once."""
        return self._served < self._limit()

    async def enter(self, *, goes_first: bool = False) -> None:
        """Return when it is the caller's turn, who must `leave` afterwards."""
        if self.is_free:
            self._served += 1
            return
        turn = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if goes_first else self._waiting.append)(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.leave()  # it came with the cancellation
            else:
                with suppress(ValueError):
                    self._waiting.remove(turn)
            raise

    def leave(self) -> None:
        """Let the next one in."""
        self._served -= 1
        while self._waiting and self.is_free:
            turn = self._waiting.popleft()
            if not turn.done():
                self._served += 1
                turn.set_result(None)


class Places:
    """A bounded number of places at the engine, and a bounded queue before them.

    An engine that works on few requests at a time refuses what is too much for its own queue (KoboldCPP: one at a
    time unless told, and 503 beyond six more). So those requests wait here, without a connection.

    Args:
        most_waiting: returns how many requests may wait for an engine or for a place.
    """

    def __init__(self, gate: Gate, most_waiting: Callable[[], int]) -> None:
        self._gate = gate
        self._most_waiting = most_waiting
        self._connections = Line(lambda: gate.engine.most_connections)
        self._turns = Line(lambda: gate.engine.most_at_work)
        self._since: dict[object, float] = {}
        self.next_arrival = asyncio.Event()
        """Set when the next request for the model comes; a new event then takes its place."""
        self.arrived_s: float | None = None
        """When the last one came, on the monotonic clock; None for never."""

    @property
    def waiting(self) -> int:
        """Requests for the model that wait for a ready engine or for a place; polls do not count."""
        return len(self._since)

    @property
    def longest_wait_s(self) -> float:
        """Seconds that the first of them has waited."""
        return time.monotonic() - min(self._since.values()) if self._since else 0.0

    @asynccontextmanager
    async def taken(
        self,
        patience: Patience,
        *,
        is_work: bool,
        goes_first: bool,
        uses_model: bool = True,
        wakes: bool = True,
    ) -> AsyncIterator[int]:
        """Wait for a ready engine and a place; yield the engine's port; give the place back at the end.

        Args:
            patience: how long to wait for an engine that is not ready.
            is_work: whether the engine works on few such requests at a time.
            goes_first: its reply was cut, so it goes to the front.
            uses_model: a user waits for the model, not a page that polls, which never takes the place of one.
            wakes: an engine that is cool is started for it.

        Raises:
            NotReady: no engine in time, or too many requests already wait.
        """
        if uses_model:
            arrival, self.next_arrival = self.next_arrival, asyncio.Event()
            arrival.set()
            self.arrived_s = time.monotonic()
        lines = [self._turns, self._connections] if is_work else [self._connections]
        ticket = object()
        if uses_model:
            self._since[ticket] = time.monotonic()
        try:
            port = await self._wait(patience, lines, goes_first=goes_first, is_counted=uses_model, wakes=wakes)
        finally:
            self._since.pop(ticket, None)
        try:
            yield port
        finally:
            self._give_back(lines)

    async def _wait(
        self, patience: Patience, lines: list[Line], *, goes_first: bool, is_counted: bool, wakes: bool
    ) -> int:
        while True:
            port = await self._ready(patience, may_refuse=is_counted and not goes_first, wakes=wakes)
            if all(line.is_free for line in lines):
                for line in lines:
                    await line.enter()
                return port
            if is_counted and not goes_first:
                self._refuse_a_crowd()
            await self._line_up(lines, goes_first=goes_first)
            patience.renew()
            # The engine may have gone, or be draining, since this request took its place in the queue.
            try:
                return await self._gate.ensure_ready(0, wakes=wakes)
            except NotReady:
                self._give_back(lines)
            except BaseException:
                self._give_back(lines)
                raise

    async def _line_up(self, lines: list[Line], *, goes_first: bool) -> None:
        entered: list[Line] = []
        try:
            async with asyncio.timeout(_LONGEST_IN_LINE_S):
                for line in lines:
                    await line.enter(goes_first=goes_first)
                    entered.append(line)
        except BaseException as error:
            for line in entered:
                line.leave()
            if isinstance(error, TimeoutError):
                raise NotReady("BUSY", "the engine is busy with other requests", _RETRY_BUSY_S) from None
            raise

    def _give_back(self, lines: list[Line]) -> None:
        for line in lines:
            line.leave()

    async def _ready(self, patience: Patience, *, may_refuse: bool, wakes: bool) -> int:
        try:
            return await self._gate.ensure_ready(0, wakes=wakes)
        except NotReady:
            if may_refuse:
                self._refuse_a_crowd()
        return await self._gate.ensure_ready(patience.left_s, wakes=wakes)

    def _refuse_a_crowd(self) -> None:
        others = len(self._since) - 1
        if others >= self._most_waiting():
            raise NotReady("BUSY", f"{others} requests wait already", _RETRY_BUSY_S)
