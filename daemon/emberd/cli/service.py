"""What the verbs about the service share: which manager and label, what is wanted, waiting for the daemon."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from emberd.cli.talk import ask_status
from emberd.core.errors import (
    AlreadyRunning,
    ConfigError,
    EmberdError,
    EngineFailed,
    NotRunning,
    ServiceManagerFailed,
)
from emberd.core.service import DEFAULT_LABEL, WantedService, full_label, stop_limit_s
from emberd.host import ThisHost, api_key, config_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from emberd.core.ports import ServiceManager
    from emberd.core.service import ServiceStatus
    from emberd.core.settings import Settings
    from emberd.core.status import Status

ManagerName = Literal["auto", "launchd", "systemd"]
_ANSWER_LIMIT_S = 30.0
"""A new emberd answers within a second; a computer that swaps takes longer."""
_UNDECIDED = {"STOPPED", "STARTING", "FAILED"}
_DECIDED_LIMIT_S = 5.0
_ASK_AGAIN_S = 0.1
_PASSED_ON = ("XDG_STATE_HOME",)
"""Variables that decide where emberd's files are: the daemon must see what its owner's shell sees."""

with_label = click.option(
    "--label",
    metavar="NAME",
    help="Which emberd, if there are several. Default: the one installed with these settings, else "
    f"{DEFAULT_LABEL}. A name without a dot is put behind that.",
)
with_manager = click.option(
    "--manager",
    "manager_name",
    type=click.Choice(["auto", "launchd", "systemd"]),
    default="auto",
    show_default=True,
    help="auto: launchd on macOS, systemd elsewhere.",
)


def find_manager(name: ManagerName) -> ServiceManager:
    """Return the service manager of that name; auto is this computer's."""
    if name == "launchd" or (name == "auto" and ThisHost.name == "darwin"):
        from emberd.host.launchd import Launchd  # noqa: PLC0415  # only the one that is used

        return Launchd()
    from emberd.host.systemd import Systemd  # noqa: PLC0415  # same

    return Systemd()


def find_label(manager: ServiceManager, config: str | None, label: str | None) -> str:
    """Return the label that is meant: the named one, else the one installed with these settings, else the default.

    Raises:
        ConfigError: the name cannot be a label, or several services are installed with these settings.
    """
    if label is not None:
        return full_label(label)
    found = manager.labels(config_file.locate(config)[0])
    if len(found) > 1 and DEFAULT_LABEL not in found:
        raise ConfigError(f"several services run on these settings: {', '.join(found)}", "Name one: --label.")
    return DEFAULT_LABEL if not found or DEFAULT_LABEL in found else found[0]


def wanted_service(
    manager: ServiceManager, config: str | None, label: str, *, starts_at_login: bool
) -> tuple[WantedService, Settings]:
    """Return how this emberd is to be run on these settings, and the settings.

    Raises:
        ConfigError: the settings are wrong.
    """
    settings, path = config_file.load(config)
    wanted = WantedService(
        label=label,
        # Not resolved: the Python of a virtual environment is a link, and the environment is found by its path.
        program=(str(Path(sys.executable).absolute()), "-P", "-m", "emberd", "--config", str(path), "run"),
        host=settings.endpoint.host,
        port=settings.endpoint.port,
        log=str(manager.log_path(label)),
        stop_limit_s=stop_limit_s(settings.lifecycle),
        starts_at_login=starts_at_login,
        environment={name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)},
    )
    return wanted, settings


def notices(settings: Settings, wanted: WantedService, manager: ServiceManager) -> list[str]:
    """Return what works in this shell and would not in the service, each with its remedy."""
    found = []
    if not settings.model.path and not settings.engine.kcpps:
        found.append("no model is named: set model.path in the settings")
    for key, value in (
        ("model.path", settings.model.path),
        ("engine.kcpps", settings.engine.kcpps),
        ("engine.path", settings.engine.path if os.sep in settings.engine.path else ""),
    ):
        if value and not Path(value).expanduser().is_absolute():
            found.append(f"{key} is relative, and the service starts elsewhere: write the whole path")
    if os.environ.get(api_key.ENVIRONMENT):
        found.append(
            f"{api_key.ENVIRONMENT} is set in this shell only: put the key into a file of mode 0600 and name it in "
            "endpoint.api_key_file"
        )
    found += _path_notices(settings, wanted, manager)
    if manager.name == "systemd":
        from emberd.host.systemd import lingers  # noqa: PLC0415  # only where it is used

        if lingers() is False:
            found.append(
                "emberd ends when you log out; `loginctl enable-linger` keeps it running and starts it at boot"
            )
    return found


def _path_notices(settings: Settings, wanted: WantedService, manager: ServiceManager) -> list[str]:
    """Tell of an engine that is found on this shell's PATH only."""
    named = settings.engine.path
    if settings.engine.kind == "embedded" or os.sep in named:
        return []
    import plistlib  # noqa: PLC0415  # only for launchd

    path = os.defpath
    if manager.name == "launchd":
        text = next(iter(manager.files(wanted).values()))
        path = plistlib.loads(text.encode())["EnvironmentVariables"]["PATH"]
    names = [named] if named else ["koboldcpp", "koboldcpp.py", "llama-server"]
    for name in names:
        here = shutil.which(name)
        if here and not shutil.which(name, path=path):
            return [f"{name} is found on this shell's PATH only: set engine.path to {here}"]
    return []


def check_settings(config: str | None, settings: Settings) -> None:
    """Refuse settings with which the service could not start.

    Raises:
        ConfigError: there is no settings file, or the API key of the service cannot be read.
    """
    path, _ = config_file.locate(config)
    if not path.exists():
        raise ConfigError(f"there is no settings file at {path}", "Make one: emberd config init --model FILE")
    of_the_shell = os.environ.pop(api_key.ENVIRONMENT, None)  # the service will not see it
    try:
        api_key.read_api_key(settings, path)
    finally:
        if of_the_shell is not None:
            os.environ[api_key.ENVIRONMENT] = of_the_shell


def check_user() -> None:
    """Refuse to act for root where a person meant their own account.

    Raises:
        EmberdError: under sudo.
    """
    if os.geteuid() == 0 and os.environ.get("SUDO_USER", "root") != "root":
        raise EmberdError("emberd is a service of one user, not of root", "Run it without sudo.")


def check_no_other(
    manager: ServiceManager, config: str | None, wanted: WantedService, found: ServiceStatus
) -> None:
    """Refuse where something else has the place of the service.

    Raises:
        AlreadyRunning: an emberd that was started by hand.
        ConfigError: the label is that of a service with other settings.
        PortTaken: another program listens on the port.
    """
    path = config_file.locate(config)[0]
    program = manager.program(wanted.label)
    if program and str(path) not in program:
        raise ConfigError(
            f"{wanted.label} is installed with other settings",
            "Name this one: --label NAME. Or remove that one first: emberd uninstall --label " + wanted.label,
        )
    status = daemon_status(config)
    if status is not None and not found.is_loaded:
        raise AlreadyRunning(
            f"an emberd that was started by hand runs on these settings (pid {status.pid})",
            "Stop it first: emberd stop.",
        )
    if not found.is_loaded:
        from emberd.host.listener import bind  # noqa: PLC0415  # only to try

        bind(wanted.host, wanted.port).close()


def daemon_status(config: str | None) -> Status | None:
    """Return what the daemon of these settings says of itself, None if none answers."""
    try:
        return ask_status(config)
    except NotRunning:
        return None


def end_leftover_engine(settings: Settings) -> int | None:
    """End the engine of an emberd that was killed, and return its pid; None if there is none."""
    import asyncio  # noqa: PLC0415  # rarely needed

    from emberd.engine.record import end_leftover  # noqa: PLC0415  # same
    from emberd.host.paths import state_paths  # noqa: PLC0415  # same

    return asyncio.run(end_leftover(state_paths(settings), ThisHost(), settings.lifecycle.stop_timeout_s))


def wait_for_daemon(config: str | None, manager: ServiceManager, label: str) -> Status:
    """Return the status of the daemon as soon as it answers.

    Raises:
        ServiceManagerFailed: it has ended or does not answer in time, with what it said if it did.
        EngineFailed: it runs, and has given up on the engine.
    """
    began_s = time.monotonic()
    found = manager.status(label)
    while time.monotonic() < began_s + _ANSWER_LIMIT_S and found.is_running:
        if (status := _answer(config)) is not None:
            # An engine that can never start ends emberd too, just after it has begun to answer.
            is_decided = status.state not in _UNDECIDED or time.monotonic() > began_s + _DECIDED_LIMIT_S
            if is_decided and status.state == "FAILED":
                raise EngineFailed(status.reason, "The service stays. Mend the cause, then: emberd restart.")
            if is_decided:
                return status
        time.sleep(_ASK_AGAIN_S)
        found = manager.status(label)
    said = manager.last_words(label)
    how = (
        " and runs, but does not answer" if found.is_running else f", but it ended ({found.last_exit or 'unknown'})"
    )
    raise ServiceManagerFailed(
        f"{label} was started{how}" + (f": {said}" if said else ""),
        f"See more: {where_it_says(manager, label)}. Then: emberd start.",
    )


def _answer(config: str | None) -> Status | None:
    """Return the daemon's status, None if it does not answer (yet)."""
    with contextlib.suppress(EmberdError):
        return ask_status(config)
    return None


def where_it_says(manager: ServiceManager, label: str) -> str:
    """Return where a person reads what the service printed."""
    if manager.name == "systemd":
        from emberd.core.service import unit_name  # noqa: PLC0415  # only for a message

        return f"journalctl --user -u {unit_name(label)} -n 50"
    return str(manager.log_path(label))


def daemon_words(status: Status) -> str:
    """Say in a line what the daemon and its engine are doing."""
    text = f"emberd runs (pid {status.pid}) on {status.endpoint}, engine {status.state_words}"
    if status.state == "READY":
        return text
    if status.state == "FAILED":
        return f"{text}: {status.reason}"
    return f"{text}; clients may connect already and wait until it is ready"


def teller(*, is_quiet: bool) -> Callable[[str], None]:
    """Return what tells a person of progress; nothing where JSON is printed."""
    return (lambda _: None) if is_quiet else click.echo
