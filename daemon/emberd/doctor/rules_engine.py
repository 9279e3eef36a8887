"""Conditions of the model's file, and of the engine's program and process. Pure."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from emberd.core.lock_limits import shown
from emberd.doctor.condition import Kinds
from emberd.doctor.facts import EngineProblem, ModelProblem, Volume

if TYPE_CHECKING:
    from emberd.doctor.condition import Seen
    from emberd.doctor.facts import Facts, Problem

_NO_SETTINGS = ("SETTINGS_WRONG",)
_NO_MODEL = tuple(each.code for each in ModelProblem)
_NO_ENGINE = tuple(each.code for each in EngineProblem if each is not EngineProblem.REFUSES)
_CANNOT_START = (*_NO_SETTINGS, *_NO_ENGINE, EngineProblem.REFUSES.code, *_NO_MODEL)
_SWAPPED_LEAST_BYTES = 64 << 20
"""Python's and the loader's own memory may be swapped out once the model serves."""
_MOVE_IT = "Move it to a folder such as ~/Models and set model.path."
_MEND = "Mend the cause, then: emberd restart. What it printed: emberd logs --category engine."

KINDS = Kinds()


def _of_problem(problem: Problem, facts: Facts) -> Seen:
    """Yield the problem that keeps the model or the engine from being used."""
    for found in (facts.model, facts.engine):
        if found.problem is problem:
            yield found.message, found.remedy


# --- the model's file and the place where it lies ----------------------------------------------------------------

for _model in ModelProblem:
    KINDS.error(_model.code, _model.title, _NO_SETTINGS)(partial(_of_problem, _model))


@KINDS.warning("MODEL_DATALESS", "The model is a placeholder in a cloud folder", ("MODEL_MISSING",))
def _(facts: Facts) -> Seen:
    path = facts.model.path
    if facts.model.is_dataless:
        yield (
            f"{path} has a size but no content on this disk",
            f"Download it: brctl download {path}. Better: move it to a folder such as ~/Models and set model.path.",
        )


@KINDS.warning(
    "MODEL_IN_CLOUD_FOLDER",
    "The model is in a folder that a cloud service manages",
    ("MODEL_MISSING", "MODEL_DATALESS"),
)
def _(facts: Facts) -> Seen:
    if facts.model.is_synced:
        yield f"{facts.model.path}: the service may take its content off this disk whenever it wants room", _MOVE_IT


@KINDS.warning("MODEL_ON_NETWORK_VOLUME", "The model is on a network volume", ("MODEL_MISSING",))
def _(facts: Facts) -> Seen:
    if facts.model.volume is Volume.NETWORK:
        yield (
            f"{facts.model.path}: what leaves memory comes back over the network, and cannot if it is gone",
            _MOVE_IT,
        )


@KINDS.note("MODEL_ON_EXTERNAL_VOLUME", "The model is on an external volume", ("MODEL_MISSING", "MODEL_DENIED"))
def _(facts: Facts) -> Seen:
    why = "emberd cannot start the engine while it is not mounted, and macOS may deny it to agents"
    if facts.model.volume is Volume.EXTERNAL:
        yield f"{facts.model.path}: {why}", _MOVE_IT


@KINDS.warning(
    "MODEL_IN_PROTECTED_FOLDER",
    "The model is in a folder that macOS protects",
    ("MODEL_MISSING", "MODEL_DENIED", "MODEL_IN_CLOUD_FOLDER"),
)
def _(facts: Facts) -> Seen:
    why = "background programs need a permission for Documents, Desktop, Downloads and iCloud Drive"
    if facts.model.is_in_protected_folder:
        yield f"{facts.model.path}: {why}", _MOVE_IT


@KINDS.warning("MODEL_REPLACED", "The model's file has changed since the engine loaded it", _NO_MODEL)
def _(facts: Facts) -> Seen:
    younger_s = facts.model.changed_after_start_s
    if younger_s is not None and younger_s > 0:
        yield f"{facts.model.path} was written {younger_s:.0f} s after the engine had started", "emberd restart"


# --- the engine's program and process ----------------------------------------------------------------------------

for _engine in EngineProblem:
    _hidden_by = (*_NO_SETTINGS, *_NO_ENGINE) if _engine is EngineProblem.REFUSES else _NO_SETTINGS
    KINDS.error(_engine.code, _engine.title, _hidden_by)(partial(_of_problem, _engine))


def _last_words(facts: Facts) -> str:
    return facts.daemon.last_words or "it ended again and again"


@KINDS.error("ENGINE_FAILED", "The engine failed, and emberd has given up on it", _CANNOT_START)
def _(facts: Facts) -> Seen:
    if facts.daemon.has_failed:
        yield _last_words(facts), _MEND


@KINDS.error("ENGINE_CRASHING", "The engine crashes again and again", (*_CANNOT_START, "ENGINE_FAILED"))
def _(facts: Facts) -> Seen:
    if facts.daemon.crashes and not facts.daemon.has_failed:
        yield f"{facts.daemon.crashes} in a row: {_last_words(facts)}", _MEND


@KINDS.warning("ENGINE_TOO_OLD", "The engine is too old to do all that keeps a model warm", _NO_ENGINE)
def _(facts: Facts) -> Seen:
    if facts.engine.lacks:
        yield f"this build lacks {'; '.join(facts.engine.lacks)}", "Install a newer KoboldCPP and set engine.path."


@KINDS.warning("ENGINE_LOST_GPU", "The engine does not use the GPU", ("ENGINE_FAILED", "PYTHON_TRANSLATED"))
def _(facts: Facts) -> Seen:
    if facts.wants_gpu and facts.engine.has_gpu is False:
        yield (
            "engine.gpu_layers asks for the GPU, and the engine's log names none",
            "Use a build with Metal (macOS arm64), CUDA or Vulkan; or set engine.gpu_layers = 0.",
        )


@KINDS.note("ENGINE_GPU_OFF", "The settings keep the model off the GPU")
def _(facts: Facts) -> Seen:
    if facts.is_mac and not facts.wants_gpu:
        yield "engine.gpu_layers = 0: every reply is computed by the processor", "Set engine.gpu_layers = -1."


@KINDS.warning(
    "ENGINE_HEARTBEAT_LOST",
    "Metal will let go of the idle model",
    ("ENGINE_LOST_GPU", "ENGINE_GPU_OFF", "ENGINE_FAILED"),
)
def _(facts: Facts) -> Seen:
    problem = facts.daemon.heartbeat_problem
    if problem:
        yield (
            f"{problem}: macOS 26 unwires a model about a second after its last use",
            facts.daemon.heartbeat_remedy,
        )


@KINDS.warning("ENGINE_UNLOADS_WHEN_IDLE", "The engine lets go of an idle model by itself")
def _(facts: Facts) -> Seen:
    option = facts.engine.unloads_when_idle
    if option:
        yield f"it is started with {option}", f"Take {option} out of engine.extra_args or the .kcpps file."


@KINDS.warning(
    "ENGINE_SWAPPED",
    "A part of the engine is in swap",
    ("RAM_TOO_SMALL", "RAM_SHORT", "CGROUP_TOO_SMALL", "MODELS_OVERCOMMIT", "PRESSURE_CRITICAL"),
)
def _(facts: Facts) -> Seen:
    swapped = facts.daemon.swapped_bytes or 0
    if swapped >= _SWAPPED_LEAST_BYTES:
        yield (
            f"{shown(swapped)} of it are {'compressed or ' if facts.is_mac else ''}in swap",
            "emberd warm brings it back now; a mapped and locked model does not go there (docs/locking.md).",
        )


@KINDS.note("ENGINE_SWITCHED", "The engine serves another model than the settings name")
def _(facts: Facts) -> Seen:
    if facts.daemon.switched_to:
        yield (
            f"it was told to, and serves {facts.daemon.switched_to}",
            "Nothing if you wish it so. To go back: emberd stop and start, or change the settings.",
        )


@KINDS.note("ENGINE_FILES_COPIED", "Files of the engine are copies in its own memory")
def _(facts: Facts) -> Seen:
    if facts.daemon.copied:
        yield (
            f"{', '.join(facts.daemon.copied)}: emberd cannot touch them, and what leaves memory goes to swap",
            "Nothing: engines copy projectors and adapters. Use keeps them in memory.",
        )


@KINDS.warning("ENGINE_FILE_REPLACED", "A file has been replaced since the engine loaded it", ("MODEL_REPLACED",))
def _(facts: Facts) -> Seen:
    if facts.daemon.replaced:
        yield f"{', '.join(facts.daemon.replaced)}: the engine works with the old one", "emberd restart"


@KINDS.warning("ENGINE_ORPHANED", "The engine runs without emberd", ("DAEMON_SILENT",))
def _(facts: Facts) -> Seen:
    pid = facts.engine.orphan_pid
    if pid is not None:
        yield (
            f"pid {pid} holds the model, and no client can reach it",
            "emberd start, or emberd run: it is taken over without loading again.",
        )


@KINDS.warning("PYTHON_TRANSLATED", "This Python runs under Rosetta")
def _(facts: Facts) -> Seen:
    if facts.host.is_translated:
        yield (
            "sysctl.proc_translated is 1: programs that it starts may be translated too, and lose Metal",
            "Install emberd with a Python for arm64.",
        )
