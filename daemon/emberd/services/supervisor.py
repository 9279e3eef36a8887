"""The supervisor: a single task owns the engine's state and does what `lifecycle.step` decides."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emberd.core import lifecycle
from emberd.core.errors import EmberdError
from emberd.core.lifecycle import Effect, Event, Lifecycle, State
from emberd.core.status import Status
from emberd.services.engine_output import EngineOutput
from emberd.services.engine_run import EngineRun, plan_digest
from emberd.services.gate import SERVING, EngineNow, Gate
from emberd.services.lock_meter import LockMeter
from emberd.services.probing import Probing
from emberd.services.switching import Switching

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from structlog.typing import FilteringBoundLogger

    from emberd.core.engine_files import EngineFile
    from emberd.core.ports import Engine, Host
    from emberd.core.settings import Settings
    from emberd.engine.process import EngineProcess
    from emberd.engine.record import EngineRecord
    from emberd.services.engine_run import Paths

_PORTS = range(20000, 30000)
"""Below the ephemeral ranges of macOS (from 49152) and Linux (from 32768): no outgoing connection can take the
port while a large model loads."""
_REPORT_LIMIT_S = 1.0


def free_port() -> int:
    """Return a loopback TCP port that nothing listens on, outside the ephemeral ranges.

    Raises:
        OSError: none was found in 100 tries.
    """
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise OSError("no free port between 20000 and 30000")


class Supervisor:
    """Keeps one engine in the state that is wanted."""

    def __init__(
        self, settings: Settings, engine: Engine, host: Host, paths: Paths, log: FilteringBoundLogger
    ) -> None:
        self._settings = settings
        self._host = host
        self._paths = paths
        self._log = log
        self._inbox: asyncio.Queue[Event | asyncio.Future[None]] = asyncio.Queue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._meter = LockMeter(host)
        self._switching = Switching(lambda: self._settings, host, log, self._meter)
        self._output = EngineOutput(
            paths.output,
            settings.log,
            engine,
            host,
            log,
            self._switching.note,
            lambda reason: self.post(lifecycle.Stuck(reason)),
        )
        self.gate = Gate(
            engine, EngineNow(Lifecycle(since_s=time.monotonic())), self._meter, self._output, self.post
        )
        """Through it others ask the engine."""
        self._switching.gate, self._switching.post = self.gate, self.post
        self.gate.hear_switch = self._switching.asked
        self._run = EngineRun(lambda: self._settings, host, paths, log, self.gate, self._output, self._switching)
        self._probing = Probing(
            lambda: self._settings.lifecycle, log, self.gate, self._run, self._output, self.post
        )
        self.keep_record = self._run.keep_record
        self.launch_error: EmberdError | None = None
        """Why the engine cannot be started at all; None if it could, or was never tried."""

    # --- what others ask ------------------------------------------------------------------------------------

    def post(self, event: Event) -> None:
        """Hand an event to the owner task."""
        self._inbox.put_nowait(event)

    @property
    def state(self) -> State:
        """Where the engine is in its life."""
        return self.gate.state

    @property
    def _life(self) -> Lifecycle:
        return self.gate.now.life

    @property
    def _record(self) -> EngineRecord | None:
        return self.gate.now.record

    async def prove_alive(self) -> None:
        """Return when the owner task has taken this question out of its inbox, which proves that it works."""
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait(asked)
        await asked

    def status(self) -> Status:
        """Return the engine's part of the status; the daemon adds the rest."""
        now_s = time.monotonic()
        life, record = self._life, self._record
        deadline_s = life.deadline_s if life.state in {State.BACKOFF, State.FAILED} else None
        return Status(
            state=life.state.value,
            state_for_s=round(now_s - life.since_s, 3),
            reason=life.reason,
            remedy=life.cause.remedy if life.cause else None,
            crashes_in_a_row=life.crashes,
            next_start_in_s=None if deadline_s is None else round(deadline_s - now_s, 3),
            starts=self._run.starts,
            last_exit=self._run.last_exit or None,
            requests_in_flight=self.gate.in_flight,
            requests_held=self.gate.held,
            loading=self._output.progress if life.state is State.LOADING else None,
            engine=None if record is None else record.status(is_adopted=self.gate.is_adopted),
            serving=self._switching.status() if life.state in SERVING else None,
            lock=self._meter.verdict if life.state in SERVING and not self.gate.is_empty else None,
            context=self._meter.context(self.gate.room) if life.state in SERVING else None,
            metal_heartbeat=self._meter.heartbeat(self._settings.engine.metal_keep_alive_s),
            notices=self._run.notices,
            output_file=str(self._paths.output),
        )

    def files(self) -> tuple[EngineFile, ...]:
        """Return the ready engine's files, with its locks; takes tens of milliseconds."""
        return self._switching.with_locks() if self._life.state in SERVING else ()

    # --- the owner task -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Own the state until cancelled; a running engine is left running, for the next emberd to adopt."""
        try:
            while True:
                event = await self._next_event()
                if not isinstance(event, asyncio.Future):
                    self._apply(event)
                elif not event.done():  # the caller may have given up
                    event.set_result(None)
        finally:
            for name in list(self._tasks):
                self._cancel(name)
            await asyncio.gather(*self._ending, return_exceptions=True)

    async def shut_down(self) -> None:
        """Drain and stop the engine; return when it is gone. Waiting requests are refused."""
        self.gate.change(is_closing=True)
        self.gate.wake_waiters()
        self.post(lifecycle.Stop())
        await self.gate.wait_for(State.STOPPED)
        if "end" in self._tasks:  # a sweep of what the engine left
            await asyncio.wait({self._tasks["end"]})

    def hurry(self) -> None:
        """Cut a drain short; for a second Ctrl-C."""
        self.post(lifecycle.Drained())

    async def reload(self, settings: Settings, engine: Engine) -> bool:
        """Take over new settings; restart the engine only if its command line, environment or files change.

        Returns:
            True if the engine is being restarted.

        Raises:
            EmberdError: the engine cannot run with the new settings; the old ones stay in force.
        """
        will_lock = self._would_lock(settings)
        plan = await engine.plan(self._record.port if self._record else free_port(), will_lock=will_lock)
        is_starting = self._life.state is State.STARTING and not self._is_done("launch")
        must_restart = self._record is not None and self._record.plan_digest != plan_digest(plan)
        is_same = (settings.engine, settings.model) == (self._settings.engine, self._settings.model)
        is_kept = not must_restart if self._record else is_same and self._life.state is not State.FAILED
        if is_kept:
            engine.switch = self.gate.engine.switch
        self._settings, self.gate.engine = settings, engine
        self._output.use(engine, settings.log)
        if is_starting:
            self._spawn("launch", self._launch())  # the start under way uses the old settings
        elif must_restart:
            self.post(lifecycle.Restart("settings changed"))
        elif self._life.state is State.FAILED:
            self.post(lifecycle.Start())
        return must_restart

    async def _next_event(self) -> Event | asyncio.Future[None]:
        deadline_s = self._life.deadline_s
        if deadline_s is None:
            return await self._inbox.get()
        try:
            async with asyncio.timeout(max(deadline_s - time.monotonic(), 0)):
                return await self._inbox.get()
        except TimeoutError:
            return lifecycle.DeadlinePassed()

    def _apply(self, event: Event) -> None:
        if self.gate.now.is_closing and isinstance(event, lifecycle.Start | lifecycle.Restart | lifecycle.Wake):
            self.gate.wake_waiters()  # it would keep `shut_down` waiting for ever
            return
        if isinstance(event, lifecycle.Cool) and self.gate.in_flight:
            self.gate.wake_waiters()  # a request has come since
            return
        before = self._life
        life, effects = lifecycle.step(
            before,
            event,
            time.monotonic(),
            self._settings.lifecycle,
            random.random(),  # noqa: S311  # jitter
        )
        self._switching.judge(before, life, event)
        self.gate.change(life=life, has_begun=True)
        if life.state is not before.state:
            self._announce(before)
        for effect in effects:
            self._act(effect)
        if self._life.state in lifecycle.AT_REST and Effect.SWEEP not in effects:
            self._forget_process()
        if self._life.state is State.STARTING and not self._life.is_wanted and not self._is_done("launch"):
            self._cancel("launch")
            self.post(lifecycle.LaunchFailed("no longer wanted", is_permanent=True))
        self.gate.wake_waiters()

    def _announce(self, before: Lifecycle) -> None:
        after = self._life
        self.gate.tally.state_changes += 1
        fields: dict[str, Any] = {"state": after.state.value, "was": before.state.value}
        if after.reason:
            fields["reason"] = after.reason
        if after.cause is not None:
            fields["remedy"] = after.cause.remedy
            self._spawn("obstacle", self._run.obstacles.watch(after.cause, after.retries, self.post))
        else:
            self._cancel("obstacle")
        if self._record and after.state in lifecycle.HAS_PROCESS:
            fields["pid"] = self._record.pid
        if after.state is State.READY:
            self._output.progress = None
            self._run.note_ready()
            fields["seconds"] = round(after.since_s - before.since_s, 3)
        if after.state in {State.BACKOFF, State.FAILED} and after.deadline_s is not None:
            fields["next_start_in_s"] = round(after.deadline_s - after.since_s, 3)
        report = self._log.error if after.state is State.FAILED else self._log.info
        report("engine_state", **fields)
        if after.state not in {State.LOADING, State.READY}:
            self._cancel("probe")

    def _act(self, effect: Effect) -> None:
        match effect:
            case Effect.LAUNCH:
                self._spawn("launch", self._launch())
            case Effect.WATCH:
                self._spawn("probe", self._probe())
            case Effect.DRAIN:
                if not self.gate.in_flight:
                    self.post(lifecycle.Drained())
            case Effect.TERMINATE:
                self._spawn("end", self._terminate())
            case Effect.SWEEP:
                self._spawn("end", self._sweep())

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run work in a named task; a bug in it must not leave the state machine waiting for ever."""
        self._cancel(name)
        task = asyncio.get_running_loop().create_task(self._guard(name, work), name=f"supervisor-{name}")
        self._tasks[name] = task

    async def _guard(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, the state machine must hear of it
            self._log.exception("supervisor_bug", work=name)
            if name == "launch":
                self.post(lifecycle.LaunchFailed(f"internal error: {error!r}", is_permanent=False))
            elif name == "end":
                self.post(lifecycle.Gone())
            else:
                self.post(lifecycle.Stuck(f"internal error: {error!r}"))

    def _is_done(self, name: str) -> bool:
        return name not in self._tasks or self._tasks[name].done()

    def _cancel(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None and not task.done():
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    # --- start ----------------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        await self._sweep()
        try:
            await self._run.wait_for_release()
            self._switching.keep()
            will_lock, reasons = await self._run.decide_lock()
            of_settings = await self.gate.engine.plan(free_port(), will_lock=will_lock)
            plan = await self._switching.plan(of_settings, will_lock=will_lock)
            self._run.start(replace(plan, notices=(*plan.notices, *reasons)), of_settings, will_lock=will_lock)
            self._follow()
            self.post(lifecycle.Launched())
        except (EmberdError, OSError) as error:
            self.launch_error = error if isinstance(error, EmberdError) else None
            self.post(await asyncio.to_thread(self._run.obstacles.failed_launch, error))

    def _follow(self) -> None:
        process = self._run.process
        if process is not None:
            self._spawn("exit", self._watch_exit(process))
            self._spawn("output", self._output.follow())

    async def adopt(self) -> bool:
        """Take over the engine that an earlier emberd left running; return False if there is none."""
        if not await self._run.adopt():
            return False
        self._follow()
        self.post(lifecycle.Adopted())
        return True

    async def restart_if_changed(self) -> None:
        """Restart an adopted engine if it was started with other settings than today's."""
        if self._record is None:
            return
        plan = await self.gate.engine.plan(self._record.port, will_lock=self._would_lock(self._settings))
        self._run.notices = plan.notices
        if plan_digest(plan) != self._record.plan_digest:
            self.post(lifecycle.Restart("settings changed since this engine was started"))

    def _would_lock(self, settings: Settings) -> bool:
        """Return True if the engine would be asked to lock; under `auto` the answer of its start stands."""
        if settings.engine.lock == "auto" and self._record is not None:
            return self._record.will_lock
        return settings.engine.lock != "never" and not self.gate.must_not_lock

    # --- watch ----------------------------------------------------------------------------------------------

    async def _watch_exit(self, process: EngineProcess) -> None:
        ended = await self._run.wait_for_exit(process, lambda: self._life.state is State.STOPPING)
        self.post(lifecycle.Exited(*ended))

    async def _probe(self) -> None:
        record = self._record
        if record is not None and await self._probing.earn_ready(record):
            self.post(lifecycle.BecameReady())
            await self._probing.prove_alive(record)

    # --- stop -----------------------------------------------------------------------------------------------

    async def _terminate(self) -> None:
        await self._run.end_tree()
        if "exit" in self._tasks:  # its report comes first
            await asyncio.wait({self._tasks["exit"]}, timeout=_REPORT_LIMIT_S)
        self.post(lifecycle.Gone())

    async def _sweep(self) -> None:
        await self._run.sweep()
        if self._life.state in lifecycle.AT_REST:
            self._forget_process()

    def _forget_process(self) -> None:
        self._cancel("output")
        self._run.forget()
