"""Conditions of memory: room, swap, other programs, emberd's own part, and the lock. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.lock import LockState
from emberd.core.lock_limits import explain, find_remedy, judge_limits
from emberd.core.memory import PowerSource, Pressure
from emberd.core.warmth_cost import BUDGET_SHARE, BUDGET_WINDOW_S
from emberd.doctor.condition import Kinds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emberd.doctor.condition import Seen
    from emberd.doctor.facts import Facts, Program

GIB = 1 << 30
SWAP_NEARLY_FULL = 0.9
"""Above this share the next program that needs memory is ended, or the system stops answering."""
COLD_SHARE = 0.98
"""Below this share of resident weights a reply waits for the disk; above it, cold pages are chance."""
USUAL_SWAPPINESS = 60
"""Linux' own default (Documentation/admin-guide/sysctl/vm.rst)."""
_TOO_SMALL = ("RAM_TOO_SMALL", "CGROUP_TOO_SMALL")
_NEEDED_ELSEWHERE = ("PRESSURE_CRITICAL", "RAM_TOO_SMALL", "MODELS_OVERCOMMIT")
_SMALLER = "Take a smaller model or quantisation, or a smaller engine.context_size."

KINDS = Kinds()


# --- room ---------------------------------------------------------------------------------------------------------


@KINDS.error("RAM_TOO_SMALL", "The model does not fit into memory")
def _(facts: Facts) -> Seen:
    needed, total = facts.memory.needed_bytes, facts.memory.system.total_bytes
    if needed is not None and total is not None and needed > total:
        yield f"{_gib(needed)} needed, {_gib(total)} in the computer", _SMALLER


@KINDS.error("CGROUP_TOO_SMALL", "The service may use less memory than the model needs", ("RAM_TOO_SMALL",))
def _(facts: Facts) -> Seen:
    needed, limit = facts.memory.needed_bytes, facts.host.cgroup_limit_bytes
    if needed is not None and limit is not None and needed > limit:
        yield (
            f"{_gib(needed)} needed, {_gib(limit)} allowed",
            "Raise MemoryMax= of the service (systemctl --user edit emberd), or the container's limit.",
        )


@KINDS.warning("MODELS_OVERCOMMIT", "Two models do not fit into memory together", ("RAM_TOO_SMALL",))
def _(facts: Facts) -> Seen:
    others, needed, total = facts.memory.others, facts.memory.needed_bytes, facts.memory.system.total_bytes
    held = _held(others)
    if held and needed is not None and total is not None and needed + held > total:
        names = ", ".join(f"{each.name} (pid {each.pid})" for each in others)
        held_by = f"{names} {'holds' if len(others) == 1 else 'hold'} {_gib(held)}"
        yield (
            f"{held_by}, emberd's model needs {_gib(needed)}, the computer has {_gib(total)}",
            "End the other one, or give one of them a smaller model.",
        )


@KINDS.warning("RAM_SHORT", "The model does not fit into what is free now", (*_TOO_SMALL, "MODELS_OVERCOMMIT"))
def _(facts: Facts) -> Seen:
    if facts.memory.short:
        yield facts.memory.short, f"Close other programs. {_SMALLER}"


@KINDS.warning("GPU_LIMIT_TOO_SMALL", "The GPU may not hold the whole model", ("RAM_TOO_SMALL",))
def _(facts: Facts) -> Seen:
    needed, gpu = facts.memory.needed_bytes, facts.memory.gpu
    wired = gpu.wired_limit_bytes if gpu else None
    if needed is not None and wired and facts.wants_gpu and needed > wired:
        yield (
            f"{_gib(needed)} needed, iogpu.wired_limit_mb allows {_gib(wired)}",
            f"sudo sysctl iogpu.wired_limit_mb={(needed >> 20) + 1024}, or put fewer layers on the GPU.",
        )


@KINDS.warning("PRESSURE_CRITICAL", "The computer is short of memory", (*_TOO_SMALL, "MODELS_OVERCOMMIT"))
def _(facts: Facts) -> Seen:
    if facts.memory.system.pressure is Pressure.CRITICAL:
        yield (
            "memory pressure is critical: emberd warms nothing until it has fallen",
            "Close programs that use much memory, or take a smaller model.",
        )


@KINDS.warning("SWAP_NEARLY_FULL", "Swap is nearly full", ("RAM_TOO_SMALL", "DISK_FULL"))
def _(facts: Facts) -> Seen:
    used, swap = facts.memory.system.swap_used_bytes, facts.memory.system.swap_total_bytes
    if used is not None and swap and used / swap > SWAP_NEARLY_FULL:
        yield (
            f"{_gib(used)} of {_gib(swap)} used",
            "Close programs, free the disk (macOS makes swap files as it has room), or add swap.",
        )


@KINDS.warning("OTHER_MODEL_SERVER", "Another model server holds memory", ("MODELS_OVERCOMMIT",))
def _(facts: Facts) -> Seen:
    for name in sorted({each.name for each in facts.memory.others}):
        same = [each for each in facts.memory.others if each.name == name]
        pids = ", ".join(str(each.pid) for each in same)
        yield (
            f"{name} (pid {pids}), {_gib(_held(same))} resident",
            "End it if you do not need it: two models push each other out.",
        )


@KINDS.note("SWAPPINESS_HIGH", "The kernel prefers swapping programs out to dropping files")
def _(facts: Facts) -> Seen:
    swappiness = facts.host.swappiness
    if swappiness is not None and swappiness > USUAL_SWAPPINESS:
        yield (
            f"vm.swappiness is {swappiness}, {USUAL_SWAPPINESS} is usual: memory of an idle engine goes first",
            f"sudo sysctl vm.swappiness={USUAL_SWAPPINESS}",
        )


def _held(programs: Iterable[Program]) -> int:
    return sum(each.resident_bytes or 0 for each in programs)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


# --- what emberd does with it -------------------------------------------------------------------------------------


@KINDS.warning("LET_GO", "emberd has let go of the model", _NEEDED_ELSEWHERE)
def _(facts: Facts) -> Seen:
    hold = facts.daemon.hold
    if hold is not None and hold != "all":
        yield (
            f"the computer needs the memory; held now: {hold.replace('_', ' ')}",
            'It takes hold again by itself. warmth.priority = "model-first" would not let go.',
        )


@KINDS.warning(
    "RELIEF_IMPOSSIBLE",
    "The computer swaps, and nothing that emberd may let go would help",
    _NEEDED_ELSEWHERE,
)
def _(facts: Facts) -> Seen:
    remedy = (
        "Close programs that use much memory, or take a smaller model. Where the engine's own lock is in the way, "
        "warmth.may_restart = true lets emberd end it by a restart."
    )
    if facts.daemon.is_helpless:
        yield "it writes more to swap than warmth.priority allows, and the model is kept whole all the same", remedy


@KINDS.warning("WARMTH_WASTED", "Keep-warm costs more than it saves")
def _(facts: Facts) -> Seen:
    """By the engine's own counts."""
    daemon, words = facts.daemon, []
    if daemon.barred and daemon.misses:
        words.append(
            f"{daemon.misses} of {daemon.replays} replays did not find their prompt in the engine's cache and "
            f"processed {daemon.wasted_tokens} tokens"
        )
    if daemon.barred and daemon.lost_turns:
        words.append(f"{daemon.lost_turns} turns of users did not find the prompt that replays had kept")
    if daemon.barred:
        words.append(f"no more replays are sent to this engine ({', '.join(daemon.barred)})")
    if daemon.over_budget_for_s:
        words.append(
            f"more than {BUDGET_SHARE:.0%} of a core within {BUDGET_WINDOW_S / 60:.0f} minutes while no memory was "
            f"taken; the next pass waits for {daemon.over_budget_for_s:.0f} s"
        )
    remedy = (
        "KoboldCPP: remove --parallelrequests, which keeps no prompt. llama-server: a larger engine.context_size, "
        "or fewer slots (--parallel). warmth.replay = false keeps only the weights warm."
    )
    if words:
        yield "; ".join(words), remedy


@KINDS.note("WARMTH_OFF", "Keeping warm is switched off")
def _(facts: Facts) -> Seen:
    if facts.settings.warmth.mode == "off":
        yield 'warmth.mode = "off"', 'Set warmth.mode = "auto".'


@KINDS.note("WARMTH_PAUSED", "Keeping warm is paused")
def _(facts: Facts) -> Seen:
    daemon = facts.daemon
    for seconds, why in ((daemon.paused_for_s, "emberd pause"), (daemon.cool_for_s, "emberd cool, or cool_hours")):
        if seconds:
            yield f"for another {seconds:.0f} s ({why})", "emberd resume"


@KINDS.note("WARMTH_STRETCHED", "The model is warmed less often, to save power")
def _(facts: Facts) -> Seen:
    warmth, power = facts.settings.warmth, facts.memory.power
    is_on_battery = power.source is PowerSource.BATTERY
    if warmth.on_battery != "same" and warmth.mode != "off" and (power.is_low_power or is_on_battery):
        why = "low power mode is on" if power.is_low_power else "on battery"
        how = "nothing is warmed" if warmth.on_battery == "off" else "it is warmed six times less often"
        yield f"{why}: {how}", 'warmth.on_battery = "same" makes no difference between battery and mains.'


@KINDS.warning(
    "MODEL_COLD",
    "A part of the model is not in memory",
    (*_NEEDED_ELSEWHERE, "CGROUP_TOO_SMALL", "LET_GO", "WARMTH_OFF", "WARMTH_PAUSED", "ENGINE_SWAPPED"),
)
def _(facts: Facts) -> Seen:
    share = facts.daemon.resident_share
    if share is not None and share < COLD_SHARE:
        yield (
            f"{share:.1%} of the weights are in memory",
            "emberd warm brings it back now; emberd status tells why it left.",
        )


# --- the lock that keeps the weights in memory --------------------------------------------------------------------

_NO_ROOM = ("RAM_TOO_SMALL", "LOCK_WOULD_CHOKE")


@KINDS.note("LOCK_OFF", "The model is not to be locked")
def _(facts: Facts) -> Seen:
    if not facts.wants_lock:
        yield 'engine.lock = "never"', 'Set engine.lock = "auto".'


@KINDS.warning("LOCK_WOULD_CHOKE", "A lock would leave too little memory for everything else", ("RAM_TOO_SMALL",))
def _(facts: Facts) -> Seen:
    if facts.wants_lock and facts.memory.choking:
        yield (
            facts.memory.choking,
            'Take a smaller model or a shorter context (engine.context_size), or set engine.lock = "always".',
        )


@KINDS.warning("LOCK_LIMIT", "The system does not let the model be locked", _NO_ROOM)
def _(facts: Facts) -> Seen:
    limits, weights = facts.memory.limits, facts.model.weights_bytes
    if facts.wants_lock and limits is not None and weights and facts.daemon.lock is not LockState.HELD:
        can_lock, limit = judge_limits(weights, limits, facts.memory.system.wired_bytes)
        if can_lock is False and limit is not None:
            yield explain(limit, limits, weights), find_remedy(limit, limits.system, weights)


@KINDS.warning("LOCK_NOT_HELD", "The model is not locked in memory", (*_NO_ROOM, "LOCK_LIMIT"))
def _(facts: Facts) -> Seen:
    if facts.wants_lock and facts.daemon.lock is LockState.ABSENT:
        yield facts.daemon.lock_message, facts.daemon.lock_remedy


@KINDS.warning("LOCK_PARTIAL", "Only a part of the model is locked", (*_NO_ROOM, "LOCK_LIMIT"))
def _(facts: Facts) -> Seen:
    if facts.wants_lock and facts.daemon.lock is LockState.PARTIAL:
        yield facts.daemon.lock_message, facts.daemon.lock_remedy


@KINDS.note("WEIGHTS_COPIED", "The engine holds a copy of the weights")
def _(facts: Facts) -> Seen:
    by_design = "Nothing, where the build copies by design (Metal, repacked weights)"
    if facts.engine.is_mapped is False:
        yield (
            "what leaves memory has to be written to swap first",
            f"{by_design}; else drop --nommap from extra_args.",
        )
