"""When a daemon that fails at its start is to stand by, instead of being started again for ever. Pure.

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
"""This many failed starts are a burst."""
WINDOW_S = 300.0
"""How long they count; three starts by launchd take 20 s, three that first load a large model some minutes."""
FIRST_WAIT_S = 60.0
LONGEST_WAIT_S = 1800.0
_MOST_DOUBLINGS = 10
"""More would only overflow."""
KEPT = 20
"""How many runs are remembered."""


class Why(Enum):
    """Why an emberd ends regularly."""

    STOPPED = "stopped"
    ASKED = "asked"
    """A person asked for a new one, or mended what kept this one from starting."""
    DUE = "due"
    """It has stood by for long enough, and a new one is to try again."""


class End(StrEnum):
    """How a run ended."""

    SILENT = "silent"
    """It runs, crashed or was killed."""
    READY = "ready"
    """Its engine had been ready: it was of use, however it ended."""
    FAILED = "failed"
    """It said why it could not start."""


@dataclass(frozen=True, slots=True)
class Run:
    """One start of the daemon under a service manager.

    Attributes:
        began_s: on the monotonic clock of this boot.
        end: how it ended.
        reason: its error if it failed.
        waits: how many times in a row emberd has stood by, this run included; 0 if a person ended that, None if
            this run did not stand by.
    """

    began_s: float
    end: End = End.SILENT
    reason: str = ""
    waits: int | None = None


def judge(runs: Sequence[Run] | None, now_s: float) -> float | None:
    """Return how many seconds to stand by before the next try, None to end (or begin) as usual.

    Args:
        runs: the runs of this boot so far, the oldest first; None if they cannot be remembered: then the first
            failure stands by.
        now_s: the present, on the same clock.
    """
    if runs is None:
        return FIRST_WAIT_S
    bad = _last_bad(runs)
    if not bad or bad[-1].waits is not None:  # it has stood by: the next try is due
        return None
    waits = bad[-2].waits if len(bad) > 1 else None
    is_burst = sum(now_s - run.began_s <= WINDOW_S for run in bad) >= LIMIT
    if waits is None and not is_burst:
        return None
    return min(FIRST_WAIT_S * 2.0 ** min(waits or 0, _MOST_DOUBLINGS), LONGEST_WAIT_S)


def waits_after(runs: Sequence[Run]) -> int:
    """Return the `waits` of the last run, which is about to stand by."""
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
