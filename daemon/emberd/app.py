"""Composes an emberd: counts its start, and makes it serve an engine, or stand by until it can."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emberd import __version__
from emberd.core import lifecycle
from emberd.core.access import ONE_FAMILY_REMEDY
from emberd.core.errors import EmberdError, EngineFailed, StateUnusable
from emberd.core.lifecycle import State
from emberd.core.managed import find_manager
from emberd.core.start_limit import LIMIT, WINDOW_S, Why
from emberd.host import ThisHost, config_file
from emberd.host.api_key import read_api_key
from emberd.host.instance import Instance
from emberd.host.paths import prepare, state_paths
from emberd.host.start_history import StartHistory

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from emberd.core.engine_files import EngineFile
    from emberd.core.settings import Settings
    from emberd.core.status import Status
    from emberd.host.config_file import Loaded
    from emberd.host.paths import StatePaths
    from emberd.services.build import Services, SettingsInForce
    from emberd.services.control import Verb
    from emberd.services.daemon import Daemon
    from emberd.services.residency_map import ResidencyMap
    from emberd.services.upkeep import Duty, Upkeep

_FILES_S = 30.0
_LAST_ANSWERS_S = 2.0
"""After the engine is gone, only refusals are still on their way out."""
_BESIDES_S = 15.0
"""Time that a stop takes besides its drain and the engine's end: for a kill, the last replies, the accounts."""


def run(option: str | None) -> int:
    """Run emberd in the foreground until it is told to stop; return the exit code.

    Raises:
        EmberdError: it cannot start, and is not to stand by. Nothing was left behind.
        OSError: another emberd was to follow, and its program is gone.
    """
    instance = Instance()
    if _start(option, instance) is not Why.STOPPED:
        instance.replace_process()
    return 0


def _start(option: str | None, instance: Instance) -> Why:
    """Serve; under a service manager starts are counted, and a burst of failures ends in standing by."""
    is_managed = find_manager(os.environ, os.getpid(), has_terminal=sys.stderr.isatty()) is not None
    loaded = config_file.load_what_is_right(option)
    history = _history(loaded) if is_managed else StartHistory()
    wait_s = history.wait_s() if history.runs else None
    error = EmberdError(
        f"emberd ended {LIMIT} times within {WINDOW_S / 60:.0f} minutes of its start, without saying why",
        "Look at its log and for crash reports; `emberd restart` tries at once.",
    )
    if wait_s is None:
        history.begin()
        try:
            why = _serve(loaded, instance, history.ready)
        except Exception as caught:
            if not is_managed or history.was_ready:
                raise
            error = caught if isinstance(caught, EmberdError) else _bug(caught)
            history.failed(error.message)
            wait_s = history.wait_s()
            if wait_s is None:
                raise
        else:
            history.ended()
            return why
    return _stand_by(error, wait_s, loaded, option, instance, history)


def _history(loaded: Loaded) -> StartHistory:
    """Return the start history, an empty one if the state directory is unknown, or is the problem."""
    paths = state_paths(loaded.settings)
    try:
        prepare(paths)
    except EmberdError:
        return StartHistory()
    return StartHistory(paths.starts if loaded.tells_place else None, ThisHost().start_token(1))


def _bug(caught: Exception) -> EmberdError:
    # The type alone: a message may hold anything.
    return EmberdError(f"emberd failed by a bug of its own ({type(caught).__name__})", "Its log has the traceback.")


def _stand_by(
    error: EmberdError, wait_s: float, loaded: Loaded, option: str | None, instance: Instance, history: StartHistory
) -> Why:
    """Stand by until stopped, or until it is time to try again."""
    from emberd.services.daemon import Daemon, run_to_end  # noqa: PLC0415  # imports structlog
    from emberd.services.standby import Standby  # noqa: PLC0415  # rarely needed

    async def stand_by() -> Why:
        async with Daemon(loaded.settings, loaded.path, instance, ThisHost()) as daemon:
            return await Standby(daemon, error, wait_s, history.failures, loaded, option, _examine_waiting).run()

    history.waits()
    why = run_to_end(stand_by())
    if why is Why.STOPPED:
        history.ended()
    elif why is Why.ASKED:
        history.asked()
    return why


async def _examine_waiting(settings: Settings, error: EmberdError) -> dict[str, Any]:
    """Return what `emberd doctor` sees while this error keeps emberd from starting."""
    from emberd.doctor.examine import examine  # noqa: PLC0415  # asked for once in a while
    from emberd.doctor.facts import ServiceHealth  # noqa: PLC0415  # same

    return await examine(ThisHost(), settings, None, ServiceHealth(waits_because=error.message))


def _serve(loaded: Loaded, instance: Instance, tell_ready: Callable[[], None]) -> Why:
    """Take the lock and the sockets of the instance, and serve.

    Raises:
        EmberdError: it cannot start; `instance` holds what it could take.
    """
    host, settings, path = ThisHost(), loaded.settings, loaded.path
    instance.take_given(host)
    if loaded.error is not None:
        raise loaded.error
    key = read_api_key(settings, path)
    paths = state_paths(settings)
    prepare(paths)
    instance.take_lock(paths.lock)
    instance.listen(settings.endpoint.host, settings.endpoint.port)
    # From here on clients wait in the backlog; slow imports come later.
    from emberd.services.build import SettingsInForce, build  # noqa: PLC0415
    from emberd.services.daemon import Daemon, run_to_end  # noqa: PLC0415

    async def serve() -> Why:
        in_force = SettingsInForce(settings, path, key)
        async with Daemon(settings, path, instance, host) as daemon:
            return await _Serving(daemon, build(in_force, host, paths), in_force, paths, tell_ready).run()

    host.forbid_core_dumps()
    host.share_heap()
    return run_to_end(serve())


class _Serving:
    """An emberd with an engine; `tell_ready` is called when the engine is ready for the first time."""

    def __init__(
        self,
        daemon: Daemon,
        services: Services,
        settings: SettingsInForce,
        paths: StatePaths,
        tell_ready: Callable[[], None],
    ) -> None:
        self._daemon = daemon
        self._services = services
        self._settings = settings
        self._paths = paths
        self._tell_ready = tell_ready
        self._supervisor = services.supervisor
        self._log = daemon.log
        self._map: ResidencyMap | None = None
        self._files: tuple[str | None, float, tuple[EngineFile, ...]] | None = None

    async def run(self) -> Why:
        """Serve until there is a reason to end, and shut down.

        Raises:
            EmberdError: the engine can never start, or something ended by itself.
        """
        from emberd.services import logs  # noqa: PLC0415

        daemon, services = self._daemon, self._services
        daemon.take_signals(lambda: daemon.spawn(self._reload_and_report()), self._supervisor.hurry)
        verbs = self._verbs()
        await daemon.open_control(self._paths.control, verbs)
        serve = daemon.serve(
            services.proxy,
            lambda: self._supervisor.state.value,
            lambda: services.keepwarm.is_warm,
            services.proxy.login,
            services.proxy.door,
            verbs,
        )
        owner = daemon.spawn(self._supervisor.run(), "supervisor")
        serving = daemon.spawn(serve, "endpoint")
        for work in self._work():
            daemon.spawn(work)
        self._log.info(
            "emberd_started",
            version=__version__,
            pid=os.getpid(),
            endpoint=daemon.instance.url,
            settings=str(self._settings.path),
            state_directory=str(self._paths.directory),
            log=logs.places(),
        )
        if daemon.instance.lacks:
            self._log.warning("endpoint_incomplete", reason=daemon.instance.lacks, remedy=ONE_FAMILY_REMEDY)
        try:
            failed = await self._wait_for_end(owner, serving)
            if failed is None and daemon.ending.result() is Why.ASKED:
                await self._make_room()
            elif not owner.done():  # else nobody is left to stop the engine; the next emberd adopts it
                await self._shut_down(is_failed=failed is not None)
        finally:
            await daemon.end_tasks()
            await services.close()
            if self._map is not None:
                await self._map.close()
        if failed is not None:
            if isinstance(failed, EmberdError):
                self._log.error("emberd_failed", error=failed.message, remedy=failed.remedy)
            raise failed
        self._log.info("emberd_stopped")
        return daemon.ending.result()

    # --- start ----------------------------------------------------------------------------------------------

    async def _start_engine(self) -> None:
        """Adopt or start the engine; does not return.

        Raises:
            EmberdError: it can never start.
        """
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
        # A full disk has room again some time; what is left is for a person, whom the exit code tells.
        if cause is not None and self._supervisor.state is State.FAILED and not isinstance(cause, StateUnusable):
            raise cause
        await asyncio.Event().wait()  # it has started: from here on the supervisor's states tell all

    async def _wait_for_end(self, *services: asyncio.Task[None]) -> Exception | None:
        """Start the engine, and return when it is time to end, with the error if there is one."""
        starting = asyncio.create_task(self._start_engine(), name="start")
        tasks = (starting, *services)
        awaited: set[asyncio.Future[Any]] = {self._daemon.ending, *tasks}
        done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        from emberd.services.daemon import end_all  # noqa: PLC0415  # imports structlog

        await end_all([starting])
        for task in tasks:
            if task in done:
                error = task.exception()
                return error if isinstance(error, Exception) else EngineFailed(f"{task.get_name()} ended by itself")
        return None

    def _work(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield the work that goes on until the end, beside the supervisor and the endpoint."""
        notifier, gate = self._daemon.notifier, self._supervisor.gate

        async def tell_accepting() -> None:
            await self._daemon.endpoint.accepting.wait()
            notifier.ready()

        async def tell_of_use() -> None:
            await gate.wait_for(State.READY)
            self._tell_ready()

        yield self._upkeep().run()
        yield self._services.recorder.run()
        yield self._services.keepwarm.run()
        yield self._services.sleep.run()
        yield self._services.recall.run()
        yield tell_accepting()
        yield tell_of_use()
        yield notifier.follow(self._line, gate.wait_for_change)
        yield notifier.feed_watchdog(self._supervisor.prove_alive)

    def _upkeep(self) -> Upkeep:
        from emberd.services.upkeep import Upkeep  # noqa: PLC0415

        duties: dict[str, Duty] = {
            "the state directory": lambda: prepare(self._paths),
            "the lock": lambda: self._daemon.instance.keep_lock(self._paths.lock),
            "the control socket": self._daemon.keep_control,
            "the state file": self._supervisor.keep_record,
        }
        return Upkeep(duties, self._log)

    def _line(self) -> str:
        """Return the engine's state and the first line of the reason, without the engine's output."""
        status = self._supervisor.status()
        reason = status.reason.partition("\n")[0]
        return f"engine {status.state}" + (f": {reason}" if reason else f", {self._daemon.instance.url}")

    # --- while it runs --------------------------------------------------------------------------------------

    async def _reload_and_report(self) -> None:
        with contextlib.suppress(EmberdError):
            await self._reload()

    async def _reload(self) -> dict[str, Any]:
        return await self._settings.reload(self._supervisor, self._daemon.host, self._paths)

    def _verbs(self) -> dict[str, Verb]:
        keepwarm, turns = self._services.keepwarm, self._services.turns

        def restart() -> dict[str, Any]:
            starts = self._supervisor.status().starts
            self._supervisor.post(lifecycle.Restart("asked for by its owner"))
            return {"ok": True, "starts": starts}

        return {
            "status": self._status,
            "doctor": self._doctor,
            "restart": restart,
            "reload": self._reload,
            "forget": lambda: {"ok": True, "had_turn": turns.forget()},
            "warm": keepwarm.warm,
            "progress": lambda: {"ok": True, **keepwarm.progress},
            "pause": keepwarm.pause,
            "resume": keepwarm.resume,
            "cool": keepwarm.cool,
            "live": self._live,
            "history": self._services.recorder.past,
            "metrics": self._metrics,
            "layers": self._layers,
        }

    async def _status(self) -> dict[str, Any]:
        from emberd.core.status import to_plain  # noqa: PLC0415

        return to_plain(await self.status())

    async def _live(self) -> dict[str, Any]:
        from emberd.core.status import to_plain  # noqa: PLC0415

        return to_plain(await self.status(is_live=True))

    async def _engine_files(self, *, is_live: bool) -> tuple[EngineFile, ...]:
        """Return the engine's files; for a live view those of the last look, for this one takes tens of ms."""
        key, now_s = self._supervisor.gate.engine_key, time.monotonic()
        last = self._files
        if not is_live or last is None or last[0] != key or now_s - last[1] > _FILES_S:
            last = self._files = (key, now_s, await asyncio.to_thread(self._supervisor.files))
        return last[2]

    async def status(self, *, is_live: bool = False) -> Status:
        """Return what the daemon knows now of itself, its engine and this computer.

        If `is_live`, it is asked for every two seconds, and which files the engine has may be _FILES_S old.
        """
        from emberd.services import logs  # noqa: PLC0415

        services, settings = self._services, self._settings.now
        places = services.proxy.places
        return replace(
            self._supervisor.status(),
            **self._daemon.status(settings.model.path),
            requests_waiting=places.waiting,
            longest_wait_s=round(places.longest_wait_s, 3),
            requests=services.proxy.requests(),
            seconds_since_knock=services.knocks.seconds_since,
            remembers_turn=services.turns.last is not None,
            memory=await services.observer.status(),
            prevents_sleep=services.sleep.is_held,
            residency=await services.residency.status(),
            files=await services.residency.files(
                await self._engine_files(is_live=is_live),
                is_locked_outside=services.keepwarm.is_locked_outside,
            ),
            warmth=await services.keepwarm.status(),
            swap=await services.swap.status(settings.machine.ssd_endurance_tb),
            log=tuple(logs.places()),
        )

    async def _layers(self) -> dict[str, Any]:
        if self._map is None:
            from emberd.services.residency_map import ResidencyMap  # noqa: PLC0415  # for who looks at the page

            self._map = ResidencyMap(self._daemon.host.paging, self._supervisor.gate.sample)
        return await self._map.look()

    async def _metrics(self, accept: str = "") -> dict[str, Any]:
        from emberd.services.metrics import render  # noqa: PLC0415  # prometheus-client, only for who scrapes

        recorder = self._services.recorder
        text, kind = render(await self.status(), recorder.counts(), recorder.tally, recorder.swapped, accept)
        return {"content_type": kind, "text": text}

    async def _doctor(self) -> dict[str, Any]:
        from emberd.doctor.examine import examine  # noqa: PLC0415  # asked for once in a while

        return await examine(self._daemon.host, self._settings.now, await self._status())

    # --- stop -----------------------------------------------------------------------------------------------

    async def _make_room(self) -> None:
        """Let running requests end; the engine goes on, and new connections wait in the backlog."""
        in_flight = self._supervisor.status().requests_in_flight
        self._log.info("emberd_replacing_itself", requests_in_flight=in_flight)
        self._daemon.notifier.replacing()
        self._daemon.close_views()
        await self._daemon.endpoint.stop(self._settings.now.lifecycle.drain_timeout_s)

    async def _shut_down(self, *, is_failed: bool) -> None:
        """Drain and stop the engine under its own bounds, then the endpoint.

        After a failure the sockets stay open: emberd may stand by on them.
        """
        timing = self._settings.now.lifecycle
        if not is_failed:
            self._daemon.notifier.stopping(timing.drain_timeout_s + timing.stop_timeout_s + _BESIDES_S)
        self._log.info("emberd_stopping", requests_in_flight=self._supervisor.status().requests_in_flight)
        await self._supervisor.shut_down()
        if not is_failed:
            self._daemon.instance.stop_listening()  # nobody will accept any more
        self._daemon.close_views()
        await self._daemon.endpoint.stop(_LAST_ANSWERS_S)
