"""How often one event may be logged: a token bucket for each name.

A flood of one event must not bury the others, nor fill a disk, nor cost the daemon. What is left out is counted,
and told in one line as soon as the bucket has room for it.
"""

from __future__ import annotations

from dataclasses import dataclass

BURST_S = 60.0
"""A bucket holds what may come in so much time: an engine prints some hundred lines while it loads, then few."""


@dataclass(frozen=True, slots=True)
class Suppressed:
    """Events of one name that were not logged, and since when."""

    event: str
    category: str
    count: int
    seconds: float


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_s: float
    category: str = ""
    suppressed: int = 0
    since_s: float = 0.0


class RateLimit:
    """Says of each event whether it may be logged.

    Args:
        per_minute: how many events of one name may come in a minute, 0 for any number.
        exceptions: other numbers for some names.
    """

    def __init__(self, per_minute: int, exceptions: dict[str, int] | None = None) -> None:
        self._per_minute = per_minute
        self._exceptions = exceptions or {}
        self._buckets: dict[str, _Bucket] = {}
        self._has_suppressed = False

    def allows(self, event: str, category: str, now_s: float) -> bool:
        """Tell whether an event may be logged now, and count it."""
        rate = self._rate_per_s(event)
        if not rate:
            return True
        bucket = self._buckets.get(event)
        if bucket is None:
            bucket = self._buckets[event] = _Bucket(rate * BURST_S, now_s)
        self._fill(bucket, rate, now_s)
        if bucket.tokens >= 1 and not bucket.suppressed:
            bucket.tokens -= 1
            return True
        if not bucket.suppressed:
            bucket.since_s, bucket.category = now_s, category
        bucket.suppressed += 1
        self._has_suppressed = True
        return False

    def told(self, now_s: float, *, all_of_it: bool = False) -> list[Suppressed]:
        """Return what was left out and can be told now; from then on it may be logged again.

        A name is told when its bucket is an eighth full: so a flood that goes on is told of now and then.

        Args:
            now_s: the time of the clock that `allows` gets.
            all_of_it: the daemon ends; nothing is told later.
        """
        if not self._has_suppressed:
            return []
        told = []
        for event, bucket in self._buckets.items():
            rate = self._rate_per_s(event)
            self._fill(bucket, rate, now_s)
            if bucket.suppressed and (all_of_it or bucket.tokens >= max(rate * BURST_S / 8, 1)):
                told.append(Suppressed(event, bucket.category, bucket.suppressed, max(now_s - bucket.since_s, 0.0)))
                bucket.suppressed = 0
        self._has_suppressed = any(bucket.suppressed for bucket in self._buckets.values())
        return told

    @property
    def has_suppressed(self) -> bool:
        """Whether something is left to be told."""
        return self._has_suppressed

    def _rate_per_s(self, event: str) -> float:
        return self._exceptions.get(event, self._per_minute) / 60

    @staticmethod
    def _fill(bucket: _Bucket, rate_per_s: float, now_s: float) -> None:
        bucket.tokens = min(bucket.tokens + max(now_s - bucket.filled_s, 0.0) * rate_per_s, rate_per_s * BURST_S)
        bucket.filled_s = now_s
