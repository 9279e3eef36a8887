"""emberd's own files and process as a doctor sees them: settings, state directory, disks, clock, limits."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sqlite3
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from emberd.core.access import is_loopback
from emberd.core.errors import ConfigError
from emberd.core.health_facts import Room, ServiceHealth
from emberd.host.api_key import read_api_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from emberd.core.settings import Settings
    from emberd.host.paths import StatePaths

_OTHERS = 0o077
_SQLITE_LIMIT_S = 1.0


def examine_access(settings: Settings, path: Path) -> ServiceHealth:
    """Return what of the key and the endpoint's address would keep emberd from starting.

    Args:
        settings: as read from `path`.
        path: the settings file.
    """
    endpoint = settings.endpoint
    known = ServiceHealth(settings_path=str(path))
    try:
        read_api_key(settings, path)
    except ConfigError as error:
        named = Path(endpoint.api_key_file).expanduser() if endpoint.api_key_file else path
        with contextlib.suppress(OSError):
            mode = stat.S_IMODE(named.stat().st_mode)
            if (endpoint.api_key_file or endpoint.api_key) and mode & _OTHERS:
                return ServiceHealth(settings_path=str(path), open_secret=str(named), open_secret_mode=mode)
        if not endpoint.api_key_file and not endpoint.api_key and not is_loopback(endpoint.host):
            return ServiceHealth(settings_path=str(path), open_address=endpoint.host)
        return ServiceHealth(settings_path=str(path), settings_problem=error.message, settings_remedy=error.remedy)
    return known


def state_problem(directory: Path) -> str:
    """Return why emberd could not use its state directory, empty if it can; nothing is made or changed."""
    if not directory.exists():
        above = existing(directory)
        return "" if _can_write(above) else f"{directory} cannot be made: {above} is not yours to write"
    if not directory.is_dir():
        return f"{directory} is no folder"
    owner = directory.stat().st_uid
    if owner != os.geteuid():
        return f"{directory} belongs to user {owner}, not to {os.geteuid()}"
    return "" if _can_write(directory) else f"{directory} is not yours to write, or is on a read-only volume"


def _can_write(directory: Path) -> bool:
    """Ask the kernel: a volume can be read-only, and root may write wherever it can be written at all."""
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


def rooms(places: Iterable[tuple[str, Path]]) -> tuple[Room, ...]:
    """Return the free bytes of each volume once, with what is written there; a path may not exist yet."""
    found: dict[int, Room] = {}
    for what, place in places:
        path = existing(place)
        found.setdefault(path.stat().st_dev, Room(what, str(path), shutil.disk_usage(path).free))
    return tuple(found.values())


def existing(path: Path) -> Path:
    """Return the path, or what is above it and exists."""
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))


def clock_behind_s(paths: StatePaths) -> float | None:
    """Return by how much the youngest file of emberd is younger than now, None if there is none."""
    times = [path.stat().st_mtime for path in (paths.record, paths.history, paths.output) if path.exists()]
    return max(times) - time.time() if times else None


def most_open_files() -> int | None:
    """Return the hard limit of open files of this process, None if there is none."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if most == resource.RLIM_INFINITY else most


def psutil_failure(ask: Callable[[], Any] = psutil.virtual_memory) -> str:
    """Return what psutil raises for this system's memory, empty if it answers.

    Up to 7.2.2 its buffer is shorter than macOS 26 wants: RuntimeError, in nine of ten calls (psutil issue 2853).
    """
    for _ in range(5):
        try:
            ask()
        except (RuntimeError, OSError) as error:
            return str(error)
    return ""
