"""`emberd pause`: warm nothing for a while."""

from __future__ import annotations

from typing import Any

import click

from emberd.cli.talk import as_json, ask_daemon, duration, seconds_of, show


@click.command("pause")
@click.argument("for_", metavar="DURATION", default="1h")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool, for_: str) -> None:  # noqa: FBT001  # click's flag
    """Warm nothing for DURATION (90s, 30m, 2h, 1d; 1h by default). Locks stay."""
    show(ask_daemon(config, "pause", seconds=seconds_of(for_)), is_json, _print)


def _print(answer: dict[str, Any]) -> None:
    click.echo(f"nothing is warmed for {duration(answer['seconds'])}; `emberd resume` ends it")
