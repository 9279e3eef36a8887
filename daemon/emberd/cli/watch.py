"""`emberd status --watch`: the status, live, above small charts of the last hour."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import click

from emberd.cli.history import charts
from emberd.cli.talk import ask_daemon, load_of_daemon
from emberd.core.errors import EmberdError
from emberd.core.status import Status, from_plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType
    from rich.table import Table

EVERY_S = 2.0
_HOUR_S = 3600.0
_ROW_S = 60.0
"""A row of the history is a minute."""


def watch(config: str | None, draw: Callable[[Status], RenderableType], *, is_json: bool) -> None:
    """Show the status until Ctrl-C, as `draw` puts it, and say so while emberd is away."""
    load_of_daemon(config)  # settings that do not say where it is are an error at once
    with contextlib.suppress(KeyboardInterrupt):
        if is_json:
            while True:
                click.echo(json.dumps(_ask(config)))
                time.sleep(EVERY_S)
        _watch(config, draw)


def _ask(config: str | None) -> dict[str, Any]:
    """Return the status; the error and its remedy while emberd is away."""
    try:
        return ask_daemon(config, "status")
    except EmberdError as error:
        return {"error": error.message, "remedy": error.remedy}


def _watch(config: str | None, draw: Callable[[Status], RenderableType]) -> None:
    from rich.console import Console, Group  # noqa: PLC0415  # heavy
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(highlight=False)
    past: dict[str, Any] = {}
    read_s, seen_s = float("-inf"), None
    shown: RenderableType = Text("")
    with Live(shown, console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            plain = _ask(config)
            if "error" in plain:
                ago = "" if seen_s is None else f", seen {time.monotonic() - seen_s:.0f} s ago"
                away = Text(f"{plain['error']}{ago}; it is asked again. Ctrl-C ends.", style="red")
                live.update(Group(away, Text(""), shown), refresh=True)
                read_s = float("-inf")
            else:
                seen_s = time.monotonic()
                if seen_s - read_s > _ROW_S:
                    read_s = seen_s
                    with contextlib.suppress(EmberdError):  # it stands by, or is of an older version
                        past = ask_daemon(config, "history", since_s=time.time() - _HOUR_S)
                shown = _arrange(console, draw(from_plain(Status, plain)), charts(past, console.width))
                live.update(shown, refresh=True)
            time.sleep(EVERY_S)


def _arrange(console: Console, status: RenderableType, graphs: Table) -> RenderableType:
    """Put the status above the charts; on a low terminal its last lines give way, which `emberd status` shows."""
    from rich.console import Group  # noqa: PLC0415  # heavy
    from rich.layout import Layout  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    above = Group(status, Text(""))
    room = console.height - graphs.row_count
    lines = len(console.render_lines(above))
    if not console.is_terminal or lines <= room:
        return Group(above, graphs)
    arranged = Layout()
    arranged.split_column(Layout(above, size=max(room, 1)), Layout(graphs))
    return arranged
