"""The lock verdict: from what the kernel holds and what the engine says, never from a flag."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.load_facts import KeepAliveState, LoadFacts, MlockWarning, Place, WeightsBuffer, judge_keep_alive
from emberd.core.lock import HELD_SHARE, REPACKED_SHARE, LockEvidence, LockState, judge_lock
from emberd.core.lock_limits import (
    UNLIMITED_BYTES,
    LockLimits,
    LockReason,
    WireRefusals,
    default_user_wire_limit,
    judge_limits,
    shown,
)

MIB = 1024**2
GIB = 1024**3
ENOMEM = "Cannot allocate memory"
EAGAIN = "Resource temporarily unavailable"
EPERM = "Operation not permitted"
LINUX = LockLimits("linux", memlock_bytes=UNLIMITED_BYTES, can_ignore_memlock=False)
MAC = LockLimits("darwin", memlock_bytes=UNLIMITED_BYTES, user_wire_bytes=12 * GIB, global_wire_bytes=12 * GIB)
WHOLE = LockEvidence(
    limits=LINUX, weights_bytes=4 * GIB, locked_bytes=4 * GIB, is_asked=True, load=LoadFacts(is_mapped=True)
)


def refused(text: str, *, after: int = 0) -> LoadFacts:
    """Return the log of a mapped model whose lock was refused."""
    return LoadFacts(is_mapped=True, warnings=(MlockWarning(GIB, after, text),))


def buffer(place: Place, size_bytes: int) -> WeightsBuffer:
    return WeightsBuffer(place.value, size_bytes, place)


def test_a_lock_of_all_weights_is_held():
    verdict = judge_lock(WHOLE)
    assert verdict.state is LockState.HELD
    assert verdict.share == 1.0
    assert (verdict.reason, verdict.message, verdict.remedy) == (None, "", "")


def test_a_lock_of_nothing_is_absent_and_says_that_the_engine_gave_no_reason():
    verdict = judge_lock(replace(WHOLE, locked_bytes=0))
    assert verdict.state is LockState.ABSENT
    assert verdict.reason is LockReason.UNEXPLAINED


def test_a_lock_of_a_half_is_partial():
    verdict = judge_lock(replace(WHOLE, locked_bytes=2 * GIB))
    assert verdict.state is LockState.PARTIAL
    assert verdict.share == 0.5


def test_a_few_pages_that_others_lock_are_no_lock_of_the_model():
    assert judge_lock(replace(WHOLE, locked_bytes=256 * 1024)).state is LockState.ABSENT


def test_what_the_kernel_does_not_tell_is_unknown_whatever_the_engine_was_asked():
    verdict = judge_lock(replace(WHOLE, locked_bytes=None))
    assert verdict.state is LockState.UNKNOWN
    assert verdict.reason is LockReason.NO_READING


@pytest.mark.parametrize("weights", [None, 0])
def test_a_model_of_unknown_size_gives_an_unknown_verdict(weights: int | None):
    verdict = judge_lock(replace(WHOLE, weights_bytes=weights))
    assert verdict.state is LockState.UNKNOWN
    assert verdict.reason is LockReason.NO_WEIGHTS


class TestRepackedWeights:
    """Figures of a 270 M model in 4 bits, measured with llama.cpp on x86-64."""

    WEIGHTS = 246_591_488
    LOAD = LoadFacts(
        is_mapped=True,
        buffers=(buffer(Place.MAPPED, round(235.16 * MIB)), buffer(Place.REPACKED, round(12.66 * MIB))),
    )

    def test_a_repacked_copy_does_not_make_a_held_lock_look_broken(self):
        verdict = judge_lock(LockEvidence(LINUX, self.WEIGHTS, 240_812 * 1024, is_asked=True, load=self.LOAD))
        assert verdict.state is LockState.HELD
        assert "13 MiB of weights are a repacked copy" in verdict.notes[0]

    def test_neither_does_one_that_the_log_does_not_mention(self):
        seen = LockEvidence(LINUX, self.WEIGHTS, int(self.WEIGHTS * 0.96), is_asked=True)
        assert judge_lock(seen).state is LockState.HELD

    def test_without_mmap_the_repacked_weights_are_the_weights(self):
        load = replace(self.LOAD, is_mapped=False)
        verdict = judge_lock(LockEvidence(LINUX, self.WEIGHTS, 227_856 * 1024, is_asked=True, load=load))
        assert verdict.state is LockState.PARTIAL
        assert verdict.reason is LockReason.NOT_MAPPED

    def test_a_lock_of_a_file_that_is_hardly_used_any_more_is_partial(self):
        load = LoadFacts(is_mapped=True, buffers=(buffer(Place.MAPPED, 4 * GIB), buffer(Place.REPACKED, 3 * GIB)))
        verdict = judge_lock(replace(WHOLE, load=load))
        assert verdict.state is LockState.PARTIAL
        assert verdict.reason is LockReason.REPACKED
        few = LoadFacts(is_mapped=True, buffers=(buffer(Place.REPACKED, int(4 * GIB * REPACKED_SHARE)),))
        assert judge_lock(replace(WHOLE, load=few)).state is LockState.HELD


def test_weights_on_a_graphics_card_need_no_lock_and_do_not_count():
    load = LoadFacts(is_mapped=True, buffers=(buffer(Place.DEVICE, 3 * GIB), buffer(Place.MAPPED, GIB)))
    assert judge_lock(replace(WHOLE, locked_bytes=GIB, load=load)).state is LockState.HELD
    nearly_all = LoadFacts(is_mapped=True, buffers=(buffer(Place.DEVICE, 4 * GIB - MIB),))
    verdict = judge_lock(replace(WHOLE, locked_bytes=0, load=nearly_all))
    assert verdict.state is LockState.ABSENT
    assert verdict.reason is LockReason.ON_DEVICE
    assert not verdict.remedy


def test_an_engine_that_was_not_asked_is_the_reason_before_any_limit():
    seen = replace(
        WHOLE, is_asked=False, locked_bytes=0, limits=LockLimits("linux", 8 * MIB, can_ignore_memlock=False)
    )
    assert judge_lock(seen).reason is LockReason.NOT_ASKED


def test_a_refused_lock_has_no_tolerance():
    almost = int(4 * GIB * (HELD_SHARE + 1) / 2)
    assert judge_lock(replace(WHOLE, locked_bytes=almost)).state is LockState.HELD
    verdict = judge_lock(replace(WHOLE, locked_bytes=almost, load=refused(ENOMEM, after=almost)))
    assert verdict.state is LockState.PARTIAL
    assert ENOMEM in verdict.notes[0]


@pytest.mark.parametrize(
    ("limits", "text", "reason", "words"),
    [
        (LockLimits("linux", 8 * MIB, can_ignore_memlock=False), ENOMEM, LockReason.MEMLOCK_LIMIT, "is 8,192 KiB"),
        (LockLimits("linux", None, can_ignore_memlock=None), ENOMEM, LockReason.MEMLOCK_LIMIT, "in the way"),
        (LockLimits("linux", 0, can_ignore_memlock=False), EPERM, LockReason.NO_CAPABILITY, "CAP_IPC_LOCK"),
        (LockLimits("linux", 8 * MIB, can_ignore_memlock=True), ENOMEM, LockReason.NO_MEMORY, "could not bring"),
        (LINUX, EAGAIN, LockReason.NO_MEMORY, "could not bring"),
        (MAC, ENOMEM, LockReason.NO_MEMORY, "could not bring"),
        (
            replace(MAC, user_wire_bytes=3 * GIB),
            EAGAIN,
            LockReason.USER_WIRE_LIMIT,
            "vm.user_wire_limit is 3.0 GiB",
        ),
        (replace(MAC, memlock_bytes=GIB), EAGAIN, LockReason.MEMLOCK_LIMIT, "RLIMIT_MEMLOCK is 1.0 GiB"),
        (MAC, EAGAIN, LockReason.GLOBAL_WIRE_LIMIT, "vm.global_user_wire_limit is 12.0 GiB"),
    ],
)
def test_a_refusal_names_its_limit_and_what_to_do(limits: LockLimits, text: str, reason: LockReason, words: str):
    verdict = judge_lock(replace(WHOLE, limits=limits, locked_bytes=GIB, load=refused(text, after=GIB)))
    assert verdict.state is LockState.PARTIAL
    assert verdict.reason is reason
    assert words in verdict.message
    assert verdict.remedy.endswith(".")


@pytest.mark.parametrize(
    ("limits", "refusals", "reason"),
    [
        (MAC, WireRefusals(1, 0), LockReason.USER_WIRE_LIMIT),
        (replace(MAC, memlock_bytes=GIB), WireRefusals(1, 0), LockReason.MEMLOCK_LIMIT),
        (replace(MAC, user_wire_bytes=3 * GIB), WireRefusals(0, 2), LockReason.GLOBAL_WIRE_LIMIT),
    ],
)
def test_the_kernels_own_counter_is_believed_before_the_figures(
    limits: LockLimits, refusals: WireRefusals, reason: LockReason
):
    seen = replace(WHOLE, limits=limits, locked_bytes=GIB, refusals=refusals)
    assert judge_lock(replace(seen, load=refused(EAGAIN, after=GIB))).reason is reason
    assert judge_lock(seen).reason is reason


def test_a_counter_that_the_kernel_has_set_to_zero_counts_from_there():
    """macOS does so once a day."""
    assert WireRefusals(3, 1).since(WireRefusals(1, 1)) == WireRefusals(2, 0)
    assert WireRefusals(1, 0).since(WireRefusals(7, 2)) == WireRefusals(1, 0)


def test_metal_buffers_without_mmap_are_named_as_the_reason():
    load = LoadFacts(is_mapped=False, buffers=(buffer(Place.METAL, 4 * GIB),))
    verdict = judge_lock(replace(WHOLE, limits=MAC, locked_bytes=0, load=load))
    assert verdict.reason is LockReason.METAL_WITHOUT_MMAP
    assert "--nommap" in verdict.remedy


def test_a_lock_that_was_held_and_is_gone_is_lost():
    verdict = judge_lock(replace(WHOLE, locked_bytes=0, was_held=True))
    assert verdict.reason is LockReason.LOST
    assert "emberd restart" in verdict.remedy


def test_a_build_without_mlock_is_named():
    load = LoadFacts(warnings=(MlockWarning(0, 0, "mlock not supported on this system", is_supported=False),))
    assert judge_lock(replace(WHOLE, locked_bytes=0, load=load)).reason is LockReason.UNSUPPORTED


def test_every_reason_has_words():
    for limits in (LINUX, MAC):
        for load in (LoadFacts(), refused(ENOMEM), refused(EAGAIN), refused(EPERM)):
            verdict = judge_lock(replace(WHOLE, limits=limits, locked_bytes=0, load=load))
            assert verdict.message
            assert verdict.remedy


sizes = st.integers(0, 2**40)
maybe = st.none() | sizes
loads = st.builds(
    LoadFacts,
    is_mapped=st.sampled_from([None, True, False]),
    warnings=st.lists(
        st.builds(MlockWarning, sizes, sizes, st.sampled_from([ENOMEM, EAGAIN, EPERM, "?"]), st.booleans()),
        max_size=2,
    ).map(tuple),
    buffers=st.lists(st.builds(WeightsBuffer, st.just("x"), sizes, st.sampled_from(Place)), max_size=4).map(tuple),
)
limits_of_any_kind = st.builds(
    LockLimits,
    st.sampled_from(["linux", "darwin"]),
    maybe | st.just(-1),
    st.sampled_from([None, True, False]),
    maybe,
    maybe,
)
evidence = st.builds(
    LockEvidence,
    limits_of_any_kind,
    maybe,
    maybe,
    st.sampled_from([None, True, False]),
    loads,
    maybe,
    st.none() | st.builds(WireRefusals, sizes, sizes),
    st.booleans(),
)
RANK = {LockState.ABSENT: 0, LockState.PARTIAL: 1, LockState.HELD: 2}


@given(evidence, sizes, sizes)
def test_more_locked_bytes_never_make_the_verdict_worse(seen: LockEvidence, one: int, other: int):
    few, many = sorted((one, other))
    before = judge_lock(replace(seen, locked_bytes=few)).state
    after = judge_lock(replace(seen, locked_bytes=many)).state
    if LockState.UNKNOWN in {before, after}:
        assert before is after
    else:
        assert RANK[before] <= RANK[after]


@given(evidence, st.sampled_from(["weights_bytes", "locked_bytes"]))
def test_what_is_unknown_never_gives_held_or_absent(seen: LockEvidence, missing: str):
    verdict = judge_lock(dataclasses.replace(seen, **{missing: None}))
    assert verdict.state is LockState.UNKNOWN
    assert verdict.share is None or 0 <= verdict.share <= 1


@given(evidence)
def test_a_verdict_has_a_reason_and_words_exactly_if_it_is_not_held(seen: LockEvidence):
    verdict = judge_lock(seen)
    is_held = verdict.state is LockState.HELD
    assert (verdict.reason is None) is is_held
    assert (not verdict.message) is is_held


@pytest.mark.parametrize(
    ("ram_gib", "lockable_gib"),
    [
        (2, 1.4),
        (4, 2.8),
        (8, 5.84),
        (16, 12.16),
        (18, 13.68),
        (24, 18.24),
        (32, 25.28),
        (36, 28.44),
        (48, 37.92),
        (64, 52.48),
        (96, 78.72),
        (128, 108.80),
        (192, 163.20),
        (256, 225.28),
        (512, 480.0),
    ],
)
def test_the_default_wire_limit_of_macos_is_that_of_its_table(ram_gib: int, lockable_gib: float):
    assert default_user_wire_limit(ram_gib * GIB) == pytest.approx(lockable_gib * GIB, abs=1)


def test_a_mac_in_server_mode_may_lock_95_percent_from_32_gib_on():
    assert default_user_wire_limit(32 * GIB, is_server_mode=True) == 32 * GIB * 95 // 100
    assert default_user_wire_limit(16 * GIB, is_server_mode=True) == default_user_wire_limit(16 * GIB)


@given(st.integers(1, 2**45))
def test_the_default_wire_limit_is_less_than_ram_and_leaves_at_most_32_gib(ram: int):
    limit = default_user_wire_limit(ram)
    assert limit < ram
    assert ram - limit <= max(32 * GIB, ram * 30 // 100 + 1)


def test_all_wired_memory_counts_against_the_global_limit_of_macos():
    assert judge_limits(8 * GIB, MAC, 2 * GIB) == (True, None)
    assert judge_limits(8 * GIB, MAC, 5 * GIB) == (False, LockReason.GLOBAL_WIRE_LIMIT)
    assert judge_limits(8 * GIB, MAC, None) == (None, None)
    assert judge_limits(13 * GIB, MAC, None) == (False, LockReason.USER_WIRE_LIMIT)


def test_on_linux_a_capability_lifts_the_limit():
    small = LockLimits("linux", 8 * MIB, can_ignore_memlock=False)
    assert judge_limits(GIB, small) == (False, LockReason.MEMLOCK_LIMIT)
    assert judge_limits(GIB, replace(small, can_ignore_memlock=True)) == (True, None)
    assert judge_limits(GIB, replace(small, can_ignore_memlock=None)) == (None, None)
    assert judge_limits(GIB, LockLimits("linux", -1, can_ignore_memlock=False)) == (True, None)


def test_the_heartbeat_counts_only_if_the_engine_names_at_least_the_time_it_was_given():
    said = LoadFacts(keep_alive_s=2_592_000, uses_residency_sets=True)
    assert judge_keep_alive(said, 2_592_000).state is KeepAliveState.HELD
    short = judge_keep_alive(replace(said, keep_alive_s=180), 2_592_000)
    assert short.state is KeepAliveState.SHORT
    assert "180 s" in short.message


def test_a_build_without_a_heartbeat_is_told_from_a_log_that_says_nothing():
    assert judge_keep_alive(LoadFacts(), 180).state is KeepAliveState.UNKNOWN
    old = judge_keep_alive(LoadFacts(working_set_bytes=12_000_000_000), 180)
    assert old.state is KeepAliveState.ABSENT
    assert "PR 17766" in old.remedy
    switched_off = LoadFacts(keep_alive_s=180, uses_residency_sets=False)
    assert judge_keep_alive(switched_off, 180).state is KeepAliveState.ABSENT


def test_sizes_are_shown_in_the_unit_that_a_person_would_choose():
    assert [shown(65536), shown(8 * MIB), shown(241 * MIB), shown(5 * GIB // 2)] == [
        "64 KiB",
        "8,192 KiB",
        "241 MiB",
        "2.5 GiB",
    ]
