"""Who started this process: launchd, systemd, or a person. Pure."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Manager(Enum):
    """A service manager, which starts a job again that has failed."""

    LAUNCHD = "launchd"
    SYSTEMD = "systemd"


_NO_JOB = ("", "0")
_APPLICATION = "application."


def find_manager(environment: Mapping[str, str], pid: int, *, has_terminal: bool) -> Manager | None:
    """Return the service manager whose job this process is, None if a person started it.

    launchd names the job in XPC_SERVICE_NAME. A shell in Terminal has the variable too, with "0" or the name of
    the application. systemd gives its services INVOCATION_ID (systemd.exec(5)), which their children inherit,
    such as a shell in a terminal that is a user service. Since version 248 SYSTEMD_EXEC_PID names the intended
    process. No job has a terminal as its standard error.
    """
    if has_terminal:
        return None
    job = environment.get("XPC_SERVICE_NAME", "")
    if job not in _NO_JOB and not job.startswith(_APPLICATION):
        return Manager.LAUNCHD
    if environment.get("NOTIFY_SOCKET"):
        return Manager.SYSTEMD
    if environment.get("INVOCATION_ID") and environment.get("SYSTEMD_EXEC_PID", str(pid)) == str(pid):
        return Manager.SYSTEMD
    return None
