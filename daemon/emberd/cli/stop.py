"""`emberd stop`: end the daemon and its engine."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import click

from emberd.cli import service
from emberd.cli.talk import as_json, ask_daemon, load_of_daemon, show
from emberd.core.errors import EngineFailed, NotRunning
from emberd.core.service import stop_limit_s
from emberd.host import ThisHost

if TYPE_CHECKING:
    from emberd.core.ports import ServiceManager
    from emberd.core.settings import Settings


@click.command("stop")
@click.option(
    "--until-asked",
    "is_until_asked",
    is_flag=True,
    help="Leave launchd or systemd its socket: the next connection starts emberd again.",
)
@service.with_label
@service.with_manager
@as_json
@click.pass_obj
def command(
    config: str | None,
    is_until_asked: bool,  # noqa: FBT001  # click's flag
    label: str | None,
    manager_name: service.ManagerName,
    is_json: bool,  # noqa: FBT001  # same
) -> None:
    """Stop the daemon and its engine; running requests may finish first (lifecycle.drain_timeout_s).

    An installed service is unloaded, or the next connection would start it again. It comes back with the next
    login, or with `emberd start`.
    """
    settings = load_of_daemon(config).settings
    limit_s = stop_limit_s(settings.lifecycle)
    manager = service.find_manager(manager_name)
    label = service.find_label(manager, config, label)
    began_s = time.monotonic()
    content = None
    if not is_until_asked and manager.installed_login(label) is not None:
        content = _stop_service(manager, config, label, limit_s, is_json=is_json)
    if content is None:
        content = _stop_daemon(config, settings, limit_s)
    content = {
        "stopped": True,
        "ended_engine": service.end_leftover_engine(settings),
        **content,
        "seconds": round(time.monotonic() - began_s, 3),
    }
    show(content, is_json, _print)


def _stop_service(
    manager: ServiceManager, config: str | None, label: str, limit_s: int, *, is_json: bool
) -> dict[str, Any] | None:
    """Unload the service; None if it is not loaded, or an emberd that was started by hand runs instead."""
    found = manager.status(label)
    daemon = service.daemon_status(config)
    is_by_hand = daemon is not None and not found.is_running
    if not found.is_loaded:
        return None
    manager.stop(label, limit_s, service.teller(is_quiet=is_json))
    return None if is_by_hand else {"pid": found.pid, "label": label}


def _stop_daemon(config: str | None, settings: Settings, limit_s: int) -> dict[str, Any]:
    """End an emberd that was started by hand, or the engine that is all that is left of one."""
    try:
        pid: int = ask_daemon(config, "stop")["pid"]
    except NotRunning:
        engine = service.end_leftover_engine(settings)
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


def _print(content: dict[str, Any]) -> None:
    pid = f"pid {content['pid']}, " if content["pid"] else ""
    click.echo(f"stopped ({pid}{content['seconds']:.1f} s)")
    if content["ended_engine"]:
        click.echo(f"its engine had been left behind, and is stopped too (pid {content['ended_engine']})")
    if content["label"]:
        click.echo("it comes back with the next login, or with: emberd start")


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
