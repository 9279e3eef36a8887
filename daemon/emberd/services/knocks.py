"""Signs that a person is back before they ask for text: a page polls, a client asks for the model."""

from __future__ import annotations

import asyncio
import time

_AWAY_S = 60.0
"""Kobold Lite polls all the time while its page is open: only who was silent for so long is back."""


class Knocks:
    """Tells who waits for it that somebody is back. emberd's own paths and probes are nobody."""

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._heard = asyncio.Event()

    def knock(self) -> None:
        """Hear a request that is not for text."""
        now_s = time.monotonic()
        if self.is_back_at(now_s):
            self._heard.set()
        self._last_s = now_s

    def is_back_at(self, now_s: float) -> bool:
        """Tell whether a knock at that monotonic time would be somebody who comes back."""
        return self._last_s is None or now_s - self._last_s >= _AWAY_S

    async def wait(self) -> None:
        """Return when somebody comes back."""
        self._heard.clear()
        await self._heard.wait()

    @property
    def seconds_since(self) -> float | None:
        """Seconds since the last knock, None if there was none."""
        return None if self._last_s is None else time.monotonic() - self._last_s
