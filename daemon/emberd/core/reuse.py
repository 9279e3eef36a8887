"""How much an engine says that it reused of its prompt cache, and what follows for replays. Pure.

A replay should cost one token. It costs more where several conversations do not fit into the cache together
(llama-server, four slots that share 4,096 cells: each of four replays threw another one out, and every pass
processed 11,000 tokens), and where an engine keeps no prompt at all (KoboldCPP 1.115.1 with `--parallelrequests
4`: 5.5 s a replay). So the engine's own counts decide whether a replay is sent again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emberd.core.turn import PromptCounts, Turn

MOST_PROCESSED_TOKENS = 136
"""A replay that finds its prompt in the cache processes at most so much. Seen: 1 to 3 with KoboldCPP, 13 with
llama-server and a sliding window, 8 more after a replay without the last words. A hybrid model's state begins at
a checkpoint, which some builds of llama-server make 64 tokens before the prompt's end, and anew only after 64
more (server-context.cpp)."""
LEAST_FOUND_SHARE = 0.5
"""A user's turn that finds less than this share of the prompt that was kept has lost it. Some templates write the
system prompt only into the last message, so that the turn before differs from there on."""


@dataclass(frozen=True, slots=True)
class CacheRoom:
    """How much an engine's KV cache holds.

    Attributes:
        conversations: slots, each for one conversation.
        cells: tokens that fit; None if unknown.
        is_shared: the slots share these cells; otherwise each has so many.
    """

    conversations: int = 1
    cells: int | None = None
    is_shared: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation whose last turn an engine's cache holds, as far as is known.

    Attributes:
        turn: its last request and reply.
        tokens: its size in the cache, None if the engine did not tell.
        is_replayed: a replay has processed it since that turn.
        is_gone: it has left the cache, or is not worth bringing back.
    """

    turn: Turn
    tokens: int | None = None
    is_replayed: bool = False
    is_gone: bool = False


class Verdict(Enum):
    """What a replay found."""

    HIT = "hit"
    """The conversation was in the cache."""
    MISS = "miss"
    """It was not, without a known explanation."""
    PRIMED = "primed"
    """It could not be: the engine is new, or the user left before the prompt was processed."""
    UNKNOWN = "unknown"
    """The engine does not tell."""


def judge_replay(conversation: Conversation, counts: PromptCounts, *, may_be_gone: bool) -> Verdict:
    """Judge what a replay found; `may_be_gone` means a new engine, or one that has loaded its model again.

    The first replay of a turn may process as many more tokens as the reply has: an engine can generate other
    tokens than those that it makes of the same text, and thoughts are left out of a chat's history. A text has no
    more tokens than bytes.
    """
    turn = conversation.turn
    if may_be_gone or (turn.was_cut and not conversation.is_replayed):
        return Verdict.PRIMED
    if counts.processed is None:
        return Verdict.UNKNOWN
    told = turn.counts.generated
    of_reply = len(turn.reply.encode("utf-8", "surrogatepass")) if told is None else told
    most = MOST_PROCESSED_TOKENS + (0 if conversation.is_replayed else of_reply)
    return Verdict.HIT if counts.processed <= most else Verdict.MISS


def found_what_was_kept(conversation: Conversation, new: Turn) -> bool | None:
    """Return whether a user's turn found the prompt of the last one, None if it does not continue that."""
    kept, new_prompt = conversation.turn.counts.prompt, new.counts.prompt
    if kept is None or conversation.turn.was_cut or new_prompt is None or not new.continues(conversation.turn):
        return None
    if new_prompt < kept:
        return None  # the engine has cut it
    return (new.counts.reused or 0) >= LEAST_FOUND_SHARE * kept


def to_replay(conversations: Sequence[Conversation], room: CacheRoom) -> list[Conversation]:
    """Return the conversations (most recent last) that a pass replays, in the order of sending.

    The latest comes first, so that a user who interrupts the pass finds it, and once more after the others,
    because an engine gives the least recently used slot to a new conversation. Others are sent only into room
    that is surely left, so their sizes must be known.
    """
    if not conversations or conversations[-1].is_gone:
        return []
    latest, others = conversations[-1], list[Conversation]()
    left = None if room.cells is None or latest.tokens is None else room.cells - latest.tokens
    for each in reversed(conversations[:-1][-(room.conversations - 1) :] if room.conversations > 1 else []):
        if each.is_gone or each.tokens is None or left is None:
            continue
        if room.is_shared and each.tokens > left:
            break  # a small older one may still be there, but newer ones push it out
        left -= each.tokens
        others.insert(0, each)
    return [latest, *others, latest] if others else [latest]


@dataclass(frozen=True, slots=True)
class ReuseLedger:
    """How one engine process has used its prompt cache.

    Attributes:
        proven: kinds of turns whose prompt was once found again.
        doubted: kinds whose last replay missed.
        lost: kinds whose last user's turn did not find what replays had kept.
        barred: kinds that are not replayed again. replays: replays with counts. misses: those of them that
            missed.
        wasted_tokens: processed by the replays that missed.
        lost_turns: turns of users that did not find what replays had kept.
    """

    proven: frozenset[str] = field(default_factory=frozenset)
    doubted: frozenset[str] = field(default_factory=frozenset)
    lost: frozenset[str] = field(default_factory=frozenset)
    barred: frozenset[str] = field(default_factory=frozenset)
    replays: int = 0
    misses: int = 0
    wasted_tokens: int = 0
    lost_turns: int = 0

    def after_replay(self, kind: str, verdict: Verdict, counts: PromptCounts, *, is_latest: bool) -> ReuseLedger:
        """Return the ledger after a replay; the first miss bars a kind that never hit.

        A kind that did hit has lost its conversation to another one; it is in the cache again now, and the next
        replay must find it. A miss of an older conversation says nothing of its kind.
        """
        if verdict in {Verdict.PRIMED, Verdict.UNKNOWN}:
            return self
        now = replace(self, replays=self.replays + 1)
        if verdict is Verdict.HIT:
            return replace(now, proven=now.proven | {kind}, doubted=now.doubted - {kind})
        now = replace(now, misses=now.misses + 1, wasted_tokens=now.wasted_tokens + (counts.processed or 0))
        if not is_latest:
            return now
        if kind in now.proven and kind not in now.doubted:
            return replace(now, doubted=now.doubted | {kind})
        return replace(now, barred=now.barred | {kind})

    def after_turn(self, kind: str, *, has_found: bool, is_replayed: bool) -> ReuseLedger:
        """Return the ledger after a user's turn; two in a row that did not find what was kept bar the kind."""
        if has_found:
            return replace(self, proven=self.proven | {kind}, lost=self.lost - {kind})
        if not is_replayed:
            return self
        now = replace(self, lost_turns=self.lost_turns + 1, lost=self.lost | {kind})
        return replace(now, barred=now.barred | {kind}) if kind in self.lost else now
