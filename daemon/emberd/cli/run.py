"""`emberd run`: what launchd and systemd start."""

from __future__ import annotations

import click


@click.command("run")
@click.pass_obj
def command(config: str | None) -> int:
    """Run the daemon in the foreground.

    Starts the engine, waits until it answers, and keeps it alive. Clients may connect at once: their requests
    wait until the engine is ready. An engine that an earlier emberd left running (after a crash) is taken over
    without loading the model again.

    \b
    Signals: SIGTERM, SIGINT (Ctrl-C)  finish running requests, stop the engine, exit 0
             the same again            do not wait for running requests
             SIGHUP                    read the settings again

    Started by launchd or systemd, emberd does not fail for ever: after three failed starts within five minutes it
    stays up, tells every client why, and tries again when a file changes, when asked to, or after some minutes.
    """
    from emberd import app  # noqa: PLC0415  # the daemon's modules are for the daemon only

    return app.run(config)
