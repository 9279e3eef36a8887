"""Debian's Chromium without a window, driven through a pipe by the Chrome DevTools Protocol.

`--remote-debugging-pipe` (content/browser/devtools/devtools_pipe_handler.cc): the browser reads commands from
descriptor 3 and writes answers and events to descriptor 4, each a JSON text that ends with a null byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

PROGRAMS = ("chromium-headless-shell", "chromium")
WAIT_S = 60.0
_FREE = 10
"""From here on descriptors do not collide with those that the protocol wants."""
_LAUNCH = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execv(sys.argv[1], sys.argv[1:])"


def find_browser() -> str | None:
    """Return the path of a Chromium, None if there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One process of the browser, and one page in it."""

    def __init__(self, program: str) -> None:
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, _FREE) for end in (to_read, to_write)]
        arguments = [
            "--headless",
            "--no-sandbox",  # tests run as root in containers, where it cannot be had
            "--remote-debugging-pipe",
            f"--user-data-dir={self._home.name}",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--force-color-profile=srgb",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH.format(*ends), program, *arguments, "about:blank"],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_read, to_write, *ends):
            os.close(end)
        self._unread = b""
        self._number = 0
        self._session = ""
        self.events: list[dict[str, Any]] = []
        """What the page has done since `open`: the protocol's events."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(WAIT_S)
        os.close(self._from)
        self._home.cleanup()

    def open(self, url: str, *, width: int = 1280, height: int = 900, is_dark: bool = False) -> None:
        """Open a page in a tab of its own, without cookies and cache of pages before."""
        context = self._send("Target.createBrowserContext", session="")["browserContextId"]
        target = self._send("Target.createTarget", session="", url="about:blank", browserContextId=context)
        attached = self._send("Target.attachToTarget", session="", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self.events.clear()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.shape(width, height, is_dark=is_dark)
        self.send("Page.navigate", url=url)

    def shape(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """Give the page a size, in pixels of CSS, and colours."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command to the page, and return the answer."""
        return self._send(method, session=self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript in the page, awaited if it is a promise."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """Return the value of an expression as soon as it is true; it is looked at with each frame."""
        look = f"""new Promise((resolve, reject) => {{
            const ends = performance.now() + {WAIT_S * 1000};
            const look = () => {{
                let value = null;
                try {{ value = ({condition}); }} catch {{ }}
                if (value) resolve(value);
                else if (performance.now() > ends) reject(new Error("it did not come"));
                else setTimeout(look, 16);
            }};
            look();
        }})"""
        try:
            return self.evaluate(look)
        except AssertionError as error:
            raise AssertionError(f"{condition} did not come; the page says: {self.text()}") from error

    def text(self) -> str:
        """Return the page's text as a person sees it."""
        return str(self.evaluate("document.body.innerText"))

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key, named as in KeyboardEvent.key."""
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
        facts = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0), "modifiers": 8 if shift else 0}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **facts)
        self.send("Input.dispatchKeyEvent", type="keyUp", **facts)

    def picture(self, path: Path | None = None, *, whole: bool = True) -> bytes:
        """Return a screenshot as PNG, and write it if there is a path."""
        data = base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        if path is not None:
            path.write_bytes(data)
        return data

    def seen(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of that name so far."""
        self.evaluate("0")  # reads what has come
        return [each["params"] for each in self.events if each["method"] == method]

    def complaints(self) -> list[str]:
        """Return what the page has complained of on its console: errors, warnings and violations of its policy."""
        thrown = [str(each["exceptionDetails"]) for each in self.seen("Runtime.exceptionThrown")]
        logged = [str(each["args"]) for each in self.seen("Runtime.consoleAPICalled") if each["type"] != "log"]
        entries = [each["entry"] for each in self.seen("Log.entryAdded")]
        return thrown + logged + [f"{each['text']} {each.get('url', '')}" for each in entries]

    # --- the pipe -------------------------------------------------------------------------------------------

    def _send(self, method: str, *, session: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if session:
            command["sessionId"] = session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        end_s = time.monotonic() + 2 * WAIT_S
        while True:
            message = self._read(end_s)
            if message.get("id") == self._number:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result
            if message.get("sessionId") == self._session:
                self.events.append(message)

    def _read(self, end_s: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            left_s = end_s - time.monotonic()
            if left_s <= 0 or not select.select([self._from], [], [], left_s)[0]:
                raise AssertionError("the browser does not answer")
            part = os.read(self._from, 1 << 20)
            if not part:
                raise AssertionError("the browser has ended")
            self._unread += part
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message
