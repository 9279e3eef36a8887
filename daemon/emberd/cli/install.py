"""`emberd install`, `uninstall` and `upgrade`: a service of the user's launchd or systemd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from emberd import __version__
from emberd.cli.running import replace_daemon
from emberd.cli.service import Asked, daemon_words, end_leftover_engine, on_service
from emberd.core.errors import EngineFailed, NotRunning
from emberd.host import config_file
from emberd.host.paths import state_paths
from emberd.service.checks import check_no_other, check_settings, check_user, notices
from emberd.service.wanted import stop_limit_s

if TYPE_CHECKING:
    from emberd.service.wanted import WantedService


@click.command("install")
@click.option("--print", "is_print", is_flag=True, help="Print what would be written; change nothing.")
@on_service(
    click.option(
        "--at-login/--on-demand",
        "starts_at_login",
        default=None,
        help="Start at every login, or when a client connects. Default: as it is installed, else at login.",
    )
)
def install(asked: Asked, *, is_print: bool, starts_at_login: bool | None) -> None:
    """Run emberd as a service: a LaunchAgent on macOS, a systemd user service on Linux.

    From then on launchd or systemd holds the endpoint's port, and starts emberd at every login and after a crash.
    Run again, this takes over changes of the settings or of the version, mends an interrupted install, or changes
    nothing.

    A second emberd needs its own settings (endpoint.port, state.directory) and name:
    emberd --config small.toml install --label small
    """
    if starts_at_login is None:
        starts_at_login = asked.manager.installed_login(asked.label) is not False
    wanted, settings = asked.wanted(starts_at_login=starts_at_login)
    if is_print:
        files = {str(path): text for path, text in asked.manager.files(wanted).items()}
        asked.show({"label": asked.label, "files": files}, _print_files)
        return
    check_user()
    check_settings(config_file.locate(asked.config)[0], settings)
    content = _install(asked, wanted)
    content["notices"] = notices(settings, wanted, asked.manager)
    asked.show(content, _print_installed)


def _install(asked: Asked, wanted: WantedService) -> dict[str, Any]:
    manager = asked.manager
    found = manager.status(wanted.label, wanted)
    daemon = asked.daemon_status()
    path, _ = config_file.locate(asked.config)
    check_no_other(manager, path, wanted, found, daemon.pid if daemon else None)
    has_changed = manager.install(wanted, asked.tell)
    status = asked.wait_for_daemon() if wanted.starts_at_login else asked.daemon_status()
    return {
        "installed": True,
        "changed": has_changed,
        "label": wanted.label,
        "manager": manager.name,
        "files": [str(path) for path in manager.files(wanted)],
        "starts_at_login": wanted.starts_at_login,
        "endpoint": f"{wanted.host}:{wanted.port}",
        "daemon": status
        and {"pid": status.pid, "state": status.state, "endpoint": status.endpoint, "reason": status.reason},
        "words": daemon_words(status) if status else "emberd starts when a client connects",
    }


def _print_files(content: dict[str, Any]) -> None:
    files: dict[str, str] = content["files"]
    for path, text in files.items():
        if len(files) > 1:
            click.echo(f"# {path}")
        click.echo(text, nl=False)


def _print_installed(content: dict[str, Any]) -> None:
    if content["changed"]:
        click.echo(f"installed {content['label']} ({content['manager']})")
        for path in content["files"]:
            click.echo(f"  {path}")
    else:
        click.echo(f"{content['label']} is installed already; nothing has changed")
    click.echo(content["words"])
    for notice in content["notices"]:
        click.echo(f"notice: {notice}")


@click.command("uninstall")
@on_service()
def uninstall(asked: Asked) -> None:
    """Stop emberd and remove it from launchd or systemd. Settings, state and logs stay."""
    check_user()
    settings, path = config_file.load(asked.config)
    was_there = asked.manager.uninstall(asked.label, stop_limit_s(settings.lifecycle), asked.tell)
    content = {
        "uninstalled": was_there,
        "label": asked.label,
        "manager": asked.manager.name,
        "ended_engine": end_leftover_engine(settings),
        "kept": [str(each) for each in (path, state_paths(settings).directory) if each.exists()],
    }
    asked.show(content, _print_uninstalled)


def _print_uninstalled(content: dict[str, Any]) -> None:
    if content["ended_engine"]:
        click.echo(f"ended an engine that was left behind (pid {content['ended_engine']})")
    if not content["uninstalled"]:
        click.echo(f"{content['label']} is not installed; nothing to do")
        return
    click.echo(f"uninstalled {content['label']}")
    for path in content["kept"]:
        click.echo(f"kept: {path}")


@click.command("upgrade")
@on_service()
def upgrade(asked: Asked) -> None:
    """Change to this version of emberd, for example after `pip install --upgrade emberd`.

    If this version needs other service files, it writes them. The running emberd finishes its requests and
    becomes the new one in the same process: new connections wait, none is refused, and the engine is taken over
    without loading the model again.
    """
    check_user()
    manager, label = asked.manager, asked.label
    login = manager.installed_login(label)
    wanted, settings = asked.wanted(starts_at_login=login is not False)
    before = asked.daemon_status()
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
        "from": before.version if before else None,
        "to": __version__,
        "daemon": None,
    }
    if before is not None:
        content["daemon"] = _replace(asked, wanted, settings.lifecycle.drain_timeout_s)
    elif is_written and manager.status(label).is_loaded:
        manager.install(wanted, asked.tell)  # it reads its files again; no emberd runs that this could disturb
    asked.show(content, _print_upgraded)


def _replace(asked: Asked, wanted: WantedService, drain_timeout_s: float) -> dict[str, Any]:
    """Make the running emberd become the wanted one.

    Raises:
        EngineFailed: another version came back, or none.
    """
    done = replace_daemon(asked.config, drain_timeout_s, wanted.program)
    after = asked.daemon_status()
    version = after.version if after else None
    if after is None or version != __version__:
        raise EngineFailed(
            f"emberd {version} runs, not {__version__}",
            "Start it anew: emberd stop, then emberd start.",
        )
    engine = after.engine
    return {**done, "engine_pid": engine and engine.pid, "engine_adopted": engine and engine.adopted}


def _print_upgraded(content: dict[str, Any]) -> None:
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
