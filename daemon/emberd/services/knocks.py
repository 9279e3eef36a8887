"""Signs that a person is back before they ask for text: a page polls, a client asks for the model."""

from __future__ import annotations

import asyncio
import time


class Knocks:
    """Tells who waits for it that somebody is there. emberd's own paths and probes are nobody."""

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._count = 0
        self._heard = asyncio.Event()

    def knock(self, path: str) -> None:
        """Hear a request that is not for text.

        Args:
            path: what was asked for; not kept.
        """
        del path
        self._last_s = time.monotonic()
        self._count += 1
        self._heard.set()

    async def wait(self) -> None:
        """Return at the next knock."""
        self._heard.clear()
        await self._heard.wait()

    @property
    def seconds_since(self) -> float | None:
        """Seconds since the last knock, None if there was none."""
        return None if self._last_s is None else time.monotonic() - self._last_s
