"""Keeps the prompt cache: sends the last turns again, and judges by the engine's counts."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emberd.core.errors import RequestRefused
from emberd.core.replay import GENKEY, is_replayable, make_replays, tiny
from emberd.core.reuse import Verdict
from emberd.core.turn import UNTOLD
from emberd.core.warmth import Cache
from emberd.core.warmth_cost import WarmthCost

if TYPE_CHECKING:
    from collections.abc import Mapping

    from structlog.typing import FilteringBoundLogger

    from emberd.core.replay import Replay
    from emberd.core.settings import WarmthSettings
    from emberd.core.turn import PromptCounts, Turn
    from emberd.core.types import EngineSample
    from emberd.services.accounts import Spending
    from emberd.services.forecaster import Forecaster
    from emberd.services.gate import Gate
    from emberd.services.model_use import ModelUse
    from emberd.services.turns import Turns

_REPLAY_LIMIT_S = 600.0
"""Processing a long prompt again on a CPU takes minutes."""
ASK_S = 2.0


class Replays:
    """Sends generations of one token; a user who comes ends them."""

    def __init__(
        self,
        log: FilteringBoundLogger,
        gate: Gate,
        turns: Turns,
        use: ModelUse,
        forecaster: Forecaster,
        spending: Spending,
    ) -> None:
        self._log = log
        self._gate = gate
        self._use = use
        self._forecaster = forecaster
        self._spending = spending
        self._replayed_s = 0.0
        self._numbers = itertools.count(1)
        self._said_barred: frozenset[str] = frozenset()
        self._refused: int | None = None
        self._said_refused: tuple[str | None, int] | None = None
        self.turns = turns
        self.has_primed = False
        """Whether a replay of this pass had to bring a prompt into the cache."""

    async def check_prompt_was_not_truncated(self) -> None:
        """Ask the engine, once for each turn, whether it took the last prompt as a whole."""
        port, engine, turn = self._gate.port, self._gate.sample(), self.turns.last
        known = self.turns.taken_whole
        if port is None or engine.key is None or turn is None or (known is not None and known[0] == engine.key):
            return
        if not self._is_replayable(turn, engine) or not self._use.is_free:
            return
        is_whole = await self._gate.engine.took_whole(port, turn, ASK_S)
        if is_whole is not None and self.turns.last is turn:
            self.turns.taken_whole = (engine.key, is_whole)

    def cache(self, engine: EngineSample, settings: WarmthSettings) -> Cache:
        """Return whose prompt the engine's cache holds, and whether that can be replayed."""
        cache = self.turns.cache(engine.key, is_adopted=self._gate.is_adopted)
        last = self.turns.last
        can_replay = (
            last is not None and self._is_replayable(last, engine) and self.turns.taken_whole == (engine.key, True)
        )
        if cache is Cache.KNOWN and not can_replay:
            return Cache.UNKNOWN
        # A new engine has nothing to lose, and the last turn can be brought back.
        return Cache.KNOWN if cache is Cache.EMPTY and can_replay and settings.reprime else cache

    def _is_replayable(self, turn: Turn, engine: EngineSample) -> bool:
        barred = self.turns.ledger(engine.key).barred
        if barred - self._said_barred:
            self._log.warning("replays_barred", kinds=sorted(barred))
        self._said_barred = barred
        if turn.kind in barred:
            return False
        return is_replayable(turn, self._gate.engine.name, keeps_state=engine.keeps_state)

    def take_refusal(self) -> int | None:
        """Return the HTTP status with which the engine refused the last replay, once; None if it did not."""
        refused, self._refused = self._refused, None
        return refused

    async def tiny(self) -> dict[str, Any] | None:
        """Use the model with words of emberd's own; return None if it was given up or failed."""
        engine = self._gate.engine
        return None if await self._send(tiny(engine.name, engine.wishes().serves)) is None else {}

    async def replay(self, *, is_thorough: bool) -> dict[str, Any] | None:
        """Replay the conversations that fit into the cache together; end at the first miss.

        A miss of another conversation may have pushed out the latest one, which is then sent once more. If
        `is_thorough`, the latest is sent first without its last words, which the second request then has to
        process.
        """
        port, key = self._gate.port, self._gate.sample().key
        if port is None:
            return None
        to_send = [each.turn for each in self.turns.to_replay(key)]
        first_s, has_missed = None, False
        while to_send:
            turn = to_send.pop(0)
            is_first = first_s is None
            name = self._gate.engine.name
            for request in make_replays(turn, name, is_thorough=is_thorough and is_first):
                sent = await self._send(request)
                if sent is None:
                    return None
                took_s, counts = sent
                first_s = took_s if first_s is None else first_s  # the others have more to process
                # A conversation that another's miss has pushed out has not missed itself.
                if self._judge(key, turn, counts, may_be_gone=has_missed) is Verdict.MISS:
                    has_missed, to_send = True, [] if turn is self.turns.last else to_send[-1:]
                    break
        return None if first_s is None or has_missed else {"replay_ratio": self._forecaster.note_replay(first_s)}

    def _judge(self, key: str | None, turn: Turn, counts: PromptCounts, *, may_be_gone: bool) -> Verdict:
        # An engine that reloads its model in place (KoboldCPP) keeps its process, and loses its cache.
        has_loaded_again = self._gate.since_s > max(self.turns.ended_s or 0.0, self._replayed_s)
        self._replayed_s = time.monotonic()
        verdict = self.turns.replayed(key, turn, counts, may_be_gone=may_be_gone or has_loaded_again)
        self.has_primed = self.has_primed or verdict is Verdict.PRIMED
        if verdict is Verdict.MISS:
            is_barred = turn.kind in self.turns.ledger(key).barred
            self._log.warning(
                "replay_missed",
                kind=turn.kind,
                reused_tokens=counts.reused,
                processed_tokens=counts.processed,
                is_latest=turn is self.turns.last,
                is_barred=is_barred,
            )
        return verdict

    async def _send(self, request: Replay) -> tuple[float, PromptCounts] | None:
        """Send a generation of one token, given up at once when a user comes.

        Returns:
            Its time in seconds, and the engine's counts; None if it was given up or failed.
        """
        port, engine = self._gate.port, self._gate.engine
        if port is None or not self._use.is_free:
            return None  # since the pass began
        # KoboldCPP remembers the key of an abort that came too late, and does nothing for the next request with it.
        key = f"{GENKEY}-{next(self._numbers)}"
        if "genkey" in request.body:
            request = replace(request, body={**request.body, "genkey": key})
        began_s = time.monotonic()
        self._gate.forget_counts()
        sending, coming = asyncio.create_task(engine.send(port, request, _REPLAY_LIMIT_S)), self._use.interruption()
        try:
            await asyncio.wait({sending, coming}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                await engine.abort(port, key, ASK_S)
                return None
        finally:
            for task in (sending, coming):
                task.cancel()
            await asyncio.gather(sending, coming, return_exceptions=True)
        took_s, told = time.monotonic() - began_s, self._told(sending)
        counts = UNTOLD if told is None else engine.counts_in_reply(told)
        counts = self._gate.counts_in_log() if counts == UNTOLD else counts
        cost = WarmthCost(engine_ms=round(took_s * 1000), processed_tokens=counts.processed or 0)
        self._spending.add(cost)
        return None if told is None else (took_s, counts)

    def _told(self, sending: asyncio.Task[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
        """Return the reply's object, None if there is none; a refusal is logged once for each engine."""
        try:
            told, self._refused = sending.result(), None
        except RequestRefused as refusal:
            told, self._refused = None, refusal.status
            refused = (self._gate.engine_key, refusal.status)
            if refused != self._said_refused:
                self._log.warning("replay_refused", status=refusal.status)
            self._said_refused = refused
        return told
