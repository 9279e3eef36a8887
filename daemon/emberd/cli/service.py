"""What the verbs on the service share: manager and label, what is wanted, waiting for the daemon."""

from __future__ import annotations

import functools
import os
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from emberd.cli import talk
from emberd.core.errors import ConfigError, EmberdError, EngineFailed, NotRunning, ServiceManagerFailed
from emberd.host import ThisHost, config_file
from emberd.host.listener import has_ipv6_loopback
from emberd.service.wanted import DEFAULT_LABEL, WantedService, full_label, stop_limit_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emberd.core.settings import Settings
    from emberd.core.status import Status
    from emberd.service.manager import ServiceManager

    Verb = Callable[..., None]

ManagerName = Literal["auto", "launchd", "systemd"]
ANSWER_LIMIT_S = 20.0
"""A new emberd answers within a second; a computer that swaps takes longer."""
_SERVICE_ANSWER_LIMIT_S = 30.0
"""The same, with the manager's time to start it."""
_UNDECIDED = {"STOPPED", "STARTING", "FAILED"}
_DECIDED_LIMIT_S = 5.0
_ASK_AGAIN_S = 0.2
_PASSED_ON = ("XDG_STATE_HOME",)
"""Variables that decide where emberd's files are: the daemon must have those of its owner's shell."""

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


def on_service(*own_options: Callable[[Verb], Verb]) -> Callable[[Verb], Verb]:
    """Give a verb --label, --manager, its own options and --json, and call it with what was `Asked`."""

    def decorate(verb: Verb) -> Verb:
        @functools.wraps(verb)
        def ask(config: Any, *, label: str | None, manager_name: ManagerName, is_json: bool, **own: Any) -> None:
            verb(Asked(config, label, manager_name, is_json), **own)

        command: Verb = click.pass_obj(ask)
        options: list[Callable[[Verb], Verb]] = [with_label, with_manager, *own_options, talk.as_json]
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@dataclass(frozen=True)
class Asked:
    """What a person asked of the service; the manager and the label are found when they are first needed."""

    config: str | None
    named_label: str | None
    manager_name: ManagerName
    is_json: bool

    @cached_property
    def manager(self) -> ServiceManager:
        """The service manager."""
        return find_manager(self.manager_name)

    @cached_property
    def label(self) -> str:
        """The label; raises what `find_label` raises."""
        return find_label(self.manager, self.config, self.named_label)

    def wanted(self, *, starts_at_login: bool) -> tuple[WantedService, Settings]:
        """Return what `wanted_service` does."""
        return wanted_service(self.manager, self.config, self.label, starts_at_login=starts_at_login)

    def tell(self, line: str) -> None:
        """Tell a person of progress; print nothing if JSON is printed."""
        if not self.is_json:
            click.echo(line)

    def show(self, content: dict[str, Any], to_text: Callable[[dict[str, Any]], None]) -> None:
        """Print the outcome."""
        talk.show(content, self.is_json, to_text)

    def daemon_status(self) -> Status | None:
        """Return the status of the daemon of these settings, None if none answers."""
        try:
            return talk.ask_status(self.config)
        except NotRunning:
            return None

    def wait_for_daemon(self) -> Status:
        """Return the status of the daemon that the manager has started, as soon as it answers.

        Raises:
            ServiceManagerFailed: it has ended, with its last words, or does not answer in time.
            EngineFailed: it runs, and has given up on the engine.
        """
        began_s = time.monotonic()
        found = self.manager.status(self.label)
        for status in statuses(self.config, _SERVICE_ANSWER_LIMIT_S):
            if not found.is_running:
                break
            if not isinstance(status, EmberdError):
                # An engine that can never start ends emberd too, just after it has begun to answer.
                is_decided = status.state not in _UNDECIDED or time.monotonic() > began_s + _DECIDED_LIMIT_S
                if is_decided and status.state == "FAILED":
                    raise EngineFailed(status.reason, "The service stays. Mend the cause, then: emberd restart.")
                if is_decided:
                    return status
            found = self.manager.status(self.label)
        words = self.manager.last_words(self.label)
        how = " and runs, but does not answer"
        if not found.is_running:
            how = f", but it ended ({found.last_exit or 'unknown'})"
        raise ServiceManagerFailed(
            f"{self.label} was started{how}" + (f": {words}" if words else ""),
            f"See more: {self.manager.where_it_says(self.label)}. Then: emberd start.",
        )


def find_manager(name: ManagerName) -> ServiceManager:
    """Return the service manager of that name; auto is this computer's."""
    if name == "launchd" or (name == "auto" and ThisHost.name == "darwin"):
        from emberd.service.launchd import Launchd  # noqa: PLC0415  # only the one that is used

        return Launchd()
    from emberd.service.systemd import Systemd  # noqa: PLC0415  # same

    return Systemd()


def find_label(manager: ServiceManager, config: str | None, label: str | None) -> str:
    """Return the named label, else the one installed with these settings, else the default.

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
    """Return the wanted service of this emberd with these settings, and the settings.

    Raises:
        ConfigError: the settings are wrong.
    """
    settings, path = config_file.load(config)
    wanted = WantedService(
        label=label,
        # Not resolved: a virtual environment's Python is a link, by whose path the environment is found.
        program=(str(Path(sys.executable).absolute()), "-P", "-m", "emberd", "--config", str(path), "run"),
        host=settings.endpoint.host,
        port=settings.endpoint.port,
        log=str(manager.log_path(label)),
        stop_limit_s=stop_limit_s(settings.lifecycle),
        starts_at_login=starts_at_login,
        environment={name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)},
        has_ipv6=has_ipv6_loopback(),
    )
    return wanted, settings


def statuses(config: str | None, limit_s: float) -> Iterator[Status | EmberdError]:
    """Ask the daemon again and again within the limit; yield each status, or why there is none."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        try:
            yield talk.ask_status(config)
        except EmberdError as error:
            yield error
        time.sleep(_ASK_AGAIN_S)


def end_leftover_engine(settings: Settings) -> int | None:
    """End the engine of an emberd that was killed, and return its pid; None if there is none."""
    import asyncio  # noqa: PLC0415  # rarely needed

    from emberd.engine.record import end_leftover  # noqa: PLC0415  # same
    from emberd.host.paths import state_paths  # noqa: PLC0415  # same

    return asyncio.run(end_leftover(state_paths(settings), ThisHost(), settings.lifecycle.stop_timeout_s))


def daemon_words(status: Status) -> str:
    """Return a line on what the daemon and its engine are doing."""
    text = f"emberd runs (pid {status.pid}) on {status.endpoint}, engine {status.state_words}"
    if status.state == "READY":
        return text
    if status.state == "FAILED":
        return f"{text}: {status.reason}"
    return f"{text}; clients may connect already and wait until it is ready"
