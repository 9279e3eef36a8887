"""`emberd upgrade`: the installed version takes over from the running one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from emberd import __version__
from emberd.cli import service
from emberd.cli.restart import replace_daemon
from emberd.cli.talk import as_json, show
from emberd.core.errors import EngineFailed, NotRunning

if TYPE_CHECKING:
    from emberd.core.ports import ServiceManager
    from emberd.core.service import WantedService


@click.command("upgrade")
@service.with_label
@service.with_manager
@as_json
@click.pass_obj
def command(config: str | None, label: str | None, manager_name: service.ManagerName, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Go over to this version of emberd, after e.g. `pip install --upgrade emberd`.

    The service's files are written anew if this version would write them otherwise. The running emberd ends its
    requests and becomes the new one in the same process: new connections wait, none is refused, and the engine is
    taken over without loading the model again.
    """
    service.check_user()
    manager = service.find_manager(manager_name)
    label = service.find_label(manager, config, label)
    login = manager.installed_login(label)
    wanted, settings = service.wanted_service(manager, config, label, starts_at_login=login is not False)
    before = service.daemon_status(config)
    stale: list[str] = []
    is_written = False
    if login is not None:
        stale = list(manager.status(label, wanted).stale)
        is_written = manager.write(wanted)
    elif before is None:
        raise NotRunning("emberd is neither installed nor running", "Install it: emberd install.")
    content: dict[str, Any] = {
        "label": label if login is not None else None,
        "written": is_written,
        "stale": stale,
        "from": before and before.version,
        "to": __version__,
        "daemon": None,
    }
    if before is not None:
        content["daemon"] = _replace(config, wanted, settings.lifecycle.drain_timeout_s)
    elif is_written and manager.status(label).is_loaded:
        _load_anew(manager, wanted, is_json=is_json)
    show(content, is_json, _print)


def _replace(config: str | None, wanted: WantedService, drain_timeout_s: float) -> dict[str, Any]:
    """Have the running emberd become the wanted one.

    Raises:
        EngineFailed: what came back is of another version, or nothing came back.
    """
    done = replace_daemon(config, drain_timeout_s, wanted.program)
    after = service.daemon_status(config)
    if after is None or after.version != __version__:
        raise EngineFailed(
            f"emberd {after and after.version} runs, not {__version__}",
            "Start it anew: emberd stop, then emberd start.",
        )
    engine = after.engine
    return {**done, "engine_pid": engine and engine.pid, "engine_adopted": engine and engine.adopted}


def _load_anew(manager: ServiceManager, wanted: WantedService, *, is_json: bool) -> None:
    """Have the manager read files that it has loaded while no emberd runs: nobody is disturbed."""
    manager.install(wanted, service.teller(is_quiet=is_json))


def _print(content: dict[str, Any]) -> None:
    if content["written"]:
        click.echo(f"wrote {content['label']} anew ({', '.join(content['stale']) or 'owner, mode or content'})")
        if content["daemon"]:
            click.echo("it counts from the next login on, or after: emberd stop, then emberd start")
    elif content["label"]:
        click.echo(f"{content['label']} is up to date")
    daemon = content["daemon"]
    if not daemon:
        click.echo("emberd does not run; start it: emberd start")
        return
    click.echo(
        f"emberd {content['to']} has taken over from {content['from']} "
        f"(pid {daemon['pid']}, engine {daemon['state']}, {daemon['seconds']:.1f} s)"
    )
