"""Users' last turns, which the engine's KV cache holds, and the signs that a user is back.

Turns are private: they are in this process's memory only, never logged or written, of bounded size, and forgotten
on request.
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
from emberd.core.tally import Tally
from emberd.core.turn import UNTOLD, Turn, is_of_same_conversation
from emberd.core.warmth import Cache
from emberd.services.first_tokens import FirstTokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from emberd.core.generation import Generation
    from emberd.core.minute import FirstToken
    from emberd.core.ports import Engine
    from emberd.core.streamed import StreamedReply
    from emberd.core.turn import PromptCounts


@dataclass(frozen=True, slots=True)
class Ended:
    """A generation that has ended, not yet taken apart. Never printed.

    Attributes:
        generation: the request, None if it is not known what the cache holds now.
        stream: the reply, if it was streamed.
        whole: the bytes of a reply that was not streamed, empty if they were too many.
        engine: reads its counts.
        in_log: counts from its log.
        was_cut: it did not come to its end.
    """

    generation: Generation | None = field(repr=False)
    stream: StreamedReply | None = field(repr=False)
    whole: bytes = field(repr=False)
    engine: Engine = field(repr=False)
    in_log: PromptCounts
    was_cut: bool = False

    def turn(self) -> Turn | None:
        """Return the turn that the engine's cache now holds, None if unknown."""
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
"""Kobold Lite polls all the time while its page is open: a user is back only after so much silence."""


class Turns:
    """Remembers the last turn of each conversation that the engine's cache can hold: one with KoboldCPP.

    Args:
        most_bytes: returns how many bytes of requests and replies to remember; 0 for nothing.
        room: returns how much the engine's cache holds.
        tally: counts tokens.
    """

    def __init__(
        self, most_bytes: Callable[[], int], room: Callable[[], CacheRoom] = CacheRoom, tally: Tally | None = None
    ) -> None:
        self._most_bytes = most_bytes
        self._room = room
        self._conversations: list[Conversation] = []
        self._conversations_of: str | None = None
        self._tell: Callable[[], Turn | None] | None = None
        self._in_log = UNTOLD
        self._has_skipped = False
        self._counts = UNTOLD
        self._ledger = ReuseLedger()
        self._ledger_of: str | None = None
        self._cache_of: str | None = None
        self._is_known = False
        self._running = 0
        self._before: tuple[str | None, bool] = (None, False)
        self._has_changed = False
        self.taken_whole: tuple[str, bool] | None = None
        """The engine that was asked whether it took the last prompt as a whole, and its answer; None if none was
        asked."""
        self.last_replay = UNTOLD
        """The engine's counts of the last replay."""
        self.first_tokens = FirstTokens(tally or Tally())
        self._first: FirstToken | None = None
        self.ended_s: float | None = None
        """When a user's generation ended last, on the monotonic clock."""
        self.used_s: float | None = None
        """When any use of the model by a user ended last."""

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
        return tuple(each.turn for each in self._conversations)

    @property
    def counts(self) -> PromptCounts:
        """The engine's counts of the last turn, whether the turn is remembered or not."""
        self._take_apart()
        return self._counts

    def cache(self, engine_key: str | None, *, is_adopted: bool) -> Cache:
        """Return whose prompt the cache of an engine holds.

        Args:
            engine_key: text that tells the engine's process from others.
            is_adopted: it served before this emberd was there.
        """
        if self._cache_of != engine_key:
            return Cache.UNKNOWN if is_adopted else Cache.EMPTY
        return Cache.KNOWN if self._is_known and self.last is not None else Cache.UNKNOWN

    def begin(self, engine_key: str | None) -> FirstToken:
        """A user's generation is about to be sent to this engine; return what is foretold of its first token."""
        first = self.first_tokens.begin(self.ended_s, is_alone=not self._running)
        if not self._running or engine_key != self._cache_of:
            self._before, self._has_changed = (self._cache_of, self._is_known), False
        self._running += 1
        self._cache_of, self._is_known = engine_key, False
        return first

    def end(
        self,
        engine_key: str | None,
        tell: Callable[[], Turn | None],
        in_log: PromptCounts = UNTOLD,
        first: FirstToken | None = None,
    ) -> None:
        """A generation has ended.

        Args:
            engine_key: of the engine it was sent to; the cache of a later engine is not changed by its end.
            tell: returns the turn that the cache now holds, None if unknown. Called only when needed: to take a
                reply apart costs more than to pass it on, and only the last one counts.
            in_log: counts from the engine's log.
            first: its first token.
        """
        if engine_key != self._cache_of:
            self.end_unheard()
            return
        self._running -= 1
        self.ended_s = self.used_s = time.monotonic()
        shows_worth = self._first is not None and self._first.was_idle
        if self._room().conversations > 1 or self._conversations_of != engine_key or shows_worth:
            self._take_apart()  # the turn before may be of another conversation
        if self._conversations_of != engine_key:
            self._conversations = [
                replace(each, is_gone=True) for each in self._conversations
            ]  # another engine had them
        self._has_skipped = self._tell is not None or self._conversations_of != engine_key
        self._first = first
        self._tell, self._in_log, self._conversations_of, self._has_changed = tell, in_log, engine_key, True
        self._is_known = not self._running

    def end_unheard(self) -> None:
        """The engine did not work on a generation: it refused, was another one, or could not be reached.

        Its cache, and what is remembered of it, stay as they were.
        """
        self._running -= 1
        if self._running:
            return
        if self._has_changed:
            self._is_known = True
        else:
            self._cache_of, self._is_known = self._before

    def note_use(self) -> None:
        """A request has used the model, and left the prompt cache as it was."""
        self.used_s = time.monotonic()

    def take_first_tokens(self) -> list[FirstToken]:
        """Return the first tokens since the last call, with the counts of the last turn if it has ended."""
        self._take_apart()
        return self.first_tokens.take()

    def forget(self) -> bool:
        """Forget request and reply, not the engine's cache; return True if there was something to forget."""
        had, self._conversations, self.taken_whole = self.last is not None, [], None
        return had

    def with_room(self, whole: bytearray, chunk: bytes) -> bytearray | None:
        """Append to a reply; return None if there is no room."""
        if len(whole) + len(chunk) > max(self.most_bytes, 0):
            return None
        whole += chunk
        return whole

    # --- replays --------------------------------------------------------------------------------------------

    def ledger(self, engine_key: str | None) -> ReuseLedger:
        """Return what this engine has shown of its prompt cache: nothing if it is another one than before."""
        self._take_apart()
        return self._ledger if engine_key == self._ledger_of else ReuseLedger()

    def to_replay(self, engine_key: str | None) -> list[Conversation]:
        """Return the conversations that a pass replays, in order; for a new engine only the latest."""
        self._take_apart()
        others = self._conversations[:-1] if engine_key == self._cache_of else []
        barred = self.ledger(engine_key).barred
        kept = [each for each in others if each.turn.kind not in barred] + self._conversations[-1:]
        return to_replay(kept, self._room())

    def replayed(
        self, engine_key: str | None, turn: Turn, counts: PromptCounts, *, may_be_gone: bool = False
    ) -> Verdict:
        """Note this engine's counts of a replay; return the verdict on its cache.

        Args:
            engine_key: of the engine.
            turn: the turn that was replayed.
            counts: the engine's.
            may_be_gone: something known may have taken the turn out of the cache.
        """
        self.last_replay = counts
        number = next((number for number, each in enumerate(self._conversations) if each.turn is turn), None)
        if self._running or number is None:
            return Verdict.UNKNOWN  # a user has come, or the turn was forgotten
        conversation, is_latest = self._conversations[number], number == len(self._conversations) - 1
        is_new = engine_key != self._cache_of
        verdict = judge_replay(conversation, counts, may_be_gone=is_new or may_be_gone)
        self._ledger = self.ledger(engine_key).after_replay(turn.kind, verdict, counts, is_latest=is_latest)
        self._ledger_of = engine_key
        if is_new:
            self._conversations = [replace(each, is_gone=True) for each in self._conversations]
        is_gone = verdict is Verdict.MISS and not is_latest
        tokens = conversation.tokens if counts.held is None else counts.held
        self._conversations[number] = replace(conversation, tokens=tokens, is_replayed=True, is_gone=is_gone)
        self._cache_of = self._conversations_of = engine_key
        self._is_known = True
        return verdict

    def status(self, engine_key: str | None) -> ReuseStatus:
        """Return this engine's counts of the last turn and of replays."""
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
        """Take the last reply apart, unless that was done."""
        tell, self._tell = self._tell, None
        if tell is not None:
            turn = tell()
            self._counts = self._in_log if turn is None else turn.counts
            self.first_tokens.count(self._first, self._counts)
            self._remember(turn)

    def _remember(self, turn: Turn | None) -> None:
        """Replace the conversation's turn before; an unknown turn may have taken any slot."""
        self.taken_whole = None
        if turn is not None:
            self._judge(turn)
        if turn is None or _size_of(turn) > self.most_bytes:
            self._conversations = []
            return
        slots = max(self._room().conversations, 1)
        others = [
            each for each in self._conversations if slots > 1 and not is_of_same_conversation(turn, each.turn)
        ]
        kept, left_bytes = [Conversation(turn, turn.counts.held)], self.most_bytes - _size_of(turn)
        for each in reversed(others[-(slots - 1) :] if slots > 1 else []):
            left_bytes -= _size_of(each.turn)
            if left_bytes < 0:
                break
            kept.insert(0, each)
        self._conversations = kept

    def _judge(self, turn: Turn) -> None:
        """Judge whether a user's turn found what was kept of its conversation, if nothing came between.

        The latest conversation may have pushed out earlier ones.
        """
        if self._has_skipped or not self._conversations or self._conversations[-1].is_gone:
            return
        latest = self._conversations[-1]
        has_found = found_what_was_kept(latest, turn)
        if has_found is not None:
            ledger = self._ledger if self._conversations_of == self._ledger_of else ReuseLedger()
            self._ledger = ledger.after_turn(turn.kind, has_found=has_found, is_replayed=latest.is_replayed)
            self._ledger_of = self._conversations_of


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
    """Tells that a user is back before asking for text: a page polls, a client asks for models.

    emberd's own paths and probes do not count.
    """

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._heard = asyncio.Event()

    def knock(self) -> bool:
        """Note a request that is not for text; return True if it means that a user is back."""
        now_s = time.monotonic()
        is_back = self.is_back_at(now_s)
        if is_back:
            self._heard.set()
        self._last_s = now_s
        return is_back

    def is_back_at(self, now_s: float) -> bool:
        """Return True if a knock at that monotonic time would mean that a user is back."""
        return self._last_s is None or now_s - self._last_s >= _AWAY_S

    async def wait(self) -> None:
        """Return when a user comes back."""
        self._heard.clear()
        await self._heard.wait()

    @property
    def seconds_since(self) -> float | None:
        """Seconds since the last knock, None if there was none."""
        return None if self._last_s is None else time.monotonic() - self._last_s
