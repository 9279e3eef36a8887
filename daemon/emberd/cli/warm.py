"""`emberd warm`: warm everything now."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from emberd.cli.progress import byte_progress
from emberd.cli.talk import as_json, ask_daemon, show
from emberd.core.errors import EmberdError
from emberd.services.control import SLOW_ASK_LIMIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

_EVERY_S = 0.2


@click.command("warm")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Warm weights and cache now; ends a pause or a cool spell. Ctrl-C leaves emberd at it."""
    is_over = threading.Event()
    with byte_progress(is_shown=not is_json and sys.stderr.isatty()) as progress:
        watching = threading.Thread(target=_watch, args=(config, progress, is_over), daemon=True)
        watching.start()
        try:
            answer = ask_daemon(config, "warm", SLOW_ASK_LIMIT_S)
        finally:
            is_over.set()
            watching.join(_EVERY_S)
    show(answer, is_json, _print)


def _watch(config: str | None, progress: Callable[[int, int], None], is_over: threading.Event) -> None:
    while not is_over.wait(_EVERY_S):
        try:
            seen = ask_daemon(config, "progress")
        except EmberdError:
            return  # the one who asks to warm tells why
        if seen["total_bytes"]:
            progress(seen["done_bytes"], seen["total_bytes"])


def _print(answer: dict[str, Any]) -> None:
    if answer.get("steps"):
        click.echo(f"{', '.join(answer['steps'])}: {answer['seconds']:.2f} s")
    else:
        click.echo(f"nothing done: {answer.get('reason', 'unknown')}")
