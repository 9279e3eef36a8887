"""Is the model locked in memory? A pure judgement of what the kernel and the engine say.

A flag proves nothing: an mlock that fails is one warning among hundreds of lines, and the engine goes on. The
verdict compares how much the kernel holds locked with how much there is to lock (docs/locking.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.load_facts import LoadFacts, Place
from emberd.core.lock_limits import LockReason, explain, find_remedy, judge_limits, lesser_of_process_limits, shown

if TYPE_CHECKING:
    from emberd.core.lock_limits import LockLimits, WireRefusals

HELD_SHARE = 0.95
"""This share of what a lock can reach must be locked, unless the engine itself says that it was refused.

The engine locks the mapping up to the end of the last tensor that stays mapped (llama.cpp, load_all_data in
src/llama-model-loader.cpp). Tensors behind that one were repacked into a copy for the CPU, and are no longer
needed in the file; they are less than a layer, of which a model has 18 or more. A 4-bit model of 270 M
parameters: 100.0 % of the bytes of its tensors were locked with mmap, 94.6 % without (the rest repacked), with
nothing refused.
"""
REPACKED_SHARE = 0.25
"""This share of mapped weights may be repacked into an unlocked copy before a lock of the file is only partial.

The engine computes with the copy, while the file's pages are locked and idle. A small copy costs the next reply
little. But the copy can be the whole model: then nobody reads what is locked, and the weights go to swap
(KoboldCPP issue 2207).
"""
PARTIAL_SHARE = 0.01
"""Other parts of a process lock less than this for themselves, such as keys or a driver's buffers."""
_EPERM_TEXT = "operation not permitted"
_EAGAIN_TEXT = "resource temporarily unavailable"


class LockState(Enum):
    """The verdict."""

    HELD = "HELD"
    """Everything that a lock can reach is locked."""
    PARTIAL = "PARTIAL"
    """A part is locked; the rest may leave memory."""
    ABSENT = "ABSENT"
    """Nothing is locked, or a negligible part."""
    UNKNOWN = "UNKNOWN"
    """The kernel did not say, or the size of the weights is unknown."""


@dataclass(frozen=True, slots=True)
class LockEvidence:
    """The evidence for a verdict. Unknown is None.

    Attributes:
        limits: the limits in force for the engine.
        weights_bytes: size of the tensors in all parts, without the files' headers, which are unmapped after
            loading (7 MB of a model with 262,144 tokens).
        locked_bytes: locked for the engine's processes: `VmLck` of /proc/PID/status (proc_pid_status(5)) or
            `ri_wired_size` of proc_pid_rusage (xnu, bsd/sys/resource.h).
        is_asked: the engine was asked to lock.
        load: what the engine's log told.
        wired_bytes: macOS: wired memory of the whole system before the load.
        refusals: macOS: refusals between the start of the load and its end.
        was_held: an earlier verdict on the same process was HELD.
    """

    limits: LockLimits
    weights_bytes: int | None
    locked_bytes: int | None
    is_asked: bool | None
    load: LoadFacts = field(default_factory=LoadFacts)
    wired_bytes: int | None = None
    refusals: WireRefusals | None = None
    was_held: bool = False


@dataclass(frozen=True, slots=True)
class LockVerdict:
    """The verdict and its reasons.

    Attributes:
        state: the verdict.
        locked_bytes: what the kernel holds locked, None if unknown.
        needed_bytes: what must be locked for a whole lock, None if unknown.
        reason: why it is not HELD; None if it is.
        message: the reason in a sentence, empty if HELD.
        remedy: what a person can do, empty if nothing.
        notes: what else is worth knowing, even if HELD.
    """

    state: LockState
    locked_bytes: int | None
    needed_bytes: int | None
    reason: LockReason | None = None
    message: str = ""
    remedy: str = ""
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float | None:
        """The locked share of what must be locked, at most 1; None if unknown or nothing must."""
        if self.locked_bytes is None or not self.needed_bytes:
            return None
        return min(self.locked_bytes / self.needed_bytes, 1.0)


def judge_lock(seen: LockEvidence) -> LockVerdict:
    """Judge the evidence.

    More locked bytes never make a verdict worse, and unknown values never make it HELD or ABSENT.
    """
    needed = needed_bytes(seen.weights_bytes, seen.load, is_mapped=seen.load.is_mapped)
    verdict = LockVerdict(LockState.UNKNOWN, seen.locked_bytes, needed, notes=_notes(seen.load))
    if needed is None:
        return _with_reason(verdict, LockReason.NO_WEIGHTS, seen)
    if seen.locked_bytes is None:
        return _with_reason(verdict, LockReason.NO_READING, seen)
    state = _state(seen.locked_bytes, needed, is_refused=bool(seen.load.warnings))
    if state is not LockState.HELD:
        return _with_reason(replace(verdict, state=state), _reason(seen, needed), seen)
    if seen.load.is_mapped and seen.load.bytes_in(Place.REPACKED) > (seen.weights_bytes or 0) * REPACKED_SHARE:
        return _with_reason(replace(verdict, state=LockState.PARTIAL), LockReason.REPACKED, seen)
    return replace(verdict, state=state)


def needed_bytes(weights_bytes: int | None, load: LoadFacts, *, is_mapped: bool | None) -> int | None:
    """Return how much of the weights a lock can and must reach, None if unknown.

    A graphics card's own memory is out of reach and needs no lock. Repacked weights beside a mapped file are a
    copy, and do not count; without a mapped file they are the weights, and do.
    """
    if weights_bytes is None or weights_bytes <= 0:
        return None
    in_memory = max(weights_bytes - load.bytes_in(Place.DEVICE), 0)
    if in_memory <= weights_bytes * (1 - HELD_SHARE):
        return 0
    copied = load.bytes_in(Place.REPACKED) if is_mapped else 0
    return max(in_memory - copied, math.ceil(weights_bytes * PARTIAL_SHARE))


def _state(locked: int, needed: int, *, is_refused: bool) -> LockState:
    if not needed:
        return LockState.ABSENT
    if locked >= (needed if is_refused else needed * HELD_SHARE):
        return LockState.HELD
    return LockState.PARTIAL if locked >= needed * PARTIAL_SHARE else LockState.ABSENT


def _reason(seen: LockEvidence, needed: int) -> LockReason:  # noqa: PLR0911  # one for each cause
    """Return the likeliest reason, from the surest evidence to the weakest."""
    if not needed:
        return LockReason.ON_DEVICE
    if seen.is_asked is False:
        return LockReason.NOT_ASKED
    if any(not warning.is_supported for warning in seen.load.warnings):
        return LockReason.UNSUPPORTED
    if seen.load.warnings:
        return _refusal(seen, needed, seen.load.warnings[-1].text.lower())
    if seen.was_held:
        return LockReason.LOST
    if seen.load.is_mapped is False:
        return LockReason.METAL_WITHOUT_MMAP if seen.load.bytes_in(Place.METAL) else LockReason.NOT_MAPPED
    return _by_counter(seen) or judge_limits(needed, seen.limits, seen.wired_bytes)[1] or LockReason.UNEXPLAINED


def _refusal(seen: LockEvidence, needed: int, text: str) -> LockReason:
    """Return which limit refused; the errors of mlock(2) mean other things on the two systems.

    macOS says EAGAIN for its wire limits and ENOMEM for all else (xnu, bsd/kern/kern_mman.c). Linux says ENOMEM for
    the limit, EPERM if that is 0, and EAGAIN where pages cannot be had (mlock(2)).
    """
    by_limit = judge_limits(needed, seen.limits, seen.wired_bytes)[1]
    if seen.limits.system == "darwin":
        if _EAGAIN_TEXT in text:
            # By the figures the per-process limit has room, so it was the other one.
            return _by_counter(seen) or by_limit or LockReason.GLOBAL_WIRE_LIMIT
        return by_limit or LockReason.NO_MEMORY
    if _EPERM_TEXT in text:
        return LockReason.NO_CAPABILITY
    if _EAGAIN_TEXT in text:
        return LockReason.NO_MEMORY
    if by_limit is None and (seen.limits.memlock_bytes is None or seen.limits.can_ignore_memlock is None):
        return LockReason.MEMLOCK_LIMIT
    return by_limit or LockReason.NO_MEMORY


def _by_counter(seen: LockEvidence) -> LockReason | None:
    """Return the limit whose counter of refusals in the kernel rose during the load."""
    if seen.refusals is None:
        return None
    if seen.refusals.over_user_limit:
        # One counter serves two limits: the kernel compares with the lesser of both (osfmk/vm/vm_map.c).
        return lesser_of_process_limits(seen.limits)
    return LockReason.GLOBAL_WIRE_LIMIT if seen.refusals.over_global_limit else None


def _with_reason(verdict: LockVerdict, reason: LockReason, seen: LockEvidence) -> LockVerdict:
    needed = verdict.needed_bytes or 0
    return replace(
        verdict,
        reason=reason,
        message=explain(reason, seen.limits, needed),
        remedy=find_remedy(reason, seen.limits.system, needed),
    )


def _notes(load: LoadFacts) -> tuple[str, ...]:
    notes = [
        f"{shown(warning.asked_bytes)} were refused after {shown(warning.locked_bytes)} of the same buffer or "
        f"file: {warning.text}"
        for warning in load.warnings
        if warning.is_supported
    ]
    repacked = load.bytes_in(Place.REPACKED)
    if repacked:
        notes.append(
            f"{shown(repacked)} of weights are a repacked copy for the CPU, which the engine does not lock"
        )
    return tuple(notes)
