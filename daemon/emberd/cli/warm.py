"""`emberd warm`: warm everything now."""

from __future__ import annotations

from typing import Any

import click

from emberd.cli.talk import as_json, ask_daemon, show
from emberd.services.control import SLOW_ASK_LIMIT_S


@click.command("warm")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Warm weights and cache now; ends a pause or a cool spell."""
    show(ask_daemon(config, "warm", SLOW_ASK_LIMIT_S), is_json, _print)


def _print(answer: dict[str, Any]) -> None:
    if answer.get("steps"):
        click.echo(f"{', '.join(answer['steps'])}: {answer['seconds']:.2f} s")
    else:
        click.echo(f"nothing done: {answer.get('reason', 'unknown')}")
