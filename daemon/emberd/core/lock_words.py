"""A reason why a lock is not held, in words, and what a person can do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.lock_limits import LockReason

if TYPE_CHECKING:
    from emberd.core.lock_limits import LockLimits, System

_GIB = 1024**3
_MIB = 1024**2


def shown(count: int) -> str:
    """Return a number of bytes as people read it."""
    if count < 10 * _MIB:
        return f"{count / 1024:,.0f} KiB"
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / _MIB:,.0f} MiB"


def explain(reason: LockReason, limits: LockLimits, needed: int) -> str:
    """Return the reason in one sentence, with the limit's figure where it is known."""

    def limit(name: str, value: int | None) -> str:
        if value is None:
            return f"{name} is in the way"
        return f"{name} is {shown(value)}, and {shown(needed)} must be locked"

    match reason:
        case LockReason.MEMLOCK_LIMIT:
            return limit("RLIMIT_MEMLOCK", limits.memlock_bytes)
        case LockReason.NO_CAPABILITY:
            return "the engine may lock nothing: RLIMIT_MEMLOCK is 0 and it lacks CAP_IPC_LOCK"
        case LockReason.USER_WIRE_LIMIT:
            return limit("vm.user_wire_limit", limits.user_wire_bytes)
        case LockReason.GLOBAL_WIRE_LIMIT:
            return (
                limit("vm.global_user_wire_limit", limits.global_wire_bytes)
                + ", beside what the kernel, the GPU and other programs hold wired"
            )
        case _:
            return _EXPLANATIONS[reason]


_EXPLANATIONS = {
    LockReason.NOT_ASKED: "the engine was not asked to lock the model",
    LockReason.UNSUPPORTED: "this build of the engine cannot lock memory",
    LockReason.NO_MEMORY: "the kernel could not bring all pages into memory to lock them",
    LockReason.METAL_WITHOUT_MMAP: "without mmap the weights are in Metal buffers, which the engine does not lock",
    LockReason.NOT_MAPPED: "without mmap a part of the weights is in memory that the engine does not lock",
    LockReason.REPACKED: "the file is locked, but the engine computes with a repacked copy of it, which is not",
    LockReason.ON_DEVICE: "all weights are in the graphics card's own memory; there is nothing to lock",
    LockReason.LOST: "the model was locked, and no longer is",
    LockReason.UNEXPLAINED: "the engine was asked to lock the model and gave no reason why it did not",
    LockReason.NO_READING: "the system does not tell how much memory of the engine is locked",
    LockReason.NO_WEIGHTS: "the size of the model's weights is not known",
}


def find_remedy(reason: LockReason, system: System, needed: int) -> str:
    """Return what a person can do about it, empty if nothing needs doing.

    Args:
        reason: why the lock is not held.
        system: the kernel.
        needed: bytes that must be locked.
    """
    gib = -(-needed // _GIB) + 1
    match reason:
        case LockReason.MEMLOCK_LIMIT if system == "darwin":
            return (
                "Run `ulimit -l unlimited` in the shell that starts emberd, or remove MemoryLock from its launchd "
                "job; then restart emberd."
            )
        case LockReason.MEMLOCK_LIMIT | LockReason.NO_CAPABILITY:
            return (
                "Raise the limit and restart emberd: `LimitMEMLOCK=infinity` in its systemd unit (for a user unit "
                "in a drop-in of user@.service), or `* - memlock unlimited` in "
                "/etc/security/limits.d/emberd.conf and a new login; `ulimit -l` shows it. In a container: "
                "`--ulimit memlock=-1`."
            )
        case LockReason.USER_WIRE_LIMIT:
            return (
                f"If this computer can spare it: `sudo sysctl vm.user_wire_limit={gib * _GIB}`, and at least as "
                "much in vm.global_user_wire_limit; both last until the next boot. Or take a smaller model."
            )
        case LockReason.GLOBAL_WIRE_LIMIT:
            return (
                "Free wired memory (other models on the GPU, virtual machines) and run `emberd restart`, or raise "
                "vm.global_user_wire_limit with sudo sysctl; it lasts until the next boot."
            )
        case _:
            return _REMEDIES.get(reason, "")


_MAP_IT = "Let the engine map the model: remove --nommap or --no-mmap from engine.extra_args."
_REMEDIES = {
    LockReason.NOT_ASKED: 'Set engine.lock to "auto" or "always".',
    LockReason.UNSUPPORTED: "Use another build of the engine.",
    LockReason.NO_MEMORY: "Free memory, or raise the memory limit of the control group, and run `emberd restart`.",
    LockReason.METAL_WITHOUT_MMAP: _MAP_IT,
    LockReason.NOT_MAPPED: _MAP_IT,
    LockReason.REPACKED: "Switch repacking off where the engine can: llama-server has --no-repack.",
    LockReason.LOST: "Run `emberd restart`: the engine locks only while it loads.",
    LockReason.UNEXPLAINED: "Look for mlock in the engine's log.",
}
