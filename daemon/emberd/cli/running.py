"""`emberd start`, `stop` and `restart`, for an installed service or an emberd that was started by hand."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import click

from emberd.cli.service import (
    ANSWER_LIMIT_S,
    Asked,
    daemon_words,
    end_leftover_engine,
    on_service,
    statuses,
)
from emberd.cli.talk import as_json, ask_daemon, load_of_daemon, show
from emberd.core.errors import EmberdError, EngineFailed, NotRunning
from emberd.host import ThisHost, config_file
from emberd.service.checks import check_user
from emberd.service.wanted import stop_limit_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emberd.core.settings import Settings
    from emberd.core.status import Status


@click.command("start")
@on_service()
def start(asked: Asked) -> None:
    """Start the installed service now, even if it was stopped, was switched off or has given up."""
    check_user()
    settings, _ = config_file.load(asked.config)
    has_started = asked.manager.start(asked.label, stop_limit_s(settings.lifecycle), asked.tell)
    status = asked.wait_for_daemon()
    content = {
        "started": has_started,
        "label": asked.label,
        "manager": asked.manager.name,
        "pid": status.pid,
        "state": status.state,
        "words": daemon_words(status),
    }
    asked.show(content, _print_started)


def _print_started(content: dict[str, Any]) -> None:
    if not content["started"]:
        click.echo(f"{content['label']} runs already")
    click.echo(content["words"])


@click.command("stop")
@click.option(
    "--until-asked",
    "is_until_asked",
    is_flag=True,
    help="Leave launchd or systemd its socket: the next connection starts emberd again.",
)
@on_service()
def stop(asked: Asked, *, is_until_asked: bool) -> None:
    """Stop the daemon and its engine; running requests may finish first (lifecycle.drain_timeout_s).

    An installed service is unloaded, because the next connection would start it again. It comes back with the
    next login, or with `emberd start`.
    """
    settings = load_of_daemon(asked.config).settings
    limit_s = stop_limit_s(settings.lifecycle)
    label = asked.label
    began_s = time.monotonic()
    content = None
    if not is_until_asked and asked.manager.installed_login(label) is not None:
        content = _stop_service(asked, limit_s)
    if content is None:
        content = _stop_daemon(asked.config, settings, limit_s)
    content = {
        "stopped": True,
        "ended_engine": end_leftover_engine(settings),
        **content,
        "seconds": round(time.monotonic() - began_s, 3),
    }
    asked.show(content, _print_stopped)


def _stop_service(asked: Asked, limit_s: int) -> dict[str, Any] | None:
    """Unload the service; return None if it is not loaded, or an emberd that was started by hand runs instead."""
    found = asked.manager.status(asked.label)
    is_by_hand = asked.daemon_status() is not None and not found.is_running
    if not found.is_loaded:
        return None
    asked.manager.stop(asked.label, limit_s, asked.tell)
    return None if is_by_hand else {"pid": found.pid, "label": asked.label}


def _stop_daemon(config: str | None, settings: Settings, limit_s: int) -> dict[str, Any]:
    """End an emberd that was started by hand, or its leftover engine."""
    try:
        pid: int = ask_daemon(config, "stop")["pid"]
    except NotRunning:
        engine = end_leftover_engine(settings)
        if engine is None:
            raise
        return {"pid": None, "label": None, "ended_engine": engine}
    try:
        asyncio.run(_ended(pid, limit_s))
    except TimeoutError:
        raise EngineFailed(
            f"emberd (pid {pid}) has not ended within {limit_s} s",
            "Look at its log; `emberd status` may answer.",
        ) from None
    return {"pid": pid, "label": None}


async def _ended(pid: int, limit_s: float) -> None:
    """Return when the process has ended, zombie or not."""
    try:
        watch = ThisHost().watch_exit(pid)
    except ProcessLookupError:
        return
    try:
        async with asyncio.timeout(limit_s):
            await watch.wait()
    finally:
        watch.close()


def _print_stopped(content: dict[str, Any]) -> None:
    pid = f"pid {content['pid']}, " if content["pid"] else ""
    click.echo(f"stopped ({pid}{content['seconds']:.1f} s)")
    if content["ended_engine"]:
        click.echo(f"its engine had been left behind, and is stopped too (pid {content['ended_engine']})")
    if content["label"]:
        click.echo("it comes back with the next login, or with: emberd start")


@click.command("restart")
@click.option("--daemon", "is_daemon", is_flag=True, help="Replace emberd itself; the engine goes on.")
@as_json
@click.pass_obj
def restart(config: str | None, *, is_json: bool, is_daemon: bool) -> None:
    """Restart the engine and wait until it is ready; clients' requests wait meanwhile.

    With --daemon emberd replaces itself: running requests end first, new connections wait, none is refused, and the
    engine is taken over without loading the model again.
    """
    timing = load_of_daemon(config).settings.lifecycle
    if is_daemon:
        show(replace_daemon(config, timing.drain_timeout_s), is_json, _print_replaced)
        return
    began_s = time.monotonic()
    asked = ask_daemon(config, "restart")
    if asked.get("standby"):
        _await_new_start(config, began_s, timing.load_timeout_s)
    limit_s = timing.drain_timeout_s + timing.stop_timeout_s + timing.load_timeout_s
    status = _wait_until_ready(config, asked["starts"], limit_s, is_quiet=is_json)
    seconds = time.monotonic() - began_s
    pid = status.engine.pid if status.engine else None
    show(
        {"ready": True, "pid": pid, "seconds": round(seconds, 3)},
        is_json,
        lambda _: click.echo(f"ready (pid {pid}, {seconds:.1f} s)"),
    )


def _await_new_start(config: str | None, began_s: float, limit_s: float) -> None:
    """Wait until the emberd after one that stood by has started an engine.

    Raises:
        EngineFailed: it stands by again, or did not come back in time.
    """
    error = EmberdError("emberd did not come back", "See its log; then: emberd run.")
    seen_s = began_s
    for status in statuses(config, limit_s):
        if time.monotonic() > seen_s + ANSWER_LIMIT_S:
            break
        if isinstance(status, EmberdError):
            error = status
            continue
        if status.state == "STANDBY" and status.uptime_s < time.monotonic() - began_s:
            raise EngineFailed(f"emberd still cannot start: {status.reason}", status.remedy or "")
        if status.state in {"FAILED", "STOPPED"}:  # usually on its way to stand by again
            error = EngineFailed(status.reason or "the engine is stopped", "Mend the cause, then `emberd restart`.")
            continue
        if status.state not in {"STANDBY", "STARTING"}:
            return
        seen_s = time.monotonic()
    raise EngineFailed(error.message, error.remedy)


def _wait_until_ready(config: str | None, starts: int, limit_s: float, *, is_quiet: bool) -> Status:
    """Wait for an engine that was started after `starts` others, and print its states as they pass.

    Raises:
        EngineFailed: it failed, or was not ready within `limit_s`.
    """
    said = ""
    for status in statuses(config, limit_s):
        if isinstance(status, EmberdError):
            raise status
        if status.starts > starts and status.state == "READY":
            return status
        if status.state in {"FAILED", "STANDBY"}:
            raise EngineFailed(status.reason, "Mend the cause, then `emberd restart`.")
        saying = status.state_words
        if saying != said and not is_quiet:
            click.echo(saying)
        said = saying
    raise EngineFailed(f"the engine was not ready within {limit_s:.0f} s", "`emberd status` tells its state.")


def replace_daemon(config: str | None, drain_timeout_s: float, command: Sequence[str] = ()) -> dict[str, Any]:
    """Ask emberd to replace itself, by `command` if one is given, and wait for the new one.

    Raises:
        EngineFailed: it did not come back in time.
    """
    began_s = time.monotonic()
    arguments: dict[str, Any] = {"command": [*command]} if command else {}
    before = ask_daemon(config, "replace", **arguments)
    for status in statuses(config, drain_timeout_s + ANSWER_LIMIT_S):
        seconds = time.monotonic() - began_s
        if not isinstance(status, EmberdError) and status.uptime_s < seconds:
            return {
                "replaced": True,
                "pid": status.pid,
                "state": status.state,
                "seconds": round(seconds, 3),
            }
    raise EngineFailed(f"emberd (pid {before['pid']}) did not come back", "See its log; then: emberd run.")


def _print_replaced(answer: dict[str, Any]) -> None:
    click.echo(f"emberd replaced (pid {answer['pid']}, engine {answer['state']}, {answer['seconds']:.1f} s)")
