"""The front port between a real client and a raw engine socket: nothing added, lost or held back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tracemalloc
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import structlog

from emberd.core.access import AccessRules
from emberd.core.errors import NotReady
from emberd.core.settings import EndpointSettings, Settings
from emberd.core.tally import Tally
from emberd.core.turn import UNTOLD, PromptCounts, Turn
from emberd.core.warmth import Cache
from emberd.engine.http import EngineHttp
from emberd.engine.koboldcpp import KoboldCpp
from emberd.host import ThisHost
from emberd.host.listener import bind
from emberd.services import client_connection, messages, places
from emberd.services.endpoint import Endpoint
from emberd.services.proxy import Proxy, make_app
from emberd.services.turns import Knocks, Turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    Handler = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

LIMIT_S = 20
PLACES = Settings().endpoint.max_concurrent


class OpenGate:
    """A supervisor whose engine is ready as soon as it has a port."""

    def __init__(self) -> None:
        self.port = 0
        self.ready = asyncio.Event()
        self.in_flight = 0
        self.flowed = 0
        self.refused: list[int] = []
        self.asked = self.held = 0
        self.stays_ready = False
        self.engine_key = "1:a"
        self.in_log = UNTOLD
        self.tally = Tally()
        unused: Any = None
        self.engine = KoboldCpp(Settings(), ThisHost(), EngineHttp(), unused, unused, unused)

    async def ensure_ready(self, timeout_s: float, **_: bool) -> int:
        """Wait for `ready`."""
        self.asked += 1
        self.held += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self.ready.wait()
        except TimeoutError:
            raise NotReady("LOADING", "still loading", 7) from None
        finally:
            self.held -= 1
        return self.port

    @contextlib.contextmanager
    def admitted(self) -> Iterator[Callable[[int], None]]:
        """Count."""
        self.in_flight += 1
        try:
            yield self._flow
        finally:
            self.in_flight -= 1

    def _flow(self, count: int) -> None:
        self.flowed += count

    async def is_alive(self, port: int, _: str | None) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    def doubt(self, port: int) -> None:
        """Close, unless told to lie."""
        self.refused.append(port)
        if not self.stays_ready:
            self.ready.clear()

    def forget_counts(self) -> None:
        """Forget."""
        self.in_log = UNTOLD

    def counts_in_log(self) -> PromptCounts:
        return self.in_log

    def note_switch(self, method: str, path: str, body: bytes) -> None:
        """Its engine keeps its model."""


class Engine:
    """A socket that speaks HTTP by hand, one handler for all requests."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections = 0
        self.heads: list[bytes] = []
        self.closed = asyncio.Event()

    async def start(self) -> int:
        """Listen, and return the port."""
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Listen no more."""
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
        self.max_waiting = 64
        self.rules = AccessRules(names=("x", "my.name"))
        self.remember_bytes = 1 << 20
        self.turns = Turns(lambda: self.remember_bytes)
        self.knocks = Knocks()
        self.url = ""
        self.port = 0
        self.engines: list[Engine] = []
        self.endpoint = Endpoint()

    def settings(self) -> EndpointSettings:
        return EndpointSettings(hold_timeout_s=self.hold_s, max_waiting=self.max_waiting)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection that says nothing yet."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, request: bytes) -> bytes:
        """Send raw bytes and return the raw answer."""
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
    proxy = Proxy(gate, made.settings, lambda: made.rules, made.turns, made.knocks, structlog.get_logger())
    serving = asyncio.create_task(made.endpoint.serve(make_app(proxy, lambda: "READY", lambda: True), [listener]))
    try:
        yield made
    finally:
        async with asyncio.timeout(LIMIT_S):
            await made.endpoint.stop(1)
            await serving
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
        await until(lambda: bool(front.gate.refused))
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
        await until(lambda: not front.gate.in_flight)


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
        await until(lambda: most == PLACES)
        release.set()
        assert {(await call).status_code for call in calls} == {200}
    assert most == PLACES


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


# --- what must not hang, loop or lie ------------------------------------------------------------------------


async def until(is_so: Callable[[], bool]) -> None:
    """Wait, bounded, for something that no event tells."""
    async with asyncio.timeout(LIMIT_S):
        while not is_so():  # plain counters of the code under test
            await asyncio.sleep(0.005)


async def test_the_engine_sees_exactly_the_clients_head(front: Front):
    """Not even a header that httpx finds useful is added, and an unusual method keeps its spelling."""
    engine = await serve(front, hello)
    await front.exchange(b"MkCol /%e4?q HTTP/1.1\r\nHost: x\r\nProxy-X: a\r\nB: 1\r\nConnection: close\r\n\r\n")
    await front.exchange(b"POST /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert engine.heads == [
        b"MkCol /%e4?q HTTP/1.1\r\nhost: x\r\nb: 1\r\nconnection: close\r\n\r\n",
        b"POST /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    ]


async def test_a_length_beside_chunks_is_not_believed(front: Front):
    """The chunks are right (RFC 9112, 6.3): an engine that got both could read the rest as another request."""
    bodies = []

    async def keep(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"transfer-encoding" not in head.lower()
        bodies.append(await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])))
        await hello(head, reader, writer)

    await serve(front, keep)
    answer = await front.exchange(
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n0\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 200")
    assert bodies == [b"hello"]


async def test_a_large_chunked_body_stays_chunked(front: Front):
    part, taken = bytes(range(256)) * 256, bytearray()

    async def keep(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"transfer-encoding: chunked\r\n" in head.lower()
        while length := int(await reader.readline(), 16):
            taken.extend(await reader.readexactly(length))
            await reader.readline()
        await hello(head, reader, writer)

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(16):
            yield part

    await serve(front, keep)
    async with client() as user:
        assert (await user.post(front.url, content=parts())).text == "hello"
    assert bytes(taken) == part * 16


async def test_a_client_that_waits_for_100_continue_is_told_to_go_on(front: Front):
    engine = await serve(front, hello)
    reader, writer = await front.connect()
    writer.write(
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    )
    async with asyncio.timeout(LIMIT_S):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        assert engine.heads == []
        writer.write(b"body")
        assert b"hello" in await reader.read()
    assert b"expect" not in engine.heads[0].lower()
    writer.close()


async def test_an_offer_to_speak_http_2_is_ignored(front: Front):
    engine = await serve(front, hello)
    async with client() as user:
        headers = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABk"}
        assert (await user.get(front.url, headers=headers)).text == "hello"
    assert b"upgrade" not in engine.heads[0].lower()
    assert b"http2-settings" not in engine.heads[0].lower()


_ENGINE_TO_KILL = """
import signal, socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
request = b""
while not request.endswith(b"{}"):  # with something unread the kernel would reset the connection instead
    request += connection.recv(65536)
connection.sendall(b"HTTP/1.0 200 OK\\r\\nconnection: keep-alive\\r\\n\\r\\ndata: 1\\n\\n")
signal.pause()
"""


async def test_a_killed_engine_is_seen_as_truncation_although_its_streams_have_no_length(front: Front):
    """The kernel closes a dead process's connection exactly as KoboldCPP ends a stream."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _ENGINE_TO_KILL, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None

    async def is_alive(_: int, __: str | None) -> bool:
        """Wait for its end, as the supervisor does: a dying process still accepts connections for a moment."""
        async with asyncio.timeout(LIMIT_S):
            return await child.wait() == 0

    front.gate.is_alive = is_alive  # type: ignore[method-assign]
    try:
        async with asyncio.timeout(LIMIT_S):
            front.gate.port = int(await child.stdout.readline())
        front.gate.ready.set()
        async with client() as user, user.stream("POST", front.url, json={}) as answer:
            chunks = answer.aiter_raw()
            assert await anext(chunks) == b"data: 1\n\n"
            child.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(chunks)
        assert front.gate.refused == [front.gate.port]
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        await child.wait()


async def test_a_reply_shorter_than_its_length_is_seen_as_truncation(front: Front):
    async def short(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\nhello")

    await serve(front, short)
    async with client() as user:
        with pytest.raises(httpx.RemoteProtocolError):
            await user.get(front.url)


async def test_a_port_that_stays_closed_is_asked_a_few_times_and_only_until_the_deadline(front: Front):
    """The supervisor may go on saying READY; that must neither spin nor last longer than the hold time-out."""
    dead = bind("127.0.0.1", 0)
    front.gate.port = dead.getsockname()[1]
    dead.close()
    front.hold_s = 0.3
    front.gate.stays_ready = True
    front.gate.ready.set()
    async with client() as user:
        answer = await user.post(front.url, content=b"body")
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "engine_not_ready")
    assert int(answer.headers["retry-after"]) > 0
    assert 1 < len(front.gate.refused) < 20


async def test_a_client_that_leaves_while_it_is_held_is_no_longer_waited_for(front: Front):
    reader, writer = await front.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    await until(lambda: front.gate.held == 1)
    writer.close()
    await until(lambda: front.gate.held == 0)
    assert await reader.read() == b""


async def test_requests_beyond_the_engines_connections_wait_in_order_and_not_for_ever(
    front: Front, monkeypatch: pytest.MonkeyPatch
):
    release = asyncio.Event()
    front.hold_s = 0.05  # counts for an engine that is not ready, and not for the time in line

    async def slow(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(LIMIT_S):
            await release.wait()
        await hello(head, reader, writer)

    engine = await serve(front, slow)
    async with client() as user:
        running = [asyncio.create_task(user.get(front.url)) for _ in range(PLACES)]
        await until(lambda: len(engine.heads) == PLACES)
        queued = []
        for number in range(3):
            asked = front.gate.asked
            queued.append(asyncio.create_task(user.get(f"{front.url}/{number}")))
            await until(lambda asked=asked: front.gate.asked > asked)
        monkeypatch.setattr(places, "_LONGEST_IN_LINE_S", 0.05)
        refused = await user.get(front.url)
        assert (refused.status_code, refused.json()["error"]["state"]) == (503, "BUSY")
        assert len(engine.heads) == PLACES
        release.set()
        assert {(await call).status_code for call in [*running, *queued]} == {200}
    assert [head.split()[1] for head in engine.heads[PLACES:]] == [b"/0", b"/1", b"/2"]


async def test_koboldcpp_is_given_one_generation_at_a_time_and_questions_pass_meanwhile(front: Front):
    """Its own queue has six places; the ninth client of eight busy ones would get 503."""
    release, at_work = asyncio.Event(), 0

    async def work(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal at_work
        if head.startswith(b"POST /v1/completions"):
            at_work += 1
            assert at_work == 1
            async with asyncio.timeout(LIMIT_S):
                await release.wait()
            at_work -= 1
        await hello(head, reader, writer)

    engine = await serve(front, work)
    async with client() as user:
        asked = [asyncio.create_task(user.post(f"{front.url}/v1/completions", json={})) for _ in range(9)]
        await until(lambda: at_work == 1)
        assert (await user.post(f"{front.url}/api/extra/tokencount", json={})).text == "hello"
        assert (await user.get(f"{front.url}/api/v1/model")).text == "hello"
        release.set()
        assert {(await call).status_code for call in asked} == {200}
    assert len(engine.heads) == 11


async def test_the_line_lets_the_first_in_first_and_forgets_who_left():
    line = places.Line(lambda: 1)
    order: list[str] = []

    async def pass_through(name: str, *, goes_first: bool = False) -> None:
        await line.enter(goes_first=goes_first)
        order.append(name)
        line.leave()

    await line.enter()
    first, gone, last = (asyncio.create_task(pass_through(name)) for name in ("first", "gone", "last"))
    await asyncio.sleep(0)
    cut = asyncio.create_task(pass_through("cut", goes_first=True))
    await asyncio.sleep(0)
    gone.cancel()
    line.leave()
    await asyncio.gather(first, last, cut)
    assert order == ["cut", "first", "last"]
    assert line.is_free


async def test_a_turn_that_comes_with_the_cancellation_is_passed_on():
    line = places.Line(lambda: 1)
    await line.enter()
    waiting = asyncio.create_task(line.enter())
    await asyncio.sleep(0)
    line.leave()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert line.is_free


async def test_a_request_that_queued_for_the_old_engine_goes_to_the_new_one(front: Front):
    release = asyncio.Event()

    async def slow(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(LIMIT_S):
            await release.wait()
        await hello(head, reader, writer)

    old = await serve(front, slow)
    async with client() as user:
        running = [asyncio.create_task(user.get(front.url)) for _ in range(PLACES)]
        await until(lambda: len(old.heads) == PLACES)
        asked = front.gate.asked
        queued = asyncio.create_task(user.get(front.url))
        await until(lambda: front.gate.asked > asked)
        front.gate.ready.clear()  # as a drain does
        release.set()
        assert {(await call).status_code for call in running} == {200}
        new = await serve(front, hello)
        assert (await queued).status_code == 200
    assert (len(old.heads), len(new.heads)) == (PLACES, 1)


@pytest.mark.parametrize("sent", [4, 600_000])
async def test_a_client_that_stops_within_its_body_is_told_and_lets_the_engine_go(
    front: Front, monkeypatch: pytest.MonkeyPatch, sent: int
):
    """Below the first part the engine is not even connected; beyond it, it has one connection that comes free."""
    monkeypatch.setattr(messages, "CLIENT_SILENCE_S", 0.2)

    async def read_all(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    engine = await serve(front, read_all)
    reader, writer = await front.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + bytes(sent))
    async with asyncio.timeout(LIMIT_S):
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
    await until(lambda: engine.connections == front.gate.in_flight == 0)
    assert len(engine.heads) == (sent > 4)
    writer.close()


async def test_a_client_that_reads_nothing_does_not_keep_the_engine(front: Front, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "CLIENT_SILENCE_S", 0.2)
    monkeypatch.setattr(client_connection, "UNREAD_S", 0.1)

    async def flood(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            await writer.drain()

    engine = await serve(front, flood)
    _, writer = await front.connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # of every socket transport
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: len(engine.heads) == 1)
    await until(lambda: engine.connections == front.gate.in_flight == 0)
    server = front.endpoint._server
    assert server is not None
    await until(lambda: not server.server_state.connections)  # nor a file descriptor
    writer.transport.abort()


async def test_large_bodies_pass_in_both_directions_without_being_held(front: Front):
    """64 MiB up and 64 MiB down; engine, proxy and client together never hold more than a few MiB."""
    part, count = bytes(65536), 1024

    async def mirror(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _number in range(count):
            await reader.readexactly(len(part))
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n")
        for _number in range(count):
            writer.write(part)
            await writer.drain()

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield part

    await serve(front, mirror)
    taken = 0
    tracemalloc.start()
    try:
        headers = {"content-length": str(count * len(part))}
        async with client() as user, user.stream("POST", front.url, content=parts(), headers=headers) as answer:
            async for chunk in answer.aiter_raw():
                taken += len(chunk)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken == count * len(part)
    assert peak_bytes < 8 * 1024 * 1024


async def test_a_held_request_is_told_that_emberd_stops(front: Front):
    reader, writer = await front.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    await until(lambda: front.gate.held == 1)
    await front.endpoint.stop(0.05)
    async with asyncio.timeout(LIMIT_S):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"STOPPING"' in answer
    writer.close()


async def test_a_reply_that_runs_when_emberd_stops_is_cut_at_both_ends(front: Front):
    async def begin(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\ntoken")
        await reader.read()

    engine = await serve(front, begin)
    async with client() as user, user.stream("GET", front.url) as answer:
        chunks = answer.aiter_raw()
        assert await anext(chunks) == b"token"
        await front.endpoint.stop(0.05)
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(chunks)
    await until(lambda: engine.connections == front.gate.in_flight == 0)


_EVENTS_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(event: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(event), event)


async def say_and_die(writer: asyncio.StreamWriter, event: bytes) -> None:
    writer.write(_EVENTS_HEAD + chunk(event))
    await writer.drain()
    writer.transport.abort()


def generate(front: Front, user: httpx.AsyncClient, path: str = "/api/v1/generate", **body: Any) -> Any:
    return user.post(front.url + path, json={"prompt": "Once", **body})


async def seen_until_broken(front: Front, path: str, **more: Any) -> bytes:
    """Ask for a stream that ends as a broken one, and return what of it came."""
    request = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    body = json.dumps({"prompt": "Once", "stream": True, **more}).encode()
    answer = await front.exchange(f"{request}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert not answer.endswith(b"0\r\n\r\n"), "it has no normal end"
    return answer


@pytest.mark.parametrize("status", [400, 401, 404, 500, 501, 503])
async def test_a_generation_that_the_engine_refuses_changes_nothing_of_what_is_remembered(
    front: Front, status: int
):
    answers = [b"200 OK", b"%d No" % status]

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        content = b'{"results": [{"text": " upon a time"}]}'
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (answers.pop(0), len(content), content))
        await writer.drain()

    await serve(front, answer)
    async with client() as user:
        assert (await generate(front, user)).status_code == 200
        ended_s = front.turns.ended_s
        assert (await generate(front, user, prompt="Twice")).status_code == status
    assert front.turns.cache("1:a", is_adopted=False) is Cache.KNOWN
    last = front.turns.last
    assert last is not None
    assert (last.body["prompt"], last.reply) == ("Once", " upon a time")
    assert front.turns.ended_s == ended_s, "a refusal warms nothing"


async def test_what_an_engine_was_doing_when_it_failed_is_not_known(front: Front):
    async def fail(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 502 Broken\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    await serve(front, fail)
    async with client() as user:
        await generate(front, user)
    assert front.turns.cache("1:a", is_adopted=False) is Cache.UNKNOWN


async def test_a_generation_that_reached_no_engine_changes_nothing_either(front: Front):
    front.turns.begin("1:a")
    front.turns.end("1:a", lambda: Turn("/api/v1/generate", {"prompt": "Once"}, " upon a time"))
    dead = bind("127.0.0.1", 0)
    front.gate.port = dead.getsockname()[1]
    dead.close()
    front.gate.ready.set()
    front.hold_s = 0.2
    async with client() as user:
        assert (await generate(front, user, prompt="Twice")).status_code == 503
    assert front.turns.cache("1:a", is_adopted=False) is Cache.KNOWN
    assert front.turns.last is not None
    assert front.turns.last.body["prompt"] == "Once"


async def test_the_time_an_engine_computed_is_no_time_of_waiting_for_the_next(front: Front):
    front.hold_s, sent = 0.5, 0

    async def die_late_once(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        sent += 1
        if sent > 1:
            await hello(b"", reader, writer)
            return
        await asyncio.sleep(front.hold_s + 0.1)
        writer.transport.abort()
        asyncio.get_running_loop().call_later(0.1, front.gate.ready.set)

    await serve(front, die_late_once)
    async with client() as user:
        assert (await generate(front, user)).text == "hello"
    assert sent == 2


async def test_a_stream_that_lacks_no_word_does_not_wait_for_the_next_engine(front: Front):
    said = b'data: {"choices": [{"index": 0, "text": " upon", "finish_reason": "stop"}]}\n\n'

    async def finish_and_die(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await say_and_die(writer, said)

    engine = await serve(front, finish_and_die)
    async with client() as user:
        answer = await generate(front, user, "/v1/completions", stream=True)
    assert answer.content == said + b"data: [DONE]\n\n"
    assert len(engine.heads) == 1
    assert front.gate.refused == [front.gate.port]


@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/x-ndjson"])
async def test_a_cut_stream_of_ollamas_ends_with_a_line_that_has_the_error(front: Front, kind: bytes):
    line = b'{"message": {"content": " upon"}, "done": false}\n'

    async def speak_and_die(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_EVENTS_HEAD.replace(b"text/event-stream", kind) + chunk(line))
        await writer.drain()
        writer.transport.abort()

    await serve(front, speak_and_die)
    seen = await seen_until_broken(front, "/api/chat")
    assert line in seen
    assert b'{"error": "the engine ended, and a reply with events of this API cannot be continued"}\n' in seen
    assert front.turns.last is not None
    assert (front.turns.last.reply, front.turns.last.was_cut) == (" upon", True)


async def test_a_reply_to_ollama_that_koboldcpp_does_not_stream_is_remembered(front: Front):
    content = b'{"response": " upon", "context": [1, 2], "done": true}'

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))
        await writer.drain()

    await serve(front, answer)
    async with client() as user:
        assert (await generate(front, user, "/api/generate")).content == content
    assert front.turns.last is not None
    assert (front.turns.last.reply, front.turns.last.said) == (" upon", ({"context": [1, 2]},))


@pytest.mark.parametrize(("path", "is_use"), [("/v1/embeddings", True), ("/v1/messages/count_tokens", False)])
async def test_vectors_are_a_use_that_leaves_what_is_remembered(front: Front, path: str, is_use: bool):
    await serve(front, hello)
    front.turns.begin("1:a")
    front.turns.end("1:a", lambda: Turn("/api/v1/generate", {"prompt": "Once"}, " upon a time"))
    ended_s = front.turns.used_s
    assert ended_s is not None
    async with client() as user:
        assert (await user.post(front.url + path, json={"input": "x"})).status_code == 200
    assert front.turns.used_s is not None
    assert (front.turns.used_s > ended_s) is is_use
    assert front.turns.ended_s == ended_s
    assert front.turns.cache("1:a", is_adopted=False) is Cache.KNOWN
    assert front.knocks.seconds_since is not None


async def test_of_several_replies_one_that_is_whole_does_not_end_the_stream(front: Front):
    said = b'data: {"choices": [{"index": 0, "text": " upon", "finish_reason": "stop"}]}\n\n'

    async def finish_one_and_die(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await say_and_die(writer, said)

    await serve(front, finish_one_and_die)
    seen = await seen_until_broken(front, "/v1/completions", n=2)
    assert b"several replies at once" in seen


async def test_a_turn_that_was_cut_is_remembered_although_its_rest_is_refused(front: Front):
    async def speak_then_refuse(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(engine.heads) == 1:
            await say_and_die(writer, b'data: {"choices": [{"index": 0, "text": " upon"}]}\n\n')
            asyncio.get_running_loop().call_later(0.05, front.gate.ready.set)
            return
        writer.write(b"HTTP/1.1 400 Too long\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()

    engine = await serve(front, speak_then_refuse)
    assert b"a rest that the engine refuses" in await seen_until_broken(front, "/v1/completions")
    assert front.gate.refused == [front.gate.port], "only its death was doubted"
    assert front.turns.last is not None
    assert front.turns.last.reply == " upon"


async def test_words_in_a_form_that_is_not_known_are_never_said_twice(front: Front):
    said = b'data: {"choices": [{"index": 0, "text": " upon"}]}\n\n'

    async def speak_and_die(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await say_and_die(writer, said)

    engine = await serve(front, speak_and_die)
    seen = await seen_until_broken(front, "/completions")
    assert seen.count(said) == 1
    assert b"engine_died" in seen
    assert len(engine.heads) == 1


@pytest.mark.parametrize("length", [b"Content-Length: 5\r\n", b""])
async def test_the_answer_of_an_engine_that_did_not_read_the_whole_body_counts(front: Front, length: bytes):
    async def refuse_unread(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Too Large\r\n" + length + b"\r\nlarge")
        await writer.drain()
        writer.transport.abort()

    engine = await serve(front, refuse_unread)
    async with client() as user:
        for _ in range(20):
            answer = await user.post(front.url + "/api/v1/generate", json={"prompt": "Once " * 1_000_000})
            assert (answer.status_code, answer.text) == (413, "large")
    assert len(engine.heads) == 20
    assert front.gate.refused == []


async def test_a_visit_without_the_key_to_an_open_page_is_no_knock_and_wakes_nothing(
    front: Front, monkeypatch: pytest.MonkeyPatch
):
    await serve(front, hello)
    front.rules = AccessRules(key="let-me-in")
    wanted: list[bool] = []
    ensure_ready = front.gate.ensure_ready

    async def watch(timeout_s: float, *, wakes: bool) -> int:
        wanted.append(wakes)
        return await ensure_ready(timeout_s)

    monkeypatch.setattr(front.gate, "ensure_ready", watch)
    async with client() as asking:
        assert (await asking.get(f"{front.url}/")).status_code == 200
        assert front.knocks.seconds_since is None
        assert (await asking.get(f"{front.url}/", headers={"x-api-key": "let-me-in"})).status_code == 200
    assert front.knocks.seconds_since is not None
    assert wanted == [False, True]


@pytest.mark.parametrize("path", ["/emberd/login", "/emberd/status"])
async def test_a_page_that_is_still_asked_for_when_emberd_ends_is_answered(path: str):
    has_come = asyncio.Event()

    async def hang(*_: Any) -> None:
        has_come.set()
        await asyncio.Event().wait()

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    app = make_app(hang, lambda: "READY", lambda: True, hang, hang)
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
    answering = asyncio.create_task(app(scope, unused_receive, send))  # type: ignore[arg-type]
    async with asyncio.timeout(LIMIT_S):
        await has_come.wait()
        answering.cancel()
        await asyncio.wait({answering})
    assert not answering.cancelled()
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"5") in sent[0]["headers"]
    assert b"shutting down" in sent[1]["body"]


async def unused_receive() -> Any:
    raise AssertionError
