"""`emberd logs`: what emberd has logged, from this system's log or the file."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import deque
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from emberd.core import log_lines, log_reading
from emberd.core.errors import EmberdError
from emberd.core.log_reading import Wanted
from emberd.host import ThisHost, config_file
from emberd.host.log_reader import READ_THE_FILE, LogStoreRefused, SystemReader, file_entries, follow_file
from emberd.host.paths import instance_name, log_file, state_paths
from emberd.services.control import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from emberd.core.log_reading import Entry
    from emberd.core.settings import Settings

_LINES = 100
_LINES_BEFORE_FOLLOWING = 10
_SYSTEM_LOGS = {"unified", "journal"}
_COLOURS: dict[str, dict[str, Any]] = {
    "time": {"dim": True},
    "category": {"dim": True},
    "instance": {"dim": True},
    "event": {"bold": True},
    "warning": {"fg": "yellow"},
    "error": {"fg": "red"},
    "critical": {"fg": "red", "bold": True},
    "debug": {"dim": True},
    "traceback": {"dim": True},
}


@click.command("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is logged from now on; Ctrl-C ends.")
@click.option("-n", "--lines", type=click.IntRange(0), metavar="LINES", help=f"The last LINES. Default: {_LINES}.")
@click.option("--since", metavar="WHEN", help="From then on: 30m, 2h, 1d, today, yesterday, 14:30, 2026-05-31.")
@click.option(
    "--level", type=click.Choice(log_lines.LEVELS[:-1]), default="debug", help="Only this level and what is worse."
)
@click.option(
    "--category",
    "categories",
    multiple=True,
    type=click.Choice(log_lines.CATEGORIES),
    help="Only what this service says; may be given several times.",
)
@click.option(
    "--event", "events", multiple=True, metavar="NAME", help="Only this event; may be given several times."
)
@click.option("--json", "is_json", is_flag=True, help="Print a line of JSON for each event.")
@click.option(
    "--source",
    type=click.Choice(["auto", "system", "file"]),
    default="auto",
    help="The system's log, or emberd's log file. auto: where the running, or last, emberd logs.",
)
@click.option("--all-instances", is_flag=True, help="Of every emberd that logs to the system's log.")
@click.pass_obj
def command(
    config: str | None,
    *,
    follow: bool,
    lines: int | None,
    since: str | None,
    level: str,
    categories: tuple[str, ...],
    events: tuple[str, ...],
    is_json: bool,
    source: str,
    all_instances: bool,
) -> None:
    """Show what emberd has logged.

    Reads the unified log on macOS, the journal on Linux, or emberd's own log file, and prints all in one form.

    \b
      emberd logs -f                            follow
      emberd logs --since today --level warning
      emberd logs --category engine -n 500      what the engine printed
      emberd logs --json --since 1h | jq .event
    """
    settings, _ = config_file.load(config)
    try:
        moment = None if since is None else log_reading.read_since(since, datetime.now().astimezone())
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--since") from None
    for event in events:
        if not event.isidentifier():
            raise click.BadParameter(f"{event!r} is no name of an event", param_hint="--event")
    wanted = Wanted(
        moment, level, categories, events, None if all_instances else instance_name(settings), os.geteuid()
    )
    last = lines
    if lines is None and moment is None:
        last = _LINES_BEFORE_FOLLOWING if follow else _LINES
    show = _show_json if is_json else _show
    path = log_file(settings, ThisHost.name)
    reader = _system_reader(settings, path, wanted, source)
    if reader is not None:
        try:
            count = _show_all(reader.follow(wanted, last) if follow else reader.entries(wanted, last), show)
        except LogStoreRefused as refusal:
            if source == "system" or not path.exists():
                raise
            click.echo(f"emberd: {refusal.message}; this is {path}", err=True)
        else:
            _say_if_none(count, wanted, "the system's log")
            return
    of_file = Wanted(wanted.since, wanted.level, wanted.categories, wanted.events)  # a file is of one instance
    if follow:
        asyncio.run(follow_file(path, of_file, last, ThisHost().watch_file, show))
    else:
        _say_if_none(_show_all(deque(file_entries(path, of_file), last), show), wanted, str(path))


def _system_reader(settings: Settings, path: Path, wanted: Wanted, source: str) -> SystemReader | None:
    """Return the reader of the system's log, None if the file is to be read.

    Raises:
        EmberdError: the system's log is asked for, but no program reads it.
    """
    program = None if source == "file" else ThisHost().log_program()
    if program is None:
        if source == "system":
            raise EmberdError("this system has no program that reads its log", READ_THE_FILE)
        return None
    reader = SystemReader(program, is_journal=ThisHost.name != "darwin")
    if source == "system":
        return reader
    places = _places_of_running(settings)
    if places is not None:
        is_there = not _SYSTEM_LOGS.isdisjoint(places)
    elif settings.log.sink != "auto":
        is_there = settings.log.sink == "system"
    else:
        is_there = _is_newer(reader, path, wanted)
    return reader if is_there else None


def _is_newer(reader: SystemReader, path: Path, wanted: Wanted) -> bool:
    """Return True if the last emberd wrote to the system's log: its newest entry is as new as the file."""
    newest = reader.newest(Wanted(instance=wanted.instance, user_id=wanted.user_id))
    if newest is None or newest.time is None:
        return False
    try:
        # On macOS it wrote to both, and the system's log is where a person looks.
        slack_s = 60.0 if ThisHost.name == "darwin" else 0.0
        return newest.time.timestamp() + slack_s >= path.stat().st_mtime
    except OSError:
        return True


def _places_of_running(settings: Settings) -> list[str] | None:
    """Return the sinks of the running daemon, None if none runs."""
    try:
        places = ask(state_paths(settings).control, "status").get("log")
    except EmberdError:
        return None
    return places if isinstance(places, list) else None


def _show_all(entries: Iterable[Entry], show: Callable[[Entry], None]) -> int:
    count = 0
    for entry in entries:
        show(entry)
        count += 1
    return count


def _say_if_none(count: int, wanted: Wanted, place: str) -> None:
    if not count and sys.stderr.isatty():
        span = "" if wanted.since is None else f" since {wanted.since:%Y-%m-%d %H:%M}"
        click.echo(f"emberd: nothing of that kind in {place}{span}", err=True)


def _show_json(entry: Entry) -> None:
    click.echo(json.dumps(entry.as_json(), ensure_ascii=False, default=str))


def _show(entry: Entry) -> None:
    pieces = []
    for kind, text in log_reading.words(entry):
        style = _COLOURS.get(entry.level if kind == "level" else kind, {})
        pieces.append(click.style(text, **style) if style else text)
    click.echo(" ".join(pieces))
