"""Gathers the facts that `emberd doctor` judges: each fails alone, and unknown ones are named.

It runs within the daemon if there is one, because macOS treats a background program differently from a terminal.
The verb adds what only the caller knows (its version, the service file).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from emberd.core.errors import ConfigError, EmberdError, EngineNotUsable
from emberd.core.gguf import estimate_compute_buffer
from emberd.core.host_health import HostHealth
from emberd.core.memory import Power, SystemMemory
from emberd.core.wishes import OwnerWishes
from emberd.doctor import look, look_engine
from emberd.doctor.catalogue import describe, diagnose, visible
from emberd.doctor.facts import (
    EngineHealth,
    EngineProblem,
    Facts,
    MemoryHealth,
    ModelHealth,
    ModelProblem,
    OwnHealth,
    ServiceHealth,
    digest,
)
from emberd.engine.choose import choose_engine
from emberd.engine.koboldcpp import CONTINUES_TURNS, USUAL_NAMES, read_version
from emberd.host.model_file import read_model_info
from emberd.host.paths import StatePaths, log_file, state_paths
from emberd.services.lock_meter import LockMeter, kv_cache_bytes, prompt_cache_bytes
from emberd.services.supervisor import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from emberd.core.ports import Engine, Host
    from emberd.core.settings import Settings

T = TypeVar("T")
LIMIT_S = 20.0
"""Limit of a single question; an engine may have to unpack itself for --help, which is then unknown."""
_LOG_TAIL_BYTES = 1 << 20
_LOCKING = frozenset({"--usemlock", "--mlock", "--load-mode"})
"""KoboldCPP's option and llama.cpp's, old and new."""


async def examine(
    host: Host, settings: Settings, status: Mapping[str, Any] | None, known: ServiceHealth | None = None
) -> dict[str, Any]:
    """Return every condition, symptoms included, those to show, and the unknown facts, as plain values.

    Without a daemon, `status` is None; `known` has the facts that the caller knows.
    """
    examination = Examination(host, settings, status)
    facts = await examination.facts(known or ServiceHealth())
    found = diagnose(facts)
    return {
        "conditions": [asdict(each) for each in found],
        "shown": [describe(each) for each in visible(found)],
        "unknown": examination.unknown,
        "settings": digest(settings),
    }


class Examination:
    """One look at everything; `unknown` has the unknown facts, and why they are unknown."""

    def __init__(self, host: Host, settings: Settings, status: Mapping[str, Any] | None) -> None:
        self.unknown: list[str] = []
        self._host = host
        self._settings = settings
        self._daemon = look.read_status(status)
        self._paths = state_paths(settings)

    async def facts(self, known: ServiceHealth) -> Facts:
        """Gather; bounded by a few LIMIT_S."""
        daemon, pid = self._daemon, self._daemon.pid or os.getpid()
        host_health = await self._ask("process", lambda: self._host.health(pid)) or HostHealth()
        log = await self._ask("engine.log", lambda: look_engine.last_start(_tail(self._paths.output))) or ""
        with self._scratch() as paths:
            adapter = choose_engine(self._settings, self._host, paths)
            model = await self._model(adapter)
            engine = await self._engine(adapter, model, host_health, log)
        is_there = bool(known.silence or known.waits_because)
        return Facts(
            system=self._host.name,
            settings=self._settings,
            host=host_health,
            model=model,
            engine=engine,
            daemon=daemon,
            memory=await self._memory(adapter, model, engine.orphan_pid),
            own=await self._own(is_there=daemon.answers or is_there, is_loaded=bool(known.is_loaded)),
            service=replace(
                known,
                is_running=None if is_there else daemon.answers,
                is_throttled=host_health.is_throttled if daemon.answers else None,
            ),
        )

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[StatePaths]:
        """Yield the state directory, or a temporary one if there is none, so that nothing is left behind."""
        if self._paths.directory.is_dir():
            yield self._paths
            return
        with tempfile.TemporaryDirectory() as passing:
            yield StatePaths(Path(passing))

    async def _ask(self, what: str, question: Callable[[], T]) -> T | None:
        """Return the answer of a blocking question; None if it fails or takes too long, which is noted.

        The thread is a daemon thread: one that hangs in the kernel must not keep the program from ending.
        """
        answer: Future[T] = Future()
        answer.set_running_or_notify_cancel()  # it cannot be cancelled, so that a late answer finds its place

        def run() -> None:
            try:
                answer.set_result(question())
            except Exception as error:  # noqa: BLE001  # told to the caller
                answer.set_exception(error)

        threading.Thread(target=run, name=f"doctor: {what}", daemon=True).start()
        try:
            async with asyncio.timeout(LIMIT_S):
                return await asyncio.wrap_future(answer)
        except TimeoutError:
            self.unknown.append(f"{what}: no answer within {LIMIT_S:g} s")
        except Exception as error:  # noqa: BLE001  # one unreadable thing must not hide the others
            self.unknown.append(f"{what}: {error}")
        return None

    # --- the model ------------------------------------------------------------------------------------------

    async def _model(self, adapter: Engine) -> ModelHealth:
        path, started_at = adapter.model_path(), self._daemon.engine_started_at
        text = str(path) if path else self._settings.model.path
        model = await self._ask("model", lambda: look_engine.examine_model(text, self._host.name))
        if model is None:
            words = f"{text}: opening and reading it did not end within {LIMIT_S:g} s"
            remedy = "Is its volume there? On macOS, move it out of Documents, Desktop and Downloads."
            return ModelHealth(text, ModelProblem.SILENT, words, remedy)
        if started_at is not None and path and model.problem is None:
            younger = await self._ask("model's time", lambda: look_engine.changed_after_start_s(path, started_at))
            return replace(model, changed_after_start_s=younger)
        return model

    # --- the engine -----------------------------------------------------------------------------------------

    async def _engine(self, adapter: Engine, model: ModelHealth, host_health: HostHealth, log: str) -> EngineHealth:
        program = await self._program(adapter, model, host_health)
        wishes = await self._ask("engine.kcpps", adapter.wishes) or OwnerWishes()
        return replace(
            program,
            lacks=(*program.lacks, *_lost_features(log)),
            unloads_when_idle=wishes.unloads_by,
            has_gpu=look_engine.has_gpu(log, is_mac=self._host.name == "darwin"),
            is_mapped=look_engine.is_mapped(log),
            orphan_pid=None if self._daemon.answers else await self._ask("engine.json", self._orphan_pid),
        )

    async def _program(self, adapter: Engine, model: ModelHealth, host_health: HostHealth) -> EngineHealth:
        """Return what is wrong with the program, by its file and by its own answers."""
        if path := self._program_path():
            seen = await self._ask(
                "engine", lambda: look_engine.look_at_program(path, self._host, host_health.machine)
            )
            if seen is not None and seen.problem is not None:
                return seen
        if model.problem is ModelProblem.SILENT:
            return EngineHealth()  # the plan reads it too
        wants_lock = self._settings.engine.lock != "never"
        try:
            async with asyncio.timeout(LIMIT_S):
                plan = await adapter.plan(free_port(), will_lock=wants_lock)
        except TimeoutError:
            self.unknown.append(f"engine: its --help took more than {LIMIT_S:g} s")
        except EngineNotUsable as error:
            problem = EngineProblem.MISSING if "not found" in error.message else EngineProblem.REFUSES
            return EngineHealth(problem, error.message, error.remedy)
        except ConfigError as error:
            return EngineHealth(EngineProblem.REFUSES, error.message, error.remedy)
        except EmberdError:
            pass  # the model or the state directory: reported there
        else:
            if wants_lock and not _LOCKING.intersection(plan.arguments):
                return EngineHealth(lacks=("--usemlock: the model cannot be locked",))
        return EngineHealth()

    def _program_path(self) -> Path | None:
        """Return the program that would be started, None if it is not found or is emberd's own."""
        engine = self._settings.engine
        if engine.kind == "embedded":
            return None
        named = os.path.expanduser(engine.path)  # noqa: PTH111  # may be a name on PATH
        if os.sep in named or (named and Path(named).exists()):
            return Path(named).absolute()
        usual = USUAL_NAMES if engine.kind == "koboldcpp" else ("llama-server",)
        found = next(filter(None, map(shutil.which, (named,) if named else usual)), None)
        return Path(found) if found else None

    def _orphan_pid(self) -> int | None:
        """Return the engine of the state file if it still runs; the file is only read, never set aside."""
        try:
            record = json.loads(self._paths.record.read_text())
            pid, token = int(record["pid"]), record["start_token"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if self._host.start_token(pid) == token and _is_alive(pid) else None

    # --- memory ---------------------------------------------------------------------------------------------

    async def _memory(self, adapter: Engine, model: ModelHealth, orphan_pid: int | None) -> MemoryHealth:
        daemon, notices = self._daemon, dict(self._daemon.notices)
        path = adapter.model_path() if model.problem is None else None
        if daemon.engine_pid is None and path:
            # Judged only without an engine, whose own memory would be missing from what is available.
            decision = await LockMeter(self._host).decide(self._settings, adapter)
            notices |= {each.code: each.message for each in decision.reasons}
        own = {os.getpid(), daemon.engine_pid, daemon.pid, orphan_pid}
        return MemoryHealth(
            system=await self._ask("memory", self._host.system_memory) or SystemMemory(),
            needed_bytes=await self._ask("model's needs", lambda: self._needed_bytes(adapter, path)),
            limits=await self._ask("lock limits", lambda: self._host.lock_limits(None)),
            gpu=await self._ask("GPU", self._host.gpu_limits),
            others=tuple(await self._ask("other programs", lambda: look.other_servers(own)) or ()),
            short=notices.get("does_not_fit", "") if daemon.engine_pid is None else "",
            choking=notices.get("lock_would_choke", ""),
            power=await self._ask("power", self._host.power) or Power(),
        )

    def _needed_bytes(self, adapter: Engine, path: Path | None) -> int | None:
        if path is None:
            return None
        info, wishes = read_model_info(path), adapter.wishes()
        cache = self._daemon.kv_cache_bytes
        if cache is None:
            cache = kv_cache_bytes(info, self._settings, wishes, self._host.system_memory().total_bytes) or 0
        cache += prompt_cache_bytes(wishes)
        others = sum(_size(Path(each.path).expanduser()) or 0 for each in wishes.files)
        return info.weights_bytes + others + cache + (estimate_compute_buffer(info.vocabulary_tokens) or 0)

    # --- emberd itself --------------------------------------------------------------------------------------

    async def _own(self, *, is_there: bool, is_loaded: bool) -> OwnHealth:
        """Look at port, files and process; at the port only if no emberd `is_there` that holds it."""
        endpoint, paths, owner, address_problem = self._settings.endpoint, self._paths, None, ""
        if not is_there:
            tried = await self._ask("port", lambda: look.try_port(endpoint.host, endpoint.port))
            owner, address_problem = tried or (None, "")
            if is_loaded and owner is not None and owner.pid is None:
                owner = None  # launchd itself: root's, so its name is not told
        return OwnHealth(
            port_owner=owner,
            address_problem=address_problem,
            state_problem=await self._ask("state directory", lambda: look.state_problem(paths.directory)) or "",
            history_problem=await self._ask("history", lambda: look.history_problem(paths.history)) or "",
            free_spaces=await self._ask("disks", lambda: look.free_spaces(self._written())) or (),
            engine_log_bytes=await self._ask("engine.log's size", lambda: _size(paths.output)),
            clock_behind_s=await self._ask("clock", lambda: look.clock_behind_s(paths)),
            most_open_files=await self._ask("open files", look.most_open_files),
            psutil_failure=await self._ask("psutil", look.psutil_failure) or "",
        )

    def _written(self) -> list[tuple[str, Path]]:
        """Return the files that a running emberd writes."""
        written = [
            ("the state directory and the engine's log", self._paths.directory),
            ("the log", log_file(self._settings, self._host.name)),
        ]
        if self._host.name == "darwin":
            written.append(("swap files", Path("/System/Volumes/VM")))  # in APFS' container, like the others
        return written


def _lost_features(log: str) -> tuple[str, ...]:
    """Return the features that the version in the engine's log lacks."""
    found = look_engine.printed_version(log)
    version = read_version(found)
    if not version or version >= CONTINUES_TURNS:
        return ()
    needed = ".".join(map(str, CONTINUES_TURNS))
    return (f"continue_assistant_turn ({found}, it came with {needed}): a chat's last reply is processed again",)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _LOG_TAIL_BYTES, 0))
        return file.read(_LOG_TAIL_BYTES).decode("utf-8", "replace")
