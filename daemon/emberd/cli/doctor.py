"""`emberd doctor`: why the model is cold, dead or refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emberd import __version__
from emberd.cli import service
from emberd.cli.talk import as_json, ask_daemon, show
from emberd.core.errors import ConfigError, EmberdError, NotRunning
from emberd.doctor.catalogue import CATALOGUE, describe, diagnose, visible
from emberd.doctor.condition import Condition, Severity
from emberd.doctor.facts import Facts, ServiceHealth, digest
from emberd.doctor.look import examine_access
from emberd.host import ThisHost, config_file
from emberd.host.instance import holder_of
from emberd.host.paths import state_paths
from emberd.service.files import installed_program

if TYPE_CHECKING:
    from collections.abc import Mapping

FOUND = 6
"""Exit code: there is something to mend."""
_LIMIT_S = 150.0
"""At worst a few questions of 20 s each."""
_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}
_OLD_DAEMON = "not a verb"


@click.command("doctor")
@click.option("--all", "shows_all", is_flag=True, help="Show symptoms beside their causes.")
@click.option("-v", "--verbose", is_flag=True, help="Name what could not be told, and why.")
@service.with_label
@service.with_manager
@as_json
@click.pass_obj
def command(
    config: str | None,
    is_json: bool,  # noqa: FBT001  # click's flag
    label: str | None,
    manager_name: service.ManagerName,
    shows_all: bool,  # noqa: FBT001  # same
    verbose: bool,  # noqa: FBT001  # same
) -> int:
    """Tell what is wrong, on which evidence, and what helps.

    Asks the running emberd, because a background program may be denied files that a terminal may read; without
    one it looks for itself. Exit codes: 0 nothing to mend, or notes only; 6 something to mend.
    """
    found, unknown, asked = _examine(config, label, manager_name)
    shown = found if shows_all else visible(found)
    content = {
        "asked": asked,
        "conditions": [describe(each) for each in shown],
        "hidden": len(found) - len(shown),
        "unknown": unknown,
    }
    show(content, is_json, lambda answer: _print(answer, is_verbose=verbose or shows_all))
    is_ill = any(CATALOGUE[each.code].severity is not Severity.NOTE for each in shown)
    return FOUND if is_ill else 0


def _examine(
    config: str | None, label: str | None, manager_name: service.ManagerName
) -> tuple[list[Condition], list[str], str]:
    """Return all conditions, the unknown facts, and what was asked: the daemon or this program."""
    try:
        settings, path = config_file.load(config)
    except ConfigError as error:
        broken = ServiceHealth(settings_problem=error.message, settings_remedy=error.remedy)
        return diagnose(Facts(ThisHost.name, service=broken)), [], "this program"
    known, unknown = _of_service(config, label, manager_name, examine_access(settings, path))
    status: Mapping[str, Any] | None = None
    try:
        status = ask_daemon(config, "status")
        known = replace(known, version=__version__, daemon_version=status["version"], last_words="")
        answer: dict[str, Any] = ask_daemon(config, "doctor", _LIMIT_S)
    except NotRunning:
        pass
    except EmberdError as error:
        # A daemon that is too old for this verb answers the status: it is old, not silent.
        if _OLD_DAEMON not in error.message:
            holder = holder_of(state_paths(settings).lock)
            known, status = replace(known, silence=error.message, daemon_pid=holder), None
    else:
        is_same = status["version"] == __version__
        known = replace(known, are_settings_newer=is_same and answer["settings"] != digest(settings))
        told = [Condition(**each) for each in answer["conditions"]]
        found = [each for each in told if each.code in CATALOGUE]
        # A daemon of another version may know conditions that this program does not.
        unknown = [*unknown, *(f"{each.code}: {each.evidence}" for each in told if each not in found)]
        codes = {each.code for each in found}
        found += [each for each in diagnose(Facts(ThisHost.name, service=known)) if each.code not in codes]
        return found, [*unknown, *answer["unknown"]], "the daemon"
    from emberd.doctor.examine import examine  # noqa: PLC0415  # brings the engines' adapters along

    answer = asyncio.run(examine(ThisHost(), settings, status, known))
    return [Condition(**each) for each in answer["conditions"]], [*unknown, *answer["unknown"]], "this program"


def _of_service(
    config: str | None, label: str | None, manager_name: service.ManagerName, known: ServiceHealth
) -> tuple[ServiceHealth, list[str]]:
    """Add what launchd or systemd says, and which questions failed."""
    manager = service.find_manager(manager_name)
    try:
        name = service.find_label(manager, config, label)
        starts_at_login = manager.installed_login(name)
        if starts_at_login is None:
            return replace(known, is_installed=False), []
        wanted, _ = service.wanted_service(manager, config, name, starts_at_login=starts_at_login)
        found = manager.status(name, wanted)
    except EmberdError as error:
        return known, [f"service: {error.message}"]
    said = "" if found.is_running else manager.last_words(name) or found.last_exit or ""
    program = installed_program([Path(file) for file in found.files])
    keys = ", ".join(found.stale)
    return (
        replace(
            known,
            is_installed=found.is_installed,
            is_loaded=found.is_loaded,
            is_disabled=found.is_disabled,
            is_throttled=found.is_throttled,
            stale=f"it differs in {keys}" if keys else "",
            file_problem="; ".join(found.problems),
            missing_program=str(program) if program is not None and not program.exists() else "",
            last_words=said,
        ),
        [],
    )


def _print(content: dict[str, Any], *, is_verbose: bool) -> None:
    click.echo(f"asked: {content['asked']}")
    for each in content["conditions"]:
        mark = click.style(each["severity"], fg=_COLOURS[Severity(each["severity"])], bold=True)
        click.echo(f"{mark}  {each['title']}  ({each['code']})")
        click.echo(f"  seen:   {each['evidence']}")
        if each["remedy"]:
            click.echo(f"  remedy: {each['remedy']}")
    if not content["conditions"]:
        click.echo("nothing is wrong")
    elif content["hidden"]:
        click.echo(f"{content['hidden']} more follow from these (--all shows them)")
    if is_verbose:
        for line in content["unknown"]:
            click.echo(f"not known: {line}")
    elif content["unknown"]:
        click.echo(f"{len(content['unknown'])} questions stay open (--verbose names them)")
