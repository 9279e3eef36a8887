"""`emberd touch`: bring a file into memory."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from emberd.cli.residency import model_files, toucher_on
from emberd.cli.talk import as_json, byte_progress, gib, show

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_INTERRUPTED = 130


@click.command("touch")
@click.argument("file", required=False, metavar="[FILE]")
@as_json
@click.pass_context
def command(context: click.Context, file: str | None, is_json: bool) -> None:  # noqa: FBT001  # click's flag
    """Bring FILE, or else all files that the running engine maps, into memory and mark their pages as used.

    This takes all parts of a split model. After Ctrl-C, pages in memory stay there as long as the system has
    room.
    """
    paths = model_files(context.obj, file)
    content = asyncio.run(_touch(paths, is_json=is_json))
    show(content, is_json, _print)
    if not content["is_complete"]:
        context.exit(_INTERRUPTED)


async def _touch(paths: Sequence[Path], *, is_json: bool) -> dict[str, Any]:
    async with toucher_on(paths) as toucher:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, toucher.stop)
        try:
            with byte_progress(is_shown=not is_json and sys.stderr.isatty()) as progress:
                touched = await toucher.touch(progress)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
    return {
        "files": [str(path) for path in paths],
        **dataclasses.asdict(touched),
        "bytes_per_s": round(touched.done_bytes / touched.elapsed_s),
    }


def _print(content: dict[str, Any]) -> None:
    done, total = gib(content["done_bytes"]), gib(content["total_bytes"])
    text = f"{done} of {total} GiB touched" if not content["is_complete"] else f"{done} GiB touched"
    if content["cold_bytes"] is not None:
        text += f", {gib(content['cold_bytes'])} GiB of it cold"
    click.echo(f"{text}, in {content['elapsed_s']:.3g} s ({content['bytes_per_s'] / (1 << 30):.2f} GiB/s)")
