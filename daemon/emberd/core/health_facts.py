"""What `emberd doctor` knows of this computer, its engine and its model. Unknown is None; nothing is guessed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.memory import GpuLimits, SystemMemory

if TYPE_CHECKING:
    from emberd.core.lock import LockState
    from emberd.core.lock_limits import LockLimits


class ModelProblem(Enum):
    """Why a model's file cannot be used."""

    NOT_SET = "not_set"
    MISSING = "missing"
    FOLDER = "folder"
    DENIED = "denied"
    """EPERM: macOS' privacy control, for this program and its children."""
    UNREADABLE = "unreadable"
    """EACCES: permissions of the file or a folder above it."""
    BROKEN_VOLUME = "broken_volume"
    """Another error of the volume."""
    NOT_GGUF = "not_gguf"
    TRUNCATED = "truncated"
    PART_MISSING = "part_missing"
    SILENT = "silent"
    """Opening or reading it does not end: a volume or a privacy control that never answers."""


class EngineProblem(Enum):
    """Why an engine's program cannot be used."""

    MISSING = "missing"
    NOT_EXECUTABLE = "not_executable"
    QUARANTINED = "quarantined"
    WRONG_ARCHITECTURE = "wrong_architecture"
    REFUSES = "refuses"
    """It does not start, or does not know an argument."""


class Volume(Enum):
    """What kind of volume a file lies on."""

    INTERNAL = "internal"
    EXTERNAL = "external"
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """The model's file.

    Attributes:
        path: as the settings name it.
        problem: why it cannot be used, None if it can.
        message: the system's or the check's own words.
        remedy: what the check proposes.
        weights_bytes: the tensors' data.
        volume: where it lies.
        is_dataless: a placeholder of a cloud service, whose content is not here.
        is_in_protected_folder: in a folder that macOS denies background programs.
        is_synced: in a folder that a cloud service keeps in step, and may empty of its content.
        changed_after_start_s: by how much it is younger than the engine that serves it.
    """

    path: str = ""
    problem: ModelProblem | None = None
    message: str = ""
    remedy: str = ""
    weights_bytes: int | None = None
    volume: Volume | None = None
    is_dataless: bool | None = None
    is_in_protected_folder: bool | None = None
    is_synced: bool | None = None
    changed_after_start_s: float | None = None


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """The engine's program and process.

    Attributes:
        problem: why the program cannot be used, None if it can.
        message: the check's own words.
        remedy: what the check proposes.
        lacks: what emberd wants and this build does not have, and what is lost by it.
        unloads_when_idle: the option that makes it let go of an idle model, None if there is none.
        wants_gpu: it was told to use the GPU.
        has_gpu: its log says that it uses one.
        is_running: there is a process.
        is_mapped: its weights are pages of the file.
        last_words: why it failed the last time.
        has_failed: it crashed again and again, or can never start.
        crashes: how often it ended in a row while it was wanted.
        gpu_is_off: the settings give the GPU no layer although the system has one that could be used.
        heartbeat_problem: why Metal will not hold the idle model.
        heartbeat_remedy: what helps.
        swapped_bytes: what of it is in swap, or compressed.
        orphan_pid: an engine of emberd that runs without emberd.
        lock: the verdict about its lock.
        lock_message: which limit is in the way.
        lock_remedy: what helps.
        wants_lock: the settings ask for a lock.
    """

    problem: EngineProblem | None = None
    message: str = ""
    remedy: str = ""
    lacks: tuple[str, ...] = ()
    unloads_when_idle: str | None = None
    wants_gpu: bool | None = None
    has_gpu: bool | None = None
    is_running: bool | None = None
    is_mapped: bool | None = None
    last_words: str = ""
    has_failed: bool | None = None
    crashes: int | None = None
    gpu_is_off: bool | None = None
    heartbeat_problem: str = ""
    heartbeat_remedy: str = ""
    swapped_bytes: int | None = None
    orphan_pid: int | None = None
    lock: LockState | None = None
    lock_message: str = ""
    lock_remedy: str = ""
    wants_lock: bool | None = None


@dataclass(frozen=True, slots=True)
class HostHealth:
    """What only this kind of system knows of itself.

    Attributes:
        is_translated: this program runs under Rosetta.
        is_throttled: the asked process gets little processor time and slow disk access.
        cgroup_limit_bytes: what its group may hold at most.
        lingers: the user's services go on without a session.
        logs_persist: the system's log survives a restart of the computer.
        machine: the processor's word in uname(1), of the computer and not of a translated program.
        swappiness: how readily the kernel swaps out memory rather than drop pages of files.
    """

    is_translated: bool | None = None
    is_throttled: bool | None = None
    cgroup_limit_bytes: int | None = None
    lingers: bool | None = None
    logs_persist: bool | None = None
    machine: str | None = None
    swappiness: int | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """Another program: its name, process id and what it holds, in bytes (None if not told)."""

    name: str
    pid: int | None = None
    resident_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryHealth:
    """Memory and what is in its way.

    Attributes:
        system: memory, swap and pressure.
        needed_bytes: weights, KV cache and compute buffers.
        limits: what may be locked.
        gpu: what the GPU may hold.
        cgroup_limit_bytes: what the service's group may hold at most.
        resident_share: share of the weights in memory.
        others: other model servers that run.
        hold: what the thrash guard lets emberd hold, in its own word.
        warmth_mode: off, or auto.
        paused_for_s: how long nothing will be warmed.
        cool_for_s: for how long the memory is given to other work.
        short: the preflight's words about an engine that does not fit into what is available now.
        choking: the preflight's words about a lock that would leave too little for everything else.
        swappiness: of the kernel, from 0 to 200.
        saves_power: on battery, or in low power mode, and the passes over the model are rarer for it; in words.
        waste: what keep-warm has cost without saving anything, in words.
        is_helpless: the computer swaps, and nothing that emberd may let go would help.
    """

    system: SystemMemory = field(default_factory=SystemMemory)
    needed_bytes: int | None = None
    limits: LockLimits | None = None
    gpu: GpuLimits | None = None
    cgroup_limit_bytes: int | None = None
    resident_share: float | None = None
    others: tuple[Program, ...] = ()
    hold: str | None = None
    warmth_mode: str | None = None
    paused_for_s: float | None = None
    cool_for_s: float | None = None
    short: str = ""
    choking: str = ""
    swappiness: int | None = None
    saves_power: str = ""
    waste: str = ""
    is_helpless: bool | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """A volume that emberd writes to: what it keeps there, a path, and the free bytes."""

    what: str
    path: str
    free_bytes: int


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """The daemon and its place in the system.

    Attributes:
        settings_problem: what is wrong with the settings file.
        settings_remedy: what helps.
        settings_path: the settings file.
        open_secret: a file with a key that others can read.
        open_secret_mode: its permission bits.
        open_address: the endpoint's address, where others can reach it and no key is asked for.
        are_settings_newer: the file says something else than what the daemon runs with.
        is_running: a daemon answers.
        waits_because: it answers that it cannot start, with the reason.
        silence: how a daemon that is there fails to answer.
        daemon_pid: who holds the state directory's lock, None if nobody does.
        last_words: what an installed daemon said when it ended, or how it did.
        version: of this program.
        daemon_version: of the daemon that answers.
        port: of the endpoint.
        port_owner: another program that listens there.
        address_problem: why the endpoint's address cannot be used at all.
        state_problem: why the state directory cannot be used.
        history_problem: why the history cannot be read.
        rooms: the volumes that are written to.
        engine_log_bytes: size of the engine's log.
        clock_behind_s: by how much the clock is behind the youngest file of emberd.
        most_open_files: hard limit of open files.
        is_installed: a service manager starts emberd.
        is_loaded: the service manager knows the job, and holds its socket.
        is_disabled: somebody has switched the service off.
        missing_program: the service's program, where it does not exist.
        stale: what of the installed service file differs from what this version would write.
        file_problem: owner or mode that the service manager refuses.
        is_throttled: macOS gives the process little processor time and slow disk access.
        lingers: systemd keeps the user's services without a session.
        logs_persist: what emberd says is kept.
        psutil_failure: what psutil raises when it is asked for this system's memory.
        psutil_version: its version.
        is_translated: this Python runs under Rosetta.
    """

    settings_problem: str = ""
    settings_remedy: str = ""
    settings_path: str = ""
    open_secret: str = ""
    open_secret_mode: int = 0
    open_address: str = ""
    are_settings_newer: bool | None = None
    is_running: bool | None = None
    waits_because: str = ""
    silence: str = ""
    daemon_pid: int | None = None
    last_words: str = ""
    version: str = ""
    daemon_version: str = ""
    port: int = 0
    port_owner: Program | None = None
    address_problem: str = ""
    state_problem: str = ""
    history_problem: str = ""
    rooms: tuple[Room, ...] = ()
    engine_log_bytes: int | None = None
    clock_behind_s: float | None = None
    most_open_files: int | None = None
    is_installed: bool | None = None
    is_loaded: bool | None = None
    is_disabled: bool | None = None
    missing_program: str = ""
    stale: str = ""
    file_problem: str = ""
    is_throttled: bool | None = None
    lingers: bool | None = None
    logs_persist: bool | None = None
    psutil_failure: str = ""
    psutil_version: str = ""
    is_translated: bool | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it.

    Attributes:
        system: darwin or linux.
        unknown: what could not be told, and why.
    """

    system: str
    model: ModelHealth = field(default_factory=ModelHealth)
    engine: EngineHealth = field(default_factory=EngineHealth)
    memory: MemoryHealth = field(default_factory=MemoryHealth)
    service: ServiceHealth = field(default_factory=ServiceHealth)
    unknown: tuple[str, ...] = ()
