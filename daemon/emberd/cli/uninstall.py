"""`emberd uninstall`: no service any more."""

from __future__ import annotations

from typing import Any

import click

from emberd.cli import service
from emberd.cli.talk import as_json, show
from emberd.core.service import stop_limit_s
from emberd.host import config_file
from emberd.host.paths import state_paths


@click.command("uninstall")
@service.with_label
@service.with_manager
@as_json
@click.pass_obj
def command(config: str | None, label: str | None, manager_name: service.ManagerName, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Stop emberd and remove it from launchd or systemd. Settings, state and logs stay."""
    service.check_user()
    settings, path = config_file.load(config)
    manager = service.find_manager(manager_name)
    label = service.find_label(manager, config, label)
    was_there = manager.uninstall(label, stop_limit_s(settings.lifecycle), service.teller(is_quiet=is_json))
    engine = service.end_leftover_engine(settings)
    kept = [str(each) for each in (path, state_paths(settings).directory) if each.exists()]
    show(
        {"uninstalled": was_there, "label": label, "manager": manager.name, "ended_engine": engine, "kept": kept},
        is_json,
        _print,
    )


def _print(content: dict[str, Any]) -> None:
    if content["ended_engine"]:
        click.echo(f"ended an engine that was left behind (pid {content['ended_engine']})")
    if not content["uninstalled"]:
        click.echo(f"{content['label']} is not installed; nothing to do")
        return
    click.echo(f"uninstalled {content['label']}")
    for path in content["kept"]:
        click.echo(f"kept: {path}")
