"""`emberd reload`: read the settings again."""

from __future__ import annotations

from typing import Any

import click

from emberd.cli.talk import as_json, ask_daemon, show
from emberd.services.control import SLOW_ASK_LIMIT_S


@click.command("reload")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Read the settings again; the engine restarts only if its command line changes."""
    show(ask_daemon(config, "reload", SLOW_ASK_LIMIT_S), is_json, _print)


def _print(answer: dict[str, Any]) -> None:
    click.echo("settings read; " + ("the engine restarts" if answer["engine_restarts"] else "the engine goes on"))
    if answer["needs_emberd_restart"]:
        click.echo(f"in force only after emberd is restarted: {', '.join(answer['needs_emberd_restart'])}")
