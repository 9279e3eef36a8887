"""`emberd doctor`: why the model is cold, dead or refused."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from emberd import __version__
from emberd.cli.talk import as_json, ask_daemon, show
from emberd.core.errors import ConfigError, NotRunning
from emberd.core.health import Condition, Severity, visible
from emberd.core.health_facts import Facts, ServiceHealth
from emberd.core.health_service import CATALOGUE, diagnose
from emberd.host import ThisHost, config_file
from emberd.host.api_key import read_api_key

FOUND = 6
"""Exit code: there is something to mend."""
_LIMIT_S = 120.0
"""A few questions of 20 s each at worst."""
_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


@click.command("doctor")
@click.option("--all", "shows_all", is_flag=True, help="Show symptoms beside their causes, and what is not known.")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool, shows_all: bool) -> int:  # noqa: FBT001  # click's flags
    """Tell what is wrong, by which evidence, and what helps.

    Asks the running emberd, because a background program may be denied what a terminal may read; without one it
    looks for itself. Exit codes: 0 nothing to mend; 6 something is.
    """
    found, unknown, asked = _examine(config)
    shown = found if shows_all else visible(found, CATALOGUE)
    content = {
        "asked": asked,
        "conditions": [_plain(each) for each in shown],
        "hidden": len(found) - len(shown),
        "unknown": unknown,
    }
    show(content, is_json, lambda answer: _print(answer, shows_all=shows_all))
    is_ill = any(CATALOGUE[each.code].severity is not Severity.NOTE for each in shown)
    return FOUND if is_ill else 0


def _examine(config: str | None) -> tuple[list[Condition], list[str], str]:
    """Return all conditions, what is not known, and who was asked: the daemon or this program."""
    try:
        settings, path = config_file.load(config)
        read_api_key(settings, path)
    except ConfigError as error:
        broken = ServiceHealth(settings_problem=error.message, settings_remedy=error.remedy)
        return diagnose(Facts(ThisHost.name, service=broken)), [], "this program"
    try:
        answer, asked = ask_daemon(config, "doctor", _LIMIT_S), "the daemon"
        version = ask_daemon(config, "status")["version"]
    except NotRunning:
        from emberd.services.doctor import examine  # noqa: PLC0415  # brings the engines' adapters along

        answer, asked = asyncio.run(examine(ThisHost(), settings, None)), "this program"
        version = ""
    found = [Condition(**each) for each in answer["conditions"]]
    found += diagnose(Facts(ThisHost.name, service=ServiceHealth(version=__version__, daemon_version=version)))
    return found, answer["unknown"], asked


def _plain(condition: Condition) -> dict[str, Any]:
    kind = CATALOGUE[condition.code]
    return {
        "code": condition.code,
        "severity": kind.severity.value,
        "title": kind.title,
        "evidence": condition.evidence,
        "remedy": condition.remedy,
        "page": condition.page,
    }


def _print(content: dict[str, Any], *, shows_all: bool) -> None:
    for each in content["conditions"]:
        mark = click.style(each["severity"], fg=_COLOURS[Severity(each["severity"])], bold=True)
        click.echo(f"{mark}  {each['title']}  ({each['code']})")
        click.echo(f"  seen:   {each['evidence']}")
        if each["remedy"]:
            click.echo(f"  remedy: {each['remedy']}")
    if shows_all:
        for line in content["unknown"]:
            click.echo(f"not known: {line}")
    if not content["conditions"]:
        click.echo("nothing is wrong")
    elif content["hidden"]:
        click.echo(f"{content['hidden']} more follow from these (--all shows them)")
    if content["unknown"] and not shows_all:
        click.echo(f"{len(content['unknown'])} questions stay open (--all names them)")
