"""An emberd that stands by: it cannot start, and has failed too often to be started again at once. It says why.

It serves the endpoint's sockets if it can, the control socket, and systemd. It has no engine, and leaves a
running one alone for the next emberd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emberd.core import access
from emberd.core.errors import AlreadyRunning, EmberdError, NotReady, PortTaken, StateUnusable
from emberd.core.start_limit import Why
from emberd.core.status import Status, to_plain
from emberd.host import config_file
from emberd.host.files import write_atomically
from emberd.host.paths import prepare, state_paths
from emberd.services.daemon import NEED_ENGINE
from emberd.services.door import Door
from emberd.services.login import Login
from emberd.services.messages import Body, Client, ClientGone, ClientSilent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from starlette.types import Receive, Scope, Send

    from emberd.core.settings import Settings
    from emberd.host.config_file import Loaded
    from emberd.services.control import Verb
    from emberd.services.daemon import Daemon

    Examine = Callable[[Settings, EmberdError], Awaitable[dict[str, Any]]]

NAME = "STANDBY"
"""Where clients and `emberd status` find the engine's state."""
_LOOK_S = 0.5
"""How often files are looked at. A kernel watch needs a file that is there and is not replaced; editors replace."""
_SETTLED_LOOKS = 2
"""Looks without a further change before a changed file counts: a model may still be being copied."""
_STATE_S = 2.0
_TAKEN_S = 5.0
"""How often a taken port or state directory is tried."""
_RETRY_AFTER_S = 60
_LAST_ANSWERS_S = 2.0
_BODY_BYTES = 8 * 1024 * 1024
"""So much of a request is read before the answer: some clients read nothing before they have sent everything."""


@dataclass(frozen=True, slots=True)
class Standby:
    """One wait.

    Attributes:
        daemon: what others see of it.
        error: what keeps emberd from starting.
        wait_s: seconds until the next try.
        failures: the error of each of the last starts, the oldest first.
        loaded: the settings, as far as they could be read.
        option: the settings file as it was named.
        examine: returns what `emberd doctor` sees.
    """

    daemon: Daemon
    error: EmberdError
    wait_s: float
    failures: tuple[str, ...]
    loaded: Loaded
    option: str | None
    examine: Examine

    async def run(self) -> Why:
        """Answer everybody until there is a reason to end or to try again."""
        daemon, error = self.daemon, self.error
        daemon.take_signals(lambda: daemon.end(Why.ASKED))
        self._listens()
        await self._open_control()
        daemon.log.error(
            "standby",
            reason=error.message,
            remedy=error.remedy,
            failures=list(self.failures),
            next_try_in_s=round(self.wait_s),
            endpoint=daemon.instance.url,
        )
        feed = daemon.notifier.feed_watchdog(lambda: asyncio.sleep(0))  # only the event loop could hang here
        for work in (self._serve(), self._watch_files(), self._watch_lock(), self._watch_state(), feed):
            daemon.spawn(work)
        asyncio.get_running_loop().call_later(self._left_s, daemon.end, Why.DUE)
        daemon.notifier.ready()
        daemon.notifier.status(f"waiting: {error.message}")
        why = await daemon.ending
        if why is Why.STOPPED:
            daemon.notifier.stopping(_LAST_ANSWERS_S)
        else:
            daemon.notifier.replacing()
        await daemon.end_tasks()
        daemon.log.info("standby_ended", why=why.value)
        return why

    # --- what it holds --------------------------------------------------------------------------------------

    def _listens(self) -> bool:
        """Listen on the port if possible, so that clients are told why."""
        instance, endpoint = self.daemon.instance, self.loaded.settings.endpoint
        if not instance.listeners and self.loaded.tells_place:
            with contextlib.suppress(EmberdError, OSError):
                instance.listen(endpoint.host, endpoint.port, is_brief=True)
        return bool(instance.listeners)

    async def _open_control(self) -> None:
        """Serve the control socket, if this process is the instance of a usable state directory."""
        if not self.loaded.tells_place:
            return
        paths = state_paths(self.loaded.settings)
        with contextlib.suppress(EmberdError, OSError):
            prepare(paths)
            self.daemon.instance.take_lock(paths.lock)
            await self.daemon.open_control(paths.control, self._verbs())

    async def _serve(self) -> None:
        """Serve the sockets; try a taken port again, because that may be what keeps emberd from starting."""
        while not self.daemon.instance.listeners:
            await asyncio.sleep(_TAKEN_S)
            if self._listens() and isinstance(self.error, PortTaken):
                self.daemon.end(Why.DUE)
                return
        door = self._door()
        login = Login(door, self._rules)
        await self.daemon.serve(self._refuse, lambda: NAME, lambda: False, login, door, self._verbs())

    # --- what ends it ---------------------------------------------------------------------------------------

    async def _watch_lock(self) -> None:
        """Notice that the other emberd of the state directory has ended, if that kept this one from starting."""
        while isinstance(self.error, AlreadyRunning):
            await asyncio.sleep(_TAKEN_S)
            with contextlib.suppress(EmberdError):
                self.daemon.instance.take_lock(state_paths(self.loaded.settings).lock)
                self.daemon.end(Why.DUE)
                return

    async def _watch_state(self) -> None:
        """Notice that the state directory can be used again, if that kept emberd from starting."""
        while isinstance(self.error, StateUnusable):
            await asyncio.sleep(_STATE_S)
            with contextlib.suppress(EmberdError):
                paths = state_paths(self.loaded.settings)
                prepare(paths)
                write_atomically(paths.directory / "room.probe", "")
                (paths.directory / "room.probe").unlink(missing_ok=True)
                self.daemon.end(Why.DUE)
                return

    async def _watch_files(self) -> None:
        """Notice a change of the settings file, or of a file that it names: a person mends something."""
        settings, path = self.loaded.settings, self.loaded.path
        named = (settings.model.path, settings.engine.path, settings.engine.kcpps, settings.endpoint.api_key_file)
        files = [str(path), *(os.path.expanduser(each) for each in named if each)]  # noqa: PTH111  # str
        before = last = now = [_mark(each) for each in files]
        still = 0
        while now == before or still < _SETTLED_LOOKS:
            await asyncio.sleep(_LOOK_S)
            now = [_mark(each) for each in files]
            still = still + 1 if now == last else 0
            last = now
        self.daemon.end(Why.ASKED)

    # --- what it says ---------------------------------------------------------------------------------------

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with 503 and the reason, which other computers are not told."""
        shown = await self._door().admit(scope, send)
        if shown is None:
            return
        client = Client(shown, scope["path"])
        with contextlib.suppress(ClientGone, ClientSilent):
            await Body(receive, _BODY_BYTES).read_first_part()
            retry_after_s = max(1, min(_RETRY_AFTER_S, round(self._left_s)))
            await client.refuse(NotReady(NAME, self._message(scope), retry_after_s))

    def _rules(self) -> access.AccessRules:
        endpoint = self.loaded.settings.endpoint
        return access.AccessRules((*endpoint.names, *access.own_names(socket.gethostname())), endpoint.origins)

    def _door(self) -> Door:
        return Door(self._rules, self.daemon.log)

    def _message(self, scope: Scope) -> str:
        client = scope.get("client")
        if client is not None and not access.is_loopback(client[0]):
            return "emberd cannot start; `emberd status` on its computer tells why"
        return f"emberd cannot start: {self.error.message}. {self.error.remedy}".rstrip()

    @property
    def _left_s(self) -> float:
        return max(0.0, self.wait_s - self.daemon.uptime_s)

    def _verbs(self) -> dict[str, Verb]:
        def try_again(**answer: Any) -> dict[str, Any]:
            self.daemon.end(Why.ASKED)
            return {"ok": True, **answer}

        def reload() -> dict[str, Any]:
            config_file.load(self.option)
            return try_again(engine_restarts=True, needs_emberd_restart=[])

        def refuse(**_: Any) -> dict[str, Any]:
            error = self.error
            refused = EmberdError(f"emberd waits, for it cannot start: {error.message}", error.remedy)
            refused.exit_code = error.exit_code  # type: ignore[misc]
            raise refused

        return {
            **dict.fromkeys(NEED_ENGINE, refuse),
            "status": self._status,
            "doctor": lambda: self.examine(self.loaded.settings, self.error),
            "restart": lambda: try_again(starts=-1, standby=True),
            "reload": reload,
        }

    def _status(self) -> dict[str, Any]:
        status = Status(
            **self.daemon.status(self.loaded.settings.model.path),
            state=NAME,
            state_for_s=self.daemon.uptime_s,
            reason=self.error.message,
            remedy=self.error.remedy,
            exit_code=self.error.exit_code,
            failures=self.failures,
            next_start_in_s=round(self._left_s, 3),
            starts=-1,
        )
        return to_plain(status)


def _mark(path: str | Path) -> tuple[int, int, int] | None:
    """Return a value that changes when the file is written or replaced, None if there is no file."""
    try:
        found = os.stat(path)  # noqa: PTH116  # str
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
