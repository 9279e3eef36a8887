"""The users of the model: requests, which come first, and keep-warm's passes, which give way to them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emberd.services.gate import Gate
    from emberd.services.places import Places


class ModelUse:
    """Knows which users and passes use the model; ends a pass for a user, the thrash guard or a person's wish."""

    def __init__(self, gate: Gate, places: Places) -> None:
        self._gate = gate
        self._places = places
        self.letting_go = asyncio.Event()
        """Set while nothing may be brought back; ends a pass under way."""
        self.passing = asyncio.Lock()
        """Held by a pass: only one runs at a time."""
        self.last_pass_s: float | None = None
        """When the last pass that warmed everything ended, on the monotonic clock; None for never."""

    @property
    def is_free(self) -> bool:
        """Whether the engine is ready and no user uses it or waits for it."""
        return self._gate.port is not None and self._gate.sample().is_idle and not self._places.waiting

    @property
    def is_idle(self) -> bool:
        """Whether, besides, no pass runs."""
        return self.is_free and not self.passing.locked()

    @property
    def requests(self) -> int:
        """Users' requests that run or wait; those that run count as one."""
        return (0 if self._gate.sample().is_idle else 1) + self._places.waiting

    @property
    def arrived_s(self) -> float | None:
        """When the last request for the model came, on the monotonic clock; None for never."""
        return self._places.arrived_s

    async def end_pass(self) -> None:
        """End a pass under way; return when it has ended."""
        self.letting_go.set()
        async with self.passing:
            self.letting_go.clear()  # the next reading of the pressure sets it again where it must be

    def interruption(self) -> asyncio.Task[None]:
        """Wait until a user comes or a pass must end."""
        return asyncio.create_task(_first_of(self._places.next_arrival, self.letting_go))


async def _first_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()
