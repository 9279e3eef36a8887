"""`emberd install`: a service of the user's launchd or systemd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from emberd.cli import service
from emberd.cli.talk import as_json, show

if TYPE_CHECKING:
    from emberd.core.ports import ServiceManager
    from emberd.core.service import WantedService
    from emberd.core.status import Status


@click.command("install")
@click.option("--print", "is_print", is_flag=True, help="Print what would be written; change nothing.")
@service.with_label
@service.with_manager
@click.option(
    "--at-login/--on-demand",
    "starts_at_login",
    default=None,
    help="Start at every login, or when a client connects. Default: as it is installed, else at login.",
)
@as_json
@click.pass_obj
def command(
    config: str | None,
    is_print: bool,  # noqa: FBT001  # click's flag
    label: str | None,
    manager_name: service.ManagerName,
    starts_at_login: bool | None,  # noqa: FBT001  # same
    is_json: bool,  # noqa: FBT001  # same
) -> None:
    """Run emberd as a service: a LaunchAgent on macOS, a systemd user service on Linux.

    launchd or systemd holds the endpoint's port from then on, starts emberd at every login and after a crash. Run
    again, it changes nothing, or what the settings or a new version have changed, or mends an interrupted install.

    A second emberd needs its own settings (endpoint.port, state.directory) and name:
    emberd --config small.toml install --label small
    """
    manager = service.find_manager(manager_name)
    label = service.find_label(manager, config, label)
    if starts_at_login is None:
        starts_at_login = manager.installed_login(label) is not False
    wanted, settings = service.wanted_service(manager, config, label, starts_at_login=starts_at_login)
    if is_print:
        files = {str(path): text for path, text in manager.files(wanted).items()}
        show({"label": label, "files": files}, is_json, _print_files)
        return
    service.check_user()
    service.check_settings(config, settings)
    content = _install(manager, config, wanted, is_json=is_json)
    content["notices"] = service.notices(settings, wanted, manager)
    show(content, is_json, _print_installed)


def _install(
    manager: ServiceManager, config: str | None, wanted: WantedService, *, is_json: bool
) -> dict[str, Any]:
    found = manager.status(wanted.label, wanted)
    service.check_no_other(manager, config, wanted, found)
    has_changed = manager.install(wanted, service.teller(is_quiet=is_json))
    if wanted.starts_at_login:
        status: Status | None = service.wait_for_daemon(config, manager, wanted.label)
    else:
        status = service.daemon_status(config)
    return {
        "installed": True,
        "changed": has_changed,
        "label": wanted.label,
        "manager": manager.name,
        "files": [str(path) for path in manager.files(wanted)],
        "starts_at_login": wanted.starts_at_login,
        "endpoint": f"{wanted.host}:{wanted.port}",
        "daemon": status
        and {
            "pid": status.pid,
            "state": status.state,
            "endpoint": status.endpoint,
            "reason": status.reason,
        },
        "words": service.daemon_words(status) if status else "emberd starts when a client connects",
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
