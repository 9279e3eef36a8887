"""Conditions of the engine's program and of the model's file. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.health import Condition, Kind, Severity, when
from emberd.core.health_facts import EngineProblem, ModelProblem, Volume

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emberd.core.health_facts import Facts

_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
_NO_SETTINGS = ("SETTINGS_WRONG",)
_NO_ENGINE = ("ENGINE_MISSING", "ENGINE_NOT_EXECUTABLE", "ENGINE_QUARANTINED", "ENGINE_WRONG_ARCHITECTURE")

KINDS: dict[str, Kind] = {
    "ENGINE_MISSING": Kind(_E, "The engine was not found", _NO_SETTINGS),
    "ENGINE_NOT_EXECUTABLE": Kind(_E, "The engine may not be executed", _NO_SETTINGS),
    "ENGINE_QUARANTINED": Kind(_E, "macOS has quarantined the engine", _NO_SETTINGS),
    "ENGINE_WRONG_ARCHITECTURE": Kind(_E, "The engine is built for another processor", _NO_SETTINGS),
    "ENGINE_REFUSES": Kind(_E, "The engine does not start with these settings", (*_NO_SETTINGS, *_NO_ENGINE)),
    "MODEL_NOT_SET": Kind(_E, "No model is set", _NO_SETTINGS),
    "MODEL_MISSING": Kind(_E, "The model's file is missing", _NO_SETTINGS),
    "MODEL_FOLDER": Kind(_E, "The model is a folder", _NO_SETTINGS),
    "MODEL_DENIED": Kind(_E, "macOS denies background programs the model", _NO_SETTINGS),
    "MODEL_UNREADABLE": Kind(_E, "The model may not be read", _NO_SETTINGS),
    "MODEL_BROKEN_VOLUME": Kind(_E, "The model's volume cannot be read", _NO_SETTINGS),
    "MODEL_NOT_GGUF": Kind(_E, "The model is no GGUF file", _NO_SETTINGS),
    "MODEL_TRUNCATED": Kind(_E, "The model's file is cut off", _NO_SETTINGS),
    "MODEL_PART_MISSING": Kind(_E, "A part of the split model is missing", _NO_SETTINGS),
    "MODEL_DATALESS": Kind(_W, "The model is a placeholder in a cloud folder", ("MODEL_MISSING",)),
    "MODEL_ON_NETWORK_VOLUME": Kind(_W, "The model is on a network volume", ("MODEL_MISSING",)),
    "MODEL_ON_EXTERNAL_VOLUME": Kind(_N, "The model is on an external volume", ("MODEL_MISSING", "MODEL_DENIED")),
    "MODEL_IN_PROTECTED_FOLDER": Kind(
        _W, "The model is in a folder that macOS protects", ("MODEL_MISSING", "MODEL_DENIED")
    ),
    "ENGINE_FAILED": Kind(
        _E,
        "The engine failed",
        (*_NO_SETTINGS, *_NO_ENGINE, "ENGINE_REFUSES", *(f"MODEL_{each.name}" for each in ModelProblem)),
    ),
    "ENGINE_TOO_OLD": Kind(_W, "The engine lacks options that keep a model warm", _NO_ENGINE),
    "ENGINE_LOST_GPU": Kind(_W, "The engine does not use the GPU", ("ENGINE_FAILED",)),
    "ENGINE_UNLOADS_WHEN_IDLE": Kind(_W, "The engine lets go of an idle model by itself"),
    "PYTHON_TRANSLATED": Kind(_W, "This Python runs under Rosetta"),
}

_OF_ENGINE = {
    EngineProblem.MISSING: "ENGINE_MISSING",
    EngineProblem.NOT_EXECUTABLE: "ENGINE_NOT_EXECUTABLE",
    EngineProblem.QUARANTINED: "ENGINE_QUARANTINED",
    EngineProblem.WRONG_ARCHITECTURE: "ENGINE_WRONG_ARCHITECTURE",
    EngineProblem.REFUSES: "ENGINE_REFUSES",
}


def of_model(facts: Facts) -> Iterator[Condition]:
    """Yield what is wrong with the model's file and where it lies."""
    model = facts.model
    if model.problem is not None:
        yield Condition(f"MODEL_{model.problem.name}", model.message, model.remedy)
    home = "Move it to a folder such as ~/Models and set model.path."
    yield from when(
        model.is_dataless,
        "MODEL_DATALESS",
        f"{model.path} has a size but no content on this disk",
        f"Download it (brctl download, or open it in Finder). Better: {home}",
    )
    yield from when(
        model.volume is Volume.NETWORK if model.volume else None,
        "MODEL_ON_NETWORK_VOLUME",
        f"{model.path}: what leaves memory comes back over the network, and cannot if it is gone",
        home,
    )
    yield from when(
        model.volume is Volume.EXTERNAL if model.volume else None,
        "MODEL_ON_EXTERNAL_VOLUME",
        f"{model.path}: emberd cannot start the engine while it is not mounted, and macOS may deny it to agents",
        home,
    )
    yield from when(
        model.is_in_protected_folder,
        "MODEL_IN_PROTECTED_FOLDER",
        f"{model.path}: background programs need a permission for Documents, Desktop, Downloads and iCloud Drive",
        home,
    )


def of_engine(facts: Facts) -> Iterator[Condition]:
    """Yield what is wrong with the engine's program and process."""
    engine = facts.engine
    if engine.problem is not None:
        yield Condition(_OF_ENGINE[engine.problem], engine.message, engine.remedy)
    yield from when(
        engine.has_failed,
        "ENGINE_FAILED",
        engine.last_words or "it ended again and again",
        "Mend the cause, then: emberd restart. What it printed: emberd logs --category engine.",
    )
    yield from when(
        bool(engine.lacks),
        "ENGINE_TOO_OLD",
        f"this build does not know {', '.join(engine.lacks)}",
        "Install a newer KoboldCPP and set engine.path.",
    )
    yield from when(
        engine.wants_gpu and engine.has_gpu is False,
        "ENGINE_LOST_GPU",
        "engine.gpu_layers asks for the GPU, and the engine's log names none",
        "Use a build with Metal (macOS arm64), CUDA or Vulkan; or set engine.gpu_layers = 0.",
    )
    yield from when(
        bool(engine.unloads_when_idle),
        "ENGINE_UNLOADS_WHEN_IDLE",
        f"it was started with {engine.unloads_when_idle}",
        f"Take {engine.unloads_when_idle} out of engine.extra_args or the .kcpps file.",
    )
    yield from when(
        facts.service.is_translated,
        "PYTHON_TRANSLATED",
        "sysctl.proc_translated is 1: programs that it starts may be translated too, and lose Metal",
        "Install emberd with a Python for arm64.",
    )
