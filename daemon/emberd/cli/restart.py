"""`emberd restart`: a fresh engine."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import click

from emberd.cli.talk import as_json, ask_daemon, ask_status, load_of_daemon, show
from emberd.core.errors import EmberdError, EngineFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emberd.core.status import Status

_ASK_AGAIN_S = 0.2
_START_LIMIT_S = 20.0
"""A new emberd answers within a second; a computer that swaps takes longer."""


@click.command("restart")
@click.option("--daemon", "is_daemon", is_flag=True, help="Replace emberd itself; the engine goes on.")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool, is_daemon: bool) -> None:  # noqa: FBT001  # click's flags
    """Restart the engine and wait until it is ready; clients' requests wait meanwhile.

    With --daemon emberd replaces itself: running requests end first, new connections wait, none is refused, and the
    engine is taken over without loading the model again.
    """
    settings = load_of_daemon(config).settings
    if is_daemon:
        show(replace_daemon(config, settings.lifecycle.drain_timeout_s), is_json, _print_replaced)
        return
    began_s = time.monotonic()
    asked = ask_daemon(config, "restart")
    if asked.get("standby"):
        _await_new_start(config, began_s, settings.lifecycle.load_timeout_s)
    starts = asked["starts"]
    timing = settings.lifecycle
    status = wait_until_ready(
        config,
        starts,
        timing.drain_timeout_s + timing.stop_timeout_s + timing.load_timeout_s,
        is_quiet=is_json,
    )
    seconds = time.monotonic() - began_s
    pid = status.engine and status.engine.pid
    show(
        {"ready": True, "pid": pid, "seconds": round(seconds, 3)},
        is_json,
        lambda _: click.echo(f"ready (pid {pid}, {seconds:.1f} s)"),
    )


def _await_new_start(config: str | None, began_s: float, limit_s: float) -> None:
    """Wait until the emberd that follows one that waited, because it could not start, has started an engine.

    Raises:
        EngineFailed: it waits again, or did not come back in time.
    """
    error = EmberdError("emberd did not come back", "See its log; then: emberd run.")
    seen_s = began_s
    while time.monotonic() < min(seen_s + _START_LIMIT_S, began_s + limit_s):
        time.sleep(_ASK_AGAIN_S)
        try:
            status = ask_status(config)
        except EmberdError as caught:
            error = caught
            continue
        if status.state == "STANDBY" and status.uptime_s < time.monotonic() - began_s:
            raise EngineFailed(f"emberd still cannot start: {status.reason}", status.remedy or "")
        if status.state in {"FAILED", "STOPPED"}:  # on its way to waiting again, as a rule
            error = EngineFailed(status.reason or "the engine is stopped", "Mend the cause, then `emberd restart`.")
            continue
        if status.state not in {"STANDBY", "STARTING"}:
            return
        seen_s = time.monotonic()
    raise EngineFailed(error.message, error.remedy)


def replace_daemon(config: str | None, drain_timeout_s: float, command: Sequence[str] = ()) -> dict[str, Any]:
    """Ask emberd to replace itself, and wait for the new one.

    Args:
        config: the settings file, as the command line names it.
        drain_timeout_s: how long running requests may take to end.
        command: command line of the new one; empty for that of the old one.

    Raises:
        EngineFailed: it did not come back in time.
    """
    began_s = time.monotonic()
    arguments: dict[str, Any] = {"command": [*command]} if command else {}
    before = ask_daemon(config, "replace", **arguments)
    deadline_s = began_s + drain_timeout_s + _START_LIMIT_S
    while time.monotonic() < deadline_s:
        time.sleep(_ASK_AGAIN_S)
        with contextlib.suppress(EmberdError):
            status = ask_status(config)
            if status.uptime_s < time.monotonic() - began_s:
                seconds = round(time.monotonic() - began_s, 3)
                return {"replaced": True, "pid": status.pid, "state": status.state, "seconds": seconds}
    raise EngineFailed(f"emberd (pid {before['pid']}) did not come back", "See its log; then: emberd run.")


def _print_replaced(answer: dict[str, Any]) -> None:
    click.echo(f"emberd replaced (pid {answer['pid']}, engine {answer['state']}, {answer['seconds']:.1f} s)")


def wait_until_ready(config: str | None, starts: int, limit_s: float, *, is_quiet: bool) -> Status:
    """Wait for an engine that was started after `starts` others, telling its states as they pass.

    Raises:
        EngineFailed: it failed, or was not ready within `limit_s`.
    """
    deadline_s = time.monotonic() + limit_s
    said = ""
    while time.monotonic() < deadline_s:
        status = ask_status(config)
        if status.starts > starts and status.state == "READY":
            return status
        if status.state in {"FAILED", "STANDBY"}:
            raise EngineFailed(status.reason, "Mend the cause, then `emberd restart`.")
        if status.state_words != said and not is_quiet:
            click.echo(status.state_words)
        said = status.state_words
        time.sleep(_ASK_AGAIN_S)
    raise EngineFailed(f"the engine was not ready within {limit_s:.0f} s", "`emberd status` tells its state.")
