"""Asks another program, with no input and for a limited time."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def ask_program(command: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run a program and return what it printed.

    Raises:
        OSError: it cannot be run.
        subprocess.TimeoutExpired: it has not ended in time, and was killed.
    """
    return subprocess.run(
        list(command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit_s,
        check=False,
    )
