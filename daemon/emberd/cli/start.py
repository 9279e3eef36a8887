"""`emberd start`: the installed service, now."""

from __future__ import annotations

from typing import Any

import click

from emberd.cli import service
from emberd.cli.talk import as_json, show
from emberd.core.service import stop_limit_s
from emberd.host import config_file


@click.command("start")
@service.with_label
@service.with_manager
@as_json
@click.pass_obj
def command(config: str | None, label: str | None, manager_name: service.ManagerName, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Start the installed service now; also after it was stopped, switched off or has given up."""
    service.check_user()
    settings, _ = config_file.load(config)
    manager = service.find_manager(manager_name)
    label = service.find_label(manager, config, label)
    has_started = manager.start(label, stop_limit_s(settings.lifecycle), service.teller(is_quiet=is_json))
    status = service.wait_for_daemon(config, manager, label)
    content = {
        "started": has_started,
        "label": label,
        "manager": manager.name,
        "pid": status.pid,
        "state": status.state,
        "words": service.daemon_words(status),
    }
    show(content, is_json, _print)


def _print(content: dict[str, Any]) -> None:
    if not content["started"]:
        click.echo(f"{content['label']} runs already")
    click.echo(content["words"])
