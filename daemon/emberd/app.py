"""The composition root: builds the adapters, wires the services, owns the signals and the shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import time
from typing import TYPE_CHECKING, Any

from emberd import __version__
from emberd.core import lifecycle
from emberd.core.access import AccessRules
from emberd.core.errors import EmberdError, EngineFailed
from emberd.core.lifecycle import State
from emberd.host import ThisHost, config_file
from emberd.host.api_key import read_api_key
from emberd.host.notify_socket import NotifySocket
from emberd.host.paths import prepare, state_paths

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from emberd.core.settings import Settings
    from emberd.host.claims import Claims
    from emberd.host.paths import StatePaths
    from emberd.host.starts import Starts
    from emberd.services.accounts import Accounts
    from emberd.services.endpoint import Endpoint
    from emberd.services.keepwarm import KeepWarm
    from emberd.services.knocks import Knocks
    from emberd.services.memory_meter import MemoryMeter
    from emberd.services.notifier import Notifier
    from emberd.services.proxy import Proxy
    from emberd.services.residency_meter import ResidencyMeter
    from emberd.services.sleep_blocker import SleepBlocker
    from emberd.services.supervisor import Supervisor
    from emberd.services.swap_meter import SwapMeter
    from emberd.services.turns import Turns

_OWN_FILES = 64
"""Open files besides connections: about 20 when idle."""
_LAST_ANSWERS_S = 2.0
"""After the engine is gone, what is still open are refusals on their way out."""
_BESIDES_S = 15.0
"""What a stop takes besides its drain and the engine's end: a kill, the last answers, the accounts."""


def run(settings: Settings, config_path: Path, claims: Claims, starts: Starts) -> int:
    """Run the daemon in the foreground until it is told to stop; returns the exit code.

    Args:
        settings: the settings.
        config_path: where they come from.
        claims: takes the lock and the sockets; its maker lets go of them.
        starts: hears how this run goes.

    Raises:
        EmberdError: it cannot start; nothing but the claims was left behind.
    """
    key = read_api_key(settings, config_path)
    paths = state_paths(settings)
    prepare(paths)
    claims.take_lock(paths.lock)
    claims.listen(settings.endpoint.host, settings.endpoint.port)
    # From here on clients wait in the backlog; what is slow to import comes after.
    daemon = _Daemon(settings, config_path, paths, claims.listeners, key, ThisHost(), starts.ready)
    code = asyncio.run(daemon.run())
    if daemon.is_to_be_replaced:
        starts.ended()
        claims.replace_process(daemon.successor)
    return code


class _Daemon:
    """One run of the daemon."""

    def __init__(
        self,
        settings: Settings,
        config_path: Path,
        paths: StatePaths,
        listeners: Sequence[socket.socket],
        key: str,
        computer: ThisHost,
        tell_ready: Callable[[], None],
    ) -> None:
        self._rules = _rules(settings, key)
        self._first = self._settings = settings
        self._config_path = config_path
        self._had_config = config_path.exists()
        self._paths = paths
        self._listeners = listeners
        host, port = listeners[0].getsockname()[:2]
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._host = computer
        self._tell_ready = tell_ready
        computer.forbid_core_dumps()
        self.is_to_be_replaced = False
        """After its end this process is to become a new emberd on the same sockets."""
        self.successor: list[str] = []
        """Command line of that emberd; empty for this one's."""
        self._stop = asyncio.Event()
        self._started_s = time.monotonic()
        self._interrupts = 0
        self._has_terminal = sys.stderr.isatty()
        self._reloading: asyncio.Future[None] | None = None
        self._log: FilteringBoundLogger
        self._supervisor: Supervisor
        self._endpoint: Endpoint
        self._proxy: Proxy
        self._turns: Turns
        self._knocks: Knocks
        self._memory: MemoryMeter
        self._accounts: Accounts
        self._swap: SwapMeter
        self._residency: ResidencyMeter
        self._keepwarm: KeepWarm
        self._sleep: SleepBlocker
        self._notifier: Notifier

    def _build(self) -> None:
        """Make the services, and tell each of the others what it needs of them."""
        from emberd.engine.choose import choose_engine  # noqa: PLC0415
        from emberd.services import logs  # noqa: PLC0415
        from emberd.services.accounts import Accounts  # noqa: PLC0415
        from emberd.services.endpoint import MOST_CONNECTIONS, Endpoint  # noqa: PLC0415
        from emberd.services.engine_run import Paths  # noqa: PLC0415
        from emberd.services.forecaster import Forecaster  # noqa: PLC0415
        from emberd.services.keepwarm import KeepWarm  # noqa: PLC0415
        from emberd.services.knocks import Knocks  # noqa: PLC0415
        from emberd.services.memory_meter import MemoryMeter  # noqa: PLC0415
        from emberd.services.notifier import Notifier  # noqa: PLC0415
        from emberd.services.pressure_watch import PressureWatch  # noqa: PLC0415
        from emberd.services.proxy import Proxy  # noqa: PLC0415
        from emberd.services.residency_meter import ResidencyMeter  # noqa: PLC0415
        from emberd.services.sleep_blocker import SleepBlocker  # noqa: PLC0415
        from emberd.services.spending import Spending  # noqa: PLC0415
        from emberd.services.supervisor import Supervisor  # noqa: PLC0415
        from emberd.services.swap_meter import SwapMeter  # noqa: PLC0415
        from emberd.services.turns import Turns  # noqa: PLC0415
        from emberd.services.warming import Warming  # noqa: PLC0415

        logs.configure_for(self._settings, self._host)
        self._log = logs.logger("daemon")
        engine = choose_engine(self._settings, self._host, self._paths)
        paths = Paths(self._paths.record, self._paths.output, self._paths.scratch)
        supervisor = self._supervisor = Supervisor(
            self._settings, engine, self._host, paths, logs.logger("supervisor")
        )
        gate = supervisor.gate
        # A request takes two descriptors, the client's and the engine's.
        most_connections = (self._host.raise_open_files() - _OWN_FILES) // 2
        self._endpoint = Endpoint(most_connections=min(most_connections, MOST_CONNECTIONS))
        self._knocks = Knocks()
        self._turns = Turns(lambda: self._settings.endpoint.remember_kib * 1024, lambda: gate.room)
        self._proxy = Proxy(
            gate,
            lambda: self._settings.endpoint,
            lambda: self._rules,
            self._turns,
            self._knocks,
            logs.logger("endpoint"),
        )
        self._memory = MemoryMeter(self._host, logs.logger("memory"), gate.sample)
        self._accounts = Accounts(self._paths.history, logs.logger("history"))
        self._swap = SwapMeter(self._host, self._accounts, logs.logger("swap"), gate.sample)
        self._residency = ResidencyMeter(self._host, logs.logger("residency"), gate.sample)
        log = logs.logger("keepwarm")
        warming = Warming(
            self._host,
            log,
            gate,
            self._residency.toucher,
            self._turns,
            self._proxy.places,
            Forecaster(self._host, logs.logger("forecast"), gate.sample, self._turns, self._residency.status),
            Spending(self._accounts),
        )
        watch = PressureWatch(self._host, log, lambda: self._settings.warmth, gate, self._memory, warming)
        self._keepwarm = KeepWarm(log, lambda: self._settings.warmth, gate, warming, watch, self._knocks)
        self._sleep = SleepBlocker(self._host, logs.logger("power"), lambda: self._settings, gate)
        self._notifier = Notifier(NotifySocket(os.environ, os.getpid()), self._log)

    async def run(self) -> int:
        """Build, serve, wait for a reason to stop, shut down."""
        from emberd.services.lean import import_lean  # noqa: PLC0415  # before anything that imports structlog

        import_lean()
        from emberd.services import logs  # noqa: PLC0415
        from emberd.services.control import ControlServer  # noqa: PLC0415
        from emberd.services.proxy import make_app  # noqa: PLC0415

        self._build()
        app = make_app(self._proxy, lambda: self._supervisor.state.value, lambda: self._keepwarm.is_warm)
        control = ControlServer(self._paths.control, self._verbs(), logs.logger("control"))
        self._take_signals()
        await control.start()
        owner = asyncio.create_task(self._supervisor.run(), name="supervisor")
        serving = asyncio.create_task(self._endpoint.serve(app, self._listeners), name="endpoint")
        tasks = [owner, serving] + [
            asyncio.create_task(service.run(), name=name)
            for name, service in (
                ("swap", self._swap),
                ("keepwarm", self._keepwarm),
                ("sleep", self._sleep),
            )
        ]
        tasks += [asyncio.create_task(work) for work in self._reports()]
        self._log.info(
            "emberd_started",
            version=__version__,
            pid=os.getpid(),
            endpoint=self._url,
            settings=str(self._config_path),
            state_directory=str(self._paths.directory),
            log=logs.places(),
        )
        try:
            failed = await self._wait_for_end(owner, serving)
            if self.is_to_be_replaced:
                await self._make_room()
            elif not owner.done():  # else nobody is left to stop the engine; the next emberd adopts it
                await self._shut_down(is_failed=failed is not None)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._keepwarm.close()
            await self._accounts.close()
            await self._residency.close()
            await control.close()
        if failed is not None:
            if isinstance(failed, EmberdError):
                self._log.error("emberd_failed", error=failed.message, remedy=failed.remedy)
            logs.close()
            raise failed
        self._log.info("emberd_stopped")
        logs.close()
        return 0

    # --- start ----------------------------------------------------------------------------------------------

    async def _start_engine(self) -> EmberdError:
        """Adopt or start the engine; return only if it can never start, with the error that says why."""
        if await self._supervisor.adopt():
            try:
                await self._supervisor.restart_if_changed()
            except EmberdError as error:
                # The adopted engine serves; wrong settings must not take it away.
                self._log.error("settings_not_usable", error=error.message, remedy=error.remedy)
        else:
            self._supervisor.post(lifecycle.Start())
        await self._supervisor.gate.wait_for(State.LOADING, State.READY, State.FAILED)
        cause = self._supervisor.launch_error
        while cause is None or self._supervisor.state is not State.FAILED:
            await asyncio.Event().wait()  # it has started: from here on the supervisor's states tell all
        return cause

    async def _wait_for_end(self, *services: asyncio.Task[None]) -> Exception | None:
        """Start the engine, and return when it is time to stop, with the error if there is one."""
        asked = asyncio.create_task(self._stop.wait(), name="stop")
        starting = asyncio.create_task(self._start_engine(), name="start")
        tasks: set[asyncio.Task[Any]] = {asked, starting, *services}
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in (asked, starting):
            task.cancel()
        await asyncio.wait({asked, starting})
        for task in done - {asked}:
            error = task.exception() or task.result()
            return error if isinstance(error, Exception) else EngineFailed(f"{task.get_name()} ended by itself")
        return None

    def _reports(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield what tells others how this run goes."""

        async def tell_accepting() -> None:
            await self._endpoint.accepting.wait()
            self._notifier.ready()

        async def tell_of_use() -> None:
            await self._supervisor.gate.wait_for(State.READY)
            self._tell_ready()

        yield tell_accepting()
        yield tell_of_use()
        yield self._notifier.follow(self._line, self._supervisor.gate.wait_for_change)
        yield self._notifier.feed_watchdog(self._supervisor.prove_alive)

    def _line(self) -> str:
        """Say in one line how the engine is; of the reason the first line, without the engine's output."""
        status = self._supervisor.status()
        reason = str(status["reason"] or "").partition("\n")[0]
        return f"engine {status['state']}" + (f": {reason}" if reason else f", {self._url}")

    # --- while it runs --------------------------------------------------------------------------------------

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    def _hang_up(self) -> None:
        """Reload; or stop, if the signal says that the terminal emberd was started on has gone."""
        if self._has_terminal and not _terminal_answers():
            self._ask_to_stop()
        else:
            self._reloading = asyncio.ensure_future(self._reload_and_report())

    def _ask_to_stop(self) -> None:
        """First time: drain and stop. Again: do not wait for running requests any longer."""
        self._interrupts += 1
        if self._interrupts > 1:
            self._supervisor.hurry()
        self._stop.set()

    async def _reload_and_report(self) -> None:
        with contextlib.suppress(EmberdError):
            await self._reload()

    async def _reload(self) -> dict[str, Any]:
        """Read the settings again; what cannot change while running is named, wrong settings change nothing."""
        from emberd.engine.choose import choose_engine  # noqa: PLC0415
        from emberd.services import logs  # noqa: PLC0415

        try:
            settings, _ = config_file.load(str(self._config_path) if self._had_config else None)
            key = read_api_key(settings, self._config_path)
            fixed = [
                key
                for key, old, new in (
                    ("endpoint.host", self._first.endpoint.host, settings.endpoint.host),
                    ("endpoint.port", self._first.endpoint.port, settings.endpoint.port),
                    ("state.directory", self._first.state.directory, settings.state.directory),
                )
                if old != new
            ]
            engine = choose_engine(settings, self._host, self._paths)
            restarts = await self._supervisor.reload(settings, engine)
        except EmberdError as error:
            self._log.error("reload_refused", error=error.message, remedy=error.remedy)
            raise
        self._settings = settings
        self._rules = _rules(settings, key)
        logs.configure_for(settings, self._host)
        if fixed:
            self._log.warning("reload_incomplete", keys=fixed, remedy="restart emberd to change these")
        self._log.info("reloaded", engine_restarts=restarts)
        return {"ok": True, "engine_restarts": restarts, "needs_emberd_restart": fixed}

    def _verbs(self) -> dict[str, Any]:
        async def stop() -> dict[str, Any]:
            self._stop.set()
            return {"ok": True, "pid": os.getpid()}

        async def replace(command: list[str] | None = None) -> dict[str, Any]:
            if command and not os.access(command[0], os.X_OK):
                raise EmberdError(f"cannot execute {command[0]}", "Install emberd again, then: emberd upgrade.")
            self.is_to_be_replaced, self.successor = True, command or []
            self._stop.set()
            return {"ok": True, "pid": os.getpid(), "uptime_s": round(time.monotonic() - self._started_s, 3)}

        async def restart() -> dict[str, Any]:
            starts = self._supervisor.status()["starts"]
            self._supervisor.post(lifecycle.Restart("asked for by its owner"))
            return {"ok": True, "starts": starts}

        async def pause(seconds: float) -> dict[str, Any]:
            return self._keepwarm.pause(seconds)

        async def resume() -> dict[str, Any]:
            return self._keepwarm.resume()

        async def progress() -> dict[str, Any]:
            return {"ok": True, **self._keepwarm.progress}

        async def forget() -> dict[str, Any]:
            return {"ok": True, "had_turn": self._turns.forget()}

        verbs: dict[str, Awaitable[dict[str, Any]]] | dict[str, Any] = {
            "status": self._status,
            "doctor": self._doctor,
            "stop": stop,
            "restart": restart,
            "replace": replace,
            "forget": forget,
            "warm": self._keepwarm.warm,
            "progress": progress,
            "pause": pause,
            "resume": resume,
            "cool": self._keepwarm.cool,
            "reload": self._reload,
        }
        return verbs

    async def _status(self) -> dict[str, Any]:
        from emberd.services import logs  # noqa: PLC0415

        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "endpoint": self._url,
            "model": self._settings.model.path,
            "settings_file": str(self._config_path),
            **self._supervisor.status(),
            **self._proxy.status(),
            "seconds_since_knock": self._knocks.seconds_since,
            "remembers_turn": self._turns.last is not None,
            "memory": await self._memory.status(),
            "prevents_sleep": self._sleep.is_held,
            "residency": await self._residency.status(),
            "warmth": await self._keepwarm.status(),
            "swap": await self._swap.status(self._settings.machine.ssd_endurance_tb),
            "log": logs.places(),
        }

    async def _doctor(self) -> dict[str, Any]:
        from emberd.doctor.examine import examine  # noqa: PLC0415  # asked for once in a while

        return await examine(self._host, self._settings, await self._status())

    # --- stop -----------------------------------------------------------------------------------------------

    async def _make_room(self) -> None:
        """Let running requests end; the engine goes on, and new connections wait in the backlog."""
        in_flight = self._supervisor.status()["requests_in_flight"]
        self._log.info("emberd_replacing_itself", requests_in_flight=in_flight)
        self._notifier.replacing()
        await self._endpoint.stop(self._settings.lifecycle.drain_timeout_s)

    async def _shut_down(self, *, is_failed: bool) -> None:
        """Drain and stop the engine under its own bounds, then the endpoint.

        After a failure the sockets stay open: emberd may be about to say on them what is wrong.
        """
        timing = self._settings.lifecycle
        if not is_failed:
            self._notifier.stopping(timing.drain_timeout_s + timing.stop_timeout_s + _BESIDES_S)
        self._log.info("emberd_stopping", requests_in_flight=self._supervisor.status()["requests_in_flight"])
        await self._supervisor.shut_down()
        for listener in () if is_failed else self._listeners:
            listener.close()  # nobody will accept any more; a service manager has a descriptor of its own
        await self._endpoint.stop(_LAST_ANSWERS_S)


async def examine_waiting(settings: Settings, error: EmberdError) -> dict[str, Any]:
    """Return what `emberd doctor` sees while emberd cannot start for this error."""
    from emberd.doctor.examine import examine  # noqa: PLC0415  # asked for once in a while
    from emberd.doctor.facts import ServiceHealth  # noqa: PLC0415  # same

    return await examine(ThisHost(), settings, None, ServiceHealth(waits_because=error.message))


def _rules(settings: Settings, key: str) -> AccessRules:
    return AccessRules(settings.endpoint.names, settings.endpoint.origins, key)


def _terminal_answers() -> bool:
    """Tell whether the terminal on standard error still exists; tcgetattr fails with EIO after a hang-up."""
    try:
        termios.tcgetattr(sys.stderr.fileno())
    except (termios.error, OSError):
        return False
    return True
