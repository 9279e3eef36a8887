"""How often one event may be logged."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emberd.core.log_rate import RateLimit


def test_what_comes_within_the_rate_passes_and_a_flood_is_counted():
    limit = RateLimit(60)
    passed = sum(limit.allows("a", "engine", 0.0) for _ in range(1000))
    assert passed == 60
    assert limit.told(1.0) == []
    told = limit.told(10.0)
    assert [(each.event, each.category, each.count, each.seconds) for each in told] == [("a", "engine", 940, 10.0)]
    assert limit.allows("a", "engine", 10.0)
    assert not limit.has_suppressed


def test_a_flood_of_one_event_does_not_silence_another():
    limit = RateLimit(60)
    for _ in range(1000):
        limit.allows("chatter", "engine", 0.0)
    assert limit.allows("engine_exited", "supervisor", 0.0)


def test_an_exception_has_its_own_rate_and_zero_is_no_limit():
    limit = RateLimit(1, {"engine_line": 100, "free": 0})
    assert sum(limit.allows("engine_line", "engine", 0.0) for _ in range(1000)) == 100
    assert all(limit.allows("free", "x", 0.0) for _ in range(1000))


def test_at_the_end_everything_is_told():
    limit = RateLimit(1)
    for _ in range(5):
        limit.allows("a", "x", 0.0)
    assert [each.count for each in limit.told(0.0, all_of_it=True)] == [4]


@given(st.lists(st.floats(0, 5), max_size=300), st.integers(1, 200))
def test_nothing_is_lost_uncounted_and_no_minute_has_more_than_twice_the_rate(gaps: list[float], rate: int):
    limit, now_s, passed, told = RateLimit(rate), 0.0, [], 0
    for gap in gaps:
        now_s += gap
        told += sum(each.count for each in limit.told(now_s))
        if limit.allows("a", "x", now_s):
            passed.append(now_s)
    told += sum(each.count for each in limit.told(now_s, all_of_it=True))
    assert len(passed) + told == len(gaps)
    for start in passed:
        assert sum(start <= each < start + 60 for each in passed) <= 2 * rate + 1
