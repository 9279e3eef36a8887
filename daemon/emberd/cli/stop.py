"""`emberd stop`: end the daemon and its engine."""

from __future__ import annotations

import asyncio
import time

import click

from emberd.cli.talk import as_json, ask_daemon, load_of_daemon, show
from emberd.core.errors import EngineFailed
from emberd.host import ThisHost


@click.command("stop")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Stop the daemon and its engine; running requests may finish first (lifecycle.drain_timeout_s)."""
    settings = load_of_daemon(config).settings
    pid = ask_daemon(config, "stop")["pid"]
    limit_s = settings.lifecycle.drain_timeout_s + settings.lifecycle.stop_timeout_s + 15
    began_s = time.monotonic()
    try:
        asyncio.run(_ended(pid, limit_s))
    except TimeoutError:
        raise EngineFailed(
            f"emberd (pid {pid}) has not ended within {limit_s:.0f} s",
            "Look at its log; `emberd status` may answer.",
        ) from None
    seconds = time.monotonic() - began_s
    show(
        {"stopped": True, "pid": pid, "seconds": round(seconds, 3)},
        is_json,
        lambda _: click.echo(f"stopped (pid {pid}, {seconds:.1f} s)"),
    )


async def _ended(pid: int, limit_s: float) -> None:
    """Return when the process has ended, whether or not its parent has taken note."""
    try:
        watch = ThisHost().watch_exit(pid)
    except ProcessLookupError:
        return
    try:
        async with asyncio.timeout(limit_s):
            await watch.wait()
    finally:
        watch.close()
