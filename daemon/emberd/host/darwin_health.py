"""What macOS says about the place of a process."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from emberd.core.host_health import HostHealth
from emberd.host.posix import ask_program

if TYPE_CHECKING:
    from emberd.host.darwin_calls import DarwinCalls

_PS_LIMIT_S = 5.0
_THROTTLED_PRIORITY = 20
"""Agents of process type Standard and all their descendants; a shell has 31 (seen on macOS 26)."""


def read_health(pid: int, calls: DarwinCalls, ps: str = "/bin/ps") -> HostHealth:
    """Return what is known of a process.

    Args:
        pid: the process that is asked about.
        calls: the C library.
        ps: ps(1).
    """
    translated = calls.number("sysctl.proc_translated")
    priority = _priority(pid, ps)
    return HostHealth(
        # The name does not exist on Intel (ENOENT): nothing is translated there.
        is_translated=translated == 1,
        is_throttled=None if priority is None else priority <= _THROTTLED_PRIORITY,
        # uname(3) tells a translated program that this is x86_64.
        machine="arm64" if calls.number("hw.optional.arm64") == 1 else os.uname().machine,
    )


def _priority(pid: int, ps: str) -> int | None:
    """Return the scheduling priority (ps(1), keyword pri)."""
    try:
        ran = ask_program((ps, "-o", "pri=", "-p", str(pid)), _PS_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return int(ran.stdout) if ran.stdout.strip().isdecimal() else None
