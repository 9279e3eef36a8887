"""Conditions of the lock that keeps the weights in memory. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.health import Condition, Kind, Severity, when
from emberd.core.lock import LockState
from emberd.core.lock_limits import explain, find_remedy, judge_limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emberd.core.health_facts import Facts

_W, _N = Severity.WARNING, Severity.NOTE
_NO_ROOM = ("RAM_TOO_SMALL", "LOCK_WOULD_CHOKE")

KINDS: dict[str, Kind] = {
    "LOCK_OFF": Kind(_N, "The model is not to be locked"),
    "LOCK_WOULD_CHOKE": Kind(_W, "A lock would leave too little memory for everything else", ("RAM_TOO_SMALL",)),
    "LOCK_LIMIT": Kind(_W, "The system does not let the model be locked", _NO_ROOM),
    "LOCK_NOT_HELD": Kind(_W, "The model is not locked in memory", (*_NO_ROOM, "LOCK_LIMIT")),
    "LOCK_PARTIAL": Kind(_W, "Only a part of the model is locked", (*_NO_ROOM, "LOCK_LIMIT")),
    "WEIGHTS_COPIED": Kind(_N, "The engine holds a copy of the weights"),
}


def of_lock(facts: Facts) -> Iterator[Condition]:
    """Yield what is in the way of the lock; nothing where none is wanted."""
    engine, memory, weights = facts.engine, facts.memory, facts.model.weights_bytes
    yield from when(
        engine.is_mapped is False,
        "WEIGHTS_COPIED",
        "what leaves memory has to be written to swap first",
        "Nothing, where the build copies by design (Metal, repacked weights); else drop --nommap from extra_args.",
    )
    if engine.wants_lock is False:
        yield Condition("LOCK_OFF", 'engine.lock = "never"', 'Set engine.lock = "auto".')
        return
    yield from when(
        bool(memory.choking),
        "LOCK_WOULD_CHOKE",
        memory.choking,
        'Take a smaller model or a shorter context (engine.context_size), or set engine.lock = "always".',
    )
    is_held = engine.lock is LockState.HELD
    if memory.limits is not None and weights and not is_held:
        can_lock, limit = judge_limits(weights, memory.limits, memory.system.wired_bytes)
        if can_lock is False and limit is not None:
            yield Condition(
                "LOCK_LIMIT",
                explain(limit, memory.limits, weights),
                find_remedy(limit, memory.limits.system, weights),
            )
    for state, code in ((LockState.ABSENT, "LOCK_NOT_HELD"), (LockState.PARTIAL, "LOCK_PARTIAL")):
        yield from when(engine.lock is state, code, engine.lock_message, engine.lock_remedy)
