"""Gathers what `emberd doctor` judges: each fact fails alone, and what could not be told is named.

It runs within the daemon where there is one, because macOS answers an agent differently than a terminal; what only
the caller knows (its version, the service file) is added by the verb.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import sqlite3
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from emberd.core.errors import ConfigError, EmberdError, EngineNotUsable, StateUnusable
from emberd.core.health_facts import (
    EngineHealth,
    EngineProblem,
    Facts,
    MemoryHealth,
    Program,
    ServiceHealth,
)
from emberd.core.health_service import diagnose
from emberd.core.kv_cache import estimate_compute_buffer, estimate_kv_cache
from emberd.core.lock import LockState
from emberd.engine.choose import choose_engine
from emberd.engine.http import EngineHttp
from emberd.engine.http import client as http_client
from emberd.host.model_facts import read_model_facts
from emberd.host.model_health import examine_model
from emberd.host.paths import prepare, state_paths
from emberd.services.lock_meter import context_tokens
from emberd.services.supervisor import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from emberd.core.ports import Host
    from emberd.core.settings import Settings
    from emberd.host.paths import StatePaths

T = TypeVar("T")
LIMIT_S = 20.0
"""A single question; the engine's --help may have to unpack itself first and is then unknown."""
_SERVERS = re.compile(r"^(koboldcpp|ollama|llama-server|lm[ -]studio|lms|llamafile|mlx_lm)", re.IGNORECASE)
_OFFLOADED = re.compile(r"offloaded (\d+)/\d+ layers to GPU")
"""llama.cpp, src/llama-model.cpp."""
_LOG_TAIL_BYTES = 1 << 20
_UNLOADING = ("--adminunloadtimeout", "--autoswapmode", "--sleep-idle-seconds")
_LOCKING = frozenset({"--usemlock", "--mlock", "--load-mode"})
"""KoboldCPP's option and llama.cpp's, old and new."""
_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64"}
"""ELF e_machine (elf.h)."""
_MACH_O = {0x01000007: "x86_64", 0x0100000C: "arm64"}
"""Mach-O cputype (<mach/machine.h>)."""
_CONNECT_S = 1.0


async def examine(host: Host, settings: Settings, status: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return every condition and what is not known, as plain values; symptoms stand beside their causes.

    Args:
        host: this computer.
        settings: in force.
        status: what the daemon says of itself, None without one.
    """
    facts = await Examination(host, settings, status).facts()
    return {"conditions": [asdict(each) for each in diagnose(facts)], "unknown": list(facts.unknown)}


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
        self._status = status
        self._unknown: list[str] = []
        self._paths = state_paths(settings)

    async def facts(self) -> Facts:
        """Gather; bounded by a few LIMIT_S."""
        model = await self._ask("model", lambda: examine_model(self._settings.model.path, self._host.name))
        if model is None or (not self._settings.model.path and self._settings.engine.kcpps):
            model = replace(Facts(self._host.name).model, path="named in engine.kcpps")
        engine = await self._engine()
        memory = await self._memory()
        service = await self._service()
        return Facts(self._host.name, model, engine, memory, service, tuple(self._unknown))

    async def _ask(self, what: str, question: Callable[[], T]) -> T | None:
        """Return the answer of something that blocks; None if it fails or takes too long, which is noted."""
        try:
            async with asyncio.timeout(LIMIT_S):
                return await asyncio.to_thread(question)
        except TimeoutError:
            self._unknown.append(f"{what}: no answer within {LIMIT_S:g} s")
        except Exception as error:  # noqa: BLE001  # one unreadable thing must not hide the others
            self._unknown.append(f"{what}: {error}")
        return None

    # --- the engine -----------------------------------------------------------------------------------------

    async def _engine(self) -> EngineHealth:
        engine, status = self._settings.engine, self._status
        health = await self._program()
        words = (*engine.extra_args, *(await self._ask("engine.kcpps", self._kcpps_words) or ()))
        log = await self._ask("engine.log", lambda: _tail(self._paths.output)) or ""
        offloaded = _OFFLOADED.findall(log)
        health = replace(
            health,
            unloads_when_idle=next((word for word in words if word.partition("=")[0] in _UNLOADING), None),
            wants_gpu=engine.gpu_layers > 0 or (engine.gpu_layers < 0 and self._host.name == "darwin"),
            has_gpu=int(offloaded[-1]) > 0 if offloaded else None,
            wants_lock=engine.lock != "never",
        )
        if status is None:
            return health
        lock = status["lock"] or {}
        return replace(
            health,
            is_running=status["engine"] is not None,
            has_failed=status["state"] == "FAILED",
            last_words=status["reason"] or "",
            lock=LockState(lock["state"]) if lock else None,
            lock_message=lock.get("message") or "",
            lock_remedy=lock.get("remedy") or "",
        )

    async def _program(self) -> EngineHealth:
        """Return what is wrong with the program, from what can be seen to what it says itself."""
        path = Path(self._settings.engine.path).expanduser()
        if self._settings.engine.path and path.is_absolute():
            seen = await self._ask("engine", lambda: look_at_program(path, self._host))
            if seen is not None and seen.problem is not None:
                return seen
        try:
            async with asyncio.timeout(LIMIT_S), http_client() as client:
                adapter = choose_engine(self._settings, self._host, EngineHttp(client), self._paths)
                plan = await adapter.plan(free_port(), will_lock=self._settings.engine.lock != "never")
        except TimeoutError:
            self._unknown.append(f"engine: its --help took more than {LIMIT_S:g} s")
            return EngineHealth()
        except EmberdError as error:
            if isinstance(error, EngineNotUsable):
                problem = EngineProblem.MISSING if "not found" in error.message else EngineProblem.REFUSES
                return EngineHealth(problem, error.message, error.remedy)
            if isinstance(error, ConfigError):
                return EngineHealth(EngineProblem.REFUSES, error.message, error.remedy)
            return EngineHealth()  # the model: told there
        wants_lock = self._settings.engine.lock != "never"
        lacks = () if not wants_lock or _LOCKING.intersection(plan.arguments) else ("--usemlock",)
        return EngineHealth(lacks=lacks)

    def _kcpps_words(self) -> tuple[str, ...]:
        import json  # noqa: PLC0415

        if not self._settings.engine.kcpps:
            return ()
        tree = json.loads(Path(self._settings.engine.kcpps).expanduser().read_text())
        return tuple(f"--{key}" for key, value in tree.items() if value and f"--{key}" in _UNLOADING)

    # --- memory ---------------------------------------------------------------------------------------------

    async def _memory(self) -> MemoryHealth:
        status = self._status or {}
        warmth, residency = status.get("warmth") or {}, status.get("residency") or {}
        engine = status.get("engine") or {}
        own = {os.getpid(), engine.get("pid"), status.get("pid")}
        system = await self._ask("memory", self._host.system_memory)
        limits = await self._ask("lock limits", lambda: self._host.lock_limits(None))
        place = await self._ask("process", lambda: self._host.health(status.get("pid") or os.getpid()))
        return MemoryHealth(
            **({"system": system} if system else {}),
            needed_bytes=await self._ask("model's needs", self._needed_bytes),
            limits=limits,
            gpu=await self._ask("GPU", self._host.gpu_limits),
            cgroup_limit_bytes=place.cgroup_limit_bytes if place else None,
            resident_share=residency.get("share"),
            others=tuple(await self._ask("other programs", lambda: other_servers(own)) or ()),
            hold=warmth.get("hold"),
            warmth_mode=self._settings.warmth.mode,
            paused_for_s=warmth.get("paused_for_s"),
        )

    def _needed_bytes(self) -> int | None:
        if not self._settings.model.path:
            return None
        try:
            facts = read_model_facts(Path(self._settings.model.path).expanduser())
        except EmberdError:
            return None  # told of the model
        cache = estimate_kv_cache(facts.metadata, context_tokens(self._settings)).size_bytes or 0
        return facts.weights_bytes + cache + (estimate_compute_buffer(facts.vocabulary_tokens) or 0)

    # --- the daemon -----------------------------------------------------------------------------------------

    async def _service(self) -> ServiceHealth:
        status, endpoint = self._status, self._settings.endpoint
        place = await self._ask("process", lambda: self._host.health((status or {}).get("pid") or os.getpid()))
        usage = await self._ask("disk", lambda: shutil.disk_usage(_existing(self._paths.directory)))
        return ServiceHealth(
            is_running=status is not None,
            daemon_version=status["version"] if status else "",
            port=endpoint.port,
            port_owner=None
            if status
            else await self._ask("port", lambda: port_owner(endpoint.host, endpoint.port)),
            state_problem=await self._ask("state directory", lambda: _state_problem(self._paths)) or "",
            history_problem=await self._ask("history", lambda: _history_problem(self._paths.history)) or "",
            state_free_bytes=usage.free if usage else None,
            engine_log_bytes=await self._ask("engine.log", lambda: _size(self._paths.output)),
            is_throttled=place.is_throttled if place else None,
            is_translated=place.is_translated if place else None,
            logs_persist=place.logs_persist if place else None,
            lingers=place.lingers if place else None,
        )


def look_at_program(path: Path, host: Host) -> EngineHealth:
    """Judge an engine's file without starting it."""
    if not path.exists():
        return EngineHealth(EngineProblem.MISSING, f"{path} does not exist", "Set engine.path.")
    if path.is_dir() or path.suffix == ".py":
        return EngineHealth()
    if not os.access(path, os.X_OK):
        return EngineHealth(EngineProblem.NOT_EXECUTABLE, f"{path} is not executable", f"chmod +x {path}")
    if host.quarantine(path):
        words = (
            f"{path} was downloaded and not approved: started in the background it would be killed without a word"
        )
        return EngineHealth(EngineProblem.QUARANTINED, words, f"xattr -d com.apple.quarantine {path}")
    built_for, machine = machines_of(path), os.uname().machine
    if built_for and machine not in built_for:
        words = f"{path} is built for {' and '.join(sorted(built_for))}, this computer is {machine}"
        return EngineHealth(EngineProblem.WRONG_ARCHITECTURE, words, "Download the build for this computer.")
    return EngineHealth()


def machines_of(path: Path) -> frozenset[str]:
    """Return the processors that a program is built for, in uname's words; none if it is no ELF and no Mach-O.

    Layouts: elf(5); <mach-o/loader.h>, <mach-o/fat.h>.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    found: set[str | None] = set()
    if head[:4] == b"\x7fELF" and len(head) > 20:  # noqa: PLR2004  # e_machine's end
        found = {_MACHINES.get(struct.unpack_from("<H", head, 18)[0])}
    elif head[:4] == b"\xcf\xfa\xed\xfe":
        found = {_MACH_O.get(struct.unpack_from("<I", head, 4)[0])}
    elif head[:4] == b"\xca\xfe\xba\xbe":
        count = min(struct.unpack_from(">I", head, 4)[0], 16)
        found = {_MACH_O.get(struct.unpack_from(">I", head, 8 + 20 * number)[0]) for number in range(count)}
    return frozenset(each for each in found if each)


def other_servers(own: set[int | None]) -> list[Program]:
    """Return other programs here that serve models, without `own` processes and their children."""
    found = []
    for process in psutil.process_iter(["pid", "ppid", "name", "cmdline", "memory_info"]):
        facts = process.info
        words = [Path(word).name for word in (facts["cmdline"] or [])[:2]] + [facts["name"] or ""]
        name = next((word for word in words if _SERVERS.match(word)), None)
        if name and facts["pid"] not in own and facts["ppid"] not in own:
            memory = facts["memory_info"]
            found.append(Program(name, facts["pid"], memory.rss if memory else None))
    return found


def port_owner(host: str, port: int) -> Program | None:
    """Return who listens on a port; its name stays open where the system does not tell it."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            pass
    except OSError:
        return None
    for process in psutil.process_iter(["pid", "name"]):
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:
            continue
        if any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections):
            return Program(process.info["name"] or "a program", process.info["pid"])
    return Program("a program of another user")


def _state_problem(paths: StatePaths) -> str:
    try:
        prepare(paths)
    except StateUnusable as error:
        return error.message
    return "" if os.access(paths.directory, os.W_OK | os.X_OK) else f"{paths.directory} is not yours to write"


def _history_problem(path: Path) -> str:
    if not path.exists():
        return ""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=_CONNECT_S)) as database:
            answer = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        return f"{path}: {error}"
    return "" if answer == "ok" else f"{path}: {answer}"


def _existing(path: Path) -> Path:
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _LOG_TAIL_BYTES, 0))
        return file.read(_LOG_TAIL_BYTES).decode("utf-8", "replace")
