"""Conditions of memory: room, swap, who else holds it, and what emberd does with it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.health import Condition, Kind, Severity, when
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

USUAL_SWAPPINESS = 60
"""Linux' own default (Documentation/admin-guide/sysctl/vm.rst)."""
_TOO_SMALL = ("RAM_TOO_SMALL", "CGROUP_TOO_SMALL")

KINDS: dict[str, Kind] = {
    "RAM_TOO_SMALL": Kind(_E, "The model does not fit into memory"),
    "CGROUP_TOO_SMALL": Kind(_E, "The service may use less memory than the model needs", ("RAM_TOO_SMALL",)),
    "MODELS_OVERCOMMIT": Kind(_W, "Two models do not fit into memory together", ("RAM_TOO_SMALL",)),
    "RAM_SHORT": Kind(
        _W,
        "The model does not fit into what is free now",
        (*_TOO_SMALL, "MODELS_OVERCOMMIT"),
    ),
    "GPU_LIMIT_TOO_SMALL": Kind(_W, "The GPU may not hold the whole model", ("RAM_TOO_SMALL",)),
    "PRESSURE_CRITICAL": Kind(_W, "The computer is short of memory", (*_TOO_SMALL, "MODELS_OVERCOMMIT")),
    "SWAP_NEARLY_FULL": Kind(_W, "Swap is nearly full", ("RAM_TOO_SMALL", "DISK_FULL")),
    "OTHER_MODEL_SERVER": Kind(_W, "Another model server holds memory", ("MODELS_OVERCOMMIT",)),
    "SWAPPINESS_HIGH": Kind(_N, "The kernel prefers swapping programs out to dropping files"),
    "LET_GO": Kind(
        _W, "emberd has let go of the model", ("PRESSURE_CRITICAL", "RAM_TOO_SMALL", "MODELS_OVERCOMMIT")
    ),
    "RELIEF_IMPOSSIBLE": Kind(
        _W,
        "The computer swaps, and nothing that emberd may let go would help",
        ("PRESSURE_CRITICAL", "RAM_TOO_SMALL", "MODELS_OVERCOMMIT"),
    ),
    "WARMTH_WASTED": Kind(_W, "Keep-warm costs more than it saves"),
    "WARMTH_OFF": Kind(_N, "Keeping warm is switched off"),
    "WARMTH_PAUSED": Kind(_N, "Keeping warm is paused"),
    "WARMTH_STRETCHED": Kind(_N, "The model is warmed less often, to save power"),
    "MODEL_COLD": Kind(
        _W,
        "A part of the model is not in memory",
        (
            *_TOO_SMALL,
            "MODELS_OVERCOMMIT",
            "PRESSURE_CRITICAL",
            "LET_GO",
            "WARMTH_OFF",
            "WARMTH_PAUSED",
            "ENGINE_SWAPPED",
        ),
    ),
}


def of_memory(facts: Facts) -> Iterator[Condition]:
    """Yield what keeps the model out of memory."""
    yield from _of_room(facts)
    yield from _of_others(facts)
    yield from _of_swap(facts)
    yield from _of_warmth(facts)


def _of_room(facts: Facts) -> Iterator[Condition]:
    memory, needed = facts.memory, facts.memory.needed_bytes
    total = memory.system.total_bytes
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
    yield from when(bool(memory.short), "RAM_SHORT", memory.short, f"Close other programs. {smaller}")


def _of_others(facts: Facts) -> Iterator[Condition]:
    memory = facts.memory
    names = ", ".join(f"{each.name} (pid {each.pid})" for each in memory.others)
    held = sum(each.resident_bytes or 0 for each in memory.others)
    needed, total = memory.needed_bytes, memory.system.total_bytes
    yield from when(
        None if not held or needed is None or total is None else needed + held > total,
        "MODELS_OVERCOMMIT",
        f"{names} {'holds' if len(memory.others) == 1 else 'hold'} {gib(held)}, emberd's model needs "
        f"{gib(needed or 0)}, the computer has {gib(total or 0)}",
        "End the other one, or give one of them a smaller model.",
    )
    for name in sorted({each.name for each in memory.others}):
        same = [each for each in memory.others if each.name == name]
        pids = ", ".join(str(each.pid) for each in same)
        held = sum(each.resident_bytes or 0 for each in same)
        yield Condition(
            "OTHER_MODEL_SERVER",
            f"{name} (pid {pids}), {gib(held)} resident",
            "End it if you do not need it: two models push each other out.",
        )


def _of_swap(facts: Facts) -> Iterator[Condition]:
    system, swappiness = facts.memory.system, facts.memory.swappiness
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
    yield from when(
        None if swappiness is None else swappiness > USUAL_SWAPPINESS,
        "SWAPPINESS_HIGH",
        f"vm.swappiness is {swappiness}, {USUAL_SWAPPINESS} is usual: memory of an idle engine goes first",
        f"sudo sysctl vm.swappiness={USUAL_SWAPPINESS}",
    )


def _of_warmth(facts: Facts) -> Iterator[Condition]:
    memory = facts.memory
    yield from when(
        memory.hold not in {None, "all"},
        "LET_GO",
        f"the computer needs the memory; held now: {(memory.hold or '').replace('_', ' ')}",
        'It takes hold again by itself. warmth.priority = "model-first" would not let go.',
    )
    yield from when(
        memory.is_helpless,
        "RELIEF_IMPOSSIBLE",
        "it writes more to swap than warmth.priority allows, and the model is kept whole all the same",
        "Close programs that use much memory, or take a smaller model. Where the engine's own lock is in the way, "
        "warmth.may_restart = true lets emberd end it by a restart.",
    )
    yield from when(
        bool(memory.waste),
        "WARMTH_WASTED",
        memory.waste,
        "KoboldCPP: remove --parallelrequests, which keeps no prompt. llama-server: a larger engine.context_size, "
        "or fewer slots (--parallel). warmth.replay = false keeps only the weights warm.",
    )
    yield from when(memory.warmth_mode == "off", "WARMTH_OFF", 'warmth.mode = "off"', 'Set warmth.mode = "auto".')
    for seconds, why in ((memory.paused_for_s, "emberd pause"), (memory.cool_for_s, "emberd cool, or cool_hours")):
        yield from when(
            bool(seconds), "WARMTH_PAUSED", f"for another {seconds or 0:.0f} s ({why})", "emberd resume"
        )
    yield from when(
        bool(memory.saves_power),
        "WARMTH_STRETCHED",
        memory.saves_power,
        'warmth.on_battery = "same" makes no difference between battery and mains.',
    )
    share = memory.resident_share
    yield from when(
        None if share is None else share < COLD_SHARE,
        "MODEL_COLD",
        f"{share or 0:.1%} of the weights are in memory",
        "emberd warm brings it back now; emberd status tells why it left.",
    )


def gib(size_bytes: int) -> str:
    """Return a size for a person."""
    return f"{size_bytes / GIB:.1f} GiB"
