"""Before the start: will the model lock and fit, and is the engine to be asked to lock it? Pure.

A lock takes memory away from everything else for as long as the engine lives. A model that is mapped and not
locked is dropped under pressure and read again; a computer without memory for the rest thrashes. So `auto` locks
if enough memory remains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emberd.core.lock_limits import default_user_wire_limit, explain, find_remedy, judge_limits, shown
from emberd.core.types import Notice

if TYPE_CHECKING:
    from emberd.core.lock_limits import LockLimits, LockReason
    from emberd.core.settings import LockPolicy

_GIB = 1024**3
USUAL_PROMPT_CACHE_MIB = 8192
"""How much llama-server keeps of earlier prompts unless told (common/common.h, `cache_ram_mib`)."""
_PROMPT_CACHE_SHARE = 16
"""Part of RAM that emberd leaves to it: the other parts are the model's and everybody else's."""


def prompt_cache_bound_mib(ram_bytes: int | None) -> int:
    """Return how many MiB llama-server may fill with earlier prompts, which is ordinary memory that idles."""
    share_mib = USUAL_PROMPT_CACHE_MIB if ram_bytes is None else ram_bytes // _PROMPT_CACHE_SHARE >> 20
    return min(share_mib, USUAL_PROMPT_CACHE_MIB)


@dataclass(frozen=True, slots=True)
class Reserve:
    """The memory that must remain for everything else: a share of RAM between two bounds.

    Attributes:
        share: of RAM.
        least_bytes: the least: a system and a browser need it on the smallest computer.
        most_bytes: the most: more would lie idle on a large computer.
    """

    share: float
    least_bytes: int
    most_bytes: int

    def of(self, ram_bytes: int) -> int:
        """Return the bytes to leave on a computer with this RAM."""
        return min(max(int(ram_bytes * self.share), self.least_bytes), self.most_bytes)


ONE_USER = Reserve(0.2, 2 * _GIB, 16 * _GIB)
"""About as much as macOS by default keeps from being wired: 27 % of 8 GiB, 18 % of 64 GiB."""
SEVERAL_USERS = Reserve(0.35, 4 * _GIB, 32 * _GIB)
"""Other users have programs too. 32 GiB is the most that macOS ever keeps back."""


@dataclass(frozen=True, slots=True)
class PreflightFacts:
    """What is known before the start. Unknown is None.

    Attributes:
        limits: how much the engine may lock.
        weights_bytes: size of the tensors that will be in this computer's RAM.
        kv_bytes: size of the KV cache (core/gguf.py).
        compute_bytes: size of the compute buffers.
        prompt_cache_bytes: size that copies of earlier prompts may reach.
        ram_bytes: memory of the computer, or of the control group that emberd is confined to.
        available_bytes: memory that can be used without swapping, pages of files included.
        wired_bytes: memory that the kernel, the GPU and other programs have locked already.
        users: how many people have sessions on this computer, emberd's owner included.
        others_bytes: size of further files that the engine copies: projectors, adapters, speech, images.
    """

    limits: LockLimits
    weights_bytes: int | None
    kv_bytes: int | None
    compute_bytes: int | None
    ram_bytes: int | None
    available_bytes: int | None
    wired_bytes: int | None
    users: int | None
    prompt_cache_bytes: int = 0
    others_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Preflight:
    """The decision, and its reasons.

    Attributes:
        will_lock: ask the engine to lock the model.
        fits: weights, context and buffers have room without swapping; None if unknown.
        is_allowed: the limits let all of the weights be locked; None if unknown.
        limit: the limit in the way, None if none is known.
        needed_bytes: all that the engine will take, as far as known.
        remains_bytes: what then remains for everything else, None if unknown.
        reserve_bytes: what should remain, None if unknown.
        reasons: findings for the owner, with stable codes.
        remedy: what a person can do about the first of them, or empty.
    """

    will_lock: bool
    fits: bool | None
    is_allowed: bool | None
    limit: LockReason | None = None
    needed_bytes: int = 0
    remains_bytes: int | None = None
    reserve_bytes: int | None = None
    reasons: tuple[Notice, ...] = ()
    remedy: str = ""


def preflight(facts: PreflightFacts, policy: LockPolicy) -> Preflight:
    """Decide about the lock.

    `never` does not lock; `always` does, and says what speaks against it. `auto` locks unless the computer would
    choke: the engine does not fit into what is available, or less than the reserve would remain of RAM. A limit
    in the way is no reason not to ask: the engine locks what it can, and goes on.
    """
    own = (facts.weights_bytes, facts.kv_bytes, facts.compute_bytes)
    parts = (*own, facts.prompt_cache_bytes, facts.others_bytes)
    needed = sum(part or 0 for part in parts)
    fits = _fits(facts, needed)
    remains = _remains(facts, needed)
    reserve = _reserve(facts)
    is_allowed, limit = (
        (None, None)
        if facts.weights_bytes is None
        else judge_limits(facts.weights_bytes, facts.limits, facts.wired_bytes)
    )
    is_tight = remains is not None and reserve is not None and remains < reserve
    is_known = facts.weights_bytes is not None and facts.ram_bytes is not None
    chokes = fits is False or is_tight
    found: list[tuple[Notice, str]] = []
    if fits is False:
        found.append(_does_not_fit(facts, needed))
    if policy != "never":
        if is_tight:
            found.append(_too_little_remains(facts, remains or 0, reserve or 0, policy))
        if policy == "auto" and not is_known:
            found.append(_UNKNOWN)
        if is_allowed is False and limit is not None and not (policy == "auto" and chokes):
            found.append(_limit_in_the_way(facts, limit))
    return Preflight(
        will_lock=policy == "always" or (policy == "auto" and is_known and not chokes),
        fits=fits,
        is_allowed=is_allowed,
        limit=limit,
        needed_bytes=needed,
        remains_bytes=remains,
        reserve_bytes=reserve,
        reasons=tuple(notice for notice, _ in found),
        remedy=found[0][1] if found else "",
    )


def _fits(facts: PreflightFacts, needed: int) -> bool | None:
    if facts.available_bytes is None or facts.weights_bytes is None:
        return None
    if needed > facts.available_bytes:
        return False
    return None if facts.kv_bytes is None or facts.compute_bytes is None else True


def _remains(facts: PreflightFacts, needed: int) -> int | None:
    """Return what is left of RAM beside the engine and all that is wired.

    With unknown parts the result is too high, so it can only speak against a lock.
    """
    if facts.ram_bytes is None or facts.weights_bytes is None:
        return None
    return facts.ram_bytes - (facts.wired_bytes or 0) - needed


def _reserve(facts: PreflightFacts) -> int | None:
    if facts.ram_bytes is None:
        return None
    return (SEVERAL_USERS if (facts.users or 1) > 1 else ONE_USER).of(facts.ram_bytes)


_UNKNOWN = (
    Notice(
        "lock_not_judged",
        "The size of the model or of this computer's memory is not known; the model is mapped and not locked.",
    ),
    'Set engine.lock to "always" to lock it nevertheless.',
)
_SMALLER = "Take a smaller model or a shorter context (engine.context_size), or end other programs."


def _does_not_fit(facts: PreflightFacts, needed: int) -> tuple[Notice, str]:
    return (
        Notice(
            "does_not_fit",
            f"The engine needs at least {shown(needed)} ({_parts(facts)}), and {shown(facts.available_bytes or 0)} "
            "are available: this computer will swap, or read the model again and again.",
        ),
        _SMALLER,
    )


def _too_little_remains(
    facts: PreflightFacts, remains: int, reserve: int, policy: LockPolicy
) -> tuple[Notice, str]:
    whose = f"{facts.users} people use this computer: " if (facts.users or 1) > 1 else ""
    outcome = "it is mapped and not locked" if policy == "auto" else 'it is locked, for engine.lock is "always"'
    left = f"{shown(remains)} would remain" if remains > 0 else "nothing would remain"
    return (
        Notice(
            "lock_would_choke",
            f"{whose}with the model locked, {left} of {shown(facts.ram_bytes or 0)} for everything else, and "
            f"{shown(reserve)} should; {outcome}.",
        ),
        _SMALLER + (' Or set engine.lock to "always".' if policy == "auto" else ""),
    )


def _limit_in_the_way(facts: PreflightFacts, limit: LockReason) -> tuple[Notice, str]:
    needed = facts.weights_bytes or 0
    message = f"The model will not be locked whole: {explain(limit, facts.limits, needed)}."
    if facts.limits.system == "darwin" and facts.ram_bytes is not None and limit.value.endswith("wire_limit"):
        usual = default_user_wire_limit(facts.ram_bytes)
        message += f" By default macOS lets {shown(usual)} of {shown(facts.ram_bytes)} be locked."
    return Notice("lock_limited", message), find_remedy(limit, facts.limits.system, needed)


def _parts(facts: PreflightFacts) -> str:
    parts = (
        ("weights", facts.weights_bytes),
        ("context", facts.kv_bytes),
        ("buffers", facts.compute_bytes),
        *((("earlier prompts", facts.prompt_cache_bytes),) if facts.prompt_cache_bytes else ()),
        *((("other files", facts.others_bytes),) if facts.others_bytes else ()),
    )
    return ", ".join(f"{name} {'unknown' if size is None else shown(size)}" for name, size in parts)
