"""WebSockets: after the handshake bytes pass both ways untouched, until one side ends.

KoboldCPP's `/ws` (1.104 to 1.115.1) tells ComfyUI's clients the length of a queue and carries no generation. So an
open WebSocket is no work: it keeps neither a drain nor a pass of keep-warm waiting, and goes with its engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from emberd.core.errors import NotReady
from emberd.core.generation import changes_cache
from emberd.engine.connection import EngineBrokeOff, EngineConnection, EngineRefused
from emberd.services.client_connection import SWITCH
from emberd.services.messages import CLIENT_SILENCE_S, end_to_end, engine_request
from emberd.services.places import Patience

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from collections.abc import Callable

    from starlette.types import Scope

    from emberd.services.gate import Gate
    from emberd.services.messages import Body, Client
    from emberd.services.places import Places

_MOST = 4
"""Each has one of the engine's 16 places for as long as it is open; the others are for requests."""
_RETRY_S = 5
_LAST_WORDS_S = 10.0
"""How long a side may still send when the other one has ended."""
_READ_BYTES = 64 * 1024
_SWITCHING = 101
_UPGRADE = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]


def is_asked_for(scope: Scope) -> bool:
    """Return True for the handshake of a WebSocket (RFC 6455, 4.2.1); any other wish to upgrade is not heeded."""
    headers = {name: value.lower() for name, value in scope["headers"]}
    return (
        scope["method"] == "GET"
        and headers.get(b"upgrade") == b"websocket"
        and b"upgrade" in headers.get(b"connection", b"")
        and b"sec-websocket-key" in headers
        and SWITCH in scope.get("extensions", {})
        and not changes_cache("GET", scope["path"])
    )


class Tunnels:
    """Passes WebSockets on, a few at a time."""

    def __init__(self, gate: Gate, places: Places, hold_timeout_s: Callable[[], float]) -> None:
        self._gate = gate
        self._places = places
        self._hold_timeout_s = hold_timeout_s
        self._open = 0

    async def run(self, scope: Scope, body: Body, client: Client, *, wakes: bool = True) -> None:
        """Shake hands with the engine for the client, and pass bytes on until one of them ends."""
        if self._open >= min(_MOST, self._gate.engine.most_connections - 1):
            await client.refuse(NotReady("BUSY", f"no more than {self._open} WebSockets can be open", _RETRY_S))
            return
        self._open += 1
        try:
            patience = Patience(self._hold_timeout_s())
            place = self._places.taken(patience, is_work=False, goes_first=False, uses_model=False, wakes=wakes)
            async with place as port:
                await self._pass_on(scope, body, client, EngineConnection(port), port)
        except NotReady as not_ready:
            await client.refuse(not_ready)
        except (EngineRefused, EngineBrokeOff):
            if not client.has_begun:
                await client.answer(502, "engine_died", "the engine closed the connection before it answered")
        finally:
            self._open -= 1

    async def _pass_on(
        self, scope: Scope, body: Body, client: Client, connection: EngineConnection, port: int
    ) -> None:
        try:
            with self._gate.admitted() as flowed:
                request = engine_request(scope, body, port)
                request.headers[:] = [each for each in request.headers if each[0] != b"connection"] + _UPGRADE
                head = await connection.ask(request)
                if head.status != _SWITCHING:
                    start = {"type": "http.response.start", "status": head.status}
                    await client.send({**start, "headers": end_to_end(head.headers)})
                    async for part in connection.parts():
                        await client.send_part(part)
                    await client.end()
                    return
            client.has_begun = True
            first, reader, writer = connection.streams()
            client_reader, client_writer = scope["extensions"][SWITCH]["protocols"](head.headers)
            client_writer.write(first)
            await _relay((client_reader, client_writer), (reader, writer), flowed)
        finally:
            connection.close()


async def _relay(
    client: tuple[StreamReader, StreamWriter],
    engine: tuple[StreamReader, StreamWriter],
    flowed: Callable[[int], None],
) -> None:
    """Return when one side has ended, and the other has too or had its time for it."""
    ways = {
        asyncio.create_task(_copy(client[0], engine[1], lambda _: None)),
        asyncio.create_task(_copy(engine[0], client[1], flowed)),
    }
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(ways, timeout=_LAST_WORDS_S)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        client[1].close()


async def _copy(reader: StreamReader, writer: StreamWriter, flowed: Callable[[int], None]) -> None:
    """Copy until the end, or until the other side has read nothing for CLIENT_SILENCE_S."""
    with contextlib.suppress(OSError, TimeoutError):
        while data := await reader.read(_READ_BYTES):
            flowed(len(data))
            writer.write(data)
            async with asyncio.timeout(CLIENT_SILENCE_S):
                await writer.drain()
        writer.write_eof()
