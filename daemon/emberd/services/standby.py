"""The daemon that waits: it cannot start, has failed too often to be started again at once, and says why.

It serves where emberd would: the sockets if they can be had, the control socket, and systemd. There is no engine in
it, and an engine that runs is left alone, for the emberd that starts behind it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from emberd import __version__
from emberd.core import access
from emberd.core.errors import AlreadyRunning, EmberdError, NotReady, PortTaken
from emberd.host import ThisHost, config_file
from emberd.host.notify_socket import NotifySocket
from emberd.host.paths import prepare, state_paths
from emberd.services.lean import import_lean

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from starlette.types import Receive, Scope, Send
    from structlog.typing import FilteringBoundLogger

    from emberd.core.settings import Settings
    from emberd.host.claims import Claims
    from emberd.host.config_file import Loaded
    from emberd.services.control import ControlServer

    Examine = Callable[[Settings, EmberdError], Awaitable[dict[str, Any]]]

NAME = "STANDBY"
"""Where clients and `emberd status` find the engine's state."""
_LOOK_S = 0.5
"""How often files are looked at. A kernel watch needs a file that is there and is not replaced; editors replace."""
_SETTLED_LOOKS = 2
"""Looks without a further change before a changed file counts: a model may still be copied."""
_TAKEN_S = 5.0
"""How often a taken port or state directory is tried."""
_RETRY_AFTER_S = 60
_LAST_ANSWERS_S = 2.0
_BODY_BYTES = 8 * 1024 * 1024
"""Read before the answer, so that a client has sent what it wants to send."""


class Outcome(Enum):
    """Why the waiting ended."""

    STOPPED = "stopped"
    """Somebody stopped emberd."""
    DUE = "due"
    """The time has come to try again."""
    ASKED = "asked"
    """A person asked for it, or changed a file that it depends on."""


@dataclass(frozen=True, slots=True)
class Why:
    """What keeps emberd from starting.

    Attributes:
        error: what is wrong, and what to do.
        wait_s: when to try again.
        failures: what each of the last starts said, the oldest first.
    """

    error: EmberdError
    wait_s: float
    failures: tuple[str, ...] = ()


class Standby:
    """One wait.

    Args:
        why: the reason.
        loaded: what is known of the settings.
        option: the settings file as it was named, to read it again.
        examine: what `emberd doctor` sees of the settings and the reason.
        claims: the lock and the sockets, as far as they are held; more is taken if it can be had.
    """

    def __init__(self, why: Why, loaded: Loaded, option: str | None, examine: Examine, claims: Claims) -> None:
        self._why = why
        self._loaded = loaded
        self._option = option
        self._examine = examine
        self._claims = claims
        self._began_s = time.monotonic()
        self.successor: list[str] = []
        """Command line of the emberd that follows; empty for this one's."""
        self._outcome: asyncio.Future[Outcome]
        self._log: FilteringBoundLogger

    async def run(self) -> Outcome:
        """Wait, answering everybody, until there is a reason to end or to try again."""
        import_lean()
        from emberd.services import logs  # noqa: PLC0415
        from emberd.services.notifier import Notifier  # noqa: PLC0415

        self._outcome = asyncio.get_running_loop().create_future()
        logs.configure_for(self._loaded.settings, ThisHost())
        self._log = logs.logger("daemon")
        self._take_signals()
        self._listen()
        control = await self._make_control()
        notifier = Notifier(NotifySocket(os.environ, os.getpid()), self._log)
        error = self._why.error
        self._log.error(
            "standby",
            reason=error.message,
            remedy=error.remedy,
            failures=list(self._why.failures),
            next_try_in_s=round(self._why.wait_s),
            endpoint=self._url(),
        )
        serving = asyncio.create_task(self._serve())
        tasks = [
            serving,
            asyncio.create_task(self._watch_files()),
            asyncio.create_task(self._watch_time()),
            asyncio.create_task(self._watch_lock()),
            asyncio.create_task(notifier.feed_watchdog(self._prove)),
        ]
        notifier.ready()
        notifier.status(f"waiting: {error.message}")
        try:
            outcome = await self._outcome
            if outcome is Outcome.STOPPED:
                notifier.stopping(_LAST_ANSWERS_S)
            else:
                notifier.replacing()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if control is not None:
                await control.close()
        self._log.info("standby_ended", why=outcome.value)
        logs.close()
        return outcome

    # --- what it holds --------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Hold the port if that is possible: who comes is then told why."""
        endpoint = self._loaded.settings.endpoint
        if self._claims.listeners or not self._loaded.tells_place:
            return
        with contextlib.suppress(EmberdError, OSError):
            self._claims.listen(endpoint.host, endpoint.port, is_brief=True)

    async def _make_control(self) -> ControlServer | None:
        """Serve the control socket, if this process is the one emberd of a state directory that can be used."""
        from emberd.services.control import ControlServer  # noqa: PLC0415

        if not self._loaded.tells_place:
            return None
        paths = state_paths(self._loaded.settings)
        try:
            prepare(paths)
            self._claims.take_lock(paths.lock)
            control = ControlServer(paths.control, self._verbs(), self._log)
            await control.start()
        except (EmberdError, OSError):
            return None
        return control

    async def _serve(self) -> None:
        """Serve the sockets; a port that was taken is tried again, for its being free may be what is waited for."""
        while not self._claims.listeners:
            await asyncio.sleep(_TAKEN_S)
            self._listen()
            if self._claims.listeners and isinstance(self._why.error, PortTaken):
                self._end(Outcome.DUE)
                return
        from emberd.services.endpoint import Endpoint  # noqa: PLC0415
        from emberd.services.proxy import make_app  # noqa: PLC0415

        await Endpoint().serve(make_app(self._refuse, lambda: NAME, lambda: False), self._claims.listeners)

    # --- what ends it ---------------------------------------------------------------------------------------

    def _end(self, outcome: Outcome) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, Outcome.STOPPED)
        loop.add_signal_handler(signal.SIGHUP, self._end, Outcome.ASKED)

    async def _watch_time(self) -> None:
        await asyncio.sleep(self._why.wait_s)
        self._end(Outcome.DUE)

    async def _watch_lock(self) -> None:
        """See the other emberd of the state directory end, if that is what is waited for."""
        while isinstance(self._why.error, AlreadyRunning):
            await asyncio.sleep(_TAKEN_S)
            with contextlib.suppress(EmberdError):
                self._claims.take_lock(state_paths(self._loaded.settings).lock)
                self._end(Outcome.DUE)
                return

    async def _watch_files(self) -> None:
        """See the settings file change, or what it names: that is a person who mends something."""
        settings, path = self._loaded.settings, self._loaded.path
        named = (settings.model.path, settings.engine.path, settings.engine.kcpps, settings.endpoint.api_key_file)
        files = [str(path), *(os.path.expanduser(each) for each in named if each)]  # noqa: PTH111  # str
        before = last = [_mark(each) for each in files]
        still = 0
        while True:
            await asyncio.sleep(_LOOK_S)
            now = [_mark(each) for each in files]
            still = still + 1 if now == last else 0
            last = now
            if now != before and still >= _SETTLED_LOOKS:
                self._end(Outcome.ASKED)
                return

    async def _prove(self) -> None:
        """Return at once: the event loop runs, and there is nothing else here that could hang."""

    # --- what it says ---------------------------------------------------------------------------------------

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with 503 and the reason; other computers are not told what is wrong with this one."""
        from emberd.services.messages import Body, Client, ClientGone, ClientSilent  # noqa: PLC0415

        client = Client(send, scope["path"])
        endpoint = self._loaded.settings.endpoint
        rules = access.AccessRules(endpoint.names, endpoint.origins)
        refusal = access.judge(scope["method"], scope["path"], scope["headers"], rules)
        if refusal is not None:
            await client.answer(refusal.status, refusal.code, refusal.message, headers={"connection": "close"})
            return
        with contextlib.suppress(ClientGone, ClientSilent):
            await Body(receive, _BODY_BYTES).read_first_part()
            await client.refuse(NotReady(NAME, self._message(scope), self._retry_after_s()))

    def _message(self, scope: Scope) -> str:
        client = scope.get("client")
        if client is not None and not access.is_loopback(client[0]):
            return "emberd cannot start; `emberd status` on its computer tells why"
        error = self._why.error
        return f"emberd cannot start: {error.message}. {error.remedy}".rstrip()

    def _retry_after_s(self) -> int:
        return max(1, min(_RETRY_AFTER_S, round(self._left_s())))

    def _left_s(self) -> float:
        return max(0.0, self._why.wait_s - (time.monotonic() - self._began_s))

    def _url(self) -> str | None:
        if not self._claims.listeners:
            return None
        host, port = self._claims.listeners[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _verbs(self) -> dict[str, Any]:
        async def status() -> dict[str, Any]:
            return self._status()

        async def doctor() -> dict[str, Any]:
            return await self._examine(self._loaded.settings, self._why.error)

        async def stop() -> dict[str, Any]:
            self._end(Outcome.STOPPED)
            return {"ok": True, "pid": os.getpid()}

        async def restart() -> dict[str, Any]:
            self._end(Outcome.ASKED)
            return {"ok": True, "starts": -1, "standby": True}

        async def replace(command: list[str] | None = None) -> dict[str, Any]:
            self.successor = command or []
            self._end(Outcome.ASKED)
            return {"ok": True, "pid": os.getpid(), "uptime_s": self._status()["uptime_s"]}

        async def reload() -> dict[str, Any]:
            config_file.load(self._option)
            self._end(Outcome.ASKED)
            return {"ok": True, "engine_restarts": True, "needs_emberd_restart": []}

        async def refuse(**_: Any) -> dict[str, Any]:
            error = self._why.error
            refused = EmberdError(f"emberd waits, for it cannot start: {error.message}", error.remedy)
            refused.exit_code = error.exit_code  # type: ignore[misc]
            raise refused

        return collections.defaultdict(
            lambda: refuse,
            {
                "status": status,
                "doctor": doctor,
                "stop": stop,
                "restart": restart,
                "replace": replace,
                "reload": reload,
            },
        )

    def _status(self) -> dict[str, Any]:
        passed_s = round(time.monotonic() - self._began_s, 3)
        error = self._why.error
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": passed_s,
            "endpoint": self._url(),
            "model": self._loaded.settings.model.path,
            "settings_file": str(self._loaded.path),
            "state": NAME,
            "state_for_s": passed_s,
            "reason": error.message,
            "remedy": error.remedy,
            "exit_code": error.exit_code,
            "failures": list(self._why.failures),
            "next_start_in_s": round(self._left_s(), 3),
            "starts": -1,
            "engine": None,
        }


def _mark(path: str | Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written or replaced, None if it is not there."""
    try:
        found = os.stat(path)  # noqa: PTH116  # str
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
