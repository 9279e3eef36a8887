"""The facts on this computer, its daemon, engine and model. Unknown is None; nothing is guessed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.host_health import HostHealth
from emberd.core.memory import GpuLimits, Power, SystemMemory
from emberd.core.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emberd.core.lock import LockState
    from emberd.core.lock_limits import LockLimits


class Problem(Enum):
    """Why something cannot be used: code and title of the condition that says so."""

    @property
    def code(self) -> str:
        """Its name in the catalogue."""
        return str(self.value[0])

    @property
    def title(self) -> str:
        """What is wrong, in a few words."""
        return str(self.value[1])


class ModelProblem(Problem):
    """Why a model's file cannot be used. Each keeps an engine from starting."""

    NOT_SET = "MODEL_NOT_SET", "No model is set"
    MISSING = "MODEL_MISSING", "The model's file is missing"
    FOLDER = "MODEL_FOLDER", "The model is a folder"
    DENIED = "MODEL_DENIED", "macOS denies background programs the model"
    """EPERM: macOS' privacy control, for this program and its children."""
    UNREADABLE = "MODEL_UNREADABLE", "The model may not be read"
    """EACCES: permissions of the file or a folder above it."""
    BROKEN_VOLUME = "MODEL_BROKEN_VOLUME", "The model's volume cannot be read"
    SILENT = "MODEL_SILENT", "Reading the model does not end"
    """A volume or a privacy control that never answers."""
    NOT_GGUF = "MODEL_NOT_GGUF", "The model is no GGUF file"
    TRUNCATED = "MODEL_TRUNCATED", "The model's file is cut off"
    PART_MISSING = "MODEL_PART_MISSING", "A part of the split model is missing"
    NOT_FIRST = "MODEL_NOT_FIRST", "The model's file is a later part of a split model"
    COMPANION = "MODEL_COMPANION", "The model's file goes with a model and is none"


class EngineProblem(Problem):
    """Why an engine's program cannot be used."""

    MISSING = "ENGINE_MISSING", "The engine was not found"
    NOT_EXECUTABLE = "ENGINE_NOT_EXECUTABLE", "The engine may not be executed"
    QUARANTINED = "ENGINE_QUARANTINED", "macOS has quarantined the engine"
    WRONG_ARCHITECTURE = "ENGINE_WRONG_ARCHITECTURE", "The engine is built for another processor"
    REFUSES = "ENGINE_REFUSES", "The engine does not start with these settings"
    """It does not start, or does not know an argument."""


class Volume(Enum):
    """What kind of volume a file lies on."""

    INTERNAL = "internal"
    EXTERNAL = "external"
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """The model's file."""

    path: str = ""  # as the settings name it
    problem: ModelProblem | None = None  # None if it can be used
    message: str = ""  # the system's or the check's own words
    remedy: str = ""
    weights_bytes: int | None = None  # the tensors' data
    volume: Volume | None = None
    is_dataless: bool | None = None  # a placeholder of a cloud service, without content
    is_in_protected_folder: bool | None = None  # macOS denies it background programs
    is_synced: bool | None = None  # in a folder that a cloud service syncs, and may empty
    changed_after_start_s: float | None = None  # how much later than the engine's start it was written


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """The engine's program, its options, and its log of the last start."""

    problem: EngineProblem | None = None  # None if it can be used
    message: str = ""  # the check's own words
    remedy: str = ""
    lacks: tuple[str, ...] = ()  # features that emberd wants and this build lacks, and what that costs
    unloads_when_idle: str = ""  # the option that makes it unload an idle model
    has_gpu: bool | None = None  # it uses one, by its log
    is_mapped: bool | None = None  # its weights are pages of the file
    orphan_pid: int | None = None  # a running engine without an emberd


@dataclass(frozen=True, slots=True)
class DaemonHealth:
    """The facts from the daemon's status."""

    answers: bool = False
    pid: int | None = None
    engine_pid: int | None = None
    engine_started_at: float | None = None  # by the wall clock
    has_failed: bool | None = None  # the engine crashed too often, or can never start
    crashes: int | None = None  # how often in a row the engine crashed
    last_words: str = ""  # why it failed the last time
    heartbeat_problem: str = ""  # why Metal will not hold the idle model
    heartbeat_remedy: str = ""
    endpoint_lacks: str = ""  # why it does not listen on ::1, which localhost can mean
    swapped_bytes: int | None = None  # of the engine, in swap or compressed
    switched_to: str = ""  # what the engine serves instead of the settings' model
    copied: tuple[str, ...] = ()  # files that the engine holds in memory of its own
    replaced: tuple[str, ...] = ()  # files that it maps and that are no longer there
    kv_cache_bytes: int | None = None  # of the engine that runs
    lock: LockState | None = None
    lock_message: str = ""  # the limit in the way
    lock_remedy: str = ""
    resident_share: float | None = None  # of the weights
    hold: str | None = None  # the hold level, in its own word
    is_helpless: bool | None = None  # the computer swaps, and nothing that emberd may let go would help
    paused_for_s: float | None = None
    cool_for_s: float | None = None  # a cool spell
    over_budget_for_s: float | None = None  # the next pass waits, because the last ones took too much of a core
    barred: tuple[str, ...] = ()  # barred kinds of turns
    replays: int = 0
    misses: int = 0  # of the replays
    wasted_tokens: int = 0
    lost_turns: int = 0  # users' turns that did not find what replays had kept
    notices: Mapping[str, str] = field(default_factory=dict)  # the preflight's words, by code
    log_sinks: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """Another program: its name, process id and memory in bytes (None if not told)."""

    name: str
    pid: int | None = None
    resident_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryHealth:
    """Memory, and what limits it."""

    system: SystemMemory = field(default_factory=SystemMemory)
    needed_bytes: int | None = None  # weights, KV cache and compute buffers
    limits: LockLimits | None = None  # what may be locked
    gpu: GpuLimits | None = None
    others: tuple[Program, ...] = ()  # other model servers that run
    short: str = ""  # the preflight's words on an engine that does not fit into what is available now
    choking: str = ""  # the same on a lock that would leave too little for everything else
    power: Power = field(default_factory=Power)


@dataclass(frozen=True, slots=True)
class FreeSpace:
    """A volume that emberd writes to: what it keeps there, a path, and the free bytes."""

    what: str
    path: str
    free_bytes: int


@dataclass(frozen=True, slots=True)
class OwnHealth:
    """emberd's own port, files and process."""

    port_owner: Program | None = None  # another program that listens there
    address_problem: str = ""  # why the endpoint's address cannot be used at all
    state_problem: str = ""  # why the state directory cannot be used
    history_problem: str = ""  # why the history cannot be read
    free_spaces: tuple[FreeSpace, ...] = ()
    engine_log_bytes: int | None = None
    clock_behind_s: float | None = None  # behind the youngest file of emberd
    most_open_files: int | None = None  # the hard limit
    psutil_failure: str = ""  # its version, and the error that it raises for this system's memory


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """The settings, the daemon and its service manager, as the caller knows them."""

    settings_path: str = ""
    settings_problem: str = ""  # what is wrong with the settings file
    settings_remedy: str = ""
    are_settings_newer: bool | None = None  # the file differs from the settings in force
    open_secret: str = ""  # a file with a key that others can read
    open_secret_mode: int = 0  # its permission bits
    open_address: str = ""  # the endpoint's, if others can reach it without a key
    is_running: bool | None = None  # a daemon answers
    waits_because: str = ""  # it stands by
    silence: str = ""  # how a running daemon fails to answer
    daemon_pid: int | None = None  # who holds the state directory's lock
    last_words: str = ""  # an installed daemon's last words, or how it ended
    version: str = ""  # of this program
    daemon_version: str = ""  # of the daemon that answers
    is_installed: bool | None = None  # a service manager starts emberd
    is_loaded: bool | None = None  # the service manager knows the job, and holds its socket
    is_disabled: bool | None = None  # the service is switched off
    is_throttled: bool | None = None  # macOS gives the process little processor time and slow disk access
    missing_program: str = ""  # the service's program, if it does not exist
    stale: str = ""  # keys of the installed service file that this version would write differently
    file_problem: str = ""  # owner or mode that the service manager refuses


@dataclass(frozen=True, slots=True)
class Facts:
    """All facts; default settings stand for unknown ones, and make no condition."""

    system: str  # darwin or linux
    settings: Settings = field(default_factory=Settings)
    host: HostHealth = field(default_factory=HostHealth)
    model: ModelHealth = field(default_factory=ModelHealth)
    engine: EngineHealth = field(default_factory=EngineHealth)
    daemon: DaemonHealth = field(default_factory=DaemonHealth)
    memory: MemoryHealth = field(default_factory=MemoryHealth)
    own: OwnHealth = field(default_factory=OwnHealth)
    service: ServiceHealth = field(default_factory=ServiceHealth)

    @property
    def is_mac(self) -> bool:
        """Whether this is a Mac, with launchd, Metal and macOS' logs."""
        return self.system == "darwin"

    @property
    def wants_gpu(self) -> bool:
        """Whether the engine was told to use the GPU."""
        layers = self.settings.engine.gpu_layers
        return layers > 0 or (layers < 0 and self.is_mac)

    @property
    def wants_lock(self) -> bool:
        """Whether the settings ask for a lock."""
        return self.settings.engine.lock != "never"


def digest(settings: Settings) -> str:
    """Return a text that differs between different settings of the same version."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()
