"""A real Chromium without a window, driven by its DevTools protocol over a pipe."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

PROGRAM = next(
    (
        found
        for name in ("chromium", "google-chrome", "chromium-browser", "chromium-headless-shell")
        if (found := shutil.which(name))
    ),
    "",
)
WAIT_S = 60.0
_FIRST_SPARE = 100
_OPTIONS = (
    "--headless",
    "--remote-debugging-pipe",  # reads commands on descriptor 3 and answers on 4
    "--no-first-run",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
)


class Browser:
    """One browser with one page; each answer is a message that ends with NUL."""

    def __init__(self, folder: Path, *options: str) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        low = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, _FIRST_SPARE) for each in (commands, answers)]
        log = os.open(folder / "browser.log", os.O_WRONLY | os.O_CREAT, 0o600)
        actions = [
            (os.POSIX_SPAWN_DUP2, each, place) for place, each in ((3, low[0]), (4, low[1]), (1, log), (2, log))
        ]
        words = [PROGRAM, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", *options, "about:blank"]
        environment = {**os.environ, "HOME": str(folder)}
        self._pid = os.posix_spawn(PROGRAM, words, environment, file_actions=actions, setpgroup=0)
        for each in (commands, answers, log, *low):
            os.close(each)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session = ""

    def __enter__(self) -> Self:
        [page] = [each for each in self.do("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self.do("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self.do("Page.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read)
        os.close(self._write)

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> str:
        """Open a page and return its text; `show` waits until it has loaded."""
        told = self.do("Page.navigate", url=url)
        assert "errorText" not in told, told
        self._await_load()
        return str(self.run("document.body ? document.body.innerText : ''"))

    def submit(self, script: str) -> None:
        """Run a script that leads to another page, and wait for that."""
        self.do("Runtime.evaluate", expression=script, userGesture=True)
        self._await_load()

    def run(self, script: str) -> Any:
        """Return the value of an expression; a promise is awaited."""
        told = self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def _await_load(self) -> None:
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def _next(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + WAIT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline_s - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, "the browser says nothing more"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told
