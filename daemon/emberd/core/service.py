"""emberd as a service of the system: what is wanted, what was found, and what `launchctl` means by its codes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

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


def unit_name(label: str) -> str:
    """Return the systemd unit of a label, without its type: emberd, emberd-small, or a foreign label as it is."""
    if label == DEFAULT_LABEL:
        return "emberd"
    return label if not label.startswith(f"{DEFAULT_LABEL}.") else f"emberd-{label[len(DEFAULT_LABEL) + 1 :]}"


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


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What is installed and what runs.

    Attributes:
        manager: launchd or systemd.
        label: the job's label.
        files: where its files are, or would be.
        is_installed: all of them exist.
        is_loaded: the service manager knows the job.
        is_running: it has a process.
        pid: that process.
        last_exit: how the last one ended, in the manager's words; None if unknown or none has.
        state: the manager's word, None if it is not loaded.
        domain: launchd's domain in which it is loaded.
        stale: keys that differ between what is installed and what this version would install.
        is_broken: they are there and cannot be read, so that nobody knows whose they are.
        problems: what is wrong with the files, in words: owner, mode, content.
        is_throttled: the process type slows the job and the engine down; None if unknown.
        is_disabled: somebody switched it off; None if unknown.
    """

    manager: str
    label: str
    files: tuple[str, ...]
    is_installed: bool
    is_loaded: bool
    is_running: bool
    pid: int | None = None
    last_exit: str | None = None
    state: str | None = None
    domain: str | None = None
    stale: tuple[str, ...] = ()
    is_broken: bool = False
    problems: tuple[str, ...] = ()
    is_throttled: bool | None = None
    is_disabled: bool | None = None

    @property
    def is_stale(self) -> bool:
        """Tell whether the files are there but not as this version would write them."""
        return self.is_installed and bool(self.stale or self.problems)


class Outcome(Enum):
    """What an exit code of `launchctl` asks the caller to do."""

    DONE = "done"
    NOT_LOADED = "not loaded"
    BUSY = "try again"
    DISABLED = "enable, then try again"
    NO_DOMAIN = "try the other domain"
    REFUSED = "give up"


_OUTCOMES = {
    0: Outcome.DONE,
    3: Outcome.NOT_LOADED,  # No such process
    5: Outcome.BUSY,  # Input/output error: draining, loaded already, or a bad file
    36: Outcome.BUSY,  # Operation now in progress
    37: Outcome.BUSY,  # Operation already in progress
    112: Outcome.NO_DOMAIN,  # Could not find domain
    113: Outcome.NOT_LOADED,  # Could not find service
    119: Outcome.DISABLED,  # Service is disabled
    125: Outcome.NO_DOMAIN,  # Domain does not support specified action
}
"""launchctl(1) says only "an error code"; these are seen with macOS 13 to 26 (reference, section 7.3)."""


def judge(exit_code: int, words: str = "") -> Outcome:
    """Say what an exit code of `launchctl` asks for.

    Args:
        exit_code: of the command.
        words: what it printed: `Bootstrap failed: 5: Input/output error` counts where the code itself is not known.
    """
    if exit_code in _OUTCOMES:
        return _OUTCOMES[exit_code]
    named = re.search(r"failed: (\d+):", words)
    return _OUTCOMES.get(int(named[1]), Outcome.REFUSED) if named else Outcome.REFUSED


def is_headless(*, has_ssh: bool, owns_console: bool, is_sudo: bool, has_other_uid: bool) -> bool:
    """Tell whether to prefer the domain user/UID to gui/UID, as Homebrew's services do.

    Args:
        has_ssh: the caller came by ssh.
        owns_console: /dev/console belongs to the user: logged in at the screen too.
        is_sudo: under sudo.
        has_other_uid: the effective user is not the real one.
    """
    return (has_ssh and not owns_console) or is_sudo or has_other_uid


@dataclass(frozen=True, slots=True)
class PrintedJob:
    """What `launchctl print DOMAIN/LABEL` says of a job; each is None where it says nothing."""

    state: str | None = None
    pid: int | None = None
    last_exit: str | None = None
    path: str | None = None
    process_type: str | None = None


def read_print(text: str) -> PrintedJob:
    """Read the output of `launchctl print`, which calls itself no API: every line may be missing."""
    # Inner blocks (sockets, limits) have keys of the same names; the job's own stand one tab deep.
    found = dict(re.findall(r"^(?:\t| {1,4})(\w[\w ]*?) = (.+?)\s*$", text, re.MULTILINE))
    pid = found.get("pid", "")
    last_exit = found.get("last exit code") or _signal(found.get("last terminating signal"))
    return PrintedJob(
        state=found.get("state"),
        pid=int(pid) if pid.isdecimal() else None,
        last_exit=None if last_exit in {None, "(never exited)"} else last_exit,
        path=found.get("path"),
        process_type=found.get("spawn type"),
    )


def _signal(words: str | None) -> str | None:
    return None if words is None else f"signal {words}"


def is_throttled(process_type: str | None) -> bool | None:
    """Tell whether launchd slows such a job down: `interactive (4)` is not, everything else is; None if unknown."""
    return None if process_type is None else not process_type.startswith("interactive")


def last_error(log: str) -> str:
    """Return the last error for a person in what emberd printed, empty if there is none."""
    found: list[str] = re.findall(r"^emberd: (.+)$", log, re.MULTILINE)
    return found[-1] if found else ""


def is_disabled(text: str, label: str) -> bool | None:
    """Read `launchctl print-disabled`: `"LABEL" => disabled` (true before macOS 13); None if it is not listed."""
    found = re.search(rf'^\s*"{re.escape(label)}" => (\w+)', text, re.MULTILINE)
    return None if found is None else found[1] in {"disabled", "true"}
