"""`emberd`: the group of verbs. Each verb's module is imported only when it is called: the daemon stays small."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from emberd import __version__
from emberd.core.errors import EmberdError

_VERBS = {
    "run": ("run.command", "Run the daemon in the foreground."),
    "status": ("status.command", "Show the engine's state."),
    "page": ("history.page", "Open emberd's page in the browser."),
    "history": ("history.command", "Show what happened, and what keeping warm has brought."),
    "doctor": ("doctor.command", "Tell what is wrong and what helps."),
    "install": ("install.install", "Run emberd at every login, by launchd or systemd."),
    "uninstall": ("install.uninstall", "Undo install."),
    "start": ("running.start", "Start the installed service."),
    "stop": ("running.stop", "Stop the daemon and its engine."),
    "restart": ("running.restart", "Restart the engine and wait until it is ready."),
    "upgrade": ("install.upgrade", "Change to the installed version; no client is refused, no model reloaded."),
    "reload": ("ask.reload", "Read the settings again."),
    "warm": ("ask.warm", "Warm the model now."),
    "pause": ("ask.pause", "Warm nothing for a while."),
    "resume": ("ask.resume", "Keep warm again."),
    "cool": ("ask.cool", "Let go of the model's memory for a while."),
    "forget": ("ask.forget", "Forget the last prompt and reply."),
    "logs": ("logs.command", "Show what emberd has logged."),
    "residency": ("residency.command", "Show how much of a model is in memory."),
    "touch": ("touch.command", "Bring a model into memory."),
    "demo": ("demo.command", "Show the main job on a small model."),
    "config": ("config.command", "Make, show and check the settings file."),
    "completion": ("completion.command", "Print shell completion."),
}
"""Name of each verb, place of its command in this folder, and its line in the help."""
_INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""


class _LazyGroup(click.Group):
    """Knows its verbs by name, and imports them on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's interface
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  # same
        if cmd_name not in _VERBS:
            return None
        module, name = _VERBS[cmd_name][0].split(".")
        command: click.Command = getattr(importlib.import_module(f"emberd.cli.{module}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  # same
        with formatter.section("Commands"):
            formatter.write_dl([(verb, help_line) for verb, (_, help_line) in _VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib  # noqa: PLC0415  # only to mend a typing mistake

        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], _VERBS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(error.message + hint, ctx) from error


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="emberd %(version)s")
@click.option(
    "--config",
    "config",
    metavar="FILE",
    help="Settings file. Default: $EMBERD_CONFIG, else the platform's place (`emberd config path`).",
)
@click.pass_context
def group(context: click.Context, config: str | None) -> None:
    """Keep a local LLM warm behind one endpoint that is always there.

    emberd supervises KoboldCPP (or llama.cpp's server) and listens on http://127.0.0.1:5001. Point SillyTavern,
    Kobold Lite or any OpenAI client at it.

    \b
    First steps:
      emberd config init      write a settings file, then set model.path in it
      emberd config check     try it
      emberd run              start; Ctrl-C stops
      emberd status           see how it is
      emberd install          run it at every login

    Exit codes: 0 done; 1 other failure; 2 usage; 3 not running; 4 already running; 5 engine failed; 6 doctor found
    something; 66 model; 69 port taken; 71 service manager; 72 engine not usable; 73 state directory; 78 settings.
    """
    context.obj = config


def main(arguments: list[str] | None = None) -> None:
    """Run a verb; a person's mistake is one message and an exit code, never a traceback."""
    try:
        outcome: Any = group.main(arguments, standalone_mode=False)
    except EmberdError as error:
        click.echo(f"emberd: {error.message}", err=True)
        if error.remedy:
            click.echo(error.remedy, err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    sys.exit(outcome if isinstance(outcome, int) else 0)
