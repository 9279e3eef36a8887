"""A real browser at the endpoint: it logs in, reads a stream that a crash cuts, and keeps foreign pages out."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from browser import WAIT_S, Browser, find_browser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

PROGRAM = find_browser() or ""
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
    browser.evaluate(STREAM % TOKENS)
    browser.wait_for(f"told.text.split(' ').length > {TOKENS // 4}")
    assert browser.evaluate("told.end") == ""
    os.kill(engine, signal.SIGKILL)
    assert browser.wait_for("told.end") == "whole 200"
    assert len(browser.evaluate("told.text").split()) == TOKENS
    assert daemon.wait_ready()["engine"]["pid"] != engine


def go(browser: Browser, url: str, words: str) -> None:
    """Go to another page with the cookies that are there, and wait for its words."""
    browser.send("Page.navigate", url=url)
    browser.wait_for(f"document.readyState === 'complete' && document.body.innerText.includes({words!r})")


def log_in(browser: Browser, key: str, words: str) -> None:
    """Send the form, and wait for the page that comes."""
    browser.evaluate(f"document.querySelector('[name=key]').value = {key!r}")
    browser.evaluate("document.querySelector('button').click()")
    browser.wait_for(f"document.readyState === 'complete' && document.body.innerText.includes({words!r})")


def fetched(url: str, **headers: str) -> str:
    """Return a script that tells what a page sees of an answer."""
    return (
        f"fetch({url!r}, {{headers: {headers!r}}})"
        ".then(answer => `${answer.status} ${answer.headers.get('retry-after')}`, error => String(error))"
    )


def test_a_page_goes_on_although_its_engine_is_killed(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_TOKEN_MS="20")
    daemon.start()
    daemon.wait_ready()
    with Browser(PROGRAM) as browser:
        browser.open(f"http://localhost:{daemon.port}/")
        browser.wait_for("document.body.innerText.includes('stand-in')")
        stream_through_a_crash(browser, daemon)


def test_with_a_key_a_browser_logs_in_and_foreign_pages_stay_out(make_daemon: MakeDaemon, tmp_path: Path):
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    daemon = make_daemon({"endpoint.api_key_file": str(key)}, STANDIN_TOKEN_MS="20", STANDIN_LOAD_SECONDS="1")
    daemon.start()
    daemon.wait_ready()
    url = f"http://localhost:{daemon.port}"
    with other_page() as port, Browser(PROGRAM, "--host-resolver-rules=MAP evil.example 127.0.0.1") as browser:
        browser.open(f"{url}/")
        browser.wait_for("document.body.innerText.includes('stand-in')")  # the page opens without a key
        assert browser.evaluate(fetched("/api/v1/model")) == "401 null"
        go(browser, f"{url}/noscript", "asks for a key")
        log_in(browser, "wrong", "not the key")
        browser.evaluate("document.querySelector('[name=to]').value = '/'")
        log_in(browser, KEY, "stand-in")
        assert browser.evaluate("location.pathname") == "/"
        assert browser.evaluate("document.cookie") == "", "no script reads it"
        stream_through_a_crash(browser, daemon)

        go(browser, f"http://localhost:{port}/", "another page")
        model = f"{url}/api/v1/model"
        assert browser.evaluate(fetched(model, authorization="Bearer wrong")) == "401 null", "not `failed to fetch`"
        assert browser.evaluate(fetched(model, authorization=f"Bearer {KEY}")) == "200 null"
        assert browser.evaluate(fetched(model)) == "401 null", "its requests are not logged in"
        go(browser, f"http://evil.example:{port}/", "another page")
        assert browser.evaluate(fetched(model, authorization=f"Bearer {KEY}")) == "TypeError: Failed to fetch"
        go(browser, f"http://evil.example:{daemon.port}/", "not known as evil.example")
