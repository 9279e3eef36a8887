"""The memory of the last turns: what the engine's KV cache holds, in this process's memory only.

Never logged, never written: a turn is what a person said and was told. It is bounded, and forgotten when told.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from emberd.core.replay import is_of_same_conversation
from emberd.core.warmth import Cache

if TYPE_CHECKING:
    from collections.abc import Callable

    from emberd.core.replay import Turn


class Turns:
    """Remembers the last turn of each conversation that the engine's cache can hold: one with KoboldCPP.

    Args:
        most_bytes: tells how many bytes of requests and replies are remembered; 0 for nothing.
        slots: tells how many conversations the engine's cache holds.
    """

    def __init__(self, most_bytes: Callable[[], int], slots: Callable[[], int] = lambda: 1) -> None:
        self._most_bytes = most_bytes
        self._slots = slots
        self._turns: list[Turn] = []
        self._tell: Callable[[], Turn | None] | None = None
        self._holder: str | None = None
        self._is_known = False
        self._running = 0
        self._before: tuple[str | None, bool] = (None, False)
        self._has_changed = False
        self.taken_whole: tuple[str, bool] | None = None
        """Which engine was asked whether it took all of the last prompt, and what it said; None if none was."""
        self.first_token_s: float | None = None
        """How long the last streamed reply made its user wait for its first words, in seconds."""
        self.streamed = 0
        """Streamed replies so far."""
        self.ended_s: float | None = None
        """When a user's generation ended last, on the monotonic clock."""

    def __repr__(self) -> str:
        return "<Turns>"

    @property
    def most_bytes(self) -> int:
        """Bound of what is remembered of one turn."""
        return self._most_bytes()

    @property
    def last(self) -> Turn | None:
        """The last turn, None if there was none or it is not remembered."""
        turns = self.all
        return turns[-1] if turns else None

    @property
    def all(self) -> tuple[Turn, ...]:
        """The last turn of each conversation, the most recent last."""
        tell, self._tell = self._tell, None
        if tell is not None:
            self._remember(tell())
        return tuple(self._turns)

    def cache(self, engine_key: str | None, *, is_adopted: bool) -> Cache:
        """Return whose prompt the cache of an engine holds.

        Args:
            engine_key: text that tells the engine's process from others.
            is_adopted: it served before this emberd was there.
        """
        if self._holder != engine_key:
            return Cache.UNKNOWN if is_adopted else Cache.EMPTY
        return Cache.KNOWN if self._is_known and self.last is not None else Cache.UNKNOWN

    def begin(self, engine_key: str | None) -> None:
        """Hear that a generation of a user's is sent to this engine."""
        if not self._running or engine_key != self._holder:
            self._before, self._has_changed = (self._holder, self._is_known), False
        self._running += 1
        self._holder, self._is_known = engine_key, False

    def end(self, engine_key: str | None, tell: Callable[[], Turn | None]) -> None:
        """Hear that a generation ended.

        Args:
            engine_key: of the engine it was sent to; what another one holds by now is not changed by its end.
            tell: returns what the cache holds now, None if that is not known. Called when somebody wants to know:
                to take a reply apart costs more than to pass it on, and only the last one counts.
        """
        if engine_key != self._holder:
            self.end_unheard()
            return
        self._running -= 1
        self.ended_s = time.monotonic()
        if self._slots() > 1:
            _ = self.all  # the turn before may be of another conversation
        self._tell, self._has_changed = tell, True
        self._is_known = not self._running

    def end_unheard(self) -> None:
        """Hear that the engine did not work on a generation: it refused it, could not be reached, or was another.

        What it holds is what it held before, and what was remembered of that stays.
        """
        self._running -= 1
        if self._running:
            return
        if self._has_changed:
            self._is_known = True
        else:
            self._holder, self._is_known = self._before

    def spoke(self, seconds: float) -> None:
        """Hear how long after its request a streamed reply began."""
        self.first_token_s = seconds
        self.streamed += 1

    def replayed(self, engine_key: str | None) -> None:
        """Hear that this engine has processed the turn again."""
        if not self._running:
            self._holder, self._is_known = engine_key, True

    def forget(self) -> bool:
        """Forget request and reply; True if there was something to forget. The engine's cache keeps what it has."""
        had, self._turns, self.taken_whole = self.last is not None, [], None
        return had

    def with_room(self, whole: bytearray, chunk: bytes) -> bytearray | None:
        """Append to a reply while there is room, else give it up: None."""
        if len(whole) + len(chunk) > max(self.most_bytes, 0):
            return None
        whole += chunk
        return whole

    def _remember(self, turn: Turn | None) -> None:
        """Put a turn in the place of the one before it; what is not known may have taken any slot."""
        self.taken_whole = None
        if turn is None or _size_of(turn) > self.most_bytes:
            self._turns = []
            return
        slots = max(self._slots(), 1)
        others = [each for each in self._turns if slots > 1 and not is_of_same_conversation(turn, each)]
        kept, room = [turn], self.most_bytes - _size_of(turn)
        for each in reversed(others[-(slots - 1) :] if slots > 1 else []):
            room -= _size_of(each)
            if room < 0:
                break
            kept.insert(0, each)
        self._turns = kept


def _size_of(turn: Turn) -> int:
    return len(json.dumps(turn.body)) + len(turn.reply.encode("utf-8", "surrogatepass"))
