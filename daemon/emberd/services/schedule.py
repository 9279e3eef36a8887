"""When keep-warm looks next and why, and for how long it is paused."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from emberd.core.hours import left_of
from emberd.core.warmth import SOON_S, Trigger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from emberd.core.settings import WarmthSettings
    from emberd.core.status import GivenBackStatus

_LOOK = "look"
_STAYS_S = 900.0
"""During cool hours, the longest pause of a user between two turns before memory is released again."""


class Schedule:
    """Plans one look at a time, by APScheduler.

    A missed look (the computer slept) is made once and at once: `coalesce`, no grace time.
    """

    def __init__(self, look: Callable[[], Awaitable[None]]) -> None:
        self._look = look
        self._scheduler: Any = None
        self._is_woken = False
        self._trigger = Trigger.TIMER
        self._next_s: float | None = None

    @property
    def next_in_s(self) -> float | None:
        """Seconds until the next look, None if none is planned."""
        return left_s(time.monotonic(), self._next_s)

    def begin(self) -> None:
        """Make the first look now."""
        from apscheduler.schedulers.asyncio import AsyncIOScheduler  # noqa: PLC0415  # 5 MiB, for the daemon only

        # A look that comes due during another one is skipped on purpose: that one plans the next.
        logging.getLogger("apscheduler").setLevel(logging.ERROR)
        self._scheduler = AsyncIOScheduler(
            timezone=UTC, job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        )
        self._add(0)
        self._scheduler.start()

    def end(self) -> None:
        """Make no further look."""
        self._scheduler.shutdown(wait=False)

    def wake(self, trigger: Trigger) -> None:
        """Look now for this reason; an owner's wish is not replaced by another reason."""
        if self._trigger is not Trigger.ASKED and trigger is not Trigger.TIMER:
            self._trigger = trigger
        self._is_woken = True
        self.plan(0)

    def ask(self) -> None:
        """Let the next look be one that the owner asked for."""
        self._trigger = Trigger.ASKED

    def note_look(self) -> None:
        """A look begins; a `wake` from now on means another one."""
        self._is_woken = False

    def take_trigger(self) -> Trigger:
        """Return what made keep-warm look, and forget it."""
        trigger, self._trigger = self._trigger, Trigger.TIMER
        return trigger

    def put_off(self, trigger: Trigger) -> None:
        """Leave this look's purpose to a later one, unless another trigger has come."""
        if self._trigger is Trigger.TIMER and trigger is not Trigger.ASKED:
            self._trigger = trigger

    def plan_after_look(self, seconds: float) -> None:
        """Plan the next look; the scheduler drops one that comes due during the present one."""
        self.plan(SOON_S if self._is_woken else seconds)

    def plan(self, seconds: float) -> None:
        """Plan the next look in place of the planned one."""
        self._next_s = time.monotonic() + seconds
        if self._scheduler is not None and self._scheduler.running:
            self._add(seconds)

    def _add(self, seconds: float) -> None:
        run_date = datetime.now(UTC) + timedelta(seconds=seconds)
        self._scheduler.add_job(self._look, "date", id=_LOOK, run_date=run_date, replace_existing=True)


class Pauses:
    """Pauses, in which nothing is warmed, and cool spells, in which memory is given to other work."""

    def __init__(self) -> None:
        self.paused_until_s: float | None = None
        """Nothing is warmed until then (monotonic clock); locks stay."""
        self.cool_until_s: float | None = None
        """Memory is given to other work until then, or until a user comes."""
        self._cool_since_s = 0.0
        self.given_back: GivenBackStatus | None = None
        """What the last cool spell gave back, None if it had no lock to let go of."""

    def pause(self, seconds: float) -> None:
        """Begin a pause."""
        self.paused_until_s = time.monotonic() + seconds

    def cool(self, seconds: float) -> None:
        """Begin a cool spell."""
        self.given_back = None
        self._cool_since_s = time.monotonic()
        self.cool_until_s = self._cool_since_s + seconds

    def end(self) -> bool:
        """End both; return True if there was one."""
        had_one = self.paused_until_s is not None or self.cool_until_s is not None
        self.paused_until_s = self.cool_until_s = None
        return had_one

    def note_use(self, *used_s: float | None) -> None:
        """End a cool spell that is over, or in which somebody came; the settings' hours count again."""
        is_used = any((each or 0.0) > self._cool_since_s for each in used_s)
        if self.cool_until_s is not None and (is_used or time.monotonic() >= self.cool_until_s):
            self.cool_until_s = None

    def cool_end_s(self, settings: WarmthSettings, *used_s: float | None) -> float | None:
        """Return when the cool spell or the cool hours end, None if there are none now."""
        if self.cool_until_s is not None:
            return self.cool_until_s
        hours_left_s = left_of(settings.cool_hours, datetime.now().astimezone())
        now_s = time.monotonic()
        if hours_left_s is None or any(each is not None and now_s - each < _STAYS_S for each in used_s):
            return None
        return now_s + hours_left_s


def left_s(now_s: float, then_s: float | None) -> float | None:
    """Return the seconds until then, None for the past and for never."""
    return None if then_s is None or then_s < now_s else round(then_s - now_s, 3)
