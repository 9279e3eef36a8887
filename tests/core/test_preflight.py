"""Before the start: what the engine will take, and whether to lock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.gguf import estimate_compute_buffer, estimate_kv_cache
from emberd.core.lock_limits import UNLIMITED_BYTES, LockLimits, LockReason
from emberd.core.preflight import ONE_USER, SEVERAL_USERS, PreflightFacts, preflight, prompt_cache_bound_mib

MIB = 1024**2
GIB = 1024**3
GEMMA = {
    "general.architecture": "gemma3",
    "gemma3.block_count": 18,
    "gemma3.embedding_length": 640,
    "gemma3.context_length": 32768,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.attention.sliding_window": 512,
}
"""gemma-3-270m's header."""
LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "llama.embedding_length": 4096,
    "llama.context_length": 8192,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
}
LINUX = LockLimits("linux", memlock_bytes=UNLIMITED_BYTES, can_ignore_memlock=False)
ROOMY = PreflightFacts(
    limits=LINUX,
    weights_bytes=8 * GIB,
    kv_bytes=GIB,
    compute_bytes=GIB,
    ram_bytes=32 * GIB,
    available_bytes=24 * GIB,
    wired_bytes=2 * GIB,
    users=1,
)


def codes(facts: PreflightFacts, policy: str) -> list[str]:
    return [notice.code for notice in preflight(facts, policy).reasons]  # type: ignore[arg-type]


class TestKvCache:
    def test_it_is_as_large_as_koboldcpp_prints_it(self):
        """1.104 with --contextsize 2048: 6.75 + 33.75 MiB."""
        estimate = estimate_kv_cache(GEMMA, 2048)
        assert estimate.size_bytes == round(40.5 * MIB)

    def test_layers_with_a_sliding_window_keep_no_more_than_that_where_the_engine_lets_them(self):
        """1.115.1 with 16,384 tokens: 48.75 + 16.88 MiB, the window of 1,152 cells."""
        assert estimate_kv_cache(GEMMA, 16384, window_slots=1).size_bytes == 48.75 * MIB + 1280 * 15 * 1024
        assert estimate_kv_cache(GEMMA, 512, window_slots=4) == estimate_kv_cache(GEMMA, 512)
        assert estimate_kv_cache(LLAMA, 4096, window_slots=1) == estimate_kv_cache(LLAMA, 4096)
        unknown = {
            key.replace("gemma3", "new"): "new" if value == "gemma3" else value for key, value in GEMMA.items()
        }
        assert estimate_kv_cache(unknown, 16384, window_slots=1) == estimate_kv_cache(GEMMA, 16384)
        told = {**unknown, "new.attention.sliding_window_pattern": [True] * 15 + [False] * 3}
        assert estimate_kv_cache(told, 16384, window_slots=1) == estimate_kv_cache(GEMMA, 16384, window_slots=1)

    def test_a_sliding_window_makes_it_an_upper_bound_and_says_so(self):
        estimate = estimate_kv_cache(GEMMA, 2048)
        assert not estimate.is_exact
        assert "sliding window" in estimate.message
        assert estimate_kv_cache(LLAMA, 2048).is_exact

    def test_lengths_default_to_the_width_divided_by_the_heads(self):
        """32 layers, 8 heads of 128 numbers, keys and values, 2 bytes: 128 KiB a token."""
        assert estimate_kv_cache(LLAMA, 8192 - 128).size_bytes == GIB

    def test_heads_of_keys_default_to_all_heads(self):
        without = {key: value for key, value in LLAMA.items() if not key.endswith("head_count_kv")}
        assert estimate_kv_cache(without, 8064).size_bytes == 4 * GIB

    def test_a_context_of_zero_is_the_models_own(self):
        assert estimate_kv_cache(LLAMA, 0) == estimate_kv_cache(LLAMA, 8192)

    def test_heads_may_differ_by_layer_and_values_are_as_wide_as_the_widest(self):
        listed = {**LLAMA, "llama.attention.head_count_kv": [8] * 16 + [4] * 16}
        assert estimate_kv_cache(listed, 8064).size_bytes == GIB // 2 * 3 // 4 + GIB // 2

    def test_a_quantised_cache_is_smaller(self):
        assert estimate_kv_cache(LLAMA, 8064, key_bytes=1.0625, value_bytes=1.0625).size_bytes == GIB * 17 // 32

    @pytest.mark.parametrize("key", ["mamba.ssm.state_size", "mamba.block_count"])
    def test_a_recurrent_model_has_no_such_cache(self, key: str):
        assert estimate_kv_cache({"general.architecture": "mamba", key: 16}, 2048).size_bytes is None

    def test_a_hybrid_model_is_unknown(self):
        estimate = estimate_kv_cache({**LLAMA, "llama.ssm.conv_kernel": 4}, 2048)
        assert estimate.size_bytes is None
        assert "llama" in estimate.message

    @pytest.mark.parametrize(
        "broken",
        [
            {},
            {"general.architecture": 7},
            {**LLAMA, "llama.block_count": "many"},
            {**LLAMA, "llama.attention.head_count": 0},
            {**LLAMA, "llama.attention.head_count_kv": [8, 8]},
            {**LLAMA, "llama.attention.head_count_kv": [0] * 32, "llama.attention.head_count": 0},
            {**LLAMA, "llama.embedding_length": -1},
        ],
    )
    def test_numbers_that_are_missing_or_senseless_make_it_unknown(self, broken: dict[str, object]):
        estimate = estimate_kv_cache(broken, 2048)
        assert estimate.size_bytes is None or broken.get("llama.attention.head_count_kv") == [8, 8]
        assert estimate.size_bytes is not None or estimate.message

    @given(
        st.dictionaries(
            st.sampled_from(sorted(LLAMA)), st.none() | st.integers() | st.text() | st.lists(st.integers())
        )
    )
    def test_no_header_makes_it_fail(self, metadata: dict[str, object]):
        size = estimate_kv_cache({**LLAMA, **metadata}, 2048).size_bytes
        assert size is None or size > 0

    @given(st.integers(1, 2**20), st.integers(1, 2**20))
    def test_a_longer_context_never_takes_less(self, one: int, other: int):
        short, long = sorted((one, other))
        assert (estimate_kv_cache(LLAMA, short).size_bytes or 0) <= (estimate_kv_cache(LLAMA, long).size_bytes or 0)


def test_the_compute_buffer_is_not_less_than_what_was_measured():
    large, small = estimate_compute_buffer(262_144), estimate_compute_buffer(32_000)
    assert large is not None
    assert small is not None
    assert 513.25 * MIB <= large <= 600 * MIB
    assert 87 * MIB <= small <= 130 * MIB
    assert estimate_compute_buffer(None) is None


def test_where_enough_remains_auto_locks_and_says_nothing():
    checked = preflight(ROOMY, "auto")
    assert (checked.will_lock, checked.fits, checked.is_allowed) == (True, True, True)
    assert checked.reasons == ()
    assert checked.remains_bytes == 20 * GIB


def test_auto_does_not_lock_where_too_little_would_remain():
    tight = replace(ROOMY, weights_bytes=23 * GIB, available_bytes=29 * GIB)
    checked = preflight(tight, "auto")
    assert (checked.will_lock, checked.fits) == (False, True)
    assert [notice.code for notice in checked.reasons] == ["lock_would_choke"]
    assert "5.0 GiB would remain of 32.0 GiB" in checked.reasons[0].message
    assert "6.4 GiB should" in checked.reasons[0].message
    assert "smaller model" in checked.remedy


def test_auto_does_not_lock_what_does_not_fit():
    checked = preflight(replace(ROOMY, available_bytes=9 * GIB), "auto")
    assert (checked.will_lock, checked.fits) == (False, False)
    assert [notice.code for notice in checked.reasons] == ["does_not_fit"]


def test_always_locks_and_says_what_is_wrong_with_it():
    choking = replace(ROOMY, weights_bytes=31 * GIB)
    checked = preflight(choking, "always")
    assert checked.will_lock
    assert [notice.code for notice in checked.reasons] == ["does_not_fit", "lock_would_choke"]
    assert "nothing would remain" in checked.reasons[1].message


def test_never_does_not_lock_and_still_says_that_it_does_not_fit():
    assert not preflight(ROOMY, "never").will_lock
    assert codes(ROOMY, "never") == []
    assert codes(replace(ROOMY, available_bytes=9 * GIB), "never") == ["does_not_fit"]


def test_auto_is_more_cautious_where_several_people_use_the_computer():
    large = replace(ROOMY, weights_bytes=19 * GIB)
    assert preflight(large, "auto").will_lock
    checked = preflight(replace(large, users=3), "auto")
    assert not checked.will_lock
    assert "3 people use this computer" in checked.reasons[0].message
    assert preflight(replace(large, users=None), "auto").will_lock


def test_a_limit_in_the_way_is_said_and_the_lock_is_tried_all_the_same():
    limited = replace(ROOMY, limits=LockLimits("linux", 8 * MIB, can_ignore_memlock=False))
    checked = preflight(limited, "auto")
    assert checked.will_lock
    assert checked.is_allowed is False
    assert checked.limit is LockReason.MEMLOCK_LIMIT
    assert codes(limited, "auto") == ["lock_limited"]
    assert "LimitMEMLOCK=infinity" in checked.remedy


def test_the_wire_limit_of_a_mac_is_explained_by_its_default():
    mac = LockLimits("darwin", UNLIMITED_BYTES, None, 7 * GIB, 7 * GIB)
    checked = preflight(replace(ROOMY, limits=mac, ram_bytes=32 * GIB), "auto")
    assert checked.limit is LockReason.USER_WIRE_LIMIT
    assert "By default macOS lets 25.3 GiB of 32.0 GiB be locked." in checked.reasons[0].message
    assert "sysctl" in checked.remedy


def test_what_other_programs_have_wired_counts_against_a_macs_global_limit():
    mac = LockLimits("darwin", UNLIMITED_BYTES, None, 25 * GIB, 25 * GIB)
    assert preflight(replace(ROOMY, limits=mac), "auto").is_allowed is True
    busy = preflight(replace(ROOMY, limits=mac, ram_bytes=64 * GIB, wired_bytes=18 * GIB), "auto")
    assert busy.limit is LockReason.GLOBAL_WIRE_LIMIT


def test_an_unknown_size_is_not_locked_by_auto_and_said():
    for unknown in (replace(ROOMY, weights_bytes=None), replace(ROOMY, ram_bytes=None)):
        assert not preflight(unknown, "auto").will_lock
        assert codes(unknown, "auto") == ["lock_not_judged"]
        assert preflight(unknown, "always").will_lock


def test_unknown_parts_leave_open_whether_it_fits_unless_the_known_ones_are_too_large():
    assert preflight(replace(ROOMY, kv_bytes=None), "auto").fits is None
    assert preflight(replace(ROOMY, kv_bytes=None, available_bytes=8 * GIB), "auto").fits is False
    assert preflight(replace(ROOMY, available_bytes=None), "auto").fits is None


def test_the_reserve_is_a_share_between_two_bounds():
    assert [ONE_USER.of(ram * GIB) / GIB for ram in (4, 8, 64, 512)] == [2, 2, pytest.approx(12.8), 16]
    assert [SEVERAL_USERS.of(ram * GIB) / GIB for ram in (8, 64, 512)] == [4, pytest.approx(22.4), 32]


sizes = st.none() | st.integers(0, 2**40)
any_facts = st.builds(
    PreflightFacts,
    st.builds(
        LockLimits, st.sampled_from(["linux", "darwin"]), sizes, st.sampled_from([None, True, False]), sizes, sizes
    ),
    sizes,
    sizes,
    sizes,
    sizes,
    sizes,
    sizes,
    st.none() | st.integers(0, 9),
)


@given(any_facts)
def test_auto_never_locks_what_is_known_not_to_fit_and_always_says_why_not(facts: PreflightFacts):
    checked = preflight(facts, "auto")
    assert not (checked.will_lock and checked.fits is False)
    assert checked.will_lock or checked.reasons
    assert bool(checked.remedy) is bool(checked.reasons)


@given(any_facts, st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_larger_model_is_never_locked_where_a_smaller_is_not(facts: PreflightFacts, one: int, other: int):
    small, large = sorted((one, other))
    if preflight(replace(facts, weights_bytes=large), "auto").will_lock:
        assert preflight(replace(facts, weights_bytes=small), "auto").will_lock


@given(any_facts)
def test_more_users_never_make_auto_bolder(facts: PreflightFacts):
    if preflight(replace(facts, users=4), "auto").will_lock:
        assert preflight(replace(facts, users=1), "auto").will_lock


def test_copies_of_earlier_prompts_count_and_are_bounded_by_a_share_of_memory():
    tight = replace(ROOMY, prompt_cache_bytes=14 * GIB)
    assert codes(tight, "auto") == ["lock_would_choke"]
    assert preflight(replace(tight, available_bytes=GIB), "auto").needed_bytes == 24 * GIB
    assert "earlier prompts 14.0 GiB" in preflight(replace(tight, available_bytes=GIB), "auto").reasons[0].message
    sizes = [prompt_cache_bound_mib(None if gib is None else gib * GIB) for gib in (None, 8, 24, 128, 512)]
    assert sizes == [8192, 512, 1536, 8192, 8192]
