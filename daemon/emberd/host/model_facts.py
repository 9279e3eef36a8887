"""The size of a model and its numbers, read from the headers of its files; no weights are touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emberd.core.errors import ModelError
from emberd.core.gguf import read_header, split_names

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_BUFFER_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's files say.

    Attributes:
        weights_bytes: the tensors' data in all parts; the headers before it are unmapped after loading.
        metadata: the first part's numbers.
        vocabulary_tokens: size of the vocabulary, None if unknown.
    """

    weights_bytes: int
    metadata: Mapping[str, Any]
    vocabulary_tokens: int | None


def read_model_facts(path: Path) -> ModelFacts:
    """Read the headers of a model, all parts of a split one.

    Blocks for some 0.1 s on a vocabulary of 262,144 tokens.

    Raises:
        ModelError: a part is missing, unreadable or broken.
    """
    weights = 0
    first = None
    for name in split_names(path.name):
        part = path.with_name(name)
        try:
            with part.open("rb", buffering=_BUFFER_BYTES) as file:
                header = read_header(file.read, str(part))
            weights += max(part.stat().st_size - header.data_offset, 0)
        except OSError as error:
            raise ModelError(
                f"cannot read {part}: {error.strerror}", "All parts of a model belong side by side."
            ) from error
        first = first or header
    if first is None:
        raise ModelError(f"no model at {path}", "Set model.path.")
    return ModelFacts(weights, first.metadata, first.vocabulary_tokens)
