"""Conditions of emberd's own files, its port and the clock. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.health import Condition, Kind, Severity, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emberd.core.health_facts import Facts, ServiceHealth

_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
LEAST_FREE_BYTES = 512 << 20
"""The engine's log, its rotated copies and the history need some 100 MiB; below this a disk is as good as full."""
HUGE_LOG_BYTES = 1 << 30
CLOCK_SLACK_S = 300.0
"""A network volume's clock may differ from ours by as much."""
LEAST_OPEN_FILES = 256
"""64 of emberd's own and two for each of 96 connections: beyond the 24 that KoboldCPP serves, with room to wait."""

KINDS: dict[str, Kind] = {
    "SETTINGS_OPEN": Kind(_E, "Others can read a file that holds a key"),
    "SETTINGS_WRONG": Kind(_E, "The settings cannot be used", ("SETTINGS_OPEN", "ENDPOINT_OPEN")),
    "ENDPOINT_OPEN": Kind(_E, "Others could reach the model, and no key is asked for"),
    "ADDRESS_UNUSABLE": Kind(_E, "The endpoint's address cannot be used", ("SETTINGS_WRONG",)),
    "PORT_TAKEN": Kind(_E, "Another program listens on emberd's port", ("SETTINGS_WRONG",)),
    "STATE_UNUSABLE": Kind(_E, "The state directory cannot be used", ("SETTINGS_WRONG", "DISK_FULL")),
    "DISK_FULL": Kind(_E, "A disk is full"),
    "SETTINGS_NOT_IN_FORCE": Kind(_W, "The settings have changed since emberd read them"),
    "HISTORY_UNREADABLE": Kind(_W, "The history cannot be read", ("STATE_UNUSABLE", "DISK_FULL")),
    "LOG_HUGE": Kind(_W, "The engine's log is very large"),
    "CLOCK_BEHIND": Kind(_N, "The computer's clock was set back"),
    "FEW_OPEN_FILES": Kind(_W, "emberd may open only few files"),
}


def of_files(facts: Facts) -> Iterator[Condition]:
    """Yield what is wrong with the settings, the port, and the state directory."""
    yield from _of_settings(facts.service)
    yield from _of_endpoint(facts.service)
    yield from _of_state(facts.service)


def _of_settings(service: ServiceHealth) -> Iterator[Condition]:
    yield from when(
        bool(service.settings_problem), "SETTINGS_WRONG", service.settings_problem, service.settings_remedy
    )
    yield from when(
        bool(service.open_secret),
        "SETTINGS_OPEN",
        f"{service.open_secret} has mode {service.open_secret_mode:04o}, and emberd refuses such a file",
        f"chmod 600 {service.open_secret}, and choose a new key.",
    )
    yield from when(
        service.are_settings_newer,
        "SETTINGS_NOT_IN_FORCE",
        f"{service.settings_path} says something else than what emberd runs with",
        "emberd reload",
    )


def _of_endpoint(service: ServiceHealth) -> Iterator[Condition]:
    yield from when(
        bool(service.open_address),
        "ENDPOINT_OPEN",
        f"endpoint.host is {service.open_address}; emberd does not start like this",
        "Set endpoint.api_key_file, or endpoint.host to 127.0.0.1 and use a tunnel (ssh -L).",
    )
    yield from when(
        bool(service.address_problem),
        "ADDRESS_UNUSABLE",
        service.address_problem,
        "Set endpoint.host to an address of this computer and endpoint.port to 1024 or more.",
    )
    owner = service.port_owner
    if owner is not None:
        whom = owner.name if owner.pid is None else f"{owner.name} (pid {owner.pid})"
        yield Condition(
            "PORT_TAKEN",
            f"{whom} listens on {service.port}",
            ("End it" if owner.pid is None else f"End it: kill {owner.pid}") + ", or set endpoint.port.",
        )
    most = service.most_open_files
    yield from when(
        None if most is None else most < LEAST_OPEN_FILES,
        "FEW_OPEN_FILES",
        f"the hard limit is {most}, and a request takes two",
        "Raise it: LimitNOFILE= of the unit, HardResourceLimits of the property list, or ulimit -Hn.",
    )


def _of_state(service: ServiceHealth) -> Iterator[Condition]:
    yield from when(
        bool(service.state_problem),
        "STATE_UNUSABLE",
        service.state_problem,
        "Make it yours (chown, chmod 700), or set state.directory.",
    )
    for room in service.rooms:
        yield from when(
            room.free_bytes < LEAST_FREE_BYTES,
            "DISK_FULL",
            f"{room.free_bytes >> 20} MiB free for {room.what} ({room.path})",
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
    behind_s = service.clock_behind_s
    yield from when(
        None if behind_s is None else behind_s > CLOCK_SLACK_S,
        "CLOCK_BEHIND",
        f"files of emberd are {(behind_s or 0) / 3600:.1f} h younger than now",
        "Set the clock; emberd waits by another one, only dates in the history and the logs are wrong.",
    )
