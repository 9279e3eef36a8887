"""What only this system knows of itself and of a process. Unknown is None."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostHealth:
    """The answer of `Host.health`.

    Attributes:
        is_translated: this program runs under Rosetta.
        is_throttled: the process gets little processor time and slow disk access.
        cgroup_limit_bytes: the most that its control group may hold.
        lingers: the user's services run on without a session.
        logs_persist: the system's log survives a restart of the computer.
        machine: the computer's processor in uname(1)'s words, even for a translated program.
        swappiness: how readily the kernel swaps out memory instead of dropping pages of files, 0 to 200.
    """

    is_translated: bool | None = None
    is_throttled: bool | None = None
    cgroup_limit_bytes: int | None = None
    lingers: bool | None = None
    logs_persist: bool | None = None
    machine: str | None = None
    swappiness: int | None = None
