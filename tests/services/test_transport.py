"""Odd but right clients: those that end their side early, send in crumbs, talk on after a refusal, or upgrade."""

# ruff: noqa: F811  # a fixture and its use have one name

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from emberd.core.access import AccessRules
from emberd.host import ThisHost
from emberd.services import client_connection, messages, tunnel
from services.test_proxy import LIMIT_S, client, front, hello, serve, until  # noqa: F401  # a fixture

if TYPE_CHECKING:
    from services.test_proxy import Engine, Front

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


async def everything(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(LIMIT_S):
        return await reader.read()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, as a process that is killed with unread data does."""
    end: socket.socket = writer.get_extra_info("socket")
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Slow:
    """A handler whose answer waits until it is let, and that knows whether its asker has left."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.release = asyncio.Event()
        self.left = asyncio.Event()

    async def __call__(self, _: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer, or see that nobody waits."""
        self.asked.set()
        leaving = asyncio.create_task(reader.read())
        release = asyncio.create_task(self.release.wait())
        await asyncio.wait({leaving, release}, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            self.left.set()
        for task in (leaving, release):
            task.cancel()
        await hello(b"", reader, writer)


# --- half-closed connections --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_a_client_that_ends_its_side_after_its_request_is_answered_to_the_end(front: Front, version: bytes):
    slow = Slow()
    await serve(front, slow)
    reader, writer = await front.connect()
    writer.write(b"GET / HTTP/" + version + b"\r\nHost: x\r\n\r\n")
    writer.write_eof()
    async with asyncio.timeout(LIMIT_S):
        await slow.asked.wait()
    await asyncio.sleep(1.2)  # longer than emberd waits between two looks, which no event tells
    slow.release.set()
    answer = await everything(reader)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"hello" in answer
    assert not slow.left.is_set()
    writer.close()


async def test_two_requests_at_once_and_then_the_end_are_both_answered(front: Front):
    await serve(front, hello)
    reader, writer = await front.connect()
    writer.write(GET + GET)
    writer.write_eof()
    assert (await everything(reader)).count(b"hello") == 2
    writer.close()


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_half_closed_client_that_then_leaves_ends_its_generation(
    front: Front, monkeypatch: pytest.MonkeyPatch, is_known: bool
):
    """Where the kernel does not know the other end, a reset tells."""
    if not is_known:
        monkeypatch.setattr(ThisHost, "is_held", lambda *_: None)
    monkeypatch.setattr(client_connection, "_LOOK_S", 0.05)
    slow = Slow()
    await serve(front, slow)
    _, writer = await front.connect()
    writer.write(GET)
    writer.write_eof()
    async with asyncio.timeout(LIMIT_S):
        await slow.asked.wait()
        assert not slow.left.is_set()
        if is_known:
            writer.close()
        else:
            reset(writer)
        await slow.left.wait()


async def test_a_client_that_nobody_knows_is_gone_when_the_reply_cannot_be_delivered(
    front: Front, monkeypatch: pytest.MonkeyPatch
):
    """A closed connection of another computer looks like a half-closed one, until something is written."""
    monkeypatch.setattr(ThisHost, "is_held", lambda *_: None)
    cut = asyncio.Event()

    async def endless(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        try:
            while True:
                writer.write(b"data: {}\n\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        finally:
            cut.set()

    await serve(front, endless)
    reader, writer = await front.connect()
    writer.write(GET)
    async with asyncio.timeout(LIMIT_S):
        await reader.readuntil(b"data")
        writer.close()
        await cut.wait()


async def test_a_body_that_ends_too_early_is_refused_with_the_reason(front: Front):
    engine = await serve(front, hello)
    reader, writer = await front.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
    writer.write_eof()
    answer = await everything(reader)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"before the body was whole" in answer
    assert engine.heads == []
    writer.close()


# --- bodies in pieces ---------------------------------------------------------------------------------------


async def test_chunks_that_come_in_crumbs_reach_the_engine_in_few_pieces(
    front: Front, monkeypatch: pytest.MonkeyPatch
):
    """KoboldCPP takes 512 chunks; TCP may cut each of the client's, here into more than 512 in all."""
    monkeypatch.setattr(messages, "_PIECE_BYTES", 16 * 1024)
    pieces: list[bytes] = []

    async def keep(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while length := int(await reader.readline(), 16):
            pieces.append(await reader.readexactly(length))
            await reader.readline()
        await hello(head, reader, writer)

    await serve(front, keep)
    reader, writer = await front.connect()
    end: socket.socket = writer.get_extra_info("socket")
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    writer.write(b"POST /up HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = bytes(range(250)) * 8
    for _ in range(200):
        framed = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        for start in range(0, len(framed), 500):
            writer.write(framed[start : start + 500])
            await asyncio.sleep(0)  # lets emberd read each crumb by itself
    writer.write(b"0\r\n\r\n")
    assert b"hello" in await everything(reader)
    assert b"".join(pieces) == chunk * 200
    assert min(map(len, pieces[:-1])) >= 16 * 1024
    writer.close()


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", [b"Content-Length: 30000000", b"Transfer-Encoding: chunked"])
async def test_a_refusal_is_read_by_a_client_that_first_sends_all_of_its_body(front: Front, framing: bytes):
    front.rules = AccessRules(key="secret")
    reader, writer = await front.connect()
    writer.write(b"POST /api/v1/generate HTTP/1.1\r\nHost: localhost\r\n" + framing + b"\r\n\r\n")
    is_chunked = b"chunked" in framing
    part = b"x" * 100_000
    for _ in range(300):
        writer.write(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
        await writer.drain()
    writer.write(b"0\r\n\r\n" if is_chunked else b"")
    answer = await everything(reader)
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"wrong_key" in answer
    writer.close()


@pytest.mark.parametrize("limit", ["_LINGER_S", "_LINGER_SILENCE_S", "bytes"])
async def test_what_a_refused_client_still_sends_is_read_within_bounds(
    front: Front, monkeypatch: pytest.MonkeyPatch, limit: str
):
    if limit == "bytes":
        monkeypatch.setattr(client_connection.ClientConnection, "_linger_left_bytes", 1_000_000)
    else:
        monkeypatch.setattr(client_connection, limit, 0.2)
    front.rules = AccessRules(key="secret")
    reader, writer = await front.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n")
    assert (await everything(reader)).startswith(b"HTTP/1.1 401")
    assert connections(front) == 1
    crumb = {"_LINGER_S": b"x", "_LINGER_SILENCE_S": b"", "bytes": bytes(50_000)}[limit]
    async with asyncio.timeout(LIMIT_S):
        while connections(front):
            writer.write(crumb)
            await asyncio.sleep(0.01)  # a client that goes on sending
    writer.transport.abort()


def connections(front: Front) -> int:
    server = front.endpoint._server
    assert server is not None
    return len(server.server_state.connections)


async def test_a_client_that_expects_100_is_refused_before_it_sends_its_body(front: Front):
    front.rules = AccessRules(key="secret")
    reader, writer = await front.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
    async with asyncio.timeout(LIMIT_S):
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")
    writer.close()


async def test_an_engines_early_error_is_read_by_a_client_that_closes_after_one_request(front: Front):
    async def refuse(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")

    await serve(front, refuse)
    reader, writer = await front.connect()
    writer.write(b"POST /up HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 20000000\r\n\r\n")
    for _ in range(200):
        writer.write(bytes(100_000))
        await writer.drain()
    answer = await everything(reader)
    assert answer.startswith(b"HTTP/1.1 413")
    assert answer.endswith(b"big")
    writer.close()


# --- what HTTP forbids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", "one Host header"),
        (b"GET / HTTP/1.1\r\n\r\n", "wants a Host header"),
        (b"GET /\xc3\xa4 HTTP/1.1\r\nHost: x\r\n\r\n", "other bytes as %XX"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization secret\r\n\r\n", "must be NAME: VALUE"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "several different"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: secret\r\n\r\n", "must be a number"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", "http, not https"),
    ],
)
async def test_what_http_forbids_gets_400_with_the_reason_and_one_event(front: Front, request_: bytes, reason: str):
    with capture_logs() as events:
        answer = await front.exchange(request_)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert reason.encode() in answer
    [event] = [each for each in events if each["event"] == "request_invalid"]
    assert reason in event["reason"]
    assert "secret" not in str(events)


async def test_what_is_too_much_for_this_server_is_not_called_wrong(front: Front):
    assert (await front.exchange(b"GET / HTTP/1.1\r\nX: " + b"y" * 300_000)).startswith(b"HTTP/1.1 431 ")
    coded = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n"
    assert (await front.exchange(coded)).startswith(b"HTTP/1.1 501 ")


@pytest.mark.parametrize("pieces", [[b"\r\n" + GET], [b"\r\n", GET], [b"\r", b"\n" + GET]])
async def test_an_empty_line_before_a_request_is_ignored(front: Front, pieces: list[bytes]):
    await serve(front, hello)
    reader, writer = await front.connect()
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.02)  # lets the pieces arrive one by one
    async with asyncio.timeout(LIMIT_S):
        assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
    writer.close()


# --- WebSockets ---------------------------------------------------------------------------------------------


async def echo(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Agree, say `first`, then echo until the end."""
    assert b"\r\nupgrade: websocket\r\n" in head.lower()
    writer.write(SWITCHED + b"first")
    while data := await reader.read(1000):
        writer.write(data)
        await writer.drain()


async def upgraded(front: Front) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a connection after the handshake."""
    reader, writer = await front.connect()
    writer.write(UPGRADE + b"\r\nearly")
    async with asyncio.timeout(LIMIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.lower() == SWITCHED.lower()
        said = await reader.readexactly(len(b"firstearly"))
    assert said == b"firstearly"
    return reader, writer


async def test_a_websocket_passes_both_ways_and_is_no_work(front: Front):
    engine = await serve(front, echo)
    reader, writer = await upgraded(front)
    assert front.gate.in_flight == 0, "a drain would wait for it"
    writer.write(b"\x81\x85....hello")
    async with asyncio.timeout(LIMIT_S):
        assert await reader.readexactly(11) == b"\x81\x85....hello"
    writer.write_eof()
    assert await everything(reader) == b""
    await until(lambda: engine.connections == 0)
    await until(lambda: connections(front) == 0)
    writer.close()


async def test_a_websocket_ends_with_its_engine_and_with_its_client(front: Front):
    closing = asyncio.Event()

    async def leave(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SWITCHED)
        await asyncio.wait(
            {asyncio.create_task(closing.wait()), asyncio.create_task(reader.read())},
            return_when=asyncio.FIRST_COMPLETED,
        )

    engine = await serve(front, leave)
    first, first_writer = await front.connect()
    _, second_writer = await front.connect()
    for writer in (first_writer, second_writer):
        writer.write(UPGRADE + b"\r\n")
    await until(lambda: engine.connections == 2)
    reset(second_writer)
    await until(lambda: engine.connections == 1)
    closing.set()
    assert (await everything(first)).startswith(b"HTTP/1.1 101")
    first_writer.close()


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Origin: https://evil.example\r\n", b"403"),
        (b"Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: websocket\r\n", b"403"),
        (b"Origin: http://localhost:8000\r\n", b"101"),
        (b"", b"101"),
    ],
)
async def test_a_page_may_open_a_websocket_only_if_it_may_ask_at_all(front: Front, header: bytes, status: bytes):
    engine = await serve(front, echo)
    reader, writer = await front.connect()
    writer.write(UPGRADE + header + b"\r\n")
    async with asyncio.timeout(LIMIT_S):
        assert (await reader.readline()).startswith(b"HTTP/1.1 " + status)
    assert len(engine.heads) == (status == b"101")
    writer.close()


async def test_a_websocket_needs_the_key(front: Front):
    front.rules = AccessRules(key="secret")
    engine = await serve(front, echo)
    for header, status in ((b"", b"401"), (b"Authorization: Bearer secret\r\n", b"101")):
        reader, writer = await front.connect()
        writer.write(UPGRADE.replace(b"Host: x", b"Host: localhost") + header + b"\r\n")
        async with asyncio.timeout(LIMIT_S):
            assert (await reader.readline()).startswith(b"HTTP/1.1 " + status)
        writer.close()
    assert len(engine.heads) == 1
    assert b"secret" not in engine.heads[0]


async def test_an_engine_that_does_not_upgrade_answers_as_it_likes(front: Front):
    async def refuse(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\nConnection: close\r\n\r\nnone")

    await serve(front, refuse)
    reader, writer = await front.connect()
    writer.write(UPGRADE + b"\r\n")
    async with asyncio.timeout(LIMIT_S):
        answer = await reader.readuntil(b"none")
        assert answer.startswith(b"HTTP/1.1 404")
        writer.write(GET)  # the connection is still HTTP
        assert (await reader.readline()).startswith(b"HTTP/1.1 404")
    writer.close()


async def test_open_websockets_leave_places_for_requests(front: Front, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tunnel, "_MOST", 1)
    engine = await serve(front, echo)
    _, writer = await upgraded(front)
    assert (await front.exchange(UPGRADE.replace(b"keep-alive", b"close") + b"\r\n")).startswith(b"HTTP/1.1 503")
    engine.handler = hello
    async with client() as user:
        assert (await user.get(front.url)).text == "hello"
    writer.close()


async def test_an_upgrade_is_no_way_around_the_line_of_generations(front: Front):
    engine: Engine = await serve(front, hello)
    await front.exchange(
        UPGRADE.replace(b"GET /ws", b"POST /api/v1/generate").replace(b"keep-alive", b"close")
        + b"Content-Length: 2\r\n\r\n{}"
    )
    assert b"upgrade" not in engine.heads[0].lower()


async def test_an_engine_that_would_keep_its_connection_open_is_asked_to_close_it(front: Front):
    """As KoboldCPP does after a WebSocket of the same thread; its errors have no length."""

    async def keep(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n\r\nnone")
        if b"\r\nconnection: close\r\n" not in head.lower():
            await reader.read()

    await serve(front, keep)
    assert b"none" in await front.exchange(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))


async def test_the_end_of_emberd_does_not_wait_for_a_quiet_websocket(front: Front):
    await serve(front, echo)
    reader, writer = await upgraded(front)
    async with asyncio.timeout(5):
        await front.endpoint.stop(LIMIT_S)
    assert await everything(reader) == b""
    writer.close()
