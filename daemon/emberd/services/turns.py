"""What users did: their last turns, which the engine's KV cache holds, and the signs that one is back.

Turns are in this process's memory only, never logged, never written: a turn is what a person said and was told.
Their memory is bounded, and forgotten when told.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from emberd.core.reply import counts_of, sent_back, text_of
from emberd.core.reuse import (
    CacheRoom,
    Conversation,
    ReuseLedger,
    Verdict,
    found_what_was_kept,
    judge_replay,
    to_replay,
)
from emberd.core.status import ReuseStatus
from emberd.core.turn import UNTOLD, Turn, is_of_same_conversation
from emberd.core.warmth import Cache

if TYPE_CHECKING:
    from collections.abc import Callable

    from emberd.core.generation import Generation
    from emberd.core.ports import Engine
    from emberd.core.streamed import StreamedReply
    from emberd.core.turn import PromptCounts


@dataclass(frozen=True, slots=True)
class Ended:
    """A generation that has ended, not yet taken apart. Never printed.

    Attributes:
        generation: what was asked, None if what the cache holds now is not known.
        stream: the reply, if it was streamed.
        whole: else its bytes, empty if they were too many.
        engine: knows how it tells counts.
        in_log: what its log told.
        was_cut: it did not come to its end.
    """

    generation: Generation | None = field(repr=False)
    stream: StreamedReply | None = field(repr=False)
    whole: bytes = field(repr=False)
    engine: Engine = field(repr=False)
    in_log: PromptCounts
    was_cut: bool = False

    def turn(self) -> Turn | None:
        """Return what the engine's cache holds now, None if that is not known."""
        generation, stream = self.generation, self.stream
        if generation is None:
            return None
        dialect = generation.dialect
        if stream is not None:
            stream.read()
            text, told, said = stream.text, stream.told, stream.parts.sent_back(dialect, stream.text)
        else:
            content = _object_of(self.whole)
            text, told = text_of(dialect, content) or "", counts_of(content, {})
            said = sent_back(dialect, content)
        counts = self.engine.counts_in_reply(told)
        counts = self.in_log if counts == UNTOLD else counts
        return Turn(generation.path, generation.body, text, counts, self.was_cut, said=said)


_AWAY_S = 60.0
"""Kobold Lite polls all the time while its page is open: only who was silent for so long is back."""


class Turns:
    """Remembers the last turn of each conversation that the engine's cache can hold: one with KoboldCPP.

    Args:
        most_bytes: tells how many bytes of requests and replies are remembered; 0 for nothing.
        room: tells how much the engine's cache holds.
    """

    def __init__(self, most_bytes: Callable[[], int], room: Callable[[], CacheRoom] = CacheRoom) -> None:
        self._most_bytes = most_bytes
        self._room = room
        self._held: list[Conversation] = []
        self._held_by: str | None = None
        self._tell: Callable[[], Turn | None] | None = None
        self._in_log = UNTOLD
        self._has_skipped = False
        self._counts = UNTOLD
        self._ledger = ReuseLedger()
        self._ledger_of: str | None = None
        self._holder: str | None = None
        self._is_known = False
        self._running = 0
        self._before: tuple[str | None, bool] = (None, False)
        self._has_changed = False
        self.taken_whole: tuple[str, bool] | None = None
        """Which engine was asked whether it took all of the last prompt, and what it said; None if none was."""
        self.last_replay = UNTOLD
        """What the engine told of the last replay."""
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
        self._take_apart()
        return tuple(each.turn for each in self._held)

    @property
    def counts(self) -> PromptCounts:
        """What the engine told of the last turn, whether that is remembered or not."""
        self._take_apart()
        return self._counts

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
        """A user's generation is about to be sent to this engine."""
        if not self._running or engine_key != self._holder:
            self._before, self._has_changed = (self._holder, self._is_known), False
        self._running += 1
        self._holder, self._is_known = engine_key, False

    def end(self, engine_key: str | None, tell: Callable[[], Turn | None], in_log: PromptCounts = UNTOLD) -> None:
        """A generation has ended.

        Args:
            engine_key: of the engine it was sent to; what another one holds by now is not changed by its end.
            tell: returns what the cache holds now, None if that is not known. Called when somebody wants to know:
                to take a reply apart costs more than to pass it on, and only the last one counts.
            in_log: what the engine's log tells of it.
        """
        if engine_key != self._holder:
            self.end_unheard()
            return
        self._running -= 1
        self.ended_s = time.monotonic()
        if self._room().conversations > 1 or self._held_by != engine_key:
            self._take_apart()  # the turn before may be of another conversation
        if self._held_by != engine_key:
            self._held = [replace(each, is_gone=True) for each in self._held]  # they were another engine's
        self._has_skipped = self._tell is not None or self._held_by != engine_key
        self._tell, self._in_log, self._held_by, self._has_changed = tell, in_log, engine_key, True
        self._is_known = not self._running

    def end_unheard(self) -> None:
        """The engine did not work on a generation: it refused it, could not be reached, or was another.

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
        """A streamed reply began so long after its request."""
        self.first_token_s = seconds
        self.streamed += 1

    def forget(self) -> bool:
        """Forget request and reply; True if there was something to forget. The engine's cache keeps what it has."""
        had, self._held, self.taken_whole = self.last is not None, [], None
        return had

    def with_room(self, whole: bytearray, chunk: bytes) -> bytearray | None:
        """Append to a reply while there is room, else give it up: None."""
        if len(whole) + len(chunk) > max(self.most_bytes, 0):
            return None
        whole += chunk
        return whole

    # --- replays --------------------------------------------------------------------------------------------

    def ledger(self, engine_key: str | None) -> ReuseLedger:
        """Return what this engine has shown of its prompt cache; of another one nothing is known."""
        self._take_apart()
        return self._ledger if engine_key == self._ledger_of else ReuseLedger()

    def to_replay(self, engine_key: str | None) -> list[Conversation]:
        """Return the conversations that a pass replays, in order; a new engine gets the latest one only."""
        self._take_apart()
        others = self._held[:-1] if engine_key == self._holder else []
        barred = self.ledger(engine_key).barred
        held = [each for each in others if each.turn.kind not in barred] + self._held[-1:]
        return to_replay(held, self._room())

    def replayed(
        self, engine_key: str | None, turn: Turn, counts: PromptCounts, *, may_be_gone: bool = False
    ) -> Verdict:
        """Take what this engine told of a replay of this turn; return what that says of its cache.

        Args:
            engine_key: of the engine.
            turn: that was replayed.
            counts: what was told.
            may_be_gone: something is known that may have taken it from the cache.
        """
        self.last_replay = counts
        number = next((number for number, each in enumerate(self._held) if each.turn is turn), None)
        if self._running or number is None:
            return Verdict.UNKNOWN  # a user has come, or it was forgotten
        held, is_latest = self._held[number], number == len(self._held) - 1
        is_new = engine_key != self._holder
        verdict = judge_replay(held, counts, may_be_gone=is_new or may_be_gone)
        self._ledger = self.ledger(engine_key).after_replay(turn.kind, verdict, counts, is_latest=is_latest)
        self._ledger_of = engine_key
        if is_new:
            self._held = [replace(each, is_gone=True) for each in self._held]
        is_gone = verdict is Verdict.MISS and not is_latest
        tokens = held.tokens if counts.held is None else counts.held
        self._held[number] = replace(held, tokens=tokens, is_replayed=True, is_gone=is_gone)
        self._holder = self._held_by = engine_key
        self._is_known = True
        return verdict

    def status(self, engine_key: str | None) -> ReuseStatus:
        """Return what this engine told of the last turn and of replays."""
        ledger = self.ledger(engine_key)
        return ReuseStatus(
            last_turn=self.counts,
            last_replay=self.last_replay,
            replays=ledger.replays,
            misses=ledger.misses,
            wasted_tokens=ledger.wasted_tokens,
            lost_turns=ledger.lost_turns,
            barred=tuple(sorted(ledger.barred)),
        )

    # --- remembering ----------------------------------------------------------------------------------------

    def _take_apart(self) -> None:
        """Look at the last reply, if nobody has yet."""
        tell, self._tell = self._tell, None
        if tell is not None:
            turn = tell()
            self._counts = self._in_log if turn is None else turn.counts
            self._remember(turn)

    def _remember(self, turn: Turn | None) -> None:
        """Put a turn in the place of the one before it; what is not known may have taken any slot."""
        self.taken_whole = None
        if turn is not None:
            self._judge(turn)
        if turn is None or _size_of(turn) > self.most_bytes:
            self._held = []
            return
        slots = max(self._room().conversations, 1)
        others = [each for each in self._held if slots > 1 and not is_of_same_conversation(turn, each.turn)]
        kept, left_bytes = [Conversation(turn, turn.counts.held)], self.most_bytes - _size_of(turn)
        for each in reversed(others[-(slots - 1) :] if slots > 1 else []):
            left_bytes -= _size_of(each.turn)
            if left_bytes < 0:
                break
            kept.insert(0, each)
        self._held = kept

    def _judge(self, turn: Turn) -> None:
        """Hold a user's turn against what was kept of its conversation, if nothing came between.

        A conversation before the latest may have been pushed out by that one.
        """
        if self._has_skipped or not self._held or self._held[-1].is_gone:
            return
        held = self._held[-1]
        has_found = found_what_was_kept(held, turn)
        if has_found is not None:
            ledger = self._ledger if self._held_by == self._ledger_of else ReuseLedger()
            self._ledger = ledger.after_turn(turn.kind, has_found=has_found, is_replayed=held.is_replayed)
            self._ledger_of = self._held_by


def _size_of(turn: Turn) -> int:
    said = len(json.dumps(turn.said)) if turn.said else len(turn.reply.encode("utf-8", "surrogatepass"))
    return len(json.dumps(turn.body)) + said


def _object_of(whole: bytes) -> dict[str, Any]:
    try:
        content = json.loads(whole)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class Knocks:
    """Tells who waits for it that a person is back before asking for text: a page polls, a client asks for models.

    emberd's own paths and probes are nobody.
    """

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
        """Return True if a knock at that monotonic time would be somebody who comes back."""
        return self._last_s is None or now_s - self._last_s >= _AWAY_S

    async def wait(self) -> None:
        """Return when somebody comes back."""
        self._heard.clear()
        await self._heard.wait()

    @property
    def seconds_since(self) -> float | None:
        """Seconds since the last knock, None if there was none."""
        return None if self._last_s is None else time.monotonic() - self._last_s
