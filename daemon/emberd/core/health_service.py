"""Conditions of the daemon, its files and its service manager; and the catalogue of all. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core import health_memory, health_model
from emberd.core.health import Condition, Kind, Severity, visible, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emberd.core.health_facts import Facts

_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
LEAST_FREE_BYTES = 512 << 20
"""The engine's log, its rotated copies and the history need some 100 MiB; below this a disk is as good as full."""
HUGE_LOG_BYTES = 1 << 30
_OTHERS_CAN_READ = 0o077

KINDS: dict[str, Kind] = {
    "SETTINGS_OPEN": Kind(_E, "Others can read the settings file, which holds a key"),
    "SETTINGS_WRONG": Kind(_E, "The settings file is wrong", ("SETTINGS_OPEN",)),
    "STATE_UNUSABLE": Kind(_E, "The state directory cannot be used", ("SETTINGS_WRONG", "DISK_FULL")),
    "DISK_FULL": Kind(_E, "The disk is full"),
    "PORT_TAKEN": Kind(_E, "Another program listens on emberd's port", ("SETTINGS_WRONG",)),
    "NOT_RUNNING": Kind(
        _E, "emberd is not running", ("SETTINGS_WRONG", "STATE_UNUSABLE", "DISK_FULL", "PORT_TAKEN", "SERVICE_FILE")
    ),
    "SERVICE_FILE": Kind(_E, "The service manager refuses emberd's service file"),
    "SERVICE_STALE": Kind(_W, "The installed service file is not this version's"),
    "SERVICE_MISSING": Kind(_N, "No service manager starts emberd"),
    "DAEMON_OLD": Kind(_W, "The running daemon is another version"),
    "THROTTLED": Kind(_W, "The system throttles emberd and its engine", ("SERVICE_STALE",)),
    "NO_LINGER": Kind(_W, "emberd ends when you log out"),
    "LOGS_NOT_KEPT": Kind(_W, "What emberd says is not kept"),
    "LOG_HUGE": Kind(_W, "The engine's log is very large"),
    "HISTORY_UNREADABLE": Kind(_W, "The history cannot be read", ("STATE_UNUSABLE", "DISK_FULL")),
    "PSUTIL_TOO_OLD": Kind(_W, "psutil is too old for this system"),
}

CATALOGUE: dict[str, Kind] = {**KINDS, **health_model.KINDS, **health_memory.KINDS}


def diagnose(facts: Facts) -> list[Condition]:
    """Return all conditions, the worst first; none is hidden."""
    every = [
        *of_service(facts),
        *health_model.of_model(facts),
        *health_model.of_engine(facts),
        *health_memory.of_memory(facts),
    ]
    return sorted(every, key=lambda each: _rank(each.code))


def causes(facts: Facts) -> list[Condition]:
    """Return what to show: symptoms are left out beside their cause."""
    return visible(diagnose(facts), CATALOGUE)


def _rank(code: str) -> tuple[int, int]:
    return list(Severity).index(CATALOGUE[code].severity), list(CATALOGUE).index(code)


def of_service(facts: Facts) -> Iterator[Condition]:
    """Yield what is wrong with the daemon, its files and its service."""
    yield from _of_files(facts)
    yield from _of_manager(facts)


def _of_files(facts: Facts) -> Iterator[Condition]:
    service = facts.service
    yield from when(
        bool(service.settings_problem), "SETTINGS_WRONG", service.settings_problem, service.settings_remedy
    )
    mode = service.settings_mode
    yield from when(
        None if mode is None else bool(mode & _OTHERS_CAN_READ),
        "SETTINGS_OPEN",
        f"its mode is {mode or 0:04o}",
        "chmod 600 the settings file, and choose a new key.",
    )
    yield from when(
        bool(service.state_problem),
        "STATE_UNUSABLE",
        service.state_problem,
        "Make it yours (chown, chmod 700), or set state.directory.",
    )
    free = service.state_free_bytes
    yield from when(
        None if free is None else free < LEAST_FREE_BYTES,
        "DISK_FULL",
        f"{(free or 0) >> 20} MiB free on the state directory's volume",
        "Make room; macOS needs it for swap files as well.",
    )
    yield from when(
        bool(service.history_problem),
        "HISTORY_UNREADABLE",
        service.history_problem,
        "Move history.db away; emberd begins a new one.",
    )
    size = service.engine_log_bytes
    yield from when(
        None if size is None else size > HUGE_LOG_BYTES,
        "LOG_HUGE",
        f"engine.log has {(size or 0) / 1e9:.1f} GB",
        "emberd restart rotates it; look at what the engine repeats.",
    )
    owner = service.port_owner
    if owner is not None:
        whom = owner.name if owner.pid is None else f"{owner.name} (pid {owner.pid})"
        yield Condition("PORT_TAKEN", f"{whom} listens on {service.port}", "End it, or set endpoint.port.")


def _of_manager(facts: Facts) -> Iterator[Condition]:
    service, is_mac = facts.service, facts.system == "darwin"
    yield from when(
        service.is_running is False,
        "NOT_RUNNING",
        "nothing answers the control socket",
        "emberd start, or emberd run to see what it says."
        if service.is_installed
        else "emberd install, or emberd run.",
    )
    yield from when(
        service.is_installed is False, "SERVICE_MISSING", "it was started by hand, or not at all", "emberd install"
    )
    yield from when(bool(service.stale), "SERVICE_STALE", service.stale, "emberd upgrade")
    yield from when(bool(service.file_problem), "SERVICE_FILE", service.file_problem, service.file_remedy)
    other = service.daemon_version
    yield from when(
        bool(other) and other != service.version,
        "DAEMON_OLD",
        f"the daemon is {other}, this program {service.version}",
        "emberd upgrade, or emberd restart --daemon; no connection is refused.",
    )
    yield from when(
        service.is_throttled,
        "THROTTLED",
        "its priority is that of a background program; Metal then decodes at an eighth of its speed",
        "emberd install writes ProcessType Interactive; then emberd restart --daemon.",
    )
    yield from when(
        service.lingers is False,
        "NO_LINGER",
        "systemd ends your services with your last session",
        "loginctl enable-linger",
    )
    yield from when(
        service.logs_persist is False,
        "LOGS_NOT_KEPT",
        "the unified log keeps only part of it" if is_mac else "the journal is kept in memory only",
        "See docs/logs.md." if is_mac else "sudo mkdir /var/log/journal && sudo systemctl restart systemd-journald",
    )
    yield from when(
        bool(service.psutil_version),
        "PSUTIL_TOO_OLD",
        f"psutil {service.psutil_version} fails on this macOS",
        "pip install --upgrade psutil in emberd's environment.",
    )
