"""Gathers what `emberd doctor` judges: each fact fails alone, and what could not be told is named.

It runs within the daemon where there is one, because macOS answers an agent differently than a terminal; what only
the caller knows (its version, the service file) is added by the verb.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from emberd.core.errors import ConfigError, EmberdError, EngineNotUsable
from emberd.core.gguf import estimate_compute_buffer
from emberd.core.health_catalogue import diagnose
from emberd.core.health_facts import (
    EngineHealth,
    EngineProblem,
    Facts,
    HostHealth,
    MemoryHealth,
    ModelHealth,
    ModelProblem,
    ServiceHealth,
)
from emberd.core.health_log import (
    are_logs_kept,
    has_gpu,
    is_mapped,
    last_start,
    printed_version,
)
from emberd.core.lock import LockState
from emberd.core.memory import PowerSource
from emberd.core.warmth_cost import BUDGET_SHARE, BUDGET_WINDOW_S
from emberd.core.wishes import OwnerWishes
from emberd.engine.choose import choose_engine
from emberd.engine.koboldcpp import CONTINUES_TURNS, USUAL_NAMES, read_version
from emberd.host import neighbours, own_health
from emberd.host.model_file import read_model_info
from emberd.host.model_health import changed_after_start_s, examine_model
from emberd.host.paths import StatePaths, log_file, state_paths
from emberd.host.program_health import look_at_program
from emberd.services.lock_meter import LockMeter, kv_cache_bytes
from emberd.services.supervisor import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from emberd.core.ports import Engine, Host
    from emberd.core.settings import Settings

T = TypeVar("T")
LIMIT_S = 20.0
"""A single question; the engine's --help may have to unpack itself first and is then unknown."""
_LOG_TAIL_BYTES = 1 << 20
_LOCKING = frozenset({"--usemlock", "--mlock", "--load-mode"})
"""KoboldCPP's option and llama.cpp's, old and new."""


async def examine(
    host: Host, settings: Settings, status: Mapping[str, Any] | None, known: ServiceHealth | None = None
) -> dict[str, Any]:
    """Return every condition and what is not known, as plain values; symptoms stand beside their causes.

    Args:
        host: this computer.
        settings: in force.
        status: what the daemon says of itself, None without one.
        known: what the caller has found out.
    """
    facts = await Examination(host, settings, status).facts(known or ServiceHealth())
    return {
        "conditions": [asdict(each) for each in diagnose(facts)],
        "unknown": list(facts.unknown),
        "settings": digest(settings),
    }


def digest(settings: Settings) -> str:
    """Return a text that differs between different settings of the same version."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()


class Examination:
    """One look at everything.

    Args:
        host: this computer.
        settings: in force.
        status: what the daemon says of itself, None without one.
    """

    def __init__(self, host: Host, settings: Settings, status: Mapping[str, Any] | None) -> None:
        self._host = host
        self._settings = settings
        self._status: Mapping[str, Any] = status or {}
        self._unknown: list[str] = []
        self._paths = state_paths(settings)
        self._place = HostHealth()
        self._log = ""
        self._notices: dict[str, str] = {each["code"]: each["message"] for each in self._status.get("notices", ())}

    async def facts(self, known: ServiceHealth) -> Facts:
        """Gather; bounded by a few LIMIT_S."""
        pid = self._status.get("pid") or os.getpid()
        self._place = await self._ask("process", lambda: self._host.health(pid)) or HostHealth()
        self._log = await self._ask("engine.log", lambda: last_start(_tail(self._paths.output))) or ""
        with self._scratch() as paths:
            adapter = choose_engine(self._settings, self._host, paths)
            model = await self._model(adapter)
            engine = await self._engine(adapter, model)
        memory = await self._memory(adapter, model, engine.orphan_pid)
        service = await self._service(known)
        return Facts(self._host.name, model, engine, memory, service, tuple(self._unknown))

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[StatePaths]:
        """Yield the state directory, or a passing one where there is none: an examination leaves nothing behind."""
        if self._paths.directory.is_dir():
            yield self._paths
            return
        with tempfile.TemporaryDirectory() as passing:
            yield StatePaths(Path(passing))

    async def _ask(self, what: str, question: Callable[[], T]) -> T | None:
        """Return the answer of something that blocks; None if it fails or takes too long, which is noted.

        The thread is a daemon thread: one that hangs in the kernel would hold up the end of the program.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: Exception | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]  # of the question's type

        def run() -> None:
            result, failure = None, None
            try:
                result = question()
            except Exception as error:  # noqa: BLE001  # told to who asks
                failure = error
            try:
                loop.call_soon_threadsafe(tell, result, failure)
            except RuntimeError:  # the loop is closed: nobody waits any longer
                return

        threading.Thread(target=run, name=f"doctor: {what}", daemon=True).start()
        try:
            async with asyncio.timeout(LIMIT_S):
                return await answer
        except TimeoutError:
            self._unknown.append(f"{what}: no answer within {LIMIT_S:g} s")
        except Exception as error:  # noqa: BLE001  # one unreadable thing must not hide the others
            self._unknown.append(f"{what}: {error}")
        return None

    # --- the model ------------------------------------------------------------------------------------------

    async def _model(self, adapter: Engine) -> ModelHealth:
        path = adapter.model_path()
        text = str(path) if path else self._settings.model.path
        model = await self._ask("model", lambda: examine_model(text, self._host.name))
        if model is None:
            words = f"{text}: opening and reading it did not end within {LIMIT_S:g} s"
            remedy = "Is its volume there? On macOS, move it out of Documents, Desktop and Downloads."
            return ModelHealth(text, ModelProblem.SILENT, words, remedy)
        engine = self._status.get("engine")
        if engine and path and model.problem is None:
            younger = await self._ask("model's time", lambda: changed_after_start_s(path, engine["started_at"]))
            return replace(model, changed_after_start_s=younger)
        return model

    # --- the engine -----------------------------------------------------------------------------------------

    async def _engine(self, adapter: Engine, model: ModelHealth) -> EngineHealth:
        engine, status = self._settings.engine, self._status
        health = await self._program(adapter, model)
        wishes = await self._ask("engine.kcpps", adapter.wishes) or OwnerWishes()
        is_mac = self._host.name == "darwin"
        lock, heartbeat = status.get("lock") or {}, status.get("metal_heartbeat") or {}
        memory = (status.get("memory") or {}).get("engine") or {}
        is_trying = status.get("state") == "BACKOFF" or (status.get("crashes_in_a_row") or 0) > 1
        return replace(
            health,
            lacks=(*health.lacks, *self._lost_features()),
            unloads_when_idle=wishes.unloads_by or None,
            wants_gpu=engine.gpu_layers > 0 or (engine.gpu_layers < 0 and is_mac),
            has_gpu=has_gpu(self._log, is_mac=is_mac),
            gpu_is_off=is_mac and engine.gpu_layers == 0,
            wants_lock=engine.lock != "never",
            is_running=status.get("engine") is not None if status else None,
            is_mapped=is_mapped(self._log),
            has_failed=status.get("state") == "FAILED",
            crashes=status.get("crashes_in_a_row") if is_trying else None,
            last_words=status.get("reason") or status.get("last_exit") or "",
            heartbeat_problem=heartbeat.get("message") or "",
            heartbeat_remedy=heartbeat.get("remedy") or "",
            swapped_bytes=memory.get("swapped_bytes"),
            orphan_pid=None if status else await self._ask("engine.json", self._orphan_pid),
            lock=LockState(lock["state"]) if lock else None,
            lock_message=lock.get("message") or "",
            lock_remedy=lock.get("remedy") or "",
        )

    async def _program(self, adapter: Engine, model: ModelHealth) -> EngineHealth:
        """Return what is wrong with the program, from what can be seen to what it says itself."""
        if path := self._program_path():
            seen = await self._ask("engine", lambda: look_at_program(path, self._host, self._place.machine))
            if seen is not None and seen.problem is not None:
                return seen
        if model.problem is ModelProblem.SILENT:
            return EngineHealth()  # the plan reads it too
        wants_lock = self._settings.engine.lock != "never"
        try:
            async with asyncio.timeout(LIMIT_S):
                plan = await adapter.plan(free_port(), will_lock=wants_lock)
        except TimeoutError:
            self._unknown.append(f"engine: its --help took more than {LIMIT_S:g} s")
        except EngineNotUsable as error:
            problem = EngineProblem.MISSING if "not found" in error.message else EngineProblem.REFUSES
            return EngineHealth(problem, error.message, error.remedy)
        except ConfigError as error:
            return EngineHealth(EngineProblem.REFUSES, error.message, error.remedy)
        except EmberdError:
            pass  # the model or the state directory: told there
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

    def _lost_features(self) -> tuple[str, ...]:
        """Return what the version in the engine's log cannot do for emberd."""
        found = printed_version(self._log)
        version = read_version(found)
        if not version or version >= CONTINUES_TURNS:
            return ()
        needed = ".".join(map(str, CONTINUES_TURNS))
        return (
            f"continue_assistant_turn ({found}, it came with {needed}): a chat's last reply is processed again",
        )

    def _orphan_pid(self) -> int | None:
        """Return the engine of the state file if it still runs; the file is read only, never set aside."""
        try:
            record = json.loads(self._paths.record.read_text())
            pid, token = int(record["pid"]), record["start_token"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if self._host.start_token(pid) == token and _is_alive(pid) else None

    # --- memory ---------------------------------------------------------------------------------------------

    async def _memory(self, adapter: Engine, model: ModelHealth, orphan_pid: int | None) -> MemoryHealth:
        status = self._status
        warmth, residency = status.get("warmth") or {}, status.get("residency") or {}
        engine = status.get("engine") or {}
        path = adapter.model_path() if model.problem is None else None
        if not engine and path:
            # Judged while there is no engine: afterwards its own memory is missing from what is available.
            decision = await LockMeter(self._host).decide(self._settings, adapter.wishes(), path)
            self._notices |= {each.code: each.message for each in decision.reasons}
        own = {os.getpid(), engine.get("pid"), status.get("pid"), orphan_pid}
        system = await self._ask("memory", self._host.system_memory)
        return MemoryHealth(
            **({"system": system} if system else {}),
            needed_bytes=await self._ask("model's needs", lambda: self._needed_bytes(adapter, path)),
            limits=await self._ask("lock limits", lambda: self._host.lock_limits(None)),
            gpu=await self._ask("GPU", self._host.gpu_limits),
            cgroup_limit_bytes=self._place.cgroup_limit_bytes,
            resident_share=residency.get("share"),
            others=tuple(await self._ask("other programs", lambda: neighbours.other_servers(own)) or ()),
            hold=warmth.get("hold"),
            warmth_mode=self._settings.warmth.mode,
            paused_for_s=warmth.get("paused_for_s"),
            cool_for_s=warmth.get("cool_for_s"),
            short="" if engine else self._notices.get("does_not_fit", ""),
            choking=self._notices.get("lock_would_choke", ""),
            swappiness=self._place.swappiness,
            saves_power=await self._ask("power", self._saved_power) or "",
            waste=_waste(warmth),
            is_helpless=warmth.get("is_helpless"),
        )

    def _needed_bytes(self, adapter: Engine, path: Path | None) -> int | None:
        if path is None:
            return None
        facts = read_model_info(path)
        wishes = adapter.wishes()
        cache = kv_cache_bytes(facts, self._settings, wishes) or 0
        others = sum(_size(Path(name).expanduser()) or 0 for name in wishes.files)
        return facts.weights_bytes + others + cache + (estimate_compute_buffer(facts.vocabulary_tokens) or 0)

    def _saved_power(self) -> str:
        policy, power = self._settings.warmth.on_battery, self._host.power()
        if policy == "same" or self._settings.warmth.mode == "off":
            return ""
        how = "nothing is warmed" if policy == "off" else "it is warmed six times less often"
        if power.is_low_power:
            return f"low power mode is on: {how}"
        return f"on battery: {how}" if power.source is PowerSource.BATTERY else ""

    # --- the daemon -----------------------------------------------------------------------------------------

    async def _service(self, known: ServiceHealth) -> ServiceHealth:
        status, endpoint, paths = self._status, self._settings.endpoint, self._paths
        owner, address_problem = None, ""
        is_there = bool(known.silence or known.waits_because)
        if not status and not is_there:
            tried = await self._ask("port", lambda: neighbours.try_port(endpoint.host, endpoint.port))
            owner, address_problem = tried or (None, "")
            if known.is_loaded and owner is not None and owner.pid is None:
                owner = None  # launchd itself: root's, so that its name is not told
        return replace(
            known,
            is_running=None if is_there else bool(status),
            port=endpoint.port,
            port_owner=owner,
            address_problem=address_problem,
            state_problem=await self._ask("state directory", lambda: own_health.state_problem(paths.directory))
            or "",
            history_problem=await self._ask("history", lambda: own_health.history_problem(paths.history)) or "",
            rooms=await self._ask("disks", lambda: own_health.rooms(self._places())) or (),
            engine_log_bytes=await self._ask("engine.log's size", lambda: _size(paths.output)),
            clock_behind_s=await self._ask("clock", lambda: own_health.clock_behind_s(paths)),
            most_open_files=await self._ask("open files", own_health.most_open_files),
            is_throttled=self._place.is_throttled if status else None,
            is_translated=self._place.is_translated,
            logs_persist=are_logs_kept(status.get("log"), self._place.logs_persist),
            lingers=self._place.lingers,
            psutil_failure=await self._ask("psutil", own_health.psutil_failure) or "",
            psutil_version=psutil.__version__,
        )

    def _places(self) -> list[tuple[str, Path]]:
        """Return what is written while emberd runs: to a full disk the log is lost first."""
        places = [
            ("the state directory and the engine's log", self._paths.directory),
            ("the log", log_file(self._settings, self._host.name)),
        ]
        if self._host.name == "darwin":
            places.append(("swap files", Path("/System/Volumes/VM")))  # of APFS' container, as the others
        return places


def _waste(warmth: Mapping[str, Any]) -> str:
    """Say what keep-warm has cost without saving anything, by the engine's own counts; empty if nothing."""
    reuse, words = warmth.get("reuse") or {}, []
    if reuse.get("barred"):
        if reuse["misses"]:
            words.append(
                f"{reuse['misses']} of {reuse['replays']} replays did not find their prompt in the engine's cache "
                f"and processed {reuse['wasted_tokens']} tokens"
            )
        if reuse["lost_turns"]:
            words.append(f"{reuse['lost_turns']} turns of users did not find the prompt that replays had kept")
        words.append(f"no more replays are sent to this engine ({', '.join(reuse['barred'])})")
    if warmth.get("over_budget_for_s"):
        words.append(
            f"more than {BUDGET_SHARE:.0%} of a core within {BUDGET_WINDOW_S / 60:.0f} minutes while no memory was "
            f"taken; the next pass waits for {warmth['over_budget_for_s']:.0f} s"
        )
    return "; ".join(words)


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
