"""What Linux and systemd say about the place of a process."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import TYPE_CHECKING

from emberd.core.host_health import HostHealth

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNLIMITED = 1 << 60
"""cgroup v1 writes the largest page count for "no limit" (Documentation/admin-guide/cgroup-v1/memory.rst)."""
_JOURNAL = Path("var/log/journal")
"""journald.conf(5), Storage=auto: the journal is on disk if this folder exists."""
_LINGER = Path("var/lib/systemd/linger")
"""A file for each lingering user (loginctl(1), enable-linger; systemd, src/login/logind-user.c)."""
_BOOTED = Path("run/systemd/system")
"""sd_booted(3): the folder exists where systemd is the init."""


def read_health(pid: int, proc: Path, root: Path = Path("/")) -> HostHealth:
    """Return what is known; without systemd its questions stay open.

    Args:
        pid: the process that is asked about.
        proc: where /proc is.
        root: where the other files are; a test has its own.
    """
    has_systemd = (root / _BOOTED).is_dir()
    return HostHealth(
        cgroup_limit_bytes=min(_limits(pid, proc, root / "sys/fs/cgroup"), default=None),
        lingers=(root / _LINGER / _user()).exists() if has_systemd else None,
        logs_persist=(root / _JOURNAL).is_dir() if has_systemd else None,
        machine=os.uname().machine,
        swappiness=_number(proc / "sys/vm/swappiness"),
    )


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _limits(pid: int, proc: Path, root: Path) -> Iterator[int]:
    """Yield the limits of the process's memory cgroup and of those above it (cgroups(7), /proc/PID/cgroup)."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _climb(root, path, "memory.max")
            yield from _climb(root, path, "memory.high")  # beyond it the group is slowed down and reclaimed
        elif "memory" in controllers.split(","):
            yield from _climb(root / "memory", path, "memory.limit_in_bytes")


def _climb(root: Path, path: str, name: str) -> Iterator[int]:
    folder = root / path.lstrip("/")
    while folder.is_relative_to(root):
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            text = ""
        if text.isdecimal() and int(text) < _UNLIMITED:
            yield int(text)
        folder = folder.parent
