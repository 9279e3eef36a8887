"""`emberd config`: make, show and check the settings file."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import TYPE_CHECKING, Any

import click

from emberd.cli.talk import as_json, show
from emberd.core.errors import ConfigError
from emberd.core.settings import Settings, masked, to_toml
from emberd.host import config_file
from emberd.host.api_key import read_api_key

if TYPE_CHECKING:
    from emberd.core.types import LaunchPlan


@click.group("config")
def command() -> None:
    """Make, show and check the settings file."""


@command.command("path")
@click.pass_obj
def path(config: str | None) -> None:
    """Print the path of the settings file."""
    click.echo(config_file.locate(config)[0])


@command.command("init")
@click.option("--model", metavar="FILE", help="The GGUF file to serve.")
@click.option("--engine", metavar="FILE", help="KoboldCPP's binary, koboldcpp.py or its folder; or llama-server.")
@click.option("--kind", type=click.Choice(["koboldcpp", "llama-server", "embedded"]), help="Which engine it is.")
@click.option("--force", is_flag=True, help="Replace an existing file (kept as *.old).")
@click.pass_obj
def init(config: str | None, model: str | None, engine: str | None, kind: Any, force: bool) -> None:  # noqa: FBT001  # click's flag
    """Write a settings file with every setting, its default, unit and range."""
    from pathlib import Path  # noqa: PLC0415

    from emberd.host.files import write_atomically  # noqa: PLC0415

    target, _ = config_file.locate(config)
    if target.exists():
        if not force:
            raise ConfigError(f"there is a settings file already: {target}", "Edit it, or use --force.")
        target.replace(target.with_name(target.name + ".old"))
    settings = Settings()
    if model:
        settings = dataclasses.replace(
            settings, model=dataclasses.replace(settings.model, path=str(Path(model).expanduser().absolute()))
        )
    chosen: dict[str, Any] = {}
    if engine:
        # A bare name is searched on PATH; a path must not depend on where emberd is started.
        is_name = os.sep not in engine and not Path(engine).exists()
        chosen["path"] = engine if is_name else str(Path(engine).expanduser().absolute())
    if kind:
        chosen["kind"] = kind
    settings = dataclasses.replace(settings, engine=dataclasses.replace(settings.engine, **chosen))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {target.parent}: {error.strerror}", "Name another --config.") from error
    write_atomically(target, to_toml(settings))
    click.echo(f"wrote {target}")
    click.echo("next: emberd config check" if model else "next: set model.path in it, then: emberd config check")


@command.command("show")
@click.option("--defaults", is_flag=True, help="Show the defaults instead of the settings in force.")
@as_json
@click.pass_obj
def show_settings(config: str | None, defaults: bool, is_json: bool) -> None:  # noqa: FBT001  # click's flags
    """Print every setting in force, with default, unit and range."""
    settings = masked(Settings() if defaults else config_file.load(config)[0])
    show(dataclasses.asdict(settings), is_json, lambda _: click.echo(to_toml(settings), nl=False))


@command.command("check")
@as_json
@click.pass_obj
def check(config: str | None, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Try the settings: the file, the model, the engine and its arguments. Starts nothing that loads a model."""
    settings, file = config_file.load(config)
    read_api_key(settings, file)
    if not file.exists() and not settings.model.path:
        raise ConfigError(f"there is no settings file at {file}", "Make one: emberd config init --model FILE")
    plan = asyncio.run(_plan(settings))
    content = {
        "settings_file": str(file),
        "command": list(plan.shown_arguments()),
        "notices": [dataclasses.asdict(notice) for notice in plan.notices],
    }
    show(content, is_json, _print_check)


def _print_check(content: dict[str, Any]) -> None:
    import shlex  # noqa: PLC0415

    click.echo(f"{content['settings_file']}: good")
    for notice in content["notices"]:
        click.echo(f"notice ({notice['code']}): {notice['message']}")
    click.echo("the engine would be started as:")
    click.echo("  " + shlex.join(content["command"]))


async def _plan(settings: Settings) -> LaunchPlan:
    from emberd.engine.choose import choose_engine  # noqa: PLC0415
    from emberd.host import ThisHost  # noqa: PLC0415
    from emberd.host.paths import prepare, state_paths  # noqa: PLC0415
    from emberd.services.lock_meter import LockMeter  # noqa: PLC0415
    from emberd.services.supervisor import free_port  # noqa: PLC0415

    paths = state_paths(settings)
    prepare(paths)
    host = ThisHost()
    engine = choose_engine(settings, host, paths)
    decision = await LockMeter(host).decide(settings, engine)
    plan = await engine.plan(free_port(), will_lock=decision.will_lock)
    return dataclasses.replace(plan, notices=(*plan.notices, *decision.reasons))
