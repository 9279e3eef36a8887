"""`emberd forget`: forget the last prompt and reply."""

from __future__ import annotations

from typing import Any

import click

from emberd.cli.talk import as_json, ask_daemon, show


@click.command("forget")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Forget the last prompt and reply, which emberd keeps in memory to keep the prompt cache."""
    show(ask_daemon(config, "forget"), is_json, _print)


def _print(answer: dict[str, Any]) -> None:
    click.echo("forgotten" if answer["had_turn"] else "there was nothing to forget")
