"""Users' first tokens, each with what was foretold when its request came."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from emberd.core.minute import FirstToken

if TYPE_CHECKING:
    from collections.abc import Callable

    from emberd.core.tally import Tally
    from emberd.core.turn import PromptCounts

_MOST_KEPT = 256
"""So many of a minute wait for the history."""


class FirstTokens:
    """Measures them, and keeps those of the last minute; counts tokens of prompts in the tally."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._began_s = time.monotonic()
        self._kept: deque[FirstToken] = deque(maxlen=_MOST_KEPT)
        self.last: FirstToken | None = None
        """Of the last streamed reply that has begun."""
        self.foretell: Callable[[], FirstToken] = FirstToken
        """Returns what is foretold of the next one."""

    def begin(self, idle_since_s: float | None, *, is_alone: bool) -> FirstToken:
        """A request is about to be sent; return what is foretold.

        Args:
            idle_since_s: when the last user's generation ended, on the monotonic clock; None if none has.
            is_alone: no other user's generation runs.
        """
        first = self.foretell()
        if is_alone:
            since_s = self._began_s if idle_since_s is None else idle_since_s
            first.idle_s = round(time.monotonic() - since_s, 3)
        return first

    def spoke(self, seconds: float, first: FirstToken) -> None:
        """A streamed reply began this long after its request."""
        first.at_s, first.took_s = round(time.time(), 3), round(seconds, 3)
        self._tally.note_first_token(seconds)
        self._kept.append(first)
        self.last = first

    def count(self, first: FirstToken | None, counts: PromptCounts) -> None:
        """A turn has ended with the engine's counts of its prompt."""
        self._tally.reused_tokens += counts.reused or 0
        self._tally.processed_tokens += counts.processed or 0
        if first is not None:
            first.reused, first.processed = counts.reused, counts.processed

    def take(self) -> list[FirstToken]:
        """Return those since the last call; the counts of the last one may be filled in later."""
        taken = list(self._kept)
        self._kept.clear()
        return taken
