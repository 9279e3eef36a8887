"""What must be so before emberd becomes a service, and what would work in the shell and not in the service."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from emberd.core.errors import AlreadyRunning, ConfigError, EmberdError
from emberd.host import api_key

if TYPE_CHECKING:
    from emberd.core.settings import Settings
    from emberd.service.manager import ServiceManager
    from emberd.service.wanted import ServiceStatus, WantedService


def check_user() -> None:
    """Refuse to act for root where a person meant their own account.

    Raises:
        EmberdError: under sudo.
    """
    if os.geteuid() == 0 and os.environ.get("SUDO_USER", "root") != "root":
        raise EmberdError("emberd is a service of one user, not of root", "Run it without sudo.")


def check_settings(path: Path, settings: Settings) -> None:
    """Refuse settings with which the service could not start.

    Raises:
        ConfigError: there is no settings file, or the API key of the service cannot be read.
    """
    if not path.exists():
        raise ConfigError(f"there is no settings file at {path}", "Make one: emberd config init --model FILE")
    of_the_shell = os.environ.pop(api_key.ENVIRONMENT, None)  # the service will not see it
    try:
        api_key.read_api_key(settings, path)
    finally:
        if of_the_shell is not None:
            os.environ[api_key.ENVIRONMENT] = of_the_shell


def check_no_other(
    manager: ServiceManager, path: Path, wanted: WantedService, found: ServiceStatus, daemon_pid: int | None
) -> None:
    """Refuse where something else has the place of the service.

    Raises:
        AlreadyRunning: an emberd that was started by hand.
        ConfigError: the label is that of a service with other settings.
        PortTaken: another program listens on the port.
    """
    program = manager.program(wanted.label)
    if program and str(path) not in program:
        raise ConfigError(
            f"{wanted.label} is installed with other settings",
            "Name this one: --label NAME. Or remove that one first: emberd uninstall --label " + wanted.label,
        )
    if found.is_loaded:
        return
    if daemon_pid is not None:
        raise AlreadyRunning(
            f"an emberd that was started by hand runs on these settings (pid {daemon_pid})",
            "Stop it first: emberd stop.",
        )
    from emberd.host.listener import bind  # noqa: PLC0415  # only to try

    for address in wanted.addresses:
        bind(address, wanted.port).close()


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
    return [*found, *_path_notices(settings, manager.search_path(wanted)), *manager.notices()]


def _path_notices(settings: Settings, path: str) -> list[str]:
    """Name an engine that is found on this shell's PATH only."""
    named = settings.engine.path
    if settings.engine.kind == "embedded" or os.sep in named:
        return []
    for name in [named] if named else ["koboldcpp", "koboldcpp.py", "llama-server"]:
        here = shutil.which(name)
        if here and not shutil.which(name, path=path):
            return [f"{name} is found on this shell's PATH only: set engine.path to {here}"]
    return []
