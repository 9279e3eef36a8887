"""`emberd completion`: shell completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash: emberd completion bash > ~/.local/share/bash-completion/completions/emberd
    zsh:  emberd completion zsh > a folder of your $fpath, named _emberd
    fish: emberd completion fish > ~/.config/fish/completions/emberd.fish
    """
    from emberd.cli.main import group  # noqa: PLC0415  # main imports this module

    found = get_completion_class(shell)
    if found is None:
        raise click.ClickException(f"no completion for {shell}")
    click.echo(found(group, {}, "emberd", "_EMBERD_COMPLETE").source())
