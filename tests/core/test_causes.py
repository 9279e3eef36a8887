"""What keeps an engine from running and can pass, from its end, its words and what is seen of the computer."""

from __future__ import annotations

import pytest

from emberd.core.causes import Cause, Kind, of_error, of_exit
from emberd.core.errors import ConfigError, EmberdError, EngineFailed, EngineNotUsable, ModelError, StateUnusable

FULL = Cause(Kind.DISK, "the disk of /state has no room", "Make room.")


@pytest.mark.parametrize(
    ("status", "words", "missing", "disk", "kind"),
    [
        (1, "print failed: [Errno 28] No space left on device", None, None, Kind.DISK),
        (1, "", None, FULL, Kind.DISK),
        (0, "loading", None, FULL, Kind.DISK),
        (-9, "", None, None, Kind.MEMORY),
        (1, "ggml: unable to allocate CPU buffer", None, None, Kind.MEMORY),
        (1, "couldn't bind HTTP server socket", None, None, Kind.PORT),
        (-7, "", "model not found: /m.gguf", None, Kind.FILES),
        (-11, "", None, FULL, None),
        (
            -11,
            "tensor 'blk.0.ffn_down.weight' data is not within the file bounds, model is corrupted",
            None,
            None,
            Kind.FILES,
        ),
        (1, "llama_model_load: error loading model: invalid magic", None, None, Kind.FILES),
        (1, "common_init_from_params: failed to load model", None, None, Kind.FILES),
        (1, "unable to allocate CPU buffer\nerror loading model", None, None, Kind.MEMORY),
        (1, "unknown argument", None, None, None),
    ],
)
def test_the_cause_of_an_end(status: int, words: str, missing: str | None, disk: Cause | None, kind: Kind | None):
    cause = of_exit(status, words, missing, disk)
    assert (cause.kind if cause else None) is kind
    assert cause is None or (cause.message and cause.remedy)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StateUnusable("full", "Make room."), Kind.DISK),
        (ModelError("gone", "Mount it."), Kind.FILES),
        (EngineNotUsable("gone", "Mount it."), Kind.FILES),
        (ConfigError("--lora gone: not found", "Mend it."), Kind.FILES),
        (EngineFailed("no", ""), None),
    ],
)
def test_the_cause_of_a_refused_start_has_its_words(error: EmberdError, kind: Kind | None):
    cause = of_error(error)
    assert cause == (None if kind is None else Cause(kind, error.message, error.remedy))
