"""What page counts and process memory say about residency, and how sure a sample is."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.gguf import GgufHeader, TensorSpan, layer_of
from emberd.core.memory import EngineMemory
from emberd.core.residency import (
    CONFIDENCE,
    SAMPLED_PAGES,
    PageCount,
    Source,
    Unknown,
    by_layer,
    by_tensor,
    from_pages,
    from_process,
    is_copied,
    sample_bounds,
    unknown,
)

GIB = 1 << 30


def chance(successes: int, draws: int, share: float) -> float:
    """Return the binomial probability."""
    if share in {0.0, 1.0}:
        return float(successes == draws * share)
    return math.exp(
        math.lgamma(draws + 1)
        - math.lgamma(successes + 1)
        - math.lgamma(draws - successes + 1)
        + successes * math.log(share)
        + (draws - successes) * math.log(1 - share)
    )


@pytest.mark.parametrize("share", [0.0, 0.004, 0.03, 0.2, 0.5, 0.77, 0.95, 0.99, 0.999, 1.0])
def test_the_bounds_hold_the_truth_as_often_as_they_promise(share: float):
    held = 0.0
    for resident in range(SAMPLED_PAGES + 1):
        low, high = sample_bounds(resident, SAMPLED_PAGES)
        if low <= share <= high:
            held += chance(resident, SAMPLED_PAGES, share)
    assert held >= CONFIDENCE


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_bounds_enclose_the_estimate_and_stay_between_nothing_and_all(sample: tuple[int, int]):
    resident, sampled = sample
    low, high = sample_bounds(resident, sampled)
    assert 0 <= low <= resident / sampled <= high <= 1


@given(st.integers(0, 400))
def test_more_pages_never_widen_the_bounds(resident: int):
    low, high = sample_bounds(resident, 400)
    closer_low, closer_high = sample_bounds(4 * resident, 1600)
    assert low <= closer_low + 1e-9
    assert closer_high <= high + 1e-9


def test_a_full_sample_bounds_what_may_be_missing_to_a_few_per_cent():
    low, high = sample_bounds(SAMPLED_PAGES, SAMPLED_PAGES)
    assert 0.98 < low < 1
    assert high == 1


def test_an_exact_count_has_no_error():
    seen = from_pages(PageCount(3, 4, 4, 4096, Source.MINCORE))
    assert (seen.at_least, seen.share, seen.at_most) == (0.75, 0.75, 0.75)
    assert seen.resident_bytes == 3 * 4096


def test_a_sample_speaks_for_the_whole_file():
    seen = from_pages(PageCount(128, 256, 1 << 20, 4096, Source.CACHESTAT))
    assert seen.total_bytes == 4 * GIB
    assert seen.resident_bytes == 2 * GIB
    assert seen.at_least is not None
    assert seen.at_most is not None
    assert seen.at_least < 0.5 < seen.at_most


def test_no_pages_are_no_reading():
    assert from_pages(PageCount(0, 0, 0, 4096, Source.MINCORE)).unknown is Unknown.NO_READING


@pytest.mark.parametrize("why", Unknown)
def test_every_unknown_says_why(why: Unknown):
    seen = unknown(why)
    assert seen.share is None
    assert seen.resident_bytes is None
    assert seen.message


def test_weights_that_were_copied_and_never_swapped_are_resident():
    seen = from_process(4 * GIB, EngineMemory(swapped_bytes=0, footprint_bytes=5 * GIB))
    assert (seen.at_least, seen.share, seen.at_most) == (1, 1, 1)
    assert seen.source is Source.PROCESS
    assert "copy" in seen.message


def test_what_is_in_swap_may_be_weights_or_all_else():
    seen = from_process(4 * GIB, EngineMemory(swapped_bytes=GIB, footprint_bytes=5 * GIB))
    assert seen.at_least == 0.75
    assert seen.at_most == 1
    assert seen.share == 0.8


def test_what_exceeds_all_else_must_be_weights():
    seen = from_process(4 * GIB, EngineMemory(swapped_bytes=3 * GIB, footprint_bytes=5 * GIB))
    assert seen.at_least == 0.25
    assert seen.at_most == 0.5


@given(st.integers(1, 1 << 40), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_copied_weights_have_ordered_bounds(weights: int, swapped: int, footprint: int):
    seen = from_process(weights, EngineMemory(swapped_bytes=swapped, footprint_bytes=footprint))
    assert seen.share is not None
    assert seen.at_least is not None
    assert seen.at_most is not None
    assert 0 <= seen.at_least <= seen.at_most <= 1
    assert 0 <= seen.share <= 1


def test_copied_weights_of_an_unreadable_process_are_unknown():
    assert from_process(GIB, EngineMemory()).unknown is Unknown.NO_READING


@pytest.mark.parametrize(
    ("is_mapped", "footprint", "expected"),
    [
        (True, 9 * GIB, False),  # the log's word counts
        (False, 0, True),
        (None, 4 * GIB, True),  # an adopted engine: anonymous memory as large as the weights
        (None, GIB, False),
        (None, None, False),
    ],
)
def test_a_copy_is_told_from_the_log_or_from_anonymous_memory(
    is_mapped: bool | None, footprint: int | None, expected: bool
):
    memory = EngineMemory(footprint_bytes=footprint)
    assert is_copied(4 * GIB, memory, is_mapped=is_mapped) is expected


def test_resident_pages_of_files_say_that_a_small_model_with_a_large_context_is_mapped():
    memory = EngineMemory(footprint_bytes=2 * GIB, file_bytes=GIB)
    assert is_copied(GIB, memory, is_mapped=None) is False
    assert is_copied(4 * GIB, memory, is_mapped=False) is True


def test_a_copy_of_weights_of_unknown_size_is_not_guessed():
    assert is_copied(None, EngineMemory(footprint_bytes=GIB), is_mapped=None) is False


def test_layers_sum_their_tensors():
    spans = [
        TensorSpan("token_embd.weight", 0, 100),
        TensorSpan("blk.0.attn_q.weight", 100, 50),
        TensorSpan("blk.0.ffn_up.weight", 150, 50),
        TensorSpan("blk.1.attn_q.weight", 200, 50),
    ]
    layers = by_layer(by_tensor(spans, [(1, 2), (3, 4), (0, 4), (0, 0)]))
    assert [(part.name, part.total_bytes, part.resident_pages, part.pages) for part in layers] == [
        ("token_embd", 100, 1, 2),
        ("blk.0", 100, 3, 8),
        ("blk.1", 50, 0, 0),
    ]
    assert layers[1].share == 3 / 8
    assert layers[2].share == 1


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("blk.12.ffn_down.weight", "blk.12"),
        ("v.blk.3.attn_q.weight", "v.blk.3"),
        ("dec.blk.0.cross_attn_k.weight", "dec.blk.0"),
        ("token_embd.weight", "token_embd"),
        ("output_norm.weight", "output_norm"),
        ("mm.0.bias", "mm"),
        ("blk.", "blk"),
        ("", ""),
    ],
)
def test_a_tensor_belongs_to_its_block_or_to_its_first_word(tensor: str, layer: str):
    assert layer_of(tensor) == layer


@given(st.lists(st.integers(0, 10_000), unique=True, min_size=1, max_size=20), st.integers(0, 12_000))
def test_spans_cover_the_file_from_the_first_tensor_without_gap_or_overlap(offsets: list[int], file_bytes: int):
    header = GgufHeader({}, None, tuple((f"t{offset}", offset) for offset in offsets), 512)
    spans = header.spans(file_bytes)
    assert {span.name for span in spans} == {f"t{offset}" for offset in offsets}
    for span, following in pairwise(spans):
        assert span.offset + span.length == following.offset or following.offset >= file_bytes
    assert all(span.length >= 0 for span in spans)
    assert all(span.offset + span.length <= file_bytes for span in spans if span.length)
