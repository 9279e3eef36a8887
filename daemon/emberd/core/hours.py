"""Hours of the day, such as 23:00-07:00. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta

_SPAN = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)\s*-\s*([01]?\d|2[0-3]|24):([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Hours:
    """A span of every day, by the wall clock; a span that ends before it begins goes past midnight."""

    begin: time
    end: time

    def left_s(self, now: datetime) -> float | None:
        """Return the seconds until the span ends, None if local time `now` is outside it."""
        for day in (now.date(), now.date() - timedelta(days=1)):
            begin = datetime.combine(day, self.begin, now.tzinfo)
            end = datetime.combine(day, self.end, now.tzinfo)
            if end <= begin:
                end += timedelta(days=1)
            if begin <= now < end:
                return (end - now).total_seconds()
        return None


def read_hours(text: str) -> Hours:
    """Read a span.

    Raises:
        ValueError: the text is no span.
    """
    found = _SPAN.fullmatch(text.strip())
    if found is None or (found[3] == "24" and found[4] != "00"):
        raise ValueError(f'{text!r} are no hours: write "23:00-07:00"')
    begin, end = time(int(found[1]), int(found[2])), time(int(found[3]) % 24, int(found[4]))
    if begin == end and begin != time(0):
        raise ValueError(f"{text!r} begins when it ends")
    return Hours(begin, end)


def left_of(spans: tuple[str, ...], now: datetime) -> float | None:
    """Return the seconds until the last of the current spans ends, None if there is none."""
    left = [each for each in (read_hours(text).left_s(now) for text in spans) if each is not None]
    return max(left, default=None)
