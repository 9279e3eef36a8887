"""The listening socket, uvicorn inside the daemon, and what importing them costs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from emberd.core.errors import ConfigError, PortTaken
from emberd.host.listener import bind
from emberd.services.endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Receive, Scope, Send

LIMIT_S = 20
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class App:
    """An ASGI app that answers `done` when it is let."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.targets: list[bytes] = []
        self.body = b"done"
        self.begins_at_once = False

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        """Wait for `release`; cancelled, answer `cut`."""
        self.targets.append(scope["raw_path"])
        length = b"%d" % len(self.body)
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]}
        if self.begins_at_once:
            await send(start)
        self.started.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"3")]})
            await send({"type": "http.response.body", "body": b"cut"})
            return
        if not self.begins_at_once:
            await send(start)
        await send({"type": "http.response.body", "body": self.body})


class Served:
    """An endpoint that serves an App."""

    def __init__(self, silence_s: int = 75, most_connections: int = 1024) -> None:
        self.app = App()
        self.listener = bind("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.endpoint = Endpoint(silence_s, most_connections)
        self.serving = asyncio.create_task(self.endpoint.serve(self.app, [self.listener]))

    async def connect(self, first: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection and say something."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(first)
        return reader, writer

    def connections(self) -> int:
        """Return how many connections the server knows."""
        server = self.endpoint._server
        return len(server.server_state.connections) if server else 0

    async def end(self) -> None:
        """Stop at once; may be called twice."""
        async with asyncio.timeout(LIMIT_S):
            await self.endpoint.stop(0)
            with contextlib.suppress(asyncio.CancelledError):
                await self.serving
        self.listener.close()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    made = Served()
    yield made
    await made.end()


@pytest.fixture
async def impatient() -> AsyncIterator[Served]:
    made = Served(silence_s=1)
    yield made
    await made.end()


async def until(is_so: Callable[[], bool]) -> None:
    """Wait, bounded, for something that no event tells."""
    async with asyncio.timeout(LIMIT_S):
        while not is_so():  # plain sets of uvicorn's
            await asyncio.sleep(0.005)


async def everything(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(LIMIT_S):
        return await reader.read()


# --- the socket ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_a_taken_port_names_its_holder_and_a_remedy(host: str, family: socket.AddressFamily):
    with socket.socket(family) as holder:
        try:
            holder.bind((host, 0))
        except OSError:
            pytest.skip("no IPv6 on this computer")
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortTaken) as caught:
            bind(host, port)
    assert f"port {port} " in caught.value.message
    assert f"{psutil.Process().name()} (pid {os.getpid()})" in caught.value.message
    assert "endpoint.port" in caught.value.remedy


def test_an_address_of_another_computer_is_a_wrong_setting():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize("host", ["nowhere.invalid", "no..name", "x" * 70])
def test_a_name_that_nobody_knows_is_a_wrong_setting(host: str):
    with pytest.raises(ConfigError, match=re.escape(repr(host))):
        bind(host, 0)


def test_a_port_is_free_again_at_once_although_old_connections_linger():
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as user:
        accepted, _ = first.accept()
        accepted.close()  # this side closes first and so keeps the connection in TIME_WAIT
        assert user.recv(1) == b""
    first.close()
    bind("127.0.0.1", port).close()


def test_the_socket_is_made_before_anything_heavy_is_imported():
    assert loaded_by("import emberd.host.listener") & {"uvicorn", "starlette", "httpx"} == set()


async def test_a_client_that_comes_before_the_server_waits_and_is_answered():
    listener = bind("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(GET)
    endpoint, app = Endpoint(), App()
    app.release.set()
    serving = asyncio.create_task(endpoint.serve(app, [listener]))
    async with asyncio.timeout(LIMIT_S):
        assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
        await endpoint.stop(0)
        await serving
    writer.close()
    listener.close()


# --- while it serves ----------------------------------------------------------------------------------------


async def test_it_takes_no_signals_and_sets_no_timer_while_nothing_happens(served: Served):
    """Ten ticks a second are 0.2 % of a core, all that an idle daemon may use."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    served.app.release.set()
    reader, writer = await served.connect(GET)
    async with asyncio.timeout(LIMIT_S):
        await reader.readuntil(b"done")
    writer.close()
    await until(lambda: not served.connections())
    assert {number: signal.getsignal(number) for number in before} == before
    timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    assert [timer for timer in timers if not timer.cancelled()] == []


async def test_it_adds_no_header_of_its_own(served: Served):
    served.app.release.set()
    reader, writer = await served.connect(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head, _, _ = (await everything(reader)).partition(b"\r\n\r\n")
    assert head.lower().split(b"\r\n") == [b"http/1.1 200 ok", b"content-length: 4", b"connection: close"]
    writer.close()


async def test_a_long_request_line_that_comes_in_pieces_is_accepted(served: Served):
    """KoboldCPP's /noscript page carries whole prompts there."""
    served.app.release.set()
    target = b"/noscript/" + b"a" * 60_000
    reader, writer = await served.connect(b"GET ")
    for start in range(0, len(target), 20_000):
        writer.write(target[start : start + 20_000])
        await writer.drain()
        await asyncio.sleep(0.02)  # lets the pieces arrive one by one
    writer.write(b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await everything(reader)).startswith(b"HTTP/1.1 200")
    assert served.app.targets == [target]
    writer.close()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHos"])
async def test_a_connection_that_says_nothing_or_half_a_head_is_closed(impatient: Served, said: bytes):
    reader, writer = await impatient.connect(said)
    assert await everything(reader) == b""
    assert impatient.app.targets == []
    writer.close()


async def test_a_connection_that_falls_silent_after_a_reply_is_closed(impatient: Served):
    impatient.app.release.set()
    reader, writer = await impatient.connect(GET)
    assert (await everything(reader)).endswith(b"done")
    writer.close()


async def test_the_limit_of_silence_does_not_touch_a_request_that_takes_long(impatient: Served):
    reader, writer = await impatient.connect(GET)
    await impatient.app.started.wait()
    await asyncio.sleep(1.3)  # the limit is 1 s, and no event tells that it passed without effect
    impatient.app.release.set()
    async with asyncio.timeout(LIMIT_S):
        assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_beyond_the_limit_the_longest_silent_connection_makes_room_and_a_busy_one_never():
    served = Served(most_connections=4)
    try:
        busy, busy_writer = await served.connect(GET)
        await served.app.started.wait()
        silent = [await served.connect() for _ in range(2)]
        await until(lambda: served.connections() == 3)
        late, late_writer = await served.connect(GET)
        assert await everything(silent[0][0]) == b""
        await until(lambda: len(served.app.targets) == 2)
        assert silent[1][0].at_eof() is False
        served.app.release.set()
        for reader in (busy, late):
            async with asyncio.timeout(LIMIT_S):
                assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
        for writer in (busy_writer, late_writer, silent[0][1], silent[1][1]):
            writer.close()
    finally:
        await served.end()


async def test_with_every_connection_busy_a_further_request_is_refused():
    served = Served(most_connections=3)
    try:
        busy = [await served.connect(GET) for _ in range(2)]
        await until(lambda: len(served.app.targets) == 2)
        reader, writer = await served.connect(GET)
        assert (await everything(reader)).startswith(b"HTTP/1.1 503")
        served.app.release.set()
        for each, _ in busy:
            async with asyncio.timeout(LIMIT_S):
                await each.readuntil(b"done")
        for each in (writer, busy[0][1], busy[1][1]):
            each.close()
    finally:
        await served.end()


@pytest.mark.parametrize(("method", "has_begun"), [("POST", False), ("POST", True), ("HEAD", False)])
async def test_garbage_within_a_body_ends_the_connection_and_disturbs_nothing_else(
    method: str, has_begun: bool, caplog: pytest.LogCaptureFixture
):
    served = Served()
    try:
        head = f"{method} / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await served.connect(head.encode())
        served.app.begins_at_once = has_begun
        await served.app.started.wait()
        if has_begun:
            async with asyncio.timeout(LIMIT_S):
                await reader.readuntil(b"\r\n\r\n")
        writer.write(b"no length\r\n")
        answer = await everything(reader)
        assert answer == b"" if has_begun else answer.count(b"HTTP/1.1") == answer.count(b" 400 ") == 1
        served.app.release.set()
        await until(lambda: not served.connections())
        writer.close()
    finally:
        await served.end()
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_head_that_comes_a_byte_at_a_time_must_end_in_time():
    served = Served(silence_s=1)
    try:
        reader, writer = await served.connect()
        began_s = asyncio.get_running_loop().time()
        reading = asyncio.create_task(everything(reader))
        for byte in GET:
            writer.write(bytes([byte]))
            done, _ = await asyncio.wait([reading], timeout=0.3)
            if done:
                break
        assert await reading == b""
        assert asyncio.get_running_loop().time() - began_s < 3
        writer.close()
    finally:
        await served.end()


# --- the end ------------------------------------------------------------------------------------------------


async def test_stop_accepts_no_more_and_lets_a_running_request_end(served: Served):
    reader, writer = await served.connect(GET)
    await served.app.started.wait()
    stopping = asyncio.create_task(served.endpoint.stop(LIMIT_S))
    await asyncio.sleep(0.05)
    assert not stopping.done()
    served.listener.close()
    with pytest.raises(ConnectionRefusedError):
        await served.connect()
    served.app.release.set()
    assert (await everything(reader)).endswith(b"done")
    async with asyncio.timeout(1):
        await stopping
        await served.serving
    writer.close()


async def test_stop_cuts_a_request_that_outlasts_the_time_and_sees_it_end(served: Served):
    reader, writer = await served.connect(GET)
    await served.app.started.wait()
    async with asyncio.timeout(1):
        await served.endpoint.stop(0.05)
    assert served.app.cancelled.is_set()
    assert (await everything(reader)).endswith(b"cut")
    writer.close()


async def test_stop_closes_idle_connections_without_waiting(served: Served):
    reader, writer = await served.connect()
    await until(lambda: served.connections() == 1)
    async with asyncio.timeout(1):
        await served.endpoint.stop(LIMIT_S)
        assert await reader.read() == b""
    writer.close()


async def test_stop_does_not_wait_for_ever_for_a_client_that_reads_nothing(served: Served):
    """Its reply is written, but the kernel cannot take it: only the connection is left, and it is dropped."""
    served.app.body = bytes(32 << 20)
    served.app.release.set()
    _, writer = await served.connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # of every socket transport
    writer.write(GET)
    await served.app.started.wait()
    async with asyncio.timeout(5):
        await served.endpoint.stop(0.05)
    await until(lambda: not served.connections())
    writer.transport.abort()


async def test_stop_before_serve_ends_it_as_soon_as_it_begins(served: Served):
    async with asyncio.timeout(1):
        await served.endpoint.stop(0)
        await served.serving


async def test_a_cancelled_endpoint_leaves_neither_request_nor_socket_behind(served: Served):
    reader, writer = await served.connect(GET)
    await served.app.started.wait()
    served.serving.cancel()
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(asyncio.CancelledError):
            await served.serving
    assert served.app.cancelled.is_set()
    served.listener.close()
    with pytest.raises(ConnectionRefusedError):
        await served.connect()
    assert (await everything(reader)).endswith(b"cut")
    writer.close()


# --- what importing costs -----------------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after `code`."""
    source = [part for part in sys.path if part]
    script = f"import sys; sys.path[:] = {source!r}\n{code}\nprint(*(n for n, m in sys.modules.items() if m))"
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(asked.stdout.split())


LEAN = "import emberd.services.logs"


def test_a_lean_import_loads_no_terminal_library():
    assert "rich" in loaded_by("import structlog.dev"), "nothing would be saved"
    loaded = loaded_by(f"{LEAN}\nfrom emberd.services import endpoint, proxy, logs")
    assert {"structlog", "uvicorn"} <= loaded
    assert loaded & {"rich", "pygments"} == set()


def test_rich_can_be_imported_after_a_lean_import():
    later = "import rich.table, rich.syntax, structlog.dev\nassert None not in sys.modules.values()"
    loaded = loaded_by(f"{LEAN}\n{later}")
    assert {"rich.table", "pygments", "structlog.dev"} <= loaded


def test_a_lean_import_leaves_what_is_loaded_already():
    loaded_by(f"import rich.console\nbefore = sys.modules['rich']\n{LEAN}\nassert sys.modules['rich'] is before")
