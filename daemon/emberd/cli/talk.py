"""What the verbs share: asking the daemon, and printing for people or machines."""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

import click

from emberd.core.errors import NotRunning
from emberd.host import config_file
from emberd.host.paths import state_paths
from emberd.services.control import ASK_LIMIT_S, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emberd.core.status import FileStatus, GivenBackStatus, ResidencyStatus, Status
    from emberd.host.config_file import Loaded

as_json = click.option("--json", "is_json", is_flag=True, help="Print JSON instead of text.")


def ask_daemon(config: str | None, verb: str, timeout_s: float = ASK_LIMIT_S, **arguments: Any) -> dict[str, Any]:
    """Ask the daemon that the settings point to.

    Raises:
        NotRunning: there is none.
        ConfigError: there is none, and the settings are wrong; or they do not say where it is.
    """
    loaded = load_of_daemon(config)
    try:
        return ask(state_paths(loaded.settings).control, verb, timeout_s, **arguments)
    except NotRunning:
        if loaded.error is not None:
            raise loaded.error from None
        raise


def ask_status(config: str | None) -> Status:
    """Ask the daemon that the settings point to for its status; raises what `ask_daemon` raises."""
    from emberd.core.status import Status, from_plain  # noqa: PLC0415  # 25 ms; other verbs do without

    return from_plain(Status, ask_daemon(config, "status"))


def load_of_daemon(config: str | None) -> Loaded:
    """Return the settings by which to find the daemon: it may serve or stand by although they have become wrong.

    Raises:
        ConfigError: they do not even say where it is.
    """
    loaded = config_file.load_what_is_right(config)
    if loaded.error is not None and not loaded.tells_place:
        raise loaded.error
    return loaded


def seconds_of(text: str) -> float:
    """Return the seconds of a duration such as 90s, 30m, 2h or 1d; a bare number is minutes.

    Raises:
        click.BadParameter: the text is no duration.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not found:
        raise click.BadParameter(f"{text!r} is no duration: write 90s, 30m, 2h or 1d")
    return float(found[1]) * {"s": 1, "": 60, "m": 60, "h": 3600, "d": 86_400}[found[2]]


def show(content: dict[str, Any], is_json: bool, to_text: Callable[[dict[str, Any]], None]) -> None:  # noqa: FBT001  # click's flag
    """Print `content` as JSON, or let `to_text` print it for a person."""
    if is_json:
        click.echo(json.dumps(content, indent=2))
    else:
        to_text(content)


@contextlib.contextmanager
def byte_progress(*, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error; yield a function that takes bytes done and bytes to do."""
    if not is_shown:
        yield lambda *_: None
        return
    from rich.console import Console  # noqa: PLC0415  # heavy, and not needed without a terminal
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn  # noqa: PLC0415

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def gib(size_bytes: int) -> str:
    """Return bytes as GiB with two decimals."""
    return f"{size_bytes / (1 << 30):.2f}"


def residency_words(seen: ResidencyStatus) -> str:
    """Return a line on a residency."""
    if seen.share is None:
        return f"UNKNOWN: {seen.message}"
    text = f"{seen.share:.1%}, {gib(seen.resident_bytes or 0)} of {gib(seen.total_bytes or 0)} GiB"
    if seen.at_least != seen.at_most:
        text += f" (between {seen.at_least:.1%} and {seen.at_most:.1%})"
    return text


_HELD = {
    "copied": "copied: only use, or the engine's own lock, keeps it in memory",
    "replaced": "the engine maps a file that is no longer there; emberd restart loads this one",
    "unknown": "not known whether the engine maps it, or uses it",
}


def file_words(file: FileStatus) -> str:
    """Return a line on one of the engine's files."""
    words = [file.role.replace("_", " ")]
    if file.size_bytes is None:
        words.append("not there")
    else:
        words.append(f"{gib(file.size_bytes)} GiB")
    known = ((file.resident_bytes, "in memory"), (file.locked_bytes, "locked"))
    words += [f"{gib(size_bytes)} {word}" for size_bytes, word in known if size_bytes is not None]
    words.append(_HELD.get(file.held, "mapped"))
    return f"{file.path.rpartition('/')[2]}: {', '.join(words)}"


def given_back_words(given: GivenBackStatus) -> str:
    """Return a line on what a cool spell gave back."""

    def freed(before: int | None, after: int | None) -> str:
        return "unknown" if before is None or after is None else f"{gib(max(before - after, 0))} GiB"

    locked = freed(given.locked_before_bytes, given.locked_after_bytes)
    if not given.engine_stopped:
        return f"{locked} unlocked; the engine goes on"
    resident = freed(given.resident_before_bytes, given.resident_after_bytes)
    return f"{resident} given back, {locked} of it locked: the engine was stopped, and the next request starts it"
