"""One engine process: its start or adoption, its record, its end, and the release of its memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from emberd.core import exit_status
from emberd.core.errors import StateUnusable
from emberd.core.load_facts import LoadFacts
from emberd.core.memory import is_released
from emberd.core.status import to_plain
from emberd.engine import record as records
from emberd.engine.process import EngineProcess, ProcessTree, launch, written
from emberd.host.files import make_private_folder
from emberd.services.obstacles import Obstacles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from emberd.core.causes import Cause
    from emberd.core.ports import Host
    from emberd.core.settings import Settings
    from emberd.core.types import LaunchPlan, Notice
    from emberd.services.engine_output import EngineOutput
    from emberd.services.gate import Gate
    from emberd.services.switching import Switching

_RELEASE_LIMIT_S = 10.0
_RELEASE_POLL_S = 0.05
_HAS_ENDED = "it has ended"
_IS_A_STRANGER = "its pid belongs to another process now"


@dataclass(frozen=True, slots=True)
class Paths:
    """The engine's files in the state directory."""

    record: Path
    output: Path
    scratch: Path


class EngineRun:
    """One engine process at a time; the supervisor decides when it begins and ends."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        host: Host,
        paths: Paths,
        log: FilteringBoundLogger,
        gate: Gate,
        output: EngineOutput,
        switching: Switching,
    ) -> None:
        self._settings = settings
        self._host = host
        self._paths = paths
        self._log = log
        self._gate = gate
        self._meter = switching.meter
        self._output = output
        self._switching = switching
        self._wired_before: int | None = None
        self._wired_loaded: int | None = None
        self._died_s: float | None = None
        self._is_unsaved = False
        self.obstacles = Obstacles(settings, paths.record.parent, log, lambda: gate.engine.wishes().files)
        self.process: EngineProcess | None = None
        self.notices: tuple[Notice, ...] = ()
        """What the owner should know of the engine's settings."""
        self.starts = 0
        """Engines that were started so far."""
        self.last_exit = ""
        """How the last one ended, in words."""

    # --- begin ----------------------------------------------------------------------------------------------

    async def wait_for_release(self) -> None:
        """Wait until locked memory has fallen: loading on top of it would choke the computer."""
        began_s = time.monotonic()
        while True:
            released = is_released(self._wired_before, self._wired_loaded, self._wired_bytes())
            waited_s = time.monotonic() - began_s
            if released is not False:
                if waited_s > _RELEASE_POLL_S:
                    self._log.info("wired_memory_released", seconds=round(waited_s, 3))
                break
            if waited_s > _RELEASE_LIMIT_S:
                self._log.warning("wired_memory_not_released", seconds=round(waited_s, 3))
                break
            await asyncio.sleep(_RELEASE_POLL_S)
        self._wired_before, self._wired_loaded = self._wired_bytes(), None

    async def decide_lock(self) -> tuple[bool, tuple[Notice, ...]]:
        """Return whether to ask for the lock, and notices about it."""
        try:
            decision = await self._meter.decide(self._settings(), self._gate.engine)
        except Exception:  # noqa: BLE001  # a reading that fails must not keep the engine from starting
            self._log.exception("lock_meter_bug")
            return self._settings().engine.lock != "never", ()
        return decision.will_lock and not self._gate.must_not_lock, decision.reasons

    def start(self, plan: LaunchPlan, of_settings: LaunchPlan, *, will_lock: bool) -> None:
        """Start the process and write its record, without a pause between.

        Args:
            plan: what is started.
            of_settings: what the settings alone ask for: another plan only after a switch of the model.
            will_lock: the engine is asked to lock.
        """
        self._empty_scratch()
        self._output.skip_to_end()
        with written(plan, self._say_unwritten) as (started, descriptors):
            output = self._output.open_for_engine()
            try:
                process = launch(started, output, self._host, descriptors)
            finally:
                os.close(output)
        if self._died_s is not None:
            gap_ms = round((process.started_s - self._died_s) * 1000, 1)
            self._log.info("engine_restarted", pid=process.pid, milliseconds_since_death=gap_ms)
            self._died_s = None
        self.notices = plan.notices
        record = records.EngineRecord(
            pid=process.pid,
            start_token=self._host.start_token(process.pid) or "",
            command_digest=None,
            command=started.shown_arguments(),
            plan_digest=plan_digest(of_settings),
            port=plan.port,
            engine=self._gate.engine.name,
            started_at=time.time(),
            will_lock=will_lock,
            switch=self._gate.engine.switch,
        )
        self._take(process, record, is_adopted=False)
        self.starts += 1
        self._gate.tally.starts += 1
        self._save_record()
        for notice in plan.notices:
            self._log.warning("engine_settings_notice", code=notice.code, message=notice.message)
        self._log.info("engine_started", pid=process.pid, port=plan.port, command=" ".join(plan.shown_arguments()))

    def _empty_scratch(self) -> None:
        """Empty the engine's TMPDIR: no engine lives, so it holds only leftovers."""
        with contextlib.suppress(StateUnusable):
            make_private_folder(self._paths.scratch)
        with contextlib.suppress(OSError):
            for each in self._paths.scratch.iterdir():
                if each.is_dir() and not each.is_symlink():
                    shutil.rmtree(each, ignore_errors=True)
                else:
                    each.unlink()

    def _take(self, process: EngineProcess, record: records.EngineRecord, *, is_adopted: bool) -> None:
        if self.process is not None:  # it has ended; its watch holds a descriptor
            self.process.close()
        self.process = process
        self._gate.change(record=record, pids=(process.pid,), is_adopted=is_adopted)
        self._switching.begin(self._gate, loads=not is_adopted)

    def note_ready(self) -> None:
        """Record what only a loaded engine shows: a wrapper script has become the engine by now."""
        self._wired_loaded = self._wired_bytes()
        if self._gate.now.record is None:
            return
        command = records.observed_command(self._gate.now.record.pid)
        found = replace(
            self._gate.now.record,
            command_digest=self._gate.now.record.command_digest if command is None else records.digest(command),
            is_mapped=self._meter.told.is_mapped,
            context_tokens=self._meter.told.context_tokens,
            kv_bytes=self._meter.told.kv_bytes,
            switch=self._gate.now.serving.switch,
        )
        if found != self._gate.now.record:
            self._gate.change(record=found)
            self._save_record()

    def keep_record(self) -> None:
        """Write the record again if it is not on disk as it is in memory.

        Raises:
            StateUnusable: the disk is full or the folder not writable.
        """
        record = self._gate.now.record
        if record is not None and (self._is_unsaved or not self._paths.record.exists()):
            records.save(self._paths.record, record)
            self._is_unsaved = False

    def _save_record(self) -> None:
        self._is_unsaved = True
        try:
            self.keep_record()
        except StateUnusable as error:
            # The engine still serves; but after a crash of emberd the model would be loaded again.
            self._log.error("state_not_saved", error=error.message, remedy=error.remedy)

    async def adopt(self) -> bool:
        """Take over the engine that an earlier emberd left running.

        Returns:
            False if there is none. Another process with its pid is left alone.
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
                # It is ours but of no use: a model loaded beside it would choke the computer.
                self._log.warning("engine_left_processes", pid=record.pid)
                await tree.terminate(self._gate.engine.stop_signals, self._settings().lifecycle.stop_timeout_s)
            self._forget_record()
            return False
        self._gate.engine.switch = record.switch
        told = LoadFacts(is_mapped=record.is_mapped, context_tokens=record.context_tokens, kv_bytes=record.kv_bytes)
        await self._meter.adopt(self._gate.engine.model_path(), told)
        self._output.adopt()
        self._take(process, record, is_adopted=True)
        self._log.info("engine_adopted", pid=record.pid, port=record.port)
        return True

    def _why_not_adopt(self, record: records.EngineRecord, tree: ProcessTree) -> str | None:
        """Return why the process in the state file is not adopted, None if it is."""
        match records.claim(record, self._host):
            case records.Claim.STRANGER:
                return _IS_A_STRANGER
            case records.Claim.ENDED:
                return _HAS_ENDED
            case records.Claim.CHANGED:
                return "it runs another command line than it was started with"
            case records.Claim.OURS:
                if record.engine != self._gate.engine.name:
                    return f"it is {record.engine}, and the settings ask for {self._gate.engine.name}"
                listening = self._host.listeners(tree.members())
                if listening and record.port not in listening:
                    return "it listens on another port"
                return None

    # --- watch ----------------------------------------------------------------------------------------------

    async def wait_for_exit(self, process: EngineProcess, is_asked: Callable[[], bool]) -> tuple[str, Cause | None]:
        """Return the exit, and the cause that can pass, when the process has ended.

        `is_asked` tells whether it was told to stop.
        """
        await process.wait()
        self._died_s = time.monotonic()
        was_asked = is_asked()
        await self._output.read_rest()
        ended = exit_status.EngineExit(
            status=process.status,
            lived_s=time.monotonic() - process.started_s,
            asked_to_stop=was_asked,
            said_anything=self._output.has_said_anything,
            is_macos=self._host.name == "darwin",
        )
        cause = None if was_asked else self._output.cause
        self.last_exit = exit_status.explain(ended) + (f" (the engine says: {cause})" if cause else "")
        report = self._log.info if was_asked else self._log.warning
        report("engine_exited", pid=process.pid, status=process.status, meaning=self.last_exit)
        passing: Cause | None = None
        if not was_asked:
            passing = await self.obstacles.find_after_exit(process.status, self._output.said)
        meaning = self.last_exit if passing is None else f"{passing.message}: {self.last_exit}"
        return self._output.with_last_words(meaning), passing

    def is_ours(self, port: int) -> bool:
        """Return True if the listener belongs to the process tree, or if that is unknown."""
        listening = self._host.listeners(self.process.members()) if self.process else None
        return listening is None or port in listening

    def loads_again(self) -> None:
        """The engine loads a model in place, or has done so already."""
        self._switching.loads_again()

    async def find_model(self, record: records.EngineRecord) -> None:
        """Find out what the ready engine serves, and with which files."""
        try:
            await self._switching.find(record, tuple(self.process.members()) if self.process else ())
        except Exception:  # noqa: BLE001  # a reading that fails must not cost the engine
            self._log.exception("model_not_found_out")

    def judge_lock(self) -> None:
        """Judge whether the lock holds, and log a change: a lock can be lost."""
        record, switch = self._gate.now.record, self._gate.now.serving.switch
        is_asked = record is not None and record.will_lock
        try:
            if switch is not None and switch.is_in_place:
                is_asked = bool(self._gate.engine.wishes().locks)
            pids = tuple(self.process.members()) if self.process else ()
            self._gate.change(pids=pids)
            has_changed = self._meter.judge(pids, is_asked=is_asked)
        except Exception:  # noqa: BLE001  # a reading that fails must not cost the engine
            self._log.exception("lock_meter_bug")
            return
        if has_changed and self._meter.verdict is not None:
            lock = to_plain(self._meter.verdict)
            is_wanting = is_asked and lock["state"] in {"PARTIAL", "ABSENT"}
            report = self._log.warning if is_wanting else self._log.info
            report("engine_lock", **{name: value for name, value in lock.items() if value})

    # --- end ------------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """End what a dead main process left behind (a worker under --admin)."""
        if self.process is not None and self.process.has_ended and self.process.has_group():
            self._log.warning("engine_left_processes", pid=self.process.pid)
            await self.end_tree()

    async def end_tree(self) -> None:
        """Signal the process and its descendants until they have ended, or hang in the kernel."""
        process = self.process
        if process is None:
            return
        began_s = time.monotonic()
        killed = await process.terminate(self._gate.engine.stop_signals, self._settings().lifecycle.stop_timeout_s)
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

    def _say_unwritten(self, error: StateUnusable) -> None:
        self._log.warning("state_not_kept", what="the engine's settings", error=error.message, remedy=error.remedy)

    def _forget_record(self) -> None:
        # On a read-only disk it stays; the next emberd sees that its process has ended.
        with contextlib.suppress(OSError):
            self._paths.record.unlink(missing_ok=True)

    def forget(self) -> None:
        """Forget a process that has ended, and its record."""
        if self.process is not None:
            self.process.close()
        self.process = None
        self._gate.change(record=None)
        self._died_s = None
        self._forget_record()

    def _wired_bytes(self) -> int | None:
        try:
            return self._host.system_memory().wired_bytes
        except Exception:  # noqa: BLE001  # a reading that fails must not keep the engine from starting
            self._log.exception("memory_meter_bug")
            return None


def plan_digest(plan: LaunchPlan) -> str:
    """Return a digest of what an engine was started with, without its port and emberd's own Python.

    An upgrade may bring another Python; that alone is no reason to load the model again.
    """
    environment = [f"{name}={value}" for name, value in sorted(plan.environment.items())]
    files = [f"{name}={text}" for name, text in sorted(plan.files.items())]
    words = [word for word in plan.arguments[int(plan.by_own_python) :] if word != str(plan.port)]
    return records.digest([*words, *environment, *files])
