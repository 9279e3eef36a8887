"""Conditions of the model's file and of the place where it lies. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.health import Condition, Kind, Severity, when
from emberd.core.health_facts import ModelProblem, Volume

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emberd.core.health_facts import Facts

_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
_NO_SETTINGS = ("SETTINGS_WRONG",)
PROBLEMS = tuple(f"MODEL_{each.name}" for each in ModelProblem)
"""Each of them is why an engine does not start."""

KINDS: dict[str, Kind] = {
    "MODEL_NOT_SET": Kind(_E, "No model is set", _NO_SETTINGS),
    "MODEL_MISSING": Kind(_E, "The model's file is missing", _NO_SETTINGS),
    "MODEL_FOLDER": Kind(_E, "The model is a folder", _NO_SETTINGS),
    "MODEL_DENIED": Kind(_E, "macOS denies background programs the model", _NO_SETTINGS),
    "MODEL_UNREADABLE": Kind(_E, "The model may not be read", _NO_SETTINGS),
    "MODEL_BROKEN_VOLUME": Kind(_E, "The model's volume cannot be read", _NO_SETTINGS),
    "MODEL_SILENT": Kind(_E, "Reading the model does not end", _NO_SETTINGS),
    "MODEL_NOT_GGUF": Kind(_E, "The model is no GGUF file", _NO_SETTINGS),
    "MODEL_TRUNCATED": Kind(_E, "The model's file is cut off", _NO_SETTINGS),
    "MODEL_PART_MISSING": Kind(_E, "A part of the split model is missing", _NO_SETTINGS),
    "MODEL_DATALESS": Kind(_W, "The model is a placeholder in a cloud folder", ("MODEL_MISSING",)),
    "MODEL_IN_CLOUD_FOLDER": Kind(
        _W, "The model is in a folder that a cloud service manages", ("MODEL_MISSING", "MODEL_DATALESS")
    ),
    "MODEL_ON_NETWORK_VOLUME": Kind(_W, "The model is on a network volume", ("MODEL_MISSING",)),
    "MODEL_ON_EXTERNAL_VOLUME": Kind(_N, "The model is on an external volume", ("MODEL_MISSING", "MODEL_DENIED")),
    "MODEL_IN_PROTECTED_FOLDER": Kind(
        _W,
        "The model is in a folder that macOS protects",
        ("MODEL_MISSING", "MODEL_DENIED", "MODEL_IN_CLOUD_FOLDER"),
    ),
    "MODEL_REPLACED": Kind(_W, "The model's file has changed since the engine loaded it", PROBLEMS),
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
        f"Download it: brctl download {model.path}. Better: {home[0].lower()}{home[1:]}",
    )
    yield from when(
        model.is_synced,
        "MODEL_IN_CLOUD_FOLDER",
        f"{model.path}: the service may take its content off this disk whenever it wants room",
        home,
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
    younger_s = model.changed_after_start_s
    yield from when(
        None if younger_s is None else younger_s > 0,
        "MODEL_REPLACED",
        f"{model.path} was written {younger_s or 0:.0f} s after the engine had started",
        "emberd restart",
    )
