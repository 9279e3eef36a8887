"""Who is charged with what was written to swap."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.swap_account import SwapReading, SwapWrites, attribute, share_of_endurance

BEFORE = SwapReading(written_bytes=1000, engine_bytes=100, engine="42:boot:7")


def test_the_engine_is_charged_with_what_its_part_grew_by():
    after = replace(BEFORE, written_bytes=1500, engine_bytes=400)
    assert attribute(BEFORE, after, is_idle=True) == SwapWrites(engine_idle=300, other_idle=200)
    assert attribute(BEFORE, after, is_idle=False) == SwapWrites(engine_busy=300, other_busy=200)


def test_the_engine_is_never_charged_with_more_than_was_written():
    """macOS: what is compressed has not been written yet."""
    after = replace(BEFORE, written_bytes=1010, engine_bytes=900)
    assert attribute(BEFORE, after, is_idle=True) == SwapWrites(engine_idle=10)


def test_an_engine_whose_part_shrank_is_charged_with_nothing():
    after = replace(BEFORE, written_bytes=1500, engine_bytes=0)
    assert attribute(BEFORE, after, is_idle=True) == SwapWrites(other_idle=500)


def test_a_counter_that_went_backwards_starts_afresh():
    rebooted = SwapReading(written_bytes=200, engine_bytes=150, engine="43:other:1")
    assert attribute(BEFORE, rebooted, is_idle=True) == SwapWrites()
    after = replace(rebooted, written_bytes=260)
    assert attribute(rebooted, after, is_idle=True).total == 60


def test_a_new_engine_began_with_nothing_in_swap():
    after = SwapReading(written_bytes=1500, engine_bytes=80, engine="43:boot:9")
    assert attribute(BEFORE, after, is_idle=False) == SwapWrites(engine_busy=80, other_busy=420)


def test_without_an_engine_everything_is_others():
    nobody = SwapReading(written_bytes=1000)
    assert attribute(nobody, replace(nobody, written_bytes=1100), is_idle=False) == SwapWrites(other_busy=100)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (BEFORE, SwapReading(1500, None, BEFORE.engine)),
        (SwapReading(1000, None, BEFORE.engine), replace(BEFORE, written_bytes=1500)),
        (BEFORE, SwapReading(1500, None, None)),
    ],
)
def test_what_nobody_can_tell_is_charged_to_nobody(before: SwapReading, after: SwapReading):
    assert attribute(before, after, is_idle=True) == SwapWrites(unknown_idle=500)
    assert attribute(before, after, is_idle=False) == SwapWrites(unknown_busy=500)


def test_without_the_systems_counter_nothing_is_written_down():
    unknown = SwapReading(None, 100, BEFORE.engine)
    assert attribute(unknown, BEFORE, is_idle=True) == SwapWrites()
    assert attribute(BEFORE, unknown, is_idle=True) == SwapWrites()


maybe = st.none() | st.integers(0, 2**50)
readings = st.builds(SwapReading, maybe, maybe, st.sampled_from([None, "a", "b"]))


@given(readings, readings, st.booleans())
def test_what_is_shared_out_is_exactly_what_was_written(before: SwapReading, after: SwapReading, is_idle: bool):
    writes = attribute(before, after, is_idle=is_idle)
    if before.written_bytes is None or after.written_bytes is None:
        assert writes.total == 0
    else:
        assert writes.total == max(after.written_bytes - before.written_bytes, 0)
    assert min(writes.engine, writes.total - writes.engine) >= 0


@given(st.lists(readings, min_size=2, max_size=6))
def test_accounts_add_up(several: list[SwapReading]):
    parts = [attribute(one, two, is_idle=True) for one, two in pairwise(several)]
    assert sum(parts, SwapWrites()).total == sum(part.total for part in parts)


def test_endurance_is_counted_in_decimal_terabytes():
    assert share_of_endurance(6 * 10**12, 600) == pytest.approx(0.01)
