"""`emberd history` and `emberd page`: what happened, in the terminal and in the browser."""

from __future__ import annotations

import csv
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from emberd.cli.talk import as_json, ask_daemon, ask_status, load_of_daemon, seconds_of, show
from emberd.core.errors import EmberdError
from emberd.core.minute import COLUMNS, LONG_IDLE_S, PRESSURES
from emberd.core.spark import evenly, spark
from emberd.core.words import duration
from emberd.host.paths import state_paths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

_GIB = 1 << 30
_MIB = 1 << 20
_CHART_MARGIN = 36
_SHOWN_TOKENS = 10


@click.command("history")
@click.option(
    "--since", default="24h", metavar="DURATION", help="90m, 24h, 7d; a week by the minute, a year by the hour."
)
@click.option(
    "--step", metavar="DURATION", help="Length of a row, 1m or more; by default so that there are some 1000."
)
@click.option("--csv", "is_csv", is_flag=True, help="Print the rows as CSV.")
@as_json
@click.pass_obj
def command(config: str | None, *, since: str, step: str | None, is_csv: bool, is_json: bool) -> None:
    """Show what happened: memory, pressure, swap, passes, first tokens, and what keeping warm has brought.

    Works without a running emberd, too: then from its file.
    """
    if is_csv and is_json:
        raise click.UsageError("--csv and --json exclude each other")
    past = _past(config, time.time() - seconds_of(since), None if step is None else seconds_of(step))
    if is_csv:
        write = csv.writer(sys.stdout)
        write.writerow(COLUMNS)
        write.writerows(zip(*(past[name] for name in COLUMNS), strict=True))
        return
    show(past, is_json, _print)


@click.command("page")
@click.option("--print", "is_printed", is_flag=True, help="Print the address only.")
@as_json
@click.pass_obj
def page(config: str | None, *, is_printed: bool, is_json: bool) -> None:
    """Open emberd's page in the browser."""
    endpoint = ask_status(config).endpoint
    if endpoint is None:
        raise EmberdError("emberd has no endpoint now", "`emberd status` tells why.")
    address = f"{endpoint}/emberd/"
    if not is_json and not is_printed and click.launch(address):
        click.echo("no browser could be started; open it yourself:", err=True)
    show({"address": address}, is_json, lambda _: click.echo(address))


def _past(config: str | None, since_s: float, step_s: float | None) -> dict[str, Any]:
    """Ask the daemon, which also has what is not written yet; without one read the file."""
    try:
        return ask_daemon(config, "history", since_s=since_s, step_s=step_s)
    except EmberdError as away:
        from emberd.services.past import File, tell_past  # noqa: PLC0415  # sqlite3

        path = state_paths(load_of_daemon(config).settings).history
        if not path.exists():
            raise EmberdError(
                f"there is no history yet ({path})", "emberd writes it while it runs: emberd run."
            ) from away
        return tell_past(File(path), since_s, time.time() + 1, step_s)


# --- in words ---------------------------------------------------------------------------------------------------


def _print(past: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415  # heavy, and not needed for --json

    console = Console(highlight=False)
    if not past["at_s"]:
        console.print("nothing was recorded in this time", style="dim")
        return
    begin, end = (
        time.strftime("%a %d %b %H:%M", time.localtime(at_s)) for at_s in (past["since_s"], past["until_s"])
    )
    console.print(f"{begin} to {end}, a step is {duration(past['step_s'])}", style="dim")
    console.print(charts(past, console.width))
    console.print()
    console.print(_days(past))
    tokens = _after_idle(past)
    if tokens is not None:
        console.print()
        console.print(tokens)


def _gib(value: float) -> str:
    return f"{value / _GIB:.1f} GiB"


def _size(value: float) -> str:
    return _gib(value) if value >= _GIB else f"{value / _MIB:.0f} MiB"


_CHARTS: tuple[tuple[str, tuple[str, ...], Callable[[float], str], str], ...] = (
    ("in memory", ("resident_bytes",), _size, "min"),
    ("locked", ("locked_bytes",), _size, "min"),
    ("missing", ("missing_bytes",), _size, "max"),
    ("in swap", ("swapped_bytes",), _size, "max"),
    ("available", ("available_bytes",), _size, "min"),
    ("pressure", ("pressure",), lambda level: PRESSURES[int(level)].value, "max"),
    ("lost", ("lost_bytes",), _size, "sum"),
    ("let go", ("lettings_go",), str, "sum"),
    ("swap, engine", ("swap_engine_bytes",), _size, "sum"),
    ("swap, others", ("swap_other_bytes", "swap_unknown_bytes"), _size, "sum"),
    ("passes", ("passes",), str, "sum"),
    ("requests", ("requests",), str, "sum"),
    ("cut", ("cuts",), str, "sum"),
    ("continued", ("continuations",), str, "sum"),
)
"""Title, columns that are added, how a value is written, and which value stands beside the chart."""


def charts(past: dict[str, Any], width: int) -> Table:
    """Return a small chart of each column that has something to show, for a terminal of that width."""
    from rich.table import Table  # noqa: PLC0415  # heavy
    from rich.text import Text  # noqa: PLC0415

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    for title, columns, say, which in _CHARTS:
        values = [_sum(parts) for parts in zip(*(past.get(each) or () for each in columns), strict=True)]
        known = [value for value in values if value is not None]
        if not known or not any(known):
            continue
        told = min(known) if which == "min" else max(known) if which == "max" else sum(known)
        beside = {"min": "at least ", "max": "up to ", "sum": ""}[which] + say(told)
        steps = evenly(past["at_s"], values, past["since_s"], past["until_s"], past["step_s"])
        line = spark(steps, max(width - _CHART_MARGIN, 8), min if which == "min" else max)
        table.add_row(title, Text(line), beside)
    return table


def _sum(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def _days(past: dict[str, Any]) -> Table:
    """Return what each day has brought."""
    from rich.table import Table  # noqa: PLC0415  # heavy

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("day", "warm", "after idleness", "median", "forecast", "spared (estimate)"):
        table.add_column(title)
    for day in past["days"]:
        share, spared_s, spared_bytes = day["warm_share"], day["spared_s"], day["spared_bytes"]
        estimate = "" if spared_s is None else f"about {duration(spared_s)}"
        estimate += f", {spared_bytes / 1e9:.0f} GB of reading" if spared_bytes else ""
        table.add_row(
            day["day"],
            "" if share is None else f"{share:.1%}",
            f"{day['first_tokens']} first tokens",
            _seconds(day["median_s"]),
            _seconds(day["forecast_median_s"]),
            estimate or "no first token of a cold model yet",
        )
    return table


def _after_idle(past: dict[str, Any]) -> Table | None:
    """Return the last first tokens after long idleness, None without any."""
    from rich.table import Table  # noqa: PLC0415  # heavy

    tokens = past["tokens"]
    shown = [number for number, idle_s in enumerate(tokens["idle_s"]) if idle_s >= LONG_IDLE_S][-_SHOWN_TOKENS:]
    if not shown:
        return None
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("first token", "after", "found it", "forecast", "measured", "reused", "processed"):
        table.add_column(title)
    for number in shown:
        one = {name: values[number] for name, values in tokens.items()}
        table.add_row(
            time.strftime("%a %H:%M", time.localtime(one["at_s"])),
            duration(one["idle_s"]),
            one["temperature"],
            _seconds(one["forecast_s"]),
            _seconds(one["took_s"]),
            *("" if one[name] is None else str(one[name]) for name in ("reused", "processed")),
        )
    return table


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2g} s"
