"""The HTTP server: 24 threads, one connection each, no time limits, HTTP/1.0."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import endpoints
from endpoints import Answer
from generation import BUSY_AFTER_LOST_REPLY_S, BUSY_AFTER_REPLY_S, hang

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from generation import Job, Model

THREADS = 24
THREADS_IPV4 = 16
"""When IPv6 binds too, it gets the rest."""
FIRST_READ_S = 0.35
READ_EVERY_S = 0.02
BETWEEN_LINES_S = 0.05


class ApiHandler(BaseHTTPRequestHandler):
    """One connection with one request."""

    site: endpoints.Site
    model: Model

    def version_string(self) -> str:
        """Return the `Server` header of the personality."""
        return "ConcedoLlamaForKoboldServer " if self.model.switches.is_old else "KoboldCppServer 1"

    def log_message(self, *_: object) -> None:
        """Nothing: there is no access log."""

    def do_GET(self) -> None:
        """Answer without ever waiting for a generation."""
        self._send(self.site.get(self._path(), self._key()))

    def do_POST(self) -> None:
        """Answer at once on the light paths, in turn on all others."""
        limit = 32 << 20
        if int(self.headers.get("Content-Length") or 0) > limit:
            self._send(endpoints.failure(500, "Payload is too big. Max payload size is 32MB.", "bad_input"))
            return
        body, path = self._body(), self._path()
        if (answer := self.site.post_light(path, body, self._key(), self.client_address[0])) is not None:
            self._send(answer)
            return
        turns = self.model.turns
        if not turns.enter():
            self._send(endpoints.failure(503, "Server is busy; please try again later.", "service_unavailable"))
            return
        self.is_batched = False
        try:
            self._generate(path, body)
            # The original frees the model a moment after its reply was sent.
            threading.Event().wait(BUSY_AFTER_REPLY_S)
        except OSError:
            sys.stdout.write("Generate: The response could not be sent, maybe connection was terminated?\n")
            sys.stdout.flush()
            threading.Event().wait(BUSY_AFTER_LOST_REPLY_S)
        finally:
            turns.leave(is_batched=self.is_batched)

    def do_OPTIONS(self) -> None:
        """Allow everything to everyone."""
        self._send(Answer(200, b"", "text/html"))

    def do_HEAD(self) -> None:
        """Answer as to OPTIONS, whatever the path."""
        self.do_OPTIONS()

    def _generate(self, path: str, body: bytes) -> None:
        request = self.site.prepare(path, body, self._key())
        if isinstance(request, Answer):
            self._send(request)
            return
        job, shape = request
        job.is_streamed = shape.is_stream
        self.is_batched = self.model.is_batched(job)
        self.model.turns.begin(is_batched=self.is_batched)
        if shape.is_stream:
            self._stream(job, shape)
            return
        self.model.run(job)
        if shape.lines is None:
            self._send(endpoints.reply(json.dumps(shape.whole(job)).encode()))
        else:
            self._begin_stream()
            for line in shape.lines(shape.whole(job)):
                self.wfile.write(line)
                time.sleep(BETWEEN_LINES_S)
        self._note_finished(job)

    def _begin_stream(self) -> None:
        """Send a stream's head. It promises more than the server keeps: the stream's end is the connection's."""
        self._send_head(
            200,
            {"cache-control": "no-cache", "connection": "keep-alive", "content-type": "text/event-stream"},
        )
        self.close_connection = True

    def _stream(self, job: Job, shape: endpoints.Shape) -> None:
        """Send text as it grows; a client that has gone ends the generation."""
        self._begin_stream()
        worker = threading.Thread(target=self.model.run, args=(job,), daemon=True)
        worker.start()
        try:
            threading.Event().wait(FIRST_READ_S)
            self._send_pieces(job, shape)
        except OSError:
            job.aborted.set()
        worker.join(60)

    def _send_pieces(self, job: Job, shape: endpoints.Shape) -> None:
        sent = 0
        is_old = self.model.switches.is_old
        while True:
            is_last = job.finished.wait(READ_EVERY_S)
            piece = job.text[sent:]
            sent += len(piece)
            ends_here = is_last and (is_old or not piece)
            if piece or ends_here:
                self.wfile.write(shape.event(piece, job.finish_reason if ends_here else None))
            if ends_here:
                self.wfile.write(shape.farewell)
                self._note_finished(job)
                return

    def _note_finished(self, job: Job) -> None:
        if (path := self.model.switches.finished_file) is not None:
            with path.open("a") as file:
                file.write(hashlib.sha256(job.prompt.encode()).hexdigest() + "\n")

    def _path(self) -> str:
        # The older version looks for a path that ends so, query and all.
        path = self.path if self.model.switches.is_old else self.path.partition("?")[0]
        return path.rstrip("/") or "/"

    def _key(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _body(self) -> bytes:
        is_chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if not is_chunked or self.model.switches.is_old:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer) -> None:
        headers = {"cache-control": "no-store", "content-type": answer.kind}
        # Only good answers say how long they are; the end of all others is the end of the connection.
        if answer.status == 200 and answer.body:
            headers["content-length"] = str(len(answer.body))
        self._send_head(answer.status, headers)
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name in ("origin", "methods", "headers"):
            self.send_header(f"access-control-allow-{name}", "*")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def serve(model: Model, site: endpoints.Site) -> list[socket.socket]:
    """Bind and start the threads; return the listening sockets, none if nothing could be bound.

    Raises:
        OSError: the port is taken, in the older version only; the newer one goes on without a socket.
    """
    handler = type("BoundHandler", (ApiHandler,), {"site": site, "model": model})
    host, port = model.options.host, model.options.port
    ipv4 = _listen(socket.AF_INET, host, port)
    if _is_port_answering(port) and ipv4 is None:
        sys.stdout.write(f"Warning: Port {port} already appears to be in use by another program.\n")
    if ipv4 is None and model.switches.is_old:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    if ipv4 is None:
        sys.stdout.write("IPv4 Socket Failed to Bind.\n")
    ipv6 = None if host and ":" not in host else _listen(socket.AF_INET6, host, port)
    if ipv6 is None:
        sys.stdout.write("IPv6 Socket Failed to Bind. IPv6 will be unavailable.\n")
    if ipv4 is None and ipv6 is None and model.switches.is_batching:
        sys.stdout.write("ERROR: Both IPv4 and IPv6 cannot bind. Server features will not work.\n")
        sys.stdout.flush()
        os._exit(0)
    sys.stdout.flush()
    for number in range(THREADS):
        listener = ipv6 if ipv6 is not None and number >= THREADS_IPV4 else ipv4
        threading.Thread(target=_accept_forever, args=(listener, handler, model), daemon=True).start()
    return [listener for listener in (ipv4, ipv6) if listener is not None]


def _is_port_answering(port: int) -> bool:
    """Whether some program listens there already."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _listen(family: socket.AddressFamily, host: str, port: int) -> socket.socket | None:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
        listener.listen(THREADS)
    except OSError:
        listener.close()
        return None
    return listener


@contextlib.contextmanager
def _as_socketserver_does() -> Iterator[None]:
    """Print what went wrong with a request, and go on with the next."""
    try:
        yield
    except OSError:
        return
    except Exception:  # noqa: BLE001  # as `BaseServer.handle_error`
        traceback.print_exc()


def _accept_forever(listener: socket.socket | None, handler: Callable[..., Any], model: Model) -> None:
    """Serve one connection after the other; on a socket that is unbound or closed, spin for ever.

    The original's threads try again at once when accepting fails, which takes all the processor time there is.
    """
    with socket.socket() as unbound:
        while True:
            try:
                connection, address = (listener or unbound).accept()
            except OSError:
                continue
            with connection, _as_socketserver_does():
                if model.switches.hang == "requests" and model.is_hung():
                    hang(burns_cpu=model.switches.hang_burns_cpu)
                handler(connection, address, None)
