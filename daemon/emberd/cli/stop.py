"""`emberd stop`: end the daemon and its engine."""

from __future__ import annotations

import time

import click
import psutil

from emberd.cli.talk import as_json, ask_daemon, show
from emberd.core.errors import EngineFailed
from emberd.host import config_file


@click.command("stop")
@as_json
@click.pass_obj
def command(config: str | None, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Stop the daemon and its engine; running requests may finish first (lifecycle.drain_timeout_s)."""
    settings, _ = config_file.load(config)
    pid = ask_daemon(config, "stop")["pid"]
    limit_s = settings.lifecycle.drain_timeout_s + settings.lifecycle.stop_timeout_s + 15
    began_s = time.monotonic()
    try:
        psutil.Process(pid).wait(limit_s)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
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
