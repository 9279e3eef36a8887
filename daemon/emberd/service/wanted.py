"""emberd as a service of the system: what is wanted, and what was found. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emberd.core.access import listen_addresses
from emberd.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emberd.core.settings import LifecycleSettings

DEFAULT_LABEL = "io.github.emberd"
LABEL_VARIABLE = "EMBERD_SERVICE"
"""Environment variable of the daemon: the label under which a service manager runs it."""
STOP_MARGIN_S = 15
"""What a stop takes besides the drain and the engine's end: closing connections, services, a busy computer."""
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,150}[A-Za-z0-9])?")


def full_label(name: str) -> str:
    """Return the label of a name: a name without a dot is an instance of emberd's own label.

    Raises:
        ConfigError: no file and no unit could be named so.
    """
    if not _LABEL.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be a label",
            "Use letters, digits, dots, dashes and underscores, such as: --label small.",
        )
    return name if "." in name else f"{DEFAULT_LABEL}.{name}"


def stop_limit_s(timing: LifecycleSettings) -> int:
    """Return how long emberd may take from SIGTERM to its end, in whole seconds."""
    return math.ceil(timing.drain_timeout_s + timing.stop_timeout_s) + STOP_MARGIN_S


@dataclass(frozen=True, slots=True)
class WantedService:
    """How emberd is to be run.

    Attributes:
        label: the job's label.
        program: the command line, with absolute paths.
        host: address of the endpoint, held by the service manager.
        port: its TCP port.
        has_ipv6: this computer has the address ::1.
        log: absolute path of the file for standard output and error; launchd only.
        stop_limit_s: from SIGTERM to SIGKILL.
        starts_at_login: False for a service that its first connection starts.
        environment: variables besides those of the template.
    """

    label: str
    program: tuple[str, ...]
    host: str
    port: int
    log: str
    stop_limit_s: int
    starts_at_login: bool
    environment: Mapping[str, str]
    has_ipv6: bool = True

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the service manager listens: see `listen_addresses`."""
        return listen_addresses(self.host, has_ipv6=self.has_ipv6)


@dataclass(frozen=True, slots=True)
class Installed:
    """What the installed files say.

    Attributes:
        label: the job's label, None for a job that is not emberd's.
        program: its command line.
        starts_at_login: False for one that its first connection starts.
    """

    label: str | None
    program: tuple[str, ...]
    starts_at_login: bool


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What is installed and what runs.

    Attributes:
        files: where its files are, or would be.
        is_installed: all of them exist.
        is_loaded: the service manager knows the job.
        is_running: it has a process.
        pid: that process.
        last_exit: how the last one ended, in the manager's words; None if unknown or none has.
        stale: keys that differ between what is installed and what this version would install.
        problems: what is wrong with the files, in words: owner, mode, content.
        is_throttled: the process type slows the job and the engine down; None if unknown.
        is_disabled: somebody switched it off; None if unknown.
    """

    files: tuple[str, ...]
    is_installed: bool
    is_loaded: bool
    is_running: bool
    pid: int | None = None
    last_exit: str | None = None
    stale: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    is_throttled: bool | None = None
    is_disabled: bool | None = None

    @property
    def is_stale(self) -> bool:
        """The files are there, but not as this version would write them."""
        return self.is_installed and bool(self.stale or self.problems)

    def is_at_work(self, wanted: WantedService) -> bool:
        """Return True if the service runs, or waits for its first connection as `wanted`."""
        return self.is_running or (self.is_loaded and not wanted.starts_at_login)


def last_error(log: str) -> str:
    """Return the last error for a person in what emberd printed, empty if there is none."""
    found: list[str] = re.findall(r"^emberd: (.+)$", log, re.MULTILINE)
    return found[-1] if found else ""
