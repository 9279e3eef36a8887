"""Conditions of the engine's program and process. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.health import Condition, Kind, Severity, when
from emberd.core.health_facts import EngineProblem
from emberd.core.health_model import PROBLEMS as MODEL_PROBLEMS
from emberd.core.lock_limits import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emberd.core.health_facts import Facts

_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
_NO_SETTINGS = ("SETTINGS_WRONG",)
_NO_ENGINE = ("ENGINE_MISSING", "ENGINE_NOT_EXECUTABLE", "ENGINE_QUARANTINED", "ENGINE_WRONG_ARCHITECTURE")
_CANNOT_START = (*_NO_SETTINGS, *_NO_ENGINE, "ENGINE_REFUSES", *MODEL_PROBLEMS)
_SWAPPED_LEAST_BYTES = 64 << 20
"""Python's and the loader's own memory is swapped out rightly once the model serves."""

KINDS: dict[str, Kind] = {
    "ENGINE_MISSING": Kind(_E, "The engine was not found", _NO_SETTINGS),
    "ENGINE_NOT_EXECUTABLE": Kind(_E, "The engine may not be executed", _NO_SETTINGS),
    "ENGINE_QUARANTINED": Kind(_E, "macOS has quarantined the engine", _NO_SETTINGS),
    "ENGINE_WRONG_ARCHITECTURE": Kind(_E, "The engine is built for another processor", _NO_SETTINGS),
    "ENGINE_REFUSES": Kind(_E, "The engine does not start with these settings", (*_NO_SETTINGS, *_NO_ENGINE)),
    "ENGINE_FAILED": Kind(_E, "The engine failed, and emberd has given up on it", _CANNOT_START),
    "ENGINE_CRASHING": Kind(_E, "The engine crashes again and again", (*_CANNOT_START, "ENGINE_FAILED")),
    "ENGINE_TOO_OLD": Kind(_W, "The engine is too old to do all that keeps a model warm", _NO_ENGINE),
    "ENGINE_LOST_GPU": Kind(_W, "The engine does not use the GPU", ("ENGINE_FAILED", "PYTHON_TRANSLATED")),
    "ENGINE_GPU_OFF": Kind(_N, "The settings keep the model off the GPU"),
    "ENGINE_HEARTBEAT_LOST": Kind(
        _W, "Metal will let go of the idle model", ("ENGINE_LOST_GPU", "ENGINE_GPU_OFF", "ENGINE_FAILED")
    ),
    "ENGINE_UNLOADS_WHEN_IDLE": Kind(_W, "The engine lets go of an idle model by itself"),
    "ENGINE_SWAPPED": Kind(
        _W,
        "A part of the engine is in swap",
        ("RAM_TOO_SMALL", "RAM_SHORT", "CGROUP_TOO_SMALL", "MODELS_OVERCOMMIT", "PRESSURE_CRITICAL"),
    ),
    "ENGINE_ORPHANED": Kind(_W, "The engine runs without emberd", ("DAEMON_SILENT",)),
    "PYTHON_TRANSLATED": Kind(_W, "This Python runs under Rosetta"),
}

_OF_ENGINE = {
    EngineProblem.MISSING: "ENGINE_MISSING",
    EngineProblem.NOT_EXECUTABLE: "ENGINE_NOT_EXECUTABLE",
    EngineProblem.QUARANTINED: "ENGINE_QUARANTINED",
    EngineProblem.WRONG_ARCHITECTURE: "ENGINE_WRONG_ARCHITECTURE",
    EngineProblem.REFUSES: "ENGINE_REFUSES",
}


def of_engine(facts: Facts) -> Iterator[Condition]:
    """Yield what is wrong with the engine's program and process."""
    engine = facts.engine
    if engine.problem is not None:
        yield Condition(_OF_ENGINE[engine.problem], engine.message, engine.remedy)
    mend = "Mend the cause, then: emberd restart. What it printed: emberd logs --category engine."
    words = engine.last_words or "it ended again and again"
    yield from when(engine.has_failed, "ENGINE_FAILED", words, mend)
    crashes = engine.crashes or 0
    yield from when(crashes > 0 and not engine.has_failed, "ENGINE_CRASHING", f"{crashes} in a row: {words}", mend)
    yield from when(
        bool(engine.lacks),
        "ENGINE_TOO_OLD",
        f"this build lacks {'; '.join(engine.lacks)}",
        "Install a newer KoboldCPP and set engine.path.",
    )
    yield from _of_graphics(facts)
    yield from when(
        bool(engine.unloads_when_idle),
        "ENGINE_UNLOADS_WHEN_IDLE",
        f"it is started with {engine.unloads_when_idle}",
        f"Take {engine.unloads_when_idle} out of engine.extra_args or the .kcpps file.",
    )
    swapped = engine.swapped_bytes or 0
    yield from when(
        swapped >= _SWAPPED_LEAST_BYTES,
        "ENGINE_SWAPPED",
        f"{shown(swapped)} of it are {'compressed or ' if facts.system == 'darwin' else ''}in swap",
        "emberd warm brings it back now; a mapped and locked model does not go there (docs/locking.md).",
    )
    yield from when(
        engine.orphan_pid is not None,
        "ENGINE_ORPHANED",
        f"pid {engine.orphan_pid} holds the model, and no client can reach it",
        "emberd start, or emberd run: it is taken over without loading again.",
    )


def _of_graphics(facts: Facts) -> Iterator[Condition]:
    engine = facts.engine
    yield from when(
        engine.wants_gpu and engine.has_gpu is False,
        "ENGINE_LOST_GPU",
        "engine.gpu_layers asks for the GPU, and the engine's log names none",
        "Use a build with Metal (macOS arm64), CUDA or Vulkan; or set engine.gpu_layers = 0.",
    )
    yield from when(
        engine.gpu_is_off,
        "ENGINE_GPU_OFF",
        "engine.gpu_layers = 0: every reply is computed by the processor",
        "Set engine.gpu_layers = -1.",
    )
    yield from when(
        bool(engine.heartbeat_problem),
        "ENGINE_HEARTBEAT_LOST",
        f"{engine.heartbeat_problem}: macOS 26 unwires a model about a second after its last use",
        engine.heartbeat_remedy,
    )
    yield from when(
        facts.service.is_translated,
        "PYTHON_TRANSLATED",
        "sysctl.proc_translated is 1: programs that it starts may be translated too, and lose Metal",
        "Install emberd with a Python for arm64.",
    )
