"""A real browser at the endpoint: it logs in, reads a stream that a crash cuts, and keeps foreign pages out."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from browser import PROGRAM, WAIT_S, Browser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

pytestmark = [
    pytest.mark.skipif(not PROGRAM, reason="Chromium is not installed"),
    pytest.mark.timeout(180),
]
KEY = "correct-horse-battery"
TOKENS = 60
STREAM = """
window.told = {text: "", end: ""};
(async () => {
  const answer = await fetch("/api/extra/generate/stream", {
    method: "POST",
    headers: {"content-type": "application/json"},
    body: JSON.stringify({prompt: "ba ke lo", max_length: %d}),
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    for (const line of part.value.split("\\n"))
      if (line.startsWith("data:")) told.text += JSON.parse(line.slice(5)).token;
  }
  told.end = "whole " + answer.status;
})().catch(error => { told.end = String(error); });
0
"""


class Page(BaseHTTPRequestHandler):
    """A page of another port or name."""

    def do_GET(self) -> None:
        body = b"<!doctype html><title>another</title><body>another page</body>"
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def other_page() -> Iterator[int]:
    """Serve a page on a port of its own; yield the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(WAIT_S)
        server.server_close()


def stream_through_a_crash(browser: Browser, daemon: Daemon) -> None:
    """Generate in the page, kill the engine in the middle, and see the text go on to its end."""
    engine = daemon.status()["engine"]["pid"]
    browser.run(STREAM % TOKENS)
    deadline_s = time.monotonic() + WAIT_S
    while len(browser.run("told.text").split()) < TOKENS // 4:
        assert not browser.run("told.end")
        assert time.monotonic() < deadline_s
    os.kill(engine, signal.SIGKILL)
    while not browser.run("told.end"):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert (browser.run("told.end"), len(browser.run("told.text").split())) == ("whole 200", TOKENS)
    assert daemon.wait_ready()["engine"]["pid"] != engine


def fetched(url: str, **headers: str) -> str:
    """Return a script that tells what a page sees of an answer."""
    return (
        f"fetch({url!r}, {{headers: {headers!r}}})"
        ".then(answer => `${answer.status} ${answer.headers.get('retry-after')}`, error => String(error))"
    )


def test_a_page_goes_on_although_its_engine_is_killed(make_daemon: MakeDaemon, tmp_path: Path):
    daemon = make_daemon(STANDIN_TOKEN_MS="20")
    daemon.start()
    daemon.wait_ready()
    with Browser(tmp_path) as browser:
        assert "stand-in" in browser.open(f"http://localhost:{daemon.port}/")
        stream_through_a_crash(browser, daemon)


def test_with_a_key_a_browser_logs_in_and_foreign_pages_stay_out(make_daemon: MakeDaemon, tmp_path: Path):
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    daemon = make_daemon({"endpoint.api_key_file": str(key)}, STANDIN_TOKEN_MS="20", STANDIN_LOAD_SECONDS="1")
    daemon.start()
    daemon.wait_ready()
    url = f"http://localhost:{daemon.port}"
    with other_page() as port, Browser(tmp_path, "--host-resolver-rules=MAP evil.example 127.0.0.1") as browser:
        assert "stand-in" in browser.open(f"{url}/"), "the page opens without a key"
        assert browser.run(fetched("/api/v1/model")) == "401 null"
        browser.open(f"{url}/noscript")
        assert "/emberd/login" in browser.run("location.href")
        browser.run("document.querySelector('[name=key]').value = 'wrong'; 0")
        browser.submit("document.querySelector('button').click()")
        assert "not the key" in browser.run("document.body.innerText")
        browser.run(
            f"document.querySelector('[name=key]').value = {KEY!r}; document.querySelector('[name=to]').value = '/'"
        )
        browser.submit("document.querySelector('button').click()")
        assert browser.run("location.pathname") == "/"
        assert browser.run("document.cookie") == "", "no script reads it"
        stream_through_a_crash(browser, daemon)

        browser.open(f"http://localhost:{port}/")
        model = f"{url}/api/v1/model"
        assert browser.run(fetched(model, authorization="Bearer wrong")) == "401 null", "not `failed to fetch`"
        assert browser.run(fetched(model, authorization=f"Bearer {KEY}")) == "200 null"
        assert browser.run(fetched(model)) == "401 null", "its requests are not logged in"
        browser.open(f"http://evil.example:{port}/")
        assert browser.run(fetched(model, authorization=f"Bearer {KEY}")) == "TypeError: Failed to fetch"
        assert "not known as evil.example" in browser.open(f"http://evil.example:{daemon.port}/")
