"""`emberd cool`: let go of the model's memory for a while."""

from __future__ import annotations

from typing import Any

import click

from emberd.cli.talk import as_json, ask_daemon, duration, seconds_of, show
from emberd.services.control import SLOW_ASK_LIMIT_S


@click.command("cool")
@click.argument("for_", metavar="DURATION", default="1h")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool, for_: str) -> None:  # noqa: FBT001  # click's flag
    """Let go of the memory for DURATION (1h by default) or until the next request.

    What emberd has locked itself is let go at once; a lock of the engine's own stays until it is restarted.
    """
    show(ask_daemon(config, "cool", SLOW_ASK_LIMIT_S, seconds=seconds_of(for_)), is_json, _print)


def _print(answer: dict[str, Any]) -> None:
    click.echo(f"let go for {duration(answer['seconds'])}; `emberd resume` ends it")
