"""What `launchctl` means by its exit codes and by what it prints. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """What an exit code of `launchctl` asks the caller to do."""

    DONE = "done"
    NOT_LOADED = "not loaded"
    BUSY = "try again"
    DISABLED = "enable, then try again"
    NO_DOMAIN = "try the other domain"
    REFUSED = "give up"


_OUTCOMES = {
    0: Outcome.DONE,
    3: Outcome.NOT_LOADED,  # No such process
    5: Outcome.BUSY,  # Input/output error: draining, loaded already, or a bad file
    36: Outcome.BUSY,  # Operation now in progress
    37: Outcome.BUSY,  # Operation already in progress
    112: Outcome.NO_DOMAIN,  # Could not find domain
    113: Outcome.NOT_LOADED,  # Could not find service
    119: Outcome.DISABLED,  # Service is disabled
    125: Outcome.NO_DOMAIN,  # Domain does not support specified action
}
"""launchctl(1) says only "an error code"; these are seen with macOS 13 to 26 (reference, section 7.3)."""


def judge(exit_code: int, words: str = "") -> Outcome:
    """Say what an exit code of `launchctl` asks for.

    What it printed, as in `Bootstrap failed: 5: Input/output error`, counts where the code itself is not known.
    """
    if exit_code in _OUTCOMES:
        return _OUTCOMES[exit_code]
    named = re.search(r"failed: (\d+):", words)
    return _OUTCOMES.get(int(named[1]), Outcome.REFUSED) if named else Outcome.REFUSED


def is_headless(*, has_ssh: bool, owns_console: bool, is_sudo: bool, has_other_uid: bool) -> bool:
    """Return True if the domain user/UID is better than gui/UID, as Homebrew's services judge.

    The owner of /dev/console is logged in at the screen too; the effective user may differ from the real one.
    """
    return (has_ssh and not owns_console) or is_sudo or has_other_uid


@dataclass(frozen=True, slots=True)
class PrintedJob:
    """What `launchctl print DOMAIN/LABEL` says of a job; each is None where it says nothing."""

    state: str | None = None
    pid: int | None = None
    last_exit: str | None = None
    path: str | None = None
    process_type: str | None = None


def read_print(text: str) -> PrintedJob:
    """Read the output of `launchctl print`, which calls itself no API: every line may be missing."""
    # Inner blocks (sockets, limits) have keys of the same names; the job's own stand one tab deep.
    found = dict(re.findall(r"^(?:\t| {1,4})(\w[\w ]*?) = (.+?)\s*$", text, re.MULTILINE))
    pid = found.get("pid", "")
    ended_by = found.get("last terminating signal")
    last_exit = found.get("last exit code") or (ended_by and f"signal {ended_by}")
    return PrintedJob(
        state=found.get("state"),
        pid=int(pid) if pid.isdecimal() else None,
        last_exit=None if last_exit in {None, "(never exited)"} else last_exit,
        path=found.get("path"),
        process_type=found.get("spawn type"),
    )


def is_throttled(process_type: str | None) -> bool | None:
    """Return True if launchd slows such a job down: all but `interactive (4)`; None if unknown."""
    return None if process_type is None else not process_type.startswith("interactive")


def is_disabled(text: str, label: str) -> bool | None:
    """Read `launchctl print-disabled`: `"LABEL" => disabled` (true before macOS 13); None if it is not listed."""
    found = re.search(rf'^\s*"{re.escape(label)}" => (\w+)', text, re.MULTILINE)
    return None if found is None else found[1] in {"disabled", "true"}
