"""The front port between a real client and a raw engine socket: nothing added, lost or held back."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import httpx
import pytest
import structlog

from emberd.core.errors import NotReady
from emberd.host.listener import bind
from emberd.services.endpoint import Endpoint
from emberd.services.proxy import MAX_ENGINE_CONNECTIONS, Proxy, make_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    Handler = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

LIMIT_S = 20


class OpenGate:
    """A supervisor whose engine is ready as soon as it has a port."""

    def __init__(self) -> None:
        self.port = 0
        self.ready = asyncio.Event()
        self.in_flight = 0
        self.flowed = 0
        self.refused: list[int] = []

    async def ensure_ready(self, timeout_s: float) -> int:
        try:
            async with asyncio.timeout(timeout_s):
                await self.ready.wait()
        except TimeoutError:
            raise NotReady("LOADING", "still loading", 7) from None
        return self.port

    @contextlib.contextmanager
    def admitted(self) -> Iterator[Callable[[int], None]]:
        self.in_flight += 1
        try:
            yield self._flow
        finally:
            self.in_flight -= 1

    def _flow(self, count: int) -> None:
        self.flowed += count

    def unreachable(self, port: int) -> None:
        self.refused.append(port)
        self.ready.clear()


class Engine:
    """A socket that speaks HTTP by hand, one handler for all requests."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections = 0
        self.heads: list[bytes] = []
        self.closed = asyncio.Event()

    async def start(self) -> int:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        self.server.close()
        await self.server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            await self.handler(head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.connections -= 1
            self.closed.set()
            writer.close()


class Front:
    """The endpoint under test."""

    def __init__(self, gate: OpenGate) -> None:
        self.gate = gate
        self.hold_s = float(LIMIT_S)
        self.url = ""
        self.port = 0
        self.engines: list[Engine] = []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, request: bytes) -> bytes:
        reader, writer = await self.connect()
        writer.write(request)
        async with asyncio.timeout(LIMIT_S):
            answer = await reader.read()
        writer.close()
        return answer


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    gate = OpenGate()
    made = Front(gate)
    listener = bind("127.0.0.1", 0)
    made.port = listener.getsockname()[1]
    made.url = f"http://127.0.0.1:{made.port}"
    proxy = Proxy(gate, lambda: made.hold_s, structlog.get_logger())
    endpoint = Endpoint()
    serving = asyncio.create_task(endpoint.serve(make_app(proxy, lambda: "READY"), listener))
    try:
        yield made
    finally:
        async with asyncio.timeout(LIMIT_S):
            await endpoint.stop(1)
            await serving
            await proxy.aclose()
            for engine in made.engines:
                await engine.close()
        listener.close()


async def serve(front: Front, handler: Handler) -> Engine:
    engine = Engine(handler)
    front.engines.append(engine)
    front.gate.port = await engine.start()
    front.gate.ready.set()
    return engine


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=LIMIT_S, trust_env=False)


async def hello(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer as KoboldCPP does: HTTP/1.0, no length, end of body by closing, and an untrue keep-alive."""
    writer.write(b"HTTP/1.0 200 OK\r\nServer: KoboldCppServer 1\r\nConnection: keep-alive\r\n\r\nhello")
    await writer.drain()


async def test_target_and_headers_pass_byte_by_byte(front: Front):
    engine = await serve(front, hello)
    answer = await front.exchange(
        b"GET /api/%7Ev1//x/../y%2Fz?a=%20b&&c;d=1?e HTTP/1.1\r\nHost: my.name:5001\r\nX-Twice: 1\r\nX-Twice: 2\r\n"
        b"Connection: close, X-Hop\r\nX-Hop: gone\r\nTE: trailers\r\nCookie: a=b\r\n\r\n"
    )
    head = engine.heads[0]
    assert head.startswith(b"GET /api/%7Ev1//x/../y%2Fz?a=%20b&&c;d=1?e HTTP/1.1\r\n")
    lines = [line.lower() for line in head.split(b"\r\n")]
    assert lines.count(b"host: my.name:5001") == 1
    assert (lines.index(b"x-twice: 1"), b"cookie: a=b" in lines) == (lines.index(b"x-twice: 2") - 1, True)
    assert not any(line.startswith((b"x-hop", b"te:", b"accept", b"user-agent")) for line in lines)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"server: KoboldCppServer 1\r\n" in answer
    assert b"date:" not in answer
    assert b"uvicorn" not in answer


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_every_method_passes(front: Front, method: str):
    engine = await serve(front, hello)
    async with client() as user:
        answer = await user.request(method, f"{front.url}/any/path")
    assert answer.status_code == 200
    assert engine.heads[0].startswith(f"{method} /any/path ".encode())


@pytest.mark.parametrize("status", [b"401 Unauthorized", b"404 Not Found", b"500 Error", b"503 Busy"])
async def test_the_engines_own_errors_pass_unchanged(front: Front, status: bytes):
    async def refuse(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 " + status + b"\r\nContent-Type: application/json\r\n\r\n{}")

    await serve(front, refuse)
    async with client() as user:
        answer = await user.get(front.url)
    assert (answer.status_code, answer.text) == (int(status[:3]), "{}")


async def test_compressed_bytes_are_not_touched(front: Front):
    body = b"\x1f\x8b not really gzip \x00\xff"

    async def compressed(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    await serve(front, compressed)
    answer = await front.exchange(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n" + body)


async def test_a_token_reaches_the_client_before_the_engine_makes_the_next(front: Front):
    step = asyncio.Event()

    async def stream(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\nConnection: keep-alive\r\n\r\n")
        for number in range(5):
            writer.write(b"data: %d\n\n" % number)
            await writer.drain()
            async with asyncio.timeout(LIMIT_S):
                await step.wait()
            step.clear()

    await serve(front, stream)
    seen = []
    async with client() as user, user.stream("POST", front.url, json={}) as answer:
        async for chunk in answer.aiter_raw():
            seen.append(chunk)
            step.set()
    assert seen == [b"data: %d\n\n" % number for number in range(5)]
    assert front.gate.flowed == sum(map(len, seen))


async def test_a_request_waits_for_an_engine_and_is_answered(front: Front):
    async with client() as user:
        waiting = asyncio.create_task(user.get(front.url))
        await asyncio.sleep(0)
        await serve(front, hello)
        assert (await waiting).text == "hello"


async def test_a_request_that_waits_too_long_gets_503_that_both_dialects_understand(front: Front):
    front.hold_s = 0.05
    async with client() as user:
        answer = await user.get(front.url)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert answer.json()["error"]["message"] == answer.json()["detail"]["msg"] == "still loading"
    assert answer.json()["error"]["state"] == "LOADING"


async def test_a_refused_connection_is_tried_again_when_an_engine_is_ready(front: Front):
    dead = bind("127.0.0.1", 0)
    front.gate.port = dead.getsockname()[1]
    dead.close()
    front.gate.ready.set()
    async with client() as user:
        waiting = asyncio.create_task(user.post(front.url, content=b"body"))
        async with asyncio.timeout(LIMIT_S):
            while not front.gate.refused:
                await asyncio.sleep(0.01)
        await serve(front, hello)
        assert (await waiting).text == "hello"


async def test_a_request_whose_engine_dies_before_it_answers_is_sent_again(front: Front):
    bodies = []

    async def die_once(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bodies.append(await reader.readexactly(4))
        if len(bodies) == 1:
            writer.transport.abort()
            asyncio.get_running_loop().call_soon(front.gate.ready.set)
            return
        await hello(b"", reader, writer)

    await serve(front, die_once)
    gate_reopens = asyncio.create_task(_reopen(front.gate))
    async with client() as user:
        answer = await user.post(front.url, content=b"once")
    gate_reopens.cancel()
    assert (answer.text, bodies) == ("hello", [b"once", b"once"])


async def _reopen(gate: OpenGate) -> None:
    while True:
        await asyncio.sleep(0.01)
        gate.ready.set()


async def test_an_engine_that_never_answers_ends_in_502(front: Front):
    async def die(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    await serve(front, die)
    gate_reopens = asyncio.create_task(_reopen(front.gate))
    async with client() as user:
        answer = await user.get(front.url)
    gate_reopens.cancel()
    assert (answer.status_code, answer.json()["error"]["type"]) == (502, "engine_died")


async def test_a_reply_that_breaks_off_is_seen_as_broken_by_the_client(front: Front):
    async def break_off(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await writer.drain()
        writer.transport.abort()

    await serve(front, break_off)
    async with client() as user:
        with pytest.raises(httpx.RemoteProtocolError):
            await user.get(front.url)


async def test_a_client_that_leaves_ends_its_generation(front: Front):
    started = asyncio.Event()

    async def endless(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\ntoken")
        await writer.drain()
        started.set()
        async with asyncio.timeout(LIMIT_S):
            while True:
                writer.write(b"token")
                await writer.drain()
                await asyncio.sleep(0.01)

    engine = await serve(front, endless)
    _, writer = await front.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    await started.wait()
    writer.close()
    async with asyncio.timeout(LIMIT_S):
        await engine.closed.wait()
        while front.gate.in_flight:
            await asyncio.sleep(0.01)


async def test_a_client_that_leaves_while_it_waits_is_forgotten(front: Front):
    _, writer = await front.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    engine = await serve(front, hello)
    async with client() as user:
        assert (await user.get(front.url)).text == "hello"
    assert [head.split()[0] for head in engine.heads] == [b"GET"]


async def test_clients_that_say_nothing_never_reach_the_engine(front: Front):
    engine = await serve(front, hello)
    silent = [await front.connect() for _ in range(30)]
    for _, writer in silent[:15]:
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
    async with client() as user:
        assert (await user.get(front.url)).text == "hello"
    assert len(engine.heads) == 1
    for _, writer in silent:
        writer.transport.abort()


async def test_no_more_connections_reach_the_engine_than_it_has_threads_for(front: Front):
    release, most = asyncio.Event(), 0

    async def slow(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most
        most = max(most, engine.connections)
        async with asyncio.timeout(LIMIT_S):
            await release.wait()
        await hello(b"", __, writer)

    engine = await serve(front, slow)
    async with client() as user:
        calls = [asyncio.create_task(user.get(front.url)) for _ in range(40)]
        async with asyncio.timeout(LIMIT_S):
            while most < MAX_ENGINE_CONNECTIONS:
                await asyncio.sleep(0.01)
        release.set()
        assert {(await call).status_code for call in calls} == {200}
    assert most == MAX_ENGINE_CONNECTIONS


async def test_a_large_body_is_streamed_with_back_pressure(front: Front):
    """The engine reads nothing at first: the client must be slowed down instead of the proxy filling up."""
    size, begin = 64 * 1024 * 1024, asyncio.Event()
    taken = sent = 0

    async def count(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        assert b"content-length: %d" % size in head.lower()
        await begin.wait()
        while taken < size and (part := await reader.read(1 << 20)):
            taken += len(part)
        await hello(b"", reader, writer)

    await serve(front, count)
    reader, writer = await front.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size)
    chunk = bytes(1 << 20)
    with contextlib.suppress(TimeoutError):
        while sent < size:
            writer.write(chunk)
            sent += len(chunk)
            async with asyncio.timeout(0.5):
                await writer.drain()
    assert sent < size // 2, "the proxy took the whole body although the engine read nothing"
    begin.set()
    async with asyncio.timeout(LIMIT_S):
        while sent < size:
            writer.write(chunk)
            sent += len(chunk)
            await writer.drain()
        assert b"hello" in await reader.read()
    assert taken == size
    writer.close()


async def test_a_chunked_request_body_arrives_whole(front: Front):
    async def echo(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)

    await serve(front, echo)

    async def parts() -> AsyncIterator[bytes]:
        for number in range(10):
            yield b"%d," % number

    async with client() as user:
        assert (await user.post(front.url, content=parts())).text == "0,1,2,3,4,5,6,7,8,9,"


async def test_an_http_1_0_client_is_served(front: Front):
    await serve(front, hello)
    assert (await front.exchange(b"GET / HTTP/1.0\r\n\r\n")).endswith(b"\r\n\r\nhello")


async def test_nothing_below_emberd_is_passed_on(front: Front):
    engine = await serve(front, hello)
    async with client() as user:
        assert (await user.get(f"{front.url}/emberd/healthz")).json() == {"status": "live"}
        assert (await user.get(f"{front.url}/emberd/readyz")).json() == {"status": "READY"}
        assert (await user.get(f"{front.url}/emberd/secret")).status_code == 404
        assert (await user.post(f"{front.url}/emberd/healthz")).status_code == 405
    assert engine.heads == []
