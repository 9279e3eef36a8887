"""Looks at a daemon's status, emberd's own port, files and process, and other model servers."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import sqlite3
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from emberd.core.access import is_loopback
from emberd.core.errors import ConfigError, PortTaken
from emberd.core.lock import LockState
from emberd.doctor.facts import DaemonHealth, FreeSpace, Program, ServiceHealth
from emberd.host.api_key import read_api_key
from emberd.host.listener import addresses, bind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from emberd.core.settings import Settings
    from emberd.host.paths import StatePaths


def read_status(status: Mapping[str, Any] | None) -> DaemonHealth:
    """Return the facts in a daemon's status, None without a daemon."""
    if not status:
        return DaemonHealth()
    engine, lock = status.get("engine") or {}, status.get("lock") or {}
    heartbeat, warmth = status.get("metal_heartbeat") or {}, status.get("warmth") or {}
    reuse, memory = warmth.get("reuse") or {}, (status.get("memory") or {}).get("engine") or {}
    crashes, sinks = status.get("crashes_in_a_row"), status.get("log")
    return DaemonHealth(
        answers=True,
        pid=status.get("pid"),
        engine_pid=engine.get("pid"),
        engine_started_at=engine.get("started_at"),
        has_failed=status.get("state") == "FAILED",
        crashes=crashes if status.get("state") == "BACKOFF" or (crashes or 0) > 1 else None,
        last_words=status.get("reason") or status.get("last_exit") or "",
        heartbeat_problem=heartbeat.get("message") or "",
        heartbeat_remedy=heartbeat.get("remedy") or "",
        endpoint_lacks=status.get("endpoint_lacks") or "",
        swapped_bytes=memory.get("swapped_bytes"),
        switched_to=_switched_to(status.get("serving") or {}),
        copied=_held(status, "copied"),
        replaced=_held(status, "replaced"),
        kv_cache_bytes=(status.get("context") or {}).get("kv_cache_bytes"),
        lock=LockState(lock["state"]) if lock else None,
        lock_message=lock.get("message") or "",
        lock_remedy=lock.get("remedy") or "",
        resident_share=(status.get("residency") or {}).get("share"),
        hold=warmth.get("hold"),
        is_helpless=warmth.get("is_helpless"),
        paused_for_s=warmth.get("paused_for_s"),
        cool_for_s=warmth.get("cool_for_s"),
        over_budget_for_s=warmth.get("over_budget_for_s"),
        barred=tuple(reuse.get("barred") or ()),
        **{name: reuse.get(name, 0) for name in ("replays", "misses", "wasted_tokens", "lost_turns")},
        notices={each["code"]: each["message"] for each in status.get("notices", ())},
        log_sinks=None if sinks is None else tuple(sinks),
    )


def _switched_to(serving: Mapping[str, Any]) -> str:
    if serving.get("is_of_settings", True):
        return ""
    return str(serving.get("model") or serving.get("name") or "no model")


def _held(status: Mapping[str, Any], how: str) -> tuple[str, ...]:
    """Return role and path of each file that is held so, without the model, of which the residency tells."""
    return tuple(
        f"{each['role']} {each['path']}"
        for each in status.get("files", ())
        if each["held"] == how and (each["role"], how) != ("model", "copied")
    )


# --- emberd's own settings, files and process ---------------------------------------------------------------------

_OTHERS = 0o077
_SQLITE_LIMIT_S = 1.0


def examine_access(settings: Settings, path: Path) -> ServiceHealth:
    """Return which of key and address in this settings file keeps emberd from starting."""
    endpoint, known = settings.endpoint, ServiceHealth(settings_path=str(path))
    try:
        read_api_key(settings, path)
    except ConfigError as error:
        named = Path(endpoint.api_key_file).expanduser() if endpoint.api_key_file else path
        has_key = bool(endpoint.api_key_file or endpoint.api_key)
        with contextlib.suppress(OSError):
            mode = stat.S_IMODE(named.stat().st_mode)
            if has_key and mode & _OTHERS:
                return replace(known, open_secret=str(named), open_secret_mode=mode)
        if not has_key and not is_loopback(endpoint.host):
            return replace(known, open_address=endpoint.host)
        return replace(known, settings_problem=error.message, settings_remedy=error.remedy)
    return known


def state_problem(directory: Path) -> str:
    """Return why emberd cannot use its state directory, empty if it can; nothing is made or changed."""
    if not directory.exists():
        above = _existing(directory)
        return "" if _can_write(above) else f"{directory} cannot be made: {above} is not yours to write"
    if not directory.is_dir():
        return f"{directory} is no folder"
    owner = directory.stat().st_uid
    if owner != os.geteuid():
        return f"{directory} belongs to user {owner}, not to {os.geteuid()}"
    return "" if _can_write(directory) else f"{directory} is not yours to write, or is on a read-only volume"


def _can_write(directory: Path) -> bool:
    """Ask the kernel: a volume can be read-only, and root may write to any other."""
    return os.access(directory, os.W_OK | os.X_OK)


def history_problem(path: Path) -> str:
    """Return what is wrong with the database, empty if nothing or if there is none."""
    if not path.exists():
        return ""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_SQLITE_LIMIT_S)
        ) as database:
            answer = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        return f"{path}: {error}"
    return "" if answer == "ok" else f"{path}: {answer}"


def free_spaces(places: Iterable[tuple[str, Path]]) -> tuple[FreeSpace, ...]:
    """Return the free bytes of each volume once, with what is written there; paths may not exist yet."""
    found: dict[int, FreeSpace] = {}
    for what, place in places:
        path = _existing(place)
        found.setdefault(path.stat().st_dev, FreeSpace(what, str(path), shutil.disk_usage(path).free))
    return tuple(found.values())


def _existing(path: Path) -> Path:
    """Return the path, or the nearest existing folder above it."""
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))


def clock_behind_s(paths: StatePaths) -> float | None:
    """Return by how much emberd's newest file is ahead of the clock, None if there is none."""
    times = [path.stat().st_mtime for path in (paths.record, paths.history, paths.output) if path.exists()]
    return max(times) - time.time() if times else None


def most_open_files() -> int | None:
    """Return the hard limit of open files of this process, None if there is none."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if most == resource.RLIM_INFINITY else most


def psutil_failure(ask: Callable[[], Any] = psutil.virtual_memory) -> str:
    """Return psutil's version and its error for this system's memory, empty if it answers.

    Up to 7.2.2 its buffer is too short for macOS 26: RuntimeError in nine of ten calls (psutil issue 2853).
    """
    for _ in range(5):
        try:
            ask()
        except (RuntimeError, OSError) as error:
            return f"{psutil.__version__}: {error}"
    return ""


# --- other programs that are in the way ---------------------------------------------------------------------------

_SERVERS = re.compile(r"(koboldcpp|ollama|llama-server|lm[ -]studio|lms$|llamafile|mlx_lm)", re.IGNORECASE)
_INTERPRETER = re.compile(r"python[\d.]*$", re.IGNORECASE)
"""Interpreters: a process counts by its script's name; an editor that has the script open does not."""
_MANAGERS = frozenset({"systemd", "launchd"})
"""Service managers, which hold emberd's socket themselves."""


def other_servers(own: set[int | None]) -> list[Program]:
    """Return other programs that serve models, without the processes `own` and their children."""
    found = []
    for process in psutil.process_iter(["pid", "ppid", "name", "cmdline", "memory_info"]):
        info = process.info
        line = [Path(word).name for word in info["cmdline"] or ()]
        words = [*line[:1], info["name"] or ""]
        if line and _INTERPRETER.match(line[0]):
            words += line[1:4]  # options, -m and its module, or the script
        name = next((word for word in words if _SERVERS.match(word)), None)
        if name and info["pid"] not in own and info["ppid"] not in own:
            memory = info["memory_info"]
            found.append(Program(name, info["pid"], memory.rss if memory else None))
    return found


def try_port(host: str, port: int) -> tuple[Program | None, str]:
    """Bind the endpoint's port as emberd would, and close it.

    Nothing connects, because a connection would start an emberd whose socket a service manager holds.

    Returns:
        The program that listens there, and why the address cannot be used; None and empty if emberd could start.
        The system does not name another user's program.
    """
    try:
        for address in addresses(host):
            bind(address, port).close()
    except PortTaken:
        owner = _listener(port)
        return (None if owner.name in _MANAGERS else owner), ""
    except (ConfigError, OSError) as error:
        return None, error.message if isinstance(error, ConfigError) else f"{host}: {error}"
    return None, ""


def _listener(port: int) -> Program:
    for process in psutil.process_iter(["pid", "name"]):
        try:
            connections = process.net_connections("tcp")
        except (psutil.Error, OSError):
            continue
        if any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections):
            return Program(process.info["name"] or "a program", process.info["pid"])
    return Program("a program of another user")
