"""How much the system lets a process lock, which limit is in the way, and what a person can do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

System = Literal["linux", "darwin"]

UNLIMITED_BYTES = 2**63 - 1
"""No limit. RLIM_INFINITY of macOS (<sys/resource.h>); Linux' own, 2^64-1, is -1 in Python. All three count."""
_GIB = 1024**3
_MIB = 1024**2


class LockReason(Enum):
    """Why a lock is not HELD. The values are stable, for filters and documentation."""

    NOT_ASKED = "not_asked"
    """emberd or its owner did not ask the engine for it."""
    UNSUPPORTED = "unsupported"
    """The engine was built without mlock."""
    MEMLOCK_LIMIT = "memlock_limit"
    """RLIMIT_MEMLOCK of the engine's process."""
    NO_CAPABILITY = "no_capability"
    """Linux: the limit is 0 and the process lacks CAP_IPC_LOCK (mlock(2), EPERM)."""
    USER_WIRE_LIMIT = "user_wire_limit"
    """macOS: vm.user_wire_limit, for one process."""
    GLOBAL_WIRE_LIMIT = "global_wire_limit"
    """macOS: vm.global_user_wire_limit, against all wired memory of the system."""
    NO_MEMORY = "no_memory"
    """The kernel could not bring in the pages (mlock(2), EAGAIN or ENOMEM without a limit in the way)."""
    METAL_WITHOUT_MMAP = "metal_without_mmap"
    """Weights in separate Metal buffers, which the engine silently does not lock."""
    NOT_MAPPED = "not_mapped"
    """Weights copied or repacked into memory that the engine does not lock."""
    REPACKED = "repacked"
    """The file is locked, but the engine computes with a repacked copy, which it does not lock."""
    ON_DEVICE = "on_device"
    """All weights are in the memory of a graphics card, where there is nothing to lock."""
    LOST = "lost"
    """The lock was HELD, and no longer is."""
    UNEXPLAINED = "unexplained"
    """The engine was asked and gave no reason."""
    NO_READING = "no_reading"
    """The kernel did not say how much is locked."""
    NO_WEIGHTS = "no_weights"
    """How much there is to lock is unknown."""


_WIRE_PERCENTS = (70, 73, 76, 79, 82, 85, 88, 91, 94, 97)
"""By the power of two that RAM reaches, from 4 GiB on: wire_limit_percents of xnu's osfmk/vm/vm_kern.c."""
_FIRST_WIRE_POWER = 32
"""VM_USER_WIREABLE_MIN_CONFIG, same file: 2^32 bytes are 4 GiB."""
_SERVER_WIRE_PERCENT = 95
_SERVER_WIRE_POWER = 35
"""VM_USER_SERVERPERF_WIREABLE_MIN_CONFIG, same file: from 32 GiB on."""
_NOT_WIREABLE_MOST_BYTES = 32 * _GIB
"""VM_NOT_USER_WIREABLE_MAX of xnu's osfmk/vm/vm_page.h."""


def default_user_wire_limit(ram_bytes: int, *, is_server_mode: bool = False) -> int:
    """Return macOS' default for vm.user_wire_limit and vm.global_user_wire_limit.

    The rule of kmem_set_user_wire_limits (xnu, osfmk/vm/vm_kern.c), for kernels without jetsam, which macOS' are
    (config/MASTER.arm64.MacOSX). It serves to explain and to compare; the sysctl is what counts.

    Args:
        ram_bytes: memory that the kernel manages (hw.memsize; the kernel's own figure is slightly less).
        is_server_mode: boot argument serverperfmode=1.
    """
    power = max(ram_bytes.bit_length() - 1, 0)
    if is_server_mode and power >= _SERVER_WIRE_POWER:
        percent = _SERVER_WIRE_PERCENT
    else:
        percent = _WIRE_PERCENTS[min(max(power - _FIRST_WIRE_POWER, 0), len(_WIRE_PERCENTS) - 1)]
    return max(ram_bytes * percent // 100, ram_bytes - _NOT_WIREABLE_MOST_BYTES)


@dataclass(frozen=True, slots=True)
class LockLimits:
    """What the system lets the engine lock. Unknown is None; no limit is UNLIMITED_BYTES or a negative number.

    Attributes:
        system: the kernel.
        memlock_bytes: soft RLIMIT_MEMLOCK of the engine.
        can_ignore_memlock: Linux: the engine has CAP_IPC_LOCK.
        user_wire_bytes: macOS: vm.user_wire_limit.
        global_wire_bytes: macOS: vm.global_user_wire_limit.
    """

    system: System
    memlock_bytes: int | None = None
    can_ignore_memlock: bool | None = None
    user_wire_bytes: int | None = None
    global_wire_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class WireRefusals:
    """macOS: how often a lock of any program was refused.

    Attributes:
        over_user_limit: vm.add_wire_count_over_user_limit.
        over_global_limit: vm.add_wire_count_over_global_limit.
    """

    over_user_limit: int
    over_global_limit: int

    def since(self, before: WireRefusals) -> WireRefusals:
        """Return the refusals between two readings.

        The kernel sets both counters to 0 once a day (report_mlock_failures in xnu's osfmk/vm/analytics.c), so a
        counter that went down counts from 0.
        """
        return WireRefusals(
            _grown(before.over_user_limit, self.over_user_limit),
            _grown(before.over_global_limit, self.over_global_limit),
        )


def _grown(before: int, after: int) -> int:
    return after - before if after >= before else after


def bounded(limit_bytes: int | None) -> int:
    """Return a limit as a number of bytes, with unknown and unlimited as UNLIMITED_BYTES."""
    return UNLIMITED_BYTES if limit_bytes is None or not 0 <= limit_bytes < UNLIMITED_BYTES else limit_bytes


def lesser_of_process_limits(limits: LockLimits) -> LockReason:
    """Return the lesser of macOS' two limits for one process."""
    is_memlock = bounded(limits.memlock_bytes) < bounded(limits.user_wire_bytes)
    return LockReason.MEMLOCK_LIMIT if is_memlock else LockReason.USER_WIRE_LIMIT


def judge_limits(
    needed: int, limits: LockLimits, wired_bytes: int | None = None
) -> tuple[bool | None, LockReason | None]:
    """Return whether the limits allow `needed` bytes to be locked, and which one forbids it.

    macOS compares the process with the lesser of RLIMIT_MEMLOCK and vm.user_wire_limit, and the wired memory of the
    whole system, the kernel's and the GPU's included, with vm.global_user_wire_limit (xnu, add_wire_counts in
    osfmk/vm/vm_map.c).

    Args:
        needed: bytes to lock.
        limits: the limits.
        wired_bytes: macOS: wired memory of the system without them, None if unknown.

    Returns:
        True, False, or None if unknown; and the first limit in the way.
    """
    if limits.system == "linux":
        return _judge_memlock(needed, limits)
    if needed > min(bounded(limits.memlock_bytes), bounded(limits.user_wire_bytes)):
        return False, lesser_of_process_limits(limits)
    if needed + (wired_bytes or 0) > bounded(limits.global_wire_bytes):
        return False, LockReason.GLOBAL_WIRE_LIMIT
    is_known = None not in {limits.user_wire_bytes, limits.global_wire_bytes, wired_bytes}
    return (True if is_known else None), None


def _judge_memlock(needed: int, limits: LockLimits) -> tuple[bool | None, LockReason | None]:
    if limits.can_ignore_memlock:
        return True, None
    if limits.memlock_bytes is None:
        return None, None
    if needed <= bounded(limits.memlock_bytes):
        return True, None
    if limits.can_ignore_memlock is None:
        return None, None
    return False, LockReason.NO_CAPABILITY if limits.memlock_bytes == 0 else LockReason.MEMLOCK_LIMIT


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
    """Return what a person can do about it, or empty."""
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
