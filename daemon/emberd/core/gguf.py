"""The header of a GGUF file: where tensors lie, and how much memory an engine takes besides the weights. Pure.

Layout: ggml-org/ggml, docs/gguf.md. Little-endian; magic, version, tensor count, metadata count, metadata, tensor
table, padding to the alignment, tensor data. Versions 2 and 3 are read alike; version 1 had 32-bit counts.

mlock covers neither the KV cache nor the compute buffers; both are allocated in full while the model loads.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emberd.core.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAGIC = b"GGUF"
"""First bytes of every GGUF file, all versions."""
_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""gguf_metadata_value_type -> struct format."""
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MOST_ENTRIES = 1 << 20
_LONGEST_STRING_BYTES = 1 << 24
_MOST_ITEMS = 1 << 26
_MOST_DIMENSIONS = 8
_KEPT_ITEMS = 4096
"""Arrays of numbers up to this length are kept (heads by layer); longer ones are a vocabulary's scores."""
_BLOCKS = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    20: (32, 18),
    23: (256, 136),
    30: (1, 2),
    39: (32, 17),
}
"""Numbers and bytes in a block (ggml, ggml-common.h).

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, BF16, MXFP4; others are not measured.
"""
_VOCABULARY = "tokenizer.ggml.tokens"
_BLOCK = re.compile(r"(?:\w+\.)*?blk\.\d+(?=\.)")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
F16_BYTES = 2.0
"""llama.cpp's default for keys and values."""
_CELLS_STEP = 256
"""llama.cpp rounds the context up to a multiple of this (llama_context in src/llama-context.cpp)."""
_KOBOLDCPP_EXTRA_CELLS = 128
"""extra_context_handle_fragmentation of KoboldCPP's gpttype_adapter.cpp: 80 in 1.76, 128 in 1.104. llama.cpp's
own server adds none; always counted, so that the estimate is an upper bound."""
_BATCH_TOKENS = 512
"""A window holds a batch besides (`n_ubatch`)."""
_WINDOW_PERIODS = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone4": 4,
    "gemma-embedding": 6,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "olmo2": 4,
}
"""One layer in so many has no window, the last (llama.cpp, src/models, `swa_period`); newer files tell it."""
_RECURRENT_KEYS = (".ssm.", ".wkv.", ".shortconv.", ".kda.")
"""Metadata of models that keep a state instead of, or besides, a cache (src/llama-arch.cpp)."""
_COMPUTE_MARGIN_BYTES = 64 * 1024**2
"""Measured with batch 512: 513 MiB for 262,144 tokens, 1 MiB more than the logits; 87 MiB for 32,000, 24.5 MiB
more. The rest depends on width and context."""
_LOGIT_BYTES = 4
_MOST_LAYERS = 4096
"""Eight times llama.cpp's limit (LLAMA_MAX_LAYERS); a broken header must not cost memory."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header says.

    Attributes:
        metadata: scalars, strings, and short arrays of numbers, by key.
        vocabulary_tokens: size of the vocabulary, None if the file holds none.
        tensors: name and offset of every tensor, in the order of the file; the offset counts from `data_offset`.
        data_offset: byte at which the tensors' data begins.
        least_bytes: the least size of a whole file; a tensor of unknown type counts as one byte.
    """

    metadata: Mapping[str, Any]
    vocabulary_tokens: int | None
    tensors: tuple[tuple[str, int], ...]
    data_offset: int
    least_bytes: int = 0

    def spans(self, file_bytes: int) -> tuple[TensorSpan, ...]:
        """Return where each tensor lies in a file of this size, ordered by offset.

        A tensor reaches to the next one, its padding included, so no table of block sizes is needed, and future
        types of numbers are measured too.
        """
        starts = sorted((self.data_offset + offset, name) for name, offset in self.tensors)
        ends = [start for start, _ in starts[1:]] + [file_bytes]
        return tuple(
            TensorSpan(name, start, max(min(end, file_bytes) - start, 0))
            for (start, name), end in zip(starts, ends, strict=True)
        )


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """A tensor's place in its file, in bytes.

    Attributes:
        name: its name, as in `blk.0.attn_q.weight`.
        offset: first byte.
        length: bytes up to the next tensor or the end of the file.
    """

    name: str
    offset: int
    length: int


def layer_of(tensor: str) -> str:
    """Return the layer of a tensor: its block (`blk.0`, `v.blk.3`), or else its first word (`token_embd`)."""
    found = _BLOCK.match(tensor)
    return found[0] if found else tensor.split(".", 1)[0]


def split_names(name: str) -> tuple[str, ...]:
    """Return the names of all parts of a model from that of its first; one name if it is not split."""
    found = _SPLIT.search(name)
    if found is None:
        return (name,)
    stem, count = name[: found.start()], int(found[2])
    return tuple(f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def split_place(name: str) -> tuple[int, int] | None:
    """Return number and count of a part of a split model from its name, None if it is not split."""
    found = _SPLIT.search(name)
    return None if found is None else (int(found[1]), int(found[2]))


def read_kind(read: Callable[[int], bytes], name: str) -> dict[str, Any]:
    """Return the metadata before the first array: what kind of file it is stands there, and a vocabulary does not.

    Raises:
        ModelError: as for `read_header`.
    """
    return _Reader(read, name).kind()


def read_header(read: Callable[[int], bytes], name: str) -> GgufHeader:
    """Read a header.

    Args:
        read: returns the next bytes of the file, as many as asked for, fewer at its end.
        name: the file's name, for messages.

    Raises:
        ModelError: not a GGUF, of an unknown version, truncated, or with impossible numbers.
    """
    return _Reader(read, name).header()


class _Reader:
    def __init__(self, read: Callable[[int], bytes], name: str) -> None:
        self._read = read
        self._name = name
        self._offset = 0

    def kind(self) -> dict[str, Any]:
        _, entries = self._counts()
        found: dict[str, Any] = {}
        for _ in range(entries):
            key, kind = self._string().decode("utf-8", "replace"), self._number("I")
            if kind == _ARRAY:
                break
            found[key] = self._value(kind)
        return found

    def _counts(self) -> tuple[int, int]:
        """Read magic and version; return how many tensors and entries of metadata there are."""
        if self._take(4) != MAGIC:
            raise self._wrong("it is not a GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise self._wrong(f"its version {version} is not known")
        return self._count(_MOST_ENTRIES), self._count(_MOST_ENTRIES)

    def header(self) -> GgufHeader:
        tensors, entries = self._counts()
        metadata: dict[str, Any] = {}
        vocabulary: int | None = None
        for _ in range(entries):
            key = self._string().decode("utf-8", "replace")
            value = self._value(self._number("I"))
            if key == _VOCABULARY and isinstance(value, _Skipped):
                vocabulary = value.items
            elif not isinstance(value, _Skipped):
                metadata[key] = value
        table = tuple(self._tensor() for _ in range(tensors))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= _LONGEST_STRING_BYTES:
            raise self._wrong(f"its alignment is {alignment!r}")
        begin = -(-self._offset // alignment) * alignment
        ends = [offset + size for _, offset, size in table]
        offsets = tuple((name, offset) for name, offset, _ in table)
        return GgufHeader(metadata, vocabulary, offsets, begin, begin + max(ends, default=0))

    def _tensor(self) -> tuple[str, int, int]:
        """Read an entry of the table (name, number of dimensions, the dimensions, type, offset).

        Return name, offset, and bytes.
        """
        name = self._string().decode("utf-8", "replace")
        dimensions = self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._wrong(f"a tensor has {dimensions} dimensions")
        numbers = math.prod(self._number("Q") for _ in range(dimensions))
        block, size = _BLOCKS.get(self._number("I"), (max(numbers, 1), 1))
        return name, self._number("Q"), -(-numbers // block) * size

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string().decode("utf-8", "replace")
        if kind != _ARRAY:
            raise self._wrong(f"metadata of the unknown type {kind}")
        item = self._number("I")
        count = self._count(_MOST_ITEMS)
        if item == _STRING:
            for _ in range(count):
                self._string()
            return _Skipped(count)
        if item not in _SCALARS:
            raise self._wrong(f"an array of the unknown type {item}")
        form = _SCALARS[item]
        data = self._take(count * struct.calcsize("<" + form))
        return list(struct.unpack(f"<{count}{form}", data)) if count <= _KEPT_ITEMS else _Skipped(count)

    def _string(self) -> bytes:
        return self._take(self._count(_LONGEST_STRING_BYTES))

    def _count(self, most: int) -> int:
        count: int = self._number("Q")
        if count > most:
            raise self._wrong(f"it counts {count} of something")
        return count

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def _take(self, count: int) -> bytes:
        data = self._read(count)
        if len(data) < count:
            raise self._wrong("it ends within its header")
        self._offset += count
        return data

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"not a usable model: {self._name}: {what}", "Download it again.")


@dataclass(frozen=True, slots=True)
class _Skipped:
    """An array that was not kept."""

    items: int


@dataclass(frozen=True, slots=True)
class KvEstimate:
    """The size of the KV cache, before it is allocated.

    Attributes:
        size_bytes: an upper bound, None if unknown.
        is_exact: False where the engine may well take less.
        message: why it is unknown or not exact, otherwise empty.
    """

    size_bytes: int | None
    is_exact: bool = True
    message: str = ""


def keeps_state(metadata: Mapping[str, object]) -> bool:
    """Return True if a model keeps a state instead of, or besides, a KV cache (recurrent and hybrid models).

    Such a state cannot be cut back to where two prompts begin to differ.
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
    window_slots: int | None = None,
) -> KvEstimate:
    """Return the size of the cache from the numbers in a GGUF's header.

    The rule is that of llama_kv_cache (src/llama-kv-cache.cpp): each layer holds a key and a value for each cell.
    Keys go by the layer's own heads; values are padded to the widest layer unless flash attention is on. For two
    models KoboldCPP 1.104 printed the same size to the last digit. Layers with a sliding window hold no more than
    that (llama_kv_cache_iswa) where the engine is not told otherwise.

    Args:
        metadata: the header's key-value pairs.
        context_tokens: length of the context, 0 for the model's own.
        key_bytes: bytes of one number in a key; 1.0625 for q8_0, 0.5625 for q4_0.
        value_bytes: the same in a value.
        window_slots: conversations, each with a window of its own; None if the layers with a window hold the whole
            context.
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
    value = max(kv_heads) * value_length * value_bytes
    sizes = [heads_of_layer * key_length * key_bytes + value for heads_of_layer in kv_heads]
    window = numbers.one("attention.sliding_window")
    cells = [_cells(tokens)] * layers
    if window and window_slots:
        short = min(cells[0], _cells(window * window_slots + _BATCH_TOKENS))
        cells = [short if has_window else cells[0] for has_window in numbers.windows(layers)]
    size = int(sum(each * count for each, count in zip(sizes, cells, strict=True)))
    if window:
        return KvEstimate(size, is_exact=False, message="layers with a sliding window may take less")
    return KvEstimate(size)


def _cells(tokens: int) -> int:
    return -(-(tokens + _KOBOLDCPP_EXTRA_CELLS) // _CELLS_STEP) * _CELLS_STEP


class _Numbers:
    """Reads whole numbers of one architecture; other values count as absent."""

    def __init__(self, metadata: Mapping[str, object], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def one(self, name: str) -> int | None:
        """Return a number, None if it is absent or a list."""
        value = self._metadata.get(f"{self._architecture}.{name}")
        return value if isinstance(value, int) and value > 0 else None

    def windows(self, layers: int) -> list[bool]:
        """Return whether each layer has a sliding window; none has where the pattern is not known."""
        pattern = self._metadata.get(f"{self._architecture}.attention.sliding_window_pattern")
        if isinstance(pattern, (list, tuple)) and len(pattern) == layers:
            return [bool(each) for each in pattern]
        period = pattern if isinstance(pattern, int) and pattern > 0 else _WINDOW_PERIODS.get(self._architecture, 1)
        return [layer % period < period - 1 for layer in range(layers)]

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
    """Return the size of the engine's compute buffers, None if the vocabulary is not known.

    They are the logits of a batch (vocabulary x batch x 4 bytes) and a margin. This is an estimate and no bound:
    without flash attention the buffer also grows with heads and context.
    """
    if vocabulary_tokens is None or vocabulary_tokens <= 0:
        return None
    return vocabulary_tokens * batch_tokens * _LOGIT_BYTES + _COMPUTE_MARGIN_BYTES
