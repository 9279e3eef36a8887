"""The verbs that ask the daemon for one thing and print its answer: the name of a function is the verb."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from emberd.cli.talk import as_json, ask_daemon, byte_progress, given_back_words, seconds_of, show
from emberd.core.errors import EmberdError
from emberd.core.status import GivenBackStatus, from_plain
from emberd.core.words import duration
from emberd.services.control import ASK_LIMIT_S, SLOW_ASK_LIMIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

_PROGRESS_EVERY_S = 0.2


def _verb(
    limit_s: float = ASK_LIMIT_S, *, takes_duration: bool = False
) -> Callable[[Callable[[dict[str, Any]], str]], click.Command]:
    """Make a verb of a function that puts the daemon's answer into words; its docstring is the help."""

    def make(say: Callable[[dict[str, Any]], str]) -> click.Command:
        def ask_and_show(config: str | None, *, is_json: bool, for_: str | None = None) -> None:
            arguments = {} if for_ is None else {"seconds": seconds_of(for_)}
            answer = ask_daemon(config, say.__name__, limit_s, **arguments)
            show(answer, is_json, lambda answer: click.echo(say(answer)))

        callback = as_json(click.pass_obj(ask_and_show))
        if takes_duration:
            callback = click.argument("for_", metavar="DURATION", default="1h")(callback)
        return click.command(say.__name__, help=say.__doc__)(callback)

    return make


@_verb(SLOW_ASK_LIMIT_S)
def reload(answer: dict[str, Any]) -> str:
    """Read the settings again; the engine restarts only if its command line changes."""
    text = "settings read; " + ("the engine restarts" if answer["engine_restarts"] else "the engine goes on")
    if answer["needs_emberd_restart"]:
        text += f"\nin force only after emberd is restarted: {', '.join(answer['needs_emberd_restart'])}"
    return text


@_verb(takes_duration=True)
def pause(answer: dict[str, Any]) -> str:
    """Warm nothing for DURATION (90s, 30m, 2h, 1d; 1h by default). Locks stay."""
    return f"nothing is warmed for {duration(answer['seconds'])}; `emberd resume` ends it"


@_verb()
def resume(answer: dict[str, Any]) -> str:
    """End a pause or a cool spell, and warm the model."""
    return "keeping warm again" if answer["was_paused"] else "it was not paused; warming"


@_verb(SLOW_ASK_LIMIT_S, takes_duration=True)
def cool(answer: dict[str, Any]) -> str:
    """Let go of the memory for DURATION (1h by default) or until the next request.

    An engine that has locked the model is stopped, and started again by the next request.
    """
    lines = [f"let go for {duration(answer['seconds'])}; `emberd resume` ends it"]
    given = answer.get("given_back")
    if given is not None:
        lines.append(given_back_words(from_plain(GivenBackStatus, given)))
    elif answer.get("is_put_off"):
        lines.append("the engine is stopped as soon as no request runs")
    return "\n".join(lines)


@_verb()
def forget(answer: dict[str, Any]) -> str:
    """Forget the last prompt and reply, which emberd keeps in memory to keep the prompt cache."""
    return "forgotten" if answer["had_turn"] else "there was nothing to forget"


@click.command("warm")
@as_json
@click.pass_obj
def warm(config: str | None, *, is_json: bool) -> None:
    """Warm weights and cache now; ends a pause or a cool spell. After Ctrl-C emberd goes on warming."""
    is_over = threading.Event()
    with byte_progress(is_shown=not is_json and sys.stderr.isatty()) as progress:
        watching = threading.Thread(target=_watch, args=(config, progress, is_over), daemon=True)
        watching.start()
        try:
            answer = ask_daemon(config, "warm", SLOW_ASK_LIMIT_S)
        finally:
            is_over.set()
            watching.join(_PROGRESS_EVERY_S)
    show(answer, is_json, _print_warmed)


def _watch(config: str | None, progress: Callable[[int, int], None], is_over: threading.Event) -> None:
    while not is_over.wait(_PROGRESS_EVERY_S):
        try:
            seen = ask_daemon(config, "progress")
        except EmberdError:
            return  # the verb itself reports why
        if seen["total_bytes"]:
            progress(seen["done_bytes"], seen["total_bytes"])


def _print_warmed(answer: dict[str, Any]) -> None:
    refused = f"the engine refused the replay (HTTP {answer['refused']})" if answer.get("refused") else ""
    if answer.get("steps") == ["start"]:
        click.echo("start: the engine loads the model, which is warmed when it is ready")
    elif answer.get("steps"):
        done = f"{', '.join(answer['steps'])}: {answer['seconds']:.2f} s"
        click.echo(f"{done}; {refused}" if refused else done)
    else:
        click.echo(f"nothing done: {refused or answer.get('reason', 'unknown')}")
