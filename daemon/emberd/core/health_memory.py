"""Conditions of memory: lock, room, swap, and who else holds it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.health import Condition, Kind, Severity, when
from emberd.core.lock import LockState
from emberd.core.lock_limits import judge_limits
from emberd.core.memory import Pressure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emberd.core.health_facts import Facts

GIB = 1 << 30
_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
SWAP_NEARLY_FULL = 0.9
"""Above this share the next program that needs memory is ended, or the system stops to answer."""
COLD_SHARE = 0.98
"""Below this share of resident weights a reply waits for the disk; fewer cold pages are chance."""

KINDS: dict[str, Kind] = {
    "RAM_TOO_SMALL": Kind(_E, "The model does not fit into memory"),
    "CGROUP_TOO_SMALL": Kind(_E, "The service may use less memory than the model needs", ("RAM_TOO_SMALL",)),
    "GPU_LIMIT_TOO_SMALL": Kind(_W, "The GPU may not hold the whole model", ("RAM_TOO_SMALL",)),
    "PRESSURE_CRITICAL": Kind(_W, "The computer is short of memory", ("RAM_TOO_SMALL", "CGROUP_TOO_SMALL")),
    "SWAP_NEARLY_FULL": Kind(_W, "Swap is nearly full", ("RAM_TOO_SMALL",)),
    "OTHER_MODEL_SERVER": Kind(_W, "Another model server holds memory"),
    "LOCK_LIMIT": Kind(_W, "The system does not let the model be locked", ("RAM_TOO_SMALL",)),
    "LOCK_NOT_HELD": Kind(_W, "The model is not locked in memory", ("RAM_TOO_SMALL", "LOCK_LIMIT")),
    "LOCK_PARTIAL": Kind(_W, "Only a part of the model is locked", ("RAM_TOO_SMALL", "LOCK_LIMIT")),
    "WEIGHTS_COPIED": Kind(_N, "The engine holds a copy of the weights"),
    "LET_GO": Kind(_W, "emberd has let go of the model", ("PRESSURE_CRITICAL", "RAM_TOO_SMALL")),
    "WARMTH_OFF": Kind(_N, "Keeping warm is switched off"),
    "WARMTH_PAUSED": Kind(_N, "Keeping warm is paused"),
    "MODEL_COLD": Kind(
        _W,
        "A part of the model is not in memory",
        ("RAM_TOO_SMALL", "CGROUP_TOO_SMALL", "PRESSURE_CRITICAL", "LET_GO", "WARMTH_OFF", "WARMTH_PAUSED"),
    ),
}


def of_memory(facts: Facts) -> Iterator[Condition]:
    """Yield what keeps the model out of memory."""
    yield from _of_room(facts)
    yield from _of_lock(facts)
    yield from _of_warmth(facts)


def _of_room(facts: Facts) -> Iterator[Condition]:
    memory, needed = facts.memory, facts.memory.needed_bytes
    system, total = memory.system, memory.system.total_bytes
    smaller = "Take a smaller model or quantisation, or a smaller engine.context_size."
    if needed is not None and total is not None:
        yield from when(
            needed > total, "RAM_TOO_SMALL", f"{gib(needed)} needed, {gib(total)} in the computer", smaller
        )
    limit = memory.cgroup_limit_bytes
    if needed is not None and limit is not None:
        yield from when(
            needed > limit,
            "CGROUP_TOO_SMALL",
            f"{gib(needed)} needed, {gib(limit)} allowed",
            "Raise MemoryMax= of the service (systemctl --user edit emberd), or the container's limit.",
        )
    wired = memory.gpu.wired_limit_bytes if memory.gpu else None
    if needed is not None and wired and facts.engine.wants_gpu:
        yield from when(
            needed > wired,
            "GPU_LIMIT_TOO_SMALL",
            f"{gib(needed)} needed, iogpu.wired_limit_mb allows {gib(wired)}",
            f"sudo sysctl iogpu.wired_limit_mb={(needed >> 20) + 1024}, or put fewer layers on the GPU.",
        )
    yield from when(
        system.pressure is Pressure.CRITICAL,
        "PRESSURE_CRITICAL",
        "memory pressure is critical: emberd warms nothing until it has fallen",
        "Close programs that use much memory, or take a smaller model.",
    )
    used, swap = system.swap_used_bytes, system.swap_total_bytes
    if used is not None and swap:
        yield from when(
            used / swap > SWAP_NEARLY_FULL,
            "SWAP_NEARLY_FULL",
            f"{gib(used)} of {gib(swap)} used",
            "Close programs, free the disk (macOS makes swap files as it has room), or add swap.",
        )
    for other in memory.others:
        size = "" if other.resident_bytes is None else f", {gib(other.resident_bytes)} resident"
        yield Condition(
            "OTHER_MODEL_SERVER",
            f"{other.name} (pid {other.pid}){size}",
            "End it if you do not need it: two models push each other out.",
        )


def _of_lock(facts: Facts) -> Iterator[Condition]:
    engine, memory, weights = facts.engine, facts.memory, facts.model.weights_bytes
    if engine.wants_lock is False:
        return
    is_held = engine.lock is LockState.HELD
    if memory.limits is not None and weights and not is_held:
        can_lock, limit = judge_limits(weights, memory.limits, memory.system.wired_bytes)
        yield from when(
            can_lock is False,
            "LOCK_LIMIT",
            f"{gib(weights)} of weights, {limit.name if limit else 'a limit'} does not allow it",
            engine.lock_remedy or _lock_remedy(facts.system),
        )
    for state, code in ((LockState.ABSENT, "LOCK_NOT_HELD"), (LockState.PARTIAL, "LOCK_PARTIAL")):
        yield from when(engine.lock is state, code, engine.lock_message, engine.lock_remedy)
    yield from when(
        engine.is_mapped is False,
        "WEIGHTS_COPIED",
        "what leaves memory has to be written to swap first",
        "Nothing, where the build copies by design (Metal, repacked weights); else drop --nommap from extra_args.",
    )


def _of_warmth(facts: Facts) -> Iterator[Condition]:
    memory = facts.memory
    yield from when(
        memory.hold not in {None, "all"},
        "LET_GO",
        f"the computer was swapping; held now: {(memory.hold or '').replace('_', ' ')}",
        'It takes hold again by itself. warmth.priority = "model-first" would not let go.',
    )
    yield from when(memory.warmth_mode == "off", "WARMTH_OFF", 'warmth.mode = "off"', 'Set warmth.mode = "auto".')
    yield from when(
        bool(memory.paused_for_s), "WARMTH_PAUSED", f"for another {memory.paused_for_s or 0:.0f} s", "emberd resume"
    )
    share = memory.resident_share
    yield from when(
        None if share is None else share < COLD_SHARE,
        "MODEL_COLD",
        f"{share or 0:.1%} of the weights are in memory",
        "emberd warm brings it back now; emberd status tells why it left.",
    )


def _lock_remedy(system: str) -> str:
    if system == "darwin":
        return "Raise vm.user_wire_limit and vm.global_user_wire_limit with sudo sysctl; see docs/locking.md."
    return "Raise LimitMEMLOCK of user@.service, or memlock in /etc/security/limits.d; see docs/locking.md."


def gib(size_bytes: int) -> str:
    """Return a size for a person."""
    return f"{size_bytes / GIB:.1f} GiB"
