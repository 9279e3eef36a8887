"""`emberd resume`: keep warm again."""

from __future__ import annotations

from typing import Any

import click

from emberd.cli.talk import as_json, ask_daemon, show


@click.command("resume")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """End a pause or a cool spell, and warm the model."""
    show(ask_daemon(config, "resume"), is_json, _print)


def _print(answer: dict[str, Any]) -> None:
    click.echo("keeping warm again" if answer["was_paused"] else "it was not paused; warming")
