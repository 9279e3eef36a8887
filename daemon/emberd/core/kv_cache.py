"""How much memory an engine takes besides the weights: the context (KV cache) and the buffers it computes in.

Neither is covered by mlock, and both are allocated in full while the model loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

F16_BYTES = 2.0
"""llama.cpp's default for keys and values."""
_CELLS_STEP = 256
"""llama.cpp rounds the context up to it (llama_context in src/llama-context.cpp)."""
_KOBOLDCPP_EXTRA_CELLS = 128
"""extra_context_handle_fragmentation of KoboldCPP's gpttype_adapter.cpp: 80 in 1.76, 128 in 1.104. llama.cpp's
own server adds none; counted always, it keeps this an upper bound."""
_RECURRENT_KEYS = (".ssm.", ".wkv.", ".shortconv.", ".kda.")
"""Metadata of models that keep a state instead of, or besides, a cache (src/llama-arch.cpp)."""
_COMPUTE_MARGIN_BYTES = 64 * 1024**2
"""Measured with batch 512: 513 MiB for 262,144 tokens, 1 MiB more than the logits; 87 MiB for 32,000, 24.5 MiB
more. The rest depends on width and context."""
_LOGIT_BYTES = 4
_MOST_LAYERS = 4096
"""Eight times what llama.cpp allows (LLAMA_MAX_LAYERS); a broken header must not cost memory."""


@dataclass(frozen=True, slots=True)
class KvEstimate:
    """The size of the KV cache, before it is allocated.

    Attributes:
        size_bytes: an upper bound, None if unknown.
        is_exact: False where the engine may well take less.
        message: why it is unknown or not exact, empty if neither.
    """

    size_bytes: int | None
    is_exact: bool = True
    message: str = ""


def keeps_state(metadata: Mapping[str, object]) -> bool:
    """Tell whether a model keeps a state instead of, or besides, a KV cache (recurrent and hybrid models).

    Such a state cannot be cut back to where two prompts part.

    Args:
        metadata: the header's key-value pairs.
    """
    architecture = str(metadata.get("general.architecture"))
    return architecture.startswith(("mamba", "rwkv")) or any(
        key.startswith(architecture + part) for key in metadata for part in _RECURRENT_KEYS
    )


def estimate_kv_cache(
    metadata: Mapping[str, object],
    context_tokens: int,
    *,
    key_bytes: float = F16_BYTES,
    value_bytes: float = F16_BYTES,
) -> KvEstimate:
    """Return the size of the cache from the numbers in a GGUF's header.

    The rule is that of llama_kv_cache (src/llama-kv-cache.cpp): each layer holds a key and a value for each cell.
    Keys go by the layer's own heads; values are padded to the widest layer unless flash attention is on. For two
    models KoboldCPP 1.104 printed the same size to the last digit. Layers with a sliding window may hold less,
    which is not counted on.

    Args:
        metadata: the header's key-value pairs.
        context_tokens: length of the context; for 0, the model's own is taken.
        key_bytes: bytes of one number in a key; 1.0625 for q8_0, 0.5625 for q4_0.
        value_bytes: the same in a value.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        return KvEstimate(None, message="the model does not name its architecture")
    if keeps_state(metadata):
        return KvEstimate(None, message=f"{architecture} keeps a state of another kind than a KV cache")
    numbers = _Numbers(metadata, architecture)
    layers = numbers.one("block_count")
    heads = numbers.by_layer("attention.head_count", layers)
    kv_heads = numbers.by_layer("attention.head_count_kv", layers) or heads
    width = numbers.one("embedding_length")
    default_length = width // max(heads) if width and heads and max(heads) else None
    key_length = numbers.one("attention.key_length") or default_length
    value_length = numbers.one("attention.value_length") or default_length
    tokens = context_tokens if context_tokens > 0 else numbers.one("context_length")
    if not (layers and kv_heads and key_length and value_length and tokens):
        return KvEstimate(None, message="the model's header lacks the numbers of its attention")
    keys = sum(kv_heads) * key_length * key_bytes
    values = layers * max(kv_heads) * value_length * value_bytes
    size = int(_cells(tokens) * (keys + values))
    if numbers.one("attention.sliding_window"):
        return KvEstimate(size, is_exact=False, message="layers with a sliding window may take less")
    return KvEstimate(size)


def _cells(tokens: int) -> int:
    return -(-(tokens + _KOBOLDCPP_EXTRA_CELLS) // _CELLS_STEP) * _CELLS_STEP


class _Numbers:
    """Reads whole numbers of one architecture; what is of another kind is as good as absent."""

    def __init__(self, metadata: Mapping[str, object], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def one(self, name: str) -> int | None:
        """Return a number, None if it is absent or a list."""
        value = self._metadata.get(f"{self._architecture}.{name}")
        return value if isinstance(value, int) and value > 0 else None

    def by_layer(self, name: str, layers: int | None) -> tuple[int, ...]:
        """Return a number for each layer; empty if it is absent, or not one for each."""
        value = self._metadata.get(f"{self._architecture}.{name}")
        if layers is None or layers > _MOST_LAYERS:
            return ()
        if isinstance(value, int):
            return (value,) * layers if value > 0 else ()
        if not isinstance(value, (list, tuple)) or len(value) != layers:
            return ()
        counts = tuple(entry for entry in value if isinstance(entry, int) and entry >= 0)
        return counts if len(counts) == layers and any(counts) else ()


def estimate_compute_buffer(vocabulary_tokens: int | None, batch_tokens: int = 512) -> int | None:
    """Return the size of the buffers that the engine computes in, None if the vocabulary is not known.

    The logits of a batch (vocabulary x batch x 4 bytes) and a margin; an estimate, and no bound: without flash
    attention the buffer also grows with heads and context.
    """
    if vocabulary_tokens is None or vocabulary_tokens <= 0:
        return None
    return vocabulary_tokens * batch_tokens * _LOGIT_BYTES + _COMPUTE_MARGIN_BYTES
