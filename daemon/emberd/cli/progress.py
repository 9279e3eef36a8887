"""A bar on standard error for work on bytes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_progress(*, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Give a function that is told bytes done and bytes to do; without a terminal it shows nothing."""
    if not is_shown:
        yield lambda *_: None
        return
    from rich.console import Console  # noqa: PLC0415  # heavy, and not needed without a terminal
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn  # noqa: PLC0415

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
