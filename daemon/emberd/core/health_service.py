"""Conditions of the daemon and its service manager. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.health import Condition, Kind, Severity, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emberd.core.health_facts import Facts, ServiceHealth

_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
_NOT_STARTED = ("SERVICE_FILE", "SERVICE_DISABLED", "SERVICE_PROGRAM_MISSING")

KINDS: dict[str, Kind] = {
    "NOT_RUNNING": Kind(
        _E,
        "emberd is not running",
        (
            "SETTINGS_OPEN",
            "SETTINGS_WRONG",
            "ENDPOINT_OPEN",
            "ADDRESS_UNUSABLE",
            "STATE_UNUSABLE",
            "DISK_FULL",
            "PORT_TAKEN",
            "DAEMON_SILENT",
            *_NOT_STARTED,
        ),
    ),
    "DAEMON_SILENT": Kind(_E, "emberd is there and does not answer"),
    "SERVICE_DISABLED": Kind(_E, "The service is switched off"),
    "SERVICE_PROGRAM_MISSING": Kind(_E, "The service's program does not exist"),
    "SERVICE_FILE": Kind(_E, "The service manager refuses emberd's service file"),
    "SERVICE_STALE": Kind(_W, "The installed service file is not this version's", ("SERVICE_PROGRAM_MISSING",)),
    "SERVICE_MISSING": Kind(_N, "No service manager starts emberd"),
    "DAEMON_OLD": Kind(_W, "The running daemon is another version"),
    "THROTTLED": Kind(_W, "The system throttles emberd and its engine", ("SERVICE_STALE",)),
    "NO_LINGER": Kind(_W, "emberd ends when you log out"),
    "LOGS_NOT_KEPT": Kind(_W, "What emberd says is not kept"),
    "PSUTIL_TOO_OLD": Kind(_W, "psutil is too old for this system"),
}


def of_service(facts: Facts) -> Iterator[Condition]:
    """Yield what is wrong with the daemon and what starts it."""
    yield from _of_daemon(facts.service)
    yield from _of_manager(facts)
    yield from _of_place(facts)


def _of_daemon(service: ServiceHealth) -> Iterator[Condition]:
    who = "PID" if service.daemon_pid is None else str(service.daemon_pid)
    said = f"; the last one ended so: {service.last_words}" if service.last_words else ""
    yield from when(
        service.is_running is False,
        "NOT_RUNNING",
        f"nothing answers the control socket{said}",
        "emberd start, or emberd run to see what it says."
        if service.is_installed
        else "emberd install, or emberd run.",
    )
    yield from when(
        bool(service.silence),
        "DAEMON_SILENT",
        service.silence,
        f"kill -CONT {who} if it is stopped; else kill -9 {who}: the next emberd takes over its engine.",
    )
    yield from when(
        bool(service.waits_because),
        "WAITS",
        service.waits_because,
        "Mend the cause; it tries again by itself, or now: emberd restart.",
    )
    other = service.daemon_version
    yield from when(
        bool(other) and other != service.version,
        "DAEMON_OLD",
        f"the daemon is {other}, this program {service.version}",
        "emberd upgrade, or emberd restart --daemon; no connection is refused.",
    )


def _of_manager(facts: Facts) -> Iterator[Condition]:
    service = facts.service
    yield from when(
        service.is_installed is False, "SERVICE_MISSING", "it was started by hand, or not at all", "emberd install"
    )
    yield from when(
        service.is_disabled,
        "SERVICE_DISABLED",
        "it was disabled by hand, or in System Settings under Login Items",
        "emberd start" if facts.system == "darwin" else "systemctl --user unmask emberd.service emberd.socket",
    )
    yield from when(
        bool(service.missing_program),
        "SERVICE_PROGRAM_MISSING",
        f"{service.missing_program} is gone: its Python was updated, or its environment moved",
        "emberd install, with the emberd that you want to run.",
    )
    yield from when(bool(service.stale), "SERVICE_STALE", service.stale, "emberd upgrade")
    yield from when(
        bool(service.file_problem), "SERVICE_FILE", service.file_problem, "emberd install writes it again."
    )


def _of_place(facts: Facts) -> Iterator[Condition]:
    service, is_mac = facts.service, facts.system == "darwin"
    yield from when(
        service.is_throttled,
        "THROTTLED",
        "its priority is that of a background program; Metal then decodes at an eighth of its speed",
        "emberd install writes ProcessType Interactive; then emberd stop and emberd start.",
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
        'Set log.sink = "auto"; see docs/logs.md.'
        if is_mac
        else "sudo mkdir /var/log/journal && sudo systemctl restart systemd-journald",
    )
    yield from when(
        bool(service.psutil_failure),
        "PSUTIL_TOO_OLD",
        f"psutil {service.psutil_version}: {service.psutil_failure}",
        "pip install --upgrade psutil in emberd's environment.",
    )
