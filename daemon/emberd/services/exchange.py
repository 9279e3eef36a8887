"""One request on its way through: sent, sent again, its reply passed on, and continued when an engine dies."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from emberd.core.errors import NotReady
from emberd.core.generation import Rest, changes_cache, recognise, uses_model
from emberd.core.minute import FirstToken
from emberd.core.status import RequestStatus
from emberd.core.streamed import StreamedReply
from emberd.engine.connection import EngineBrokeOff, EngineConnection, EngineRefused
from emberd.services.messages import ClientGone, end_to_end, engine_request
from emberd.services.places import Patience
from emberd.services.turns import Ended

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Scope
    from structlog.typing import FilteringBoundLogger

    from emberd.core.generation import Generation
    from emberd.core.turn import PromptCounts
    from emberd.engine.connection import ReplyHead
    from emberd.services.gate import Gate
    from emberd.services.messages import Body, Client
    from emberd.services.places import Places
    from emberd.services.turns import Turns

_MOST_SENDS = 3
"""How many engines in a row may end before they give a request anything new."""
_RETRY_BUSY_S = 1
_PAUSE_AFTER_REFUSAL_S = 0.05
"""Meanwhile the supervisor looks; without a pause a closed port would be tried thousands of times a second."""
_LONGEST_ABORT_S = 10.0
"""An abort is seen only after the current batch of the prompt."""
_ABORT_AGAIN_S = 0.1
_ASK_S = 2.0
"""For questions between two streams: how many tokens is this text, can this engine continue."""
_HTTP_OK, _HTTP_UNAVAILABLE = 200, 503
_NOT_DONE = frozenset({501, _HTTP_UNAVAILABLE})
"""The engine cannot do it at all (llama.cpp's `/infill` without a model for it), or is busy."""
_STREAMS = frozenset({b"text/event-stream", b"application/x-ndjson"})
"""KoboldCPP names the first for Ollama's lines, too (1.115)."""


class ReplyBrokenOff(Exception):
    """The engine ended in the middle of a reply that cannot be continued."""


class _Cut(Exception):
    """The engine ended in the middle of a reply that can be continued."""


class Exchange:
    """One request and its reply.

    Args:
        log: events go here; never a header, a path's query or a body.
        hold_timeout_s: seconds to wait for an engine, anew after each cut.
    """

    def __init__(
        self,
        gate: Gate,
        places: Places,
        turns: Turns,
        log: FilteringBoundLogger,
        hold_timeout_s: float,
    ) -> None:
        self._gate = gate
        self._places = places
        self._turns = turns
        self._log = log
        self._hold_timeout_s = hold_timeout_s
        self._generation: Generation | None = None
        self._stream: StreamedReply | None = None
        self._whole: bytearray | None = None
        self._status: int | None = None
        self._port = 0
        self._engine_key: str | None = None
        self._asked_s: float | None = None
        self._was_cut = True
        self._first = FirstToken()
        self._began_s = time.monotonic()

    def status(self) -> RequestStatus:
        """Return how old it is and how far; never what it says."""
        has_words = self._stream is not None and self._asked_s is None
        state = "waits" if not self._port else "writes" if has_words or self._whole else "reads"
        age_s = round(time.monotonic() - self._began_s, 3)
        if self._stream is not None:
            self._stream.read()
        return RequestStatus(age_s, state, None if self._stream is None else self._stream.events)

    async def run(self, scope: Scope, body: Body, client: Client, *, wakes: bool = True) -> None:
        """Carry it out; unless it `wakes` a cool engine, it is refused by one.

        Raises:
            ClientGone: the client left.
            ClientSilent: the client stopped within its body.
            ReplyBrokenOff: the engine died; the client must see that something is missing.
        """
        patience = Patience(self._hold_timeout_s)
        is_work = self._gate.engine.is_work(scope["method"], scope["path"])
        waits = is_work or uses_model(scope["method"], scope["path"])
        sends, had_place = 0, False
        try:
            while sends < _MOST_SENDS and (body.can_be_sent_again or self._stream is not None):
                async with self._places.taken(
                    patience, is_work=is_work, goes_first=had_place, uses_model=waits, wakes=wakes
                ) as port:
                    self._port, had_place = port, True
                    seen = len(self._stream.text) if self._stream else 0
                    try:
                        rest = await self._rest_to_ask(port)
                        if rest is None and self._stream is not None:
                            await self._end_early(self._stream, client)
                            return
                        with self._gate.admitted() as flowed:
                            # What a page is told when it polls is no progress of a generation.
                            await self._send(scope, body, client, rest, flowed if waits else _ignore)
                            return
                    except EngineRefused:
                        pass  # nothing was sent, so nothing counts
                    except _Cut:
                        self._gate.tally.cuts += 1
                        has_grown = self._stream is not None and len(self._stream.text) > seen
                        sends = 0 if has_grown else sends + 1
                        patience.renew()
                        self._log.warning("reply_cut", can_continue=True)
                    except EngineBrokeOff as error:
                        sends += 1
                        patience.renew()  # time in which an engine computed is not time spent waiting for one
                        self._log.warning("request_failed", error=_cause(error), was_sent=sends)
                    self._gate.doubt(port)
                if not patience.left_s:
                    break
                await asyncio.sleep(min(_PAUSE_AFTER_REFUSAL_S, patience.left_s))
        except NotReady as not_ready:
            await self._give_up(client, not_ready)
            return
        if sends:
            await self._give_up(client, None)
        else:
            await self._give_up(client, NotReady("LOADING", "the engine accepts no connections", _RETRY_BUSY_S))

    async def _abandon(self, connection: EngineConnection) -> None:
        """End the work for a client that has left, and keep the place until the engine is free.

        KoboldCPP (1.104) must be told: by itself it ends a stream 0.4 s after its client has left, and never ends
        a reply that is not streamed. The rest of its reply is read, because a reply that it cannot send holds up
        the next request by 0.25 s. Other engines watch the connection. Without a key KoboldCPP aborts whatever
        runs; that is this request as long as it keeps its place. A request sent earlier would find a full queue,
        and get 503.
        A KoboldCPP that works on several requests at once ends none of them by its key (1.115). Its connection is
        closed, and while the others go on, nothing shows whether the request has ended.
        """
        engine = self._gate.engine
        key = self._generation.key if self._generation is not None else ""
        end_s = time.monotonic() + _LONGEST_ABORT_S
        outlasting = asyncio.create_task(connection.outlast())
        try:
            while time.monotonic() < end_s:
                if engine.most_at_work > 1 or not await engine.abort(self._port, key, _ASK_S):
                    connection.close()
                    if self._gate.in_flight > 1:
                        return
                    await asyncio.sleep(_ABORT_AGAIN_S)
                elif (await asyncio.wait({outlasting}, timeout=_ABORT_AGAIN_S))[0]:
                    return
                activity = await engine.probe_activity(self._port, _ASK_S)
                if not activity.answered or not activity.is_generating:
                    return
        finally:
            outlasting.cancel()

    async def _send(
        self, scope: Scope, body: Body, client: Client, rest: Rest | None, flowed: Callable[[int], None]
    ) -> None:
        replaces, engine_key = changes_cache(scope["method"], scope["path"]), self._gate.engine_key
        self._engine_key = engine_key
        if replaces:
            self._first = self._turns.begin(engine_key)
            self._gate.forget_counts()
            if self._generation is None and body.in_hand is not None:
                self._generation = recognise(scope["method"], scope["path"], body.in_hand)
        connection = EngineConnection(self._port)
        self._asked_s, self._status, self._was_cut = time.monotonic(), None, True
        was_sent = True
        try:
            asked = body.in_hand
            head = await connection.ask(engine_request(scope, body, self._port, rest))
            body.let_go()
            self._status = head.status
            if head.status == _HTTP_OK and asked is not None:
                self._gate.note_switch(scope["method"], scope["path"], asked)
            await self._reply(head, connection, client, flowed)
            self._was_cut = False
        except EngineRefused:
            was_sent = False
            raise
        except (asyncio.CancelledError, ClientGone):
            if self._gate.engine.is_work(scope["method"], scope["path"]):
                await self._abandon(connection)
            raise
        finally:
            connection.close()
            if replaces and was_sent and not self._was_refused():
                in_log = self._gate.counts_in_log()
                self._turns.end(engine_key, self._ended(in_log).turn, in_log, self._first)
            elif replaces:
                self._turns.end_unheard()
            elif self._status == _HTTP_OK and uses_model(scope["method"], scope["path"]):
                self._turns.note_use()

    async def _reply(
        self, head: ReplyHead, connection: EngineConnection, client: Client, flowed: Callable[[int], None]
    ) -> None:
        if self._stream is not None and not _is_stream(head):
            if self._was_refused() and head.status != _HTTP_UNAVAILABLE:
                self._stream.obstacle = "a rest that the engine refuses"
                await self._give_up(client, None)
            raise EngineBrokeOff  # it did not continue
        if self._stream is None:
            headers = end_to_end(head.headers)
            await client.send({"type": "http.response.start", "status": head.status, "headers": headers})
            self._watch(head)
        stream = self._stream
        try:
            async for chunk in connection.parts():
                flowed(len(chunk))
                await client.send_part(self._taken(chunk))
                if stream is not None and stream.is_over:
                    await client.end()
                    await self._abandon(connection)
                    return
        except EngineBrokeOff as error:
            await self._break_off(client, _cause(error), error)
            return
        is_whole = _tells_its_length(head)
        if not is_whole and stream is not None:
            stream.read()
            is_whole = stream.is_finished
        if not is_whole and not await self._gate.is_alive(self._port, self._engine_key):
            await self._break_off(client, "engine_died")
        if stream is not None:
            await client.send_part(stream.rest())
        await client.end()

    def _was_refused(self) -> bool:
        """Return True if the engine answered before it began to work: the client's mistake, or it is busy."""
        status = self._status
        if status is None:
            return False
        is_mistake = 400 <= status < 500  # noqa: PLR2004  # RFC 9110
        return is_mistake or status in _NOT_DONE or status in self._gate.engine.refusals

    def _taken(self, chunk: bytes) -> bytes:
        """Follow a piece of the reply; return what to send the client now."""
        if self._stream is None:
            if self._whole is not None:
                self._whole = self._turns.with_room(self._whole, chunk)
            return chunk
        if self._asked_s is not None:
            self._turns.first_tokens.spoke(time.monotonic() - self._asked_s, self._first)
            self._asked_s = None
        return self._stream.take(chunk)

    def _watch(self, head: ReplyHead) -> None:
        """Follow the reply of a generation, to continue and to remember it."""
        generation = self._generation
        if generation is None or head.status != _HTTP_OK:
            return
        if generation.is_streamed and _is_stream(head):
            self._stream = StreamedReply(generation, self._turns.most_bytes, began_at=time.time())
        elif not generation.is_streamed or not _is_stream(head):  # KoboldCPP 1.104 does not stream Ollama's
            self._whole = bytearray()

    async def _break_off(self, client: Client, error_name: str, error: Exception | None = None) -> None:
        """Decide what a cut reply means; a reply that lacks no word ends as if nothing had happened.

        Raises:
            _Cut: it can be continued.
            ReplyBrokenOff: it cannot.
        """
        stream = self._stream
        if stream is not None:
            stream.read()
            if stream.is_finished:
                self._gate.doubt(self._port)
                await client.send_part(stream.farewell())
                await client.end()
                return
            if not stream.obstacle:
                raise _Cut from error
        self._gate.tally.cuts += 1
        self._log.warning("reply_broken_off", error=error_name)
        self._gate.doubt(self._port)
        if stream is not None:
            await self._give_up(client, None)
        raise ReplyBrokenOff from error

    async def _rest_to_ask(self, port: int) -> Rest | None:
        """Return the request for the rest of a cut reply, None if no reply was cut or none is missing."""
        stream = self._stream
        if stream is None:
            return None
        engine, generation = self._gate.engine, stream.generation
        if not stream.text:
            used, rest = 0, Rest(generation.path, dict(generation.body), generation.dialect)
        else:
            counted = await engine.count_tokens(port, stream.text, _ASK_S)
            used = max(counted or 0, stream.events)
            if generation.budget_tokens is not None and used >= generation.budget_tokens:
                return None
            found = await engine.rest(port, generation, stream.text, used, _ASK_S)
            if found is None:
                stream.obstacle = "a chat, which this engine cannot continue"
                return None
            rest = found
        stream.begin_again(used, rest.dialect)
        self._gate.tally.continuations += 1
        self._log.info("reply_continued", tokens_so_far=used)
        return rest

    async def _end_early(self, stream: StreamedReply, client: Client) -> None:
        """End a cut reply that is not continued."""
        if stream.obstacle:
            await self._give_up(client, None)
            return
        await client.send_part(stream.end_by_length())
        await client.end()

    async def _give_up(self, client: Client, not_ready: NotReady | None) -> None:
        """Tell the client that there will be no (more) reply."""
        why = not_ready.message if not_ready else "the engine closed the connection before it answered"
        if self._stream is not None:
            if self._stream.obstacle:
                why = f"the engine ended, and a reply with {self._stream.obstacle} cannot be continued"
            await client.send_part(self._stream.end_by_error(why))
            raise ReplyBrokenOff
        if not_ready is not None:
            await client.refuse(not_ready)
        else:
            await client.answer(502, "engine_died", why)

    def _ended(self, in_log: PromptCounts) -> Ended:
        is_known = self._stream is not None or self._status in {None, _HTTP_OK}
        generation = self._generation if is_known else None
        return Ended(generation, self._stream, bytes(self._whole or b""), self._gate.engine, in_log, self._was_cut)


def _ignore(_count: int) -> None:
    pass


def _cause(error: EngineBrokeOff) -> str:
    return type(error.__cause__ or error).__name__


def _is_stream(head: ReplyHead) -> bool:
    kind = head.get(b"content-type") or b""
    return head.status == _HTTP_OK and kind.partition(b";")[0].strip() in _STREAMS


def _tells_its_length(head: ReplyHead) -> bool:
    """Return True if a cut can be seen. KoboldCPP's streams and errors just close, as at its death."""
    framed = head.get(b"content-length") or head.get(b"transfer-encoding")
    return framed is not None or head.status in {204, 304}
