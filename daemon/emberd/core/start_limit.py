"""When a daemon that fails at its start should stand by, instead of being started again for ever. Pure.

launchd starts a failed job every ThrottleInterval, 10 s (launchd.plist(5)), and never gives up; systemd gives up
after five starts within 10 s and never tries again (systemd.unit(5), StartLimitBurst). Neither can say why on the
port that clients use.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT = 3
"""So many failed starts are a burst."""
WINDOW_S = 300.0
"""They count for so long; three starts of launchd's take 20 s, three that load a large model first some minutes."""
FIRST_WAIT_S = 60.0
LONGEST_WAIT_S = 1800.0
_MOST_DOUBLINGS = 10
"""More would only overflow."""
KEPT = 20
"""Runs that are worth remembering."""


class Why(Enum):
    """Why an emberd ends in order."""

    STOPPED = "stopped"
    ASKED = "asked"
    """A person asked for a new one, or mended what keeps this one from starting."""
    DUE = "due"
    """It has stood by for long enough: a new one is to try again."""


class End(StrEnum):
    """How a run ended."""

    SILENT = "silent"
    """Not yet, or without a word: it crashed or was killed."""
    READY = "ready"
    """Anyhow, but its engine had been ready: it was of use, and waiting would take that away."""
    FAILED = "failed"
    """It said why it could not start."""


@dataclass(frozen=True, slots=True)
class Run:
    """One start of the daemon under a service manager.

    Attributes:
        began_s: on the monotonic clock of this boot.
        end: how it ended.
        reason: what it said when it failed.
        waits: how many times in a row emberd has waited, this run's wait included; 0 if a person ended the wait,
            None if it did not wait.
    """

    began_s: float
    end: End = End.SILENT
    reason: str = ""
    waits: int | None = None


def judge(runs: Sequence[Run] | None, now_s: float) -> float | None:
    """Return how long to stand by before the next try, None to end (or begin) as usual.

    Args:
        runs: what is known of this boot, the oldest first, without one that is still to come; None if nothing can
            be remembered: then nobody could count, and the first failure stands by.
        now_s: on the clock of the runs.
    """
    if runs is None:
        return FIRST_WAIT_S
    bad = _last_bad(runs)
    if not bad or bad[-1].waits is not None:  # it has waited: the next try is due
        return None
    waits = bad[-2].waits if len(bad) > 1 else None
    is_burst = sum(now_s - run.began_s <= WINDOW_S for run in bad) >= LIMIT
    if waits is None and not is_burst:
        return None
    return min(FIRST_WAIT_S * 2.0 ** min(waits or 0, _MOST_DOUBLINGS), LONGEST_WAIT_S)


def waits_after(runs: Sequence[Run]) -> int:
    """Return the `waits` of the last run, which is about to wait."""
    bad = _last_bad(runs)
    return 1 + ((bad[-2].waits or 0) if len(bad) > 1 else 0)


def _last_bad(runs: Sequence[Run]) -> list[Run]:
    """Return the runs since the last one that was of use."""
    bad: list[Run] = []
    for run in reversed(runs):
        if run.end is End.READY:
            break
        bad.insert(0, run)
    return bad
