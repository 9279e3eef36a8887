"""One engine's supervisor: a single task owns the state and acts on what `lifecycle.step` decides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.core import exit_status, lifecycle, liveness
from emberd.core.errors import EmberdError, StateUnusable
from emberd.core.lifecycle import Effect, Event, Lifecycle, State
from emberd.core.types import Readiness
from emberd.core.wired import is_released
from emberd.engine import record as records
from emberd.engine.output import open_for_engine
from emberd.engine.process import EngineProcess, ProcessTree, launch
from emberd.host.files import make_private_folder, write_atomically
from emberd.services.engine_output import EngineOutput
from emberd.services.gate import PROBE_TIMEOUT_S, SERVING, EngineNow, Gate
from emberd.services.lock_meter import LockMeter

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from structlog.typing import FilteringBoundLogger

    from emberd.core.ports import Engine, Host
    from emberd.core.settings import Settings
    from emberd.core.types import LaunchPlan, Notice

_PORTS = range(20000, 30000)
"""Below the ephemeral ranges of macOS (49152 up) and Linux (32768 up): no outgoing connection can take the port
while a large model loads."""
_FIRST_PROBE_S = 0.05
_SLOWEST_PROBE_S = 0.5
_JUDGE_LOCK_S = 60.0
_RELEASE_LIMIT_S = 10.0
_RELEASE_POLL_S = 0.05
_REPORT_LIMIT_S = 1.0
_HAS_ENDED = "it has ended"
_IS_A_STRANGER = "its pid belongs to another process now"


@dataclass(frozen=True, slots=True)
class Paths:
    """Files that the supervisor keeps in the state directory."""

    record: Path
    output: Path
    scratch: Path


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
    """Keeps one engine in the state that is wanted.

    Args:
        settings: emberd's settings.
        engine: the adapter.
        host: this computer.
        paths: where state is kept.
        log: events go here.
    """

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
        self._process: EngineProcess | None = None
        self._plan: LaunchPlan | None = None
        self._meter = LockMeter(host)
        self._output = EngineOutput(
            paths.output,
            settings.log,
            engine,
            host,
            log,
            self._meter,
            lambda reason: self.post(lifecycle.Stuck(reason)),
        )
        self._wired_before: int | None = None
        self._wired_loaded: int | None = None
        self._generated_units = 0
        self._starts = 0
        self._died_s: float | None = None
        self._last_exit = ""
        self.gate = Gate(
            engine, EngineNow(Lifecycle(since_s=time.monotonic())), self._meter, self._output, self.post
        )
        """What others may ask of the engine."""
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
    def _record(self) -> records.EngineRecord | None:
        return self.gate.now.record

    async def prove_alive(self) -> None:
        """Return when the owner task has taken this question out of its inbox: behind all events, as it works."""
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait(asked)
        await asked

    def status(self) -> dict[str, Any]:
        """Return the present as plain values, for people and for JSON."""
        now_s = time.monotonic()
        life, record, progress = self._life, self._record, self._output.progress
        return {
            "state": life.state.value,
            "state_for_s": round(now_s - life.since_s, 3),
            "reason": life.reason,
            "crashes_in_a_row": life.crashes,
            "next_start_in_s": round(life.deadline_s - now_s, 3)
            if life.state is State.BACKOFF and life.deadline_s
            else None,
            "starts": self._starts,
            "last_exit": self._last_exit or None,
            "requests_in_flight": self.gate.in_flight,
            "requests_held": self.gate.held,
            "loading": {"phase": progress.phase, "detail": progress.detail}
            if progress and life.state is State.LOADING
            else None,
            "engine": None
            if record is None
            else {
                "kind": record.engine,
                "pid": record.pid,
                "port": record.port,
                "adopted": self.gate.is_adopted,
                "started_at": record.started_at,
                "command": list(record.command),
            },
            "lock": self._meter.status() if life.state in SERVING else None,
            "metal_heartbeat": self._meter.heartbeat(self._settings.engine.metal_keep_alive_s),
            "notices": [
                {"code": notice.code, "message": notice.message}
                for notice in (self._plan.notices if self._plan else ())
            ],
            "output_file": str(self._paths.output),
        }

    # --- the owner task -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Own the state until cancelled; a running engine is left running, for the next emberd to adopt."""
        try:
            while True:
                event = await self._next_event()
                if not isinstance(event, asyncio.Future):
                    self._apply(event)
                elif not event.done():  # who asked may have given up
                    event.set_result(None)
        finally:
            for name in list(self._tasks):
                self._cancel(name)
            await asyncio.gather(*self._ending, return_exceptions=True)

    async def shut_down(self) -> None:
        """Drain and stop the engine; returns when it is gone. Held requests are refused."""
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
        must_restart = self._record is not None and self._record.plan_digest != _plan_digest(plan)
        self._settings, self.gate.engine = settings, engine
        self._output.use(engine, settings.log)
        if is_starting:
            self._spawn("launch", self._launch())  # the start under way is composed from the old settings
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
        before = self._life
        life, effects = lifecycle.step(
            before,
            event,
            time.monotonic(),
            self._settings.lifecycle,
            random.random(),  # noqa: S311  # jitter
        )
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
        fields: dict[str, Any] = {"state": after.state.value, "was": before.state.value}
        if after.reason:
            fields["reason"] = after.reason
        if self._record and after.state in lifecycle.HAS_PROCESS:
            fields["pid"] = self._record.pid
        if after.state is State.READY:
            self._output.progress = None
            self._wired_loaded = self._wired_bytes()
            self._write_record()
            fields["seconds"] = round(after.since_s - before.since_s, 3)
        if after.state is State.BACKOFF and after.deadline_s is not None:
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
        """Run one named piece of work; a bug in it must not leave the state machine waiting for ever."""
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
            await self._await_memory_release()
            self._wired_before = self._wired_bytes()
            self._wired_loaded = None
            will_lock, reasons = await self._decide_lock()
            plan = await self.gate.engine.plan(free_port(), will_lock=will_lock)
            self._start_process(replace(plan, notices=(*plan.notices, *reasons)), will_lock=will_lock)
        except EmberdError as error:
            self.launch_error = error
            permanent = not isinstance(error, StateUnusable)
            self.post(lifecycle.LaunchFailed(str(error), is_permanent=permanent))
        except OSError as error:
            self.post(lifecycle.LaunchFailed(f"cannot start the engine: {error}", is_permanent=False))

    async def _decide_lock(self) -> tuple[bool, tuple[Notice, ...]]:
        """Return whether to ask for the lock, and what the owner should know about it."""
        try:
            decision = await self._meter.decide(
                self._settings, self.gate.engine.wishes(), self.gate.engine.model_path()
            )
        except Exception:  # noqa: BLE001  # a reading that fails must not keep the engine from starting
            self._log.exception("lock_meter_bug")
            return self._settings.engine.lock != "never", ()
        return decision.will_lock and not self.gate.must_not_lock, decision.reasons

    def _start_process(self, plan: LaunchPlan, *, will_lock: bool) -> None:
        """Start the process and write down what is needed to adopt it, in this order and without a pause."""
        shutil.rmtree(self._paths.scratch, ignore_errors=True)  # no engine lives: what a killed one left is garbage
        make_private_folder(self._paths.scratch)
        for name, text in plan.files.items():
            write_atomically(Path(name), text)
        self._output.skip_to_end()
        output = open_for_engine(self._paths.output)
        try:
            process = launch(plan, output, self._host)
        finally:
            os.close(output)
        if self._died_s is not None:
            gap_ms = round((process.started_s - self._died_s) * 1000, 1)
            self._log.info("engine_restarted", pid=process.pid, milliseconds_since_death=gap_ms)
            self._died_s = None
        self._plan = plan
        record = records.EngineRecord(
            pid=process.pid,
            start_token=self._host.start_token(process.pid) or "",
            command_digest=None,
            command=plan.shown_arguments(),
            plan_digest=_plan_digest(plan),
            port=plan.port,
            engine=self.gate.engine.name,
            started_at=time.time(),
            will_lock=will_lock,
        )
        self._take(process, record, is_adopted=False)
        self._starts += 1
        self._save_record()
        for notice in plan.notices:
            self._log.warning("engine_settings_notice", code=notice.code, message=notice.message)
        self._log.info("engine_started", pid=process.pid, port=plan.port, command=" ".join(plan.shown_arguments()))
        self.post(lifecycle.Launched())

    def _write_record(self) -> None:
        """Write down what only a loaded engine shows: a wrapper script has become the engine by now."""
        if self._record is None:
            return
        command = records.observed_command(self._record.pid)
        found = replace(
            self._record,
            command_digest=self._record.command_digest if command is None else records.digest(command),
            is_mapped=self._meter.is_mapped,
        )
        if found != self._record:
            self.gate.change(record=found)
            self._save_record()

    def _save_record(self) -> None:
        if self._record is None:
            return
        try:
            records.save(self._paths.record, self._record)
        except StateUnusable as error:
            # The engine serves all the same; only a crash of emberd would now cost a reload.
            self._log.error("state_not_saved", error=error.message, remedy=error.remedy)

    def _take(self, process: EngineProcess, record: records.EngineRecord, *, is_adopted: bool) -> None:
        self._process = process
        self.gate.change(record=record, pids=(process.pid,), is_adopted=is_adopted)
        self._spawn("exit", self._watch_exit(process))
        self._spawn("output", self._output.follow())

    async def adopt(self) -> bool:
        """Take over the engine that an earlier emberd left running.

        Returns:
            False if there is none, or what is there is not it; a stranger is left alone.
        """
        record = records.load(self._paths.record)
        if record is None:
            return False
        tree = ProcessTree(record.pid, self._host)
        refusal = self._why_not_adopt(record, tree)
        process: EngineProcess | None = None
        if refusal is None:
            try:
                process = EngineProcess(record.pid, self._host)
            except ProcessLookupError:
                refusal = _HAS_ENDED
        if process is None:
            self._log.info("engine_not_adopted", pid=record.pid, reason=refusal)
            if refusal != _IS_A_STRANGER and tree.members():
                # Ours, but of no use: a model loaded beside it would choke the machine.
                self._log.warning("engine_left_processes", pid=record.pid)
                await tree.terminate(self.gate.engine.stop_signals, self._settings.lifecycle.stop_timeout_s)
            self._paths.record.unlink(missing_ok=True)
            return False
        await self._meter.adopt(self.gate.engine.model_path(), is_mapped=record.is_mapped)
        self._output.skip_to_end()
        self._take(process, record, is_adopted=True)
        self._log.info("engine_adopted", pid=record.pid, port=record.port)
        self.post(lifecycle.Adopted())
        return True

    def _why_not_adopt(self, record: records.EngineRecord, tree: ProcessTree) -> str | None:
        """Return why the process of the state file is not adopted, None if it is."""
        match records.claim(record, self._host):
            case records.Claim.STRANGER:
                return _IS_A_STRANGER
            case records.Claim.ENDED:
                return _HAS_ENDED
            case records.Claim.CHANGED:
                return "it runs another command line than it was started with"
            case records.Claim.OURS:
                if record.engine != self.gate.engine.name:
                    return f"it is {record.engine}, and the settings ask for {self.gate.engine.name}"
                listening = self._host.listeners(tree.members())
                if listening and record.port not in listening:
                    return "it listens on another port"
                return None

    async def restart_if_changed(self) -> None:
        """After an adoption: restart the engine if it was started with other settings than today's."""
        if self._record is None:
            return
        plan = await self.gate.engine.plan(self._record.port, will_lock=self._would_lock(self._settings))
        self._plan = plan
        if _plan_digest(plan) != self._record.plan_digest:
            self.post(lifecycle.Restart("settings changed since this engine was started"))

    def _would_lock(self, settings: Settings) -> bool:
        """Tell whether the engine would be asked to lock; under `auto` the answer of its start stands."""
        if settings.engine.lock == "auto" and self._record is not None:
            return self._record.will_lock
        return settings.engine.lock != "never"

    # --- watch ----------------------------------------------------------------------------------------------

    async def _watch_exit(self, process: EngineProcess) -> None:
        await process.wait()
        self._died_s = time.monotonic()
        self._output.read()
        is_asked = self._life.state is State.STOPPING
        ended = exit_status.EngineExit(
            status=process.status,
            lived_s=time.monotonic() - process.started_s,
            asked_to_stop=is_asked,
            said_anything=self._output.has_said_anything,
            is_macos=self._host.name == "darwin",
        )
        cause = None if is_asked else self._output.cause
        self._last_exit = exit_status.explain(ended) + (f" (the engine says: {cause})" if cause else "")
        report = self._log.info if is_asked else self._log.warning
        report("engine_exited", pid=process.pid, status=process.status, meaning=self._last_exit)
        self.post(lifecycle.Exited(self._output.with_last_words(self._last_exit)))

    async def _probe(self) -> None:
        """Earn READY, then ask again and again whether it lives."""
        record = self._record
        if record is None:
            return
        pause_s = _FIRST_PROBE_S
        while True:
            seen = await self.gate.engine.probe_readiness(record.port, PROBE_TIMEOUT_S)
            if seen is Readiness.READY and not self._is_ours(record.port):
                seen = Readiness.STRANGER
            if seen is Readiness.READY:
                break
            if seen is Readiness.STRANGER:
                self.post(lifecycle.Stuck(f"another program answers on port {record.port}"))
                return
            self._output.has_progressed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._output.has_progressed.wait()
            pause_s = min(pause_s * 1.5, _SLOWEST_PROBE_S)
        self._output.read()  # what it said of its memory while it loaded: the verdict and the record rest on it
        self._judge_lock(is_asked=record.will_lock)
        self.gate.change(room=self.gate.engine.room)
        self.post(lifecycle.BecameReady())
        await self._probe_liveness(record)

    def _is_ours(self, port: int) -> bool:
        """Tell whether the listener belongs to our process tree; True where that cannot be told."""
        listening = self._host.listeners(self._process.members()) if self._process else None
        return listening is None or port in listening

    def _judge_lock(self, *, is_asked: bool) -> None:
        """Weigh whether the lock holds, and say it when that has changed: a lock can be lost."""
        try:
            pids = tuple(self._process.members()) if self._process else ()
            self.gate.change(pids=pids)
            has_changed = self._meter.judge(pids, is_asked=is_asked)
        except Exception:  # noqa: BLE001  # a reading that fails must not cost the engine
            self._log.exception("lock_meter_bug")
            return
        if has_changed:
            lock = self._meter.status() or {}
            is_wanting = is_asked and lock["state"] in {"PARTIAL", "ABSENT"}
            report = self._log.warning if is_wanting else self._log.info
            report("engine_lock", **{name: value for name, value in lock.items() if value})

    async def _probe_liveness(self, record: records.EngineRecord) -> None:
        port = record.port
        watch = liveness.begin(time.monotonic())
        judged_s = time.monotonic()
        verdict = liveness.Verdict.ALIVE
        while True:
            is_idle = not self.gate.in_flight
            await asyncio.sleep(liveness.pause_s(verdict, self._settings.lifecycle, is_idle=is_idle))
            if time.monotonic() - judged_s >= _JUDGE_LOCK_S:
                judged_s = time.monotonic()
                self._judge_lock(is_asked=record.will_lock)
            seen = await self.gate.engine.probe_activity(port, PROBE_TIMEOUT_S)
            if (not seen.answered or seen.is_generating) and self._process:
                if seen.generated_units is not None:
                    self._generated_units = seen.generated_units
                seen = replace(
                    seen,
                    cpu_seconds=self._process.cpu_seconds(),
                    generated_units=self._generated_units + self.gate.flowed_bytes,
                )
            watch, verdict = liveness.judge(watch, seen, time.monotonic(), self._settings.lifecycle)
            if verdict is liveness.Verdict.HUNG:
                silent_s = time.monotonic() - watch.alive_at
                reason = f"hung: no sign of life or progress for {silent_s:.0f} s"
                self.post(lifecycle.Stuck(self._output.with_last_words(reason)))
                return
            if verdict is liveness.Verdict.SILENT:
                self._log.warning("engine_silent", answered=seen.answered, generating=seen.is_generating)

    # --- stop -----------------------------------------------------------------------------------------------

    async def _terminate(self) -> None:
        await self._end_tree()
        if "exit" in self._tasks:  # its report comes first
            await asyncio.wait({self._tasks["exit"]}, timeout=_REPORT_LIMIT_S)
        self.post(lifecycle.Gone())

    async def _sweep(self) -> None:
        """End what a main process that died by itself left behind (a worker under --admin)."""
        if self._process is not None and self._process.has_ended and self._process.has_group():
            self._log.warning("engine_left_processes", pid=self._process.pid)
            await self._end_tree()
        if self._life.state in lifecycle.AT_REST:
            self._forget_process()

    async def _end_tree(self) -> None:
        process = self._process
        if process is None:
            return
        began_s = time.monotonic()
        killed = await process.terminate(self.gate.engine.stop_signals, self._settings.lifecycle.stop_timeout_s)
        seconds = round(time.monotonic() - began_s, 3)
        if killed:
            self._log.warning(
                "engine_killed",
                pids=list(killed),
                seconds=seconds,
                message="it did not stop in time; on macOS killing a process that holds locked memory can leak it",
            )
        else:
            self._log.info("engine_stopped", pid=process.pid, seconds=seconds)
        left = process.members()
        if left:
            self._log.error("engine_will_not_die", pids=left, message="waiting in the kernel; look at its disk")

    def _forget_process(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None
        self.gate.change(record=None)
        self._died_s = None
        self._cancel("output")
        self._paths.record.unlink(missing_ok=True)

    async def _await_memory_release(self) -> None:
        """See locked memory fall before the next start: loading on top of it would choke the machine."""
        began_s = time.monotonic()
        while True:
            released = is_released(self._wired_before, self._wired_loaded, self._wired_bytes())
            waited_s = time.monotonic() - began_s
            if released is not False:
                if waited_s > _RELEASE_POLL_S:
                    self._log.info("wired_memory_released", seconds=round(waited_s, 3))
                return
            if waited_s > _RELEASE_LIMIT_S:
                self._log.warning("wired_memory_not_released", seconds=round(waited_s, 3))
                return
            await asyncio.sleep(_RELEASE_POLL_S)

    def _wired_bytes(self) -> int | None:
        try:
            return self._host.system_memory().wired_bytes
        except Exception:  # noqa: BLE001  # a reading that fails must not keep the engine from starting
            self._log.exception("memory_meter_bug")
            return None


def _plan_digest(plan: LaunchPlan) -> str:
    """Digest what an engine was started with, its port and emberd's own Python aside.

    An upgrade may bring another Python; that alone is no reason to load the model again.
    """
    environment = [f"{name}={value}" for name, value in sorted(plan.environment.items())]
    files = [f"{name}={text}" for name, text in sorted(plan.files.items())]
    words = [word for word in plan.arguments[int(plan.by_own_python) :] if word != str(plan.port)]
    return records.digest([*words, *environment, *files])
