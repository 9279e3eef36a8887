"""The emberd process as others see it, whether it serves an engine (app.py) or stands by (standby.py)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from emberd import __version__
from emberd.core.errors import EmberdError
from emberd.core.start_limit import Why
from emberd.host.notify_socket import NotifySocket
from emberd.services import logs
from emberd.services.control import ControlServer
from emberd.services.endpoint import MOST_CONNECTIONS, Endpoint
from emberd.services.notifier import Notifier
from emberd.services.proxy import make_app

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping
    from pathlib import Path
    from typing import Self

    from starlette.types import ASGIApp, Receive, Scope, Send

    from emberd.core.settings import Settings
    from emberd.host import ThisHost
    from emberd.host.instance import Instance
    from emberd.services.control import Verb
    from emberd.services.door import Door
    from emberd.services.page import Page

NEED_ENGINE = ("forget", "warm", "progress", "pause", "resume", "cool", "history", "metrics")
"""Verbs that an emberd without an engine refuses."""
_OWN_FILES = 64
"""Open files besides connections: about 20 when idle."""
T = TypeVar("T")
_CANCELLATIONS, _CANCEL_LIMIT_S = 4, 5.0
"""How often a task is told to end, and how long it is waited for each time."""
_LAST_LIMIT_S = 0.5
"""The same when all have been waited for."""


class Daemon:
    """What serving and standing by share: signals, control socket, endpoint, messages to systemd, the end."""

    def __init__(self, settings: Settings, settings_file: Path, instance: Instance, host: ThisHost) -> None:
        self.instance = instance
        self.host = host
        logs.configure_for(settings, host)
        self.log = logs.logger("daemon")
        self.notifier = Notifier(NotifySocket(os.environ, os.getpid()), self.log)
        # A request takes two descriptors, the client's and the engine's.
        most_connections = (host.raise_open_files() - _OWN_FILES) // 2
        self.endpoint = Endpoint(most_connections=min(most_connections, MOST_CONNECTIONS))
        self.ending: asyncio.Future[Why] = asyncio.get_running_loop().create_future()
        """Done as soon as this process is to end."""
        self._settings_file = settings_file
        self._began_s = time.monotonic()
        self._control: ControlServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._page: Page | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end_tasks()
        if self._control is not None:
            await self._control.close()
        # Requests and verbs have tasks that nobody else ends, and the end of a loop cancels each only once: once an
        # emberd that was to replace itself waited there for ever, with eight clients.
        await self._end(asyncio.all_tasks() - {asyncio.current_task()})
        logs.close()

    @property
    def uptime_s(self) -> float:
        """Seconds since this program began to serve or to stand by, in whole milliseconds."""
        return round(time.monotonic() - self._began_s, 3)

    def status(self, model: str) -> dict[str, Any]:
        """Return the beginning of every status."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": self.uptime_s,
            "endpoint": self.instance.url,
            "endpoints": self.instance.urls,
            "endpoint_lacks": self.instance.lacks,
            "model": model,
            "settings_file": str(self._settings_file),
        }

    async def open_control(self, path: Path, answers: Mapping[str, Verb]) -> None:
        """Serve the verbs: `stop` and `replace`, and `answers`, which differ between serving and standing by.

        A socket that cannot be made now is left to `keep_control`.
        """
        verbs: dict[str, Verb] = {"stop": self._stop, "replace": self._replace, **answers}
        self._control = ControlServer(path, verbs, logs.logger("control"))
        with contextlib.suppress(OSError):
            await self._control.start()

    async def keep_control(self) -> None:
        """Make the control socket anew if it is not there.

        Raises:
            OSError: it cannot be made now.
        """
        if self._control is not None:
            await self._control.keep()

    async def serve(
        self,
        proxy: ASGIApp,
        state: Callable[[], str],
        is_warm: Callable[[], bool],
        login: ASGIApp,
        door: Door,
        verbs: Mapping[str, Verb],
    ) -> None:
        """Serve clients until the endpoint is stopped: see `make_app` and `Page`."""

        async def page(scope: Scope, receive: Receive, send: Send) -> None:
            if self._page is None:
                from emberd.services.page import Page  # noqa: PLC0415  # most daemons are never looked at

                self._page = Page(verbs, door, self.log)
            await self._page(scope, receive, send)

        await self.endpoint.serve(make_app(proxy, state, is_warm, login, page), self.instance.listeners)

    def close_views(self) -> None:
        """End the live views: the end of this process waits for nobody who only looks."""
        if self._page is not None:
            self._page.events.close()

    def spawn(self, work: Coroutine[Any, Any, None], name: str | None = None) -> asyncio.Task[None]:
        """Run this work in a task until it or this process ends."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def end_tasks(self) -> None:
        """End all tasks of `spawn`."""
        await self._end(self._tasks)

    async def _end(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        left = await end_all(tasks)
        if left:
            self.log.error("tasks_do_not_end", tasks=left)

    # --- the end --------------------------------------------------------------------------------------------

    def end(self, why: Why) -> None:
        """Ask for the end; the first call counts."""
        if not self.ending.done():
            self.ending.set_result(why)

    def take_signals(self, reload: Callable[[], object], hurry: Callable[[], object] = lambda: None) -> None:
        """End at SIGTERM and SIGINT, call `hurry` if they come again, and `reload` at SIGHUP.

        A SIGHUP also ends emberd if the terminal on which it was started has gone.
        """
        had_terminal, interrupts = sys.stderr.isatty(), itertools.count()

        def interrupt() -> None:
            if next(interrupts):
                hurry()
            self.end(Why.STOPPED)

        def hang_up() -> None:
            interrupt() if had_terminal and not _terminal_answers() else reload()

        loop = asyncio.get_running_loop()
        for number, act in ((signal.SIGTERM, interrupt), (signal.SIGINT, interrupt), (signal.SIGHUP, hang_up)):
            loop.add_signal_handler(number, act)

    def _stop(self) -> dict[str, Any]:
        self.end(Why.STOPPED)
        return {"ok": True, "pid": os.getpid()}

    def _replace(self, command: list[str] | None = None) -> dict[str, Any]:
        if command and not os.access(command[0], os.X_OK):
            raise EmberdError(f"cannot execute {command[0]}", "Install emberd again, then: emberd upgrade.")
        self.instance.successor = command or []
        self.end(Why.ASKED)
        return {"ok": True, "pid": os.getpid(), "uptime_s": self.uptime_s}


def _terminal_answers() -> bool:
    """Return True if the terminal on standard error still exists; tcgetattr fails with EIO after a hang-up."""
    try:
        termios.tcgetattr(sys.stderr.fileno())
    except (termios.error, OSError):
        return False
    return True


async def end_all(tasks: Iterable[asyncio.Task[Any]], limit_s: float = _CANCEL_LIMIT_S) -> list[str]:
    """Cancel tasks until they have ended; return the names of those that have not after _CANCELLATIONS.

    A cancellation can be lost: who awaits another task may take it for the end of that.

    Args:
        tasks: what to end. What they raise is dropped.
        limit_s: how long one cancellation may take.
    """
    left = set(tasks)
    for _ in range(_CANCELLATIONS):
        if not left:
            break
        for task in left:
            task.cancel()
        ended, left = await asyncio.wait(left, timeout=limit_s)
        await asyncio.gather(*ended, return_exceptions=True)
    return sorted(getattr(task.get_coro(), "__qualname__", task.get_name()) for task in left)


def run_to_end(work: Coroutine[Any, Any, T], limit_s: float = _LAST_LIMIT_S) -> T:
    """Run this work in a loop of its own, and return its result, whatever of it does not end.

    `asyncio.run` waits without a bound for tasks that ignore their cancellation, and for threads: one that reads
    from a dead volume never ends, and the program that is to replace this one must begin.

    Args:
        work: ends its own tasks.
        limit_s: how long each cancellation of those that are left may take.
    """
    loop = asyncio.new_event_loop()
    threads = ThreadPoolExecutor(thread_name_prefix="emberd")
    loop.set_default_executor(threads)
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(end_all(asyncio.all_tasks(loop), limit_s))
        loop.run_until_complete(loop.shutdown_asyncgens())
        threads.shutdown(wait=False, cancel_futures=True)
        asyncio.set_event_loop(None)
        loop.close()
