"""The header of a GGUF file: numbers about the model, and where its tensors lie.

Layout: ggml-org/ggml, docs/gguf.md. Little-endian; magic, version, tensor count, metadata count, metadata, tensor
table, padding to the alignment, tensor data. Versions 2 and 3 are read alike; version 1 had 32-bit counts.
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


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header says.

    Attributes:
        metadata: scalars, strings, and short arrays of numbers, by key.
        vocabulary_tokens: size of the vocabulary, None if the file holds none.
        tensors: name and offset of every tensor, in the order of the file; the offset counts from `data_offset`.
        data_offset: byte at which the tensors' data begins.
        least_bytes: a whole file is at least so large; a tensor of unknown type counts as one byte.
    """

    metadata: Mapping[str, Any]
    vocabulary_tokens: int | None
    tensors: tuple[tuple[str, int], ...]
    data_offset: int
    least_bytes: int = 0

    def spans(self, file_bytes: int) -> tuple[TensorSpan, ...]:
        """Return where each tensor lies in a file of this size, ordered by offset.

        A tensor reaches to the next one, its padding included, so no table of block sizes is needed and a type of
        numbers that is invented tomorrow is measured too.
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
    """Return what a tensor belongs to: its block (`blk.0`, `v.blk.3`), else its first word (`token_embd`)."""
    found = _BLOCK.match(tensor)
    return found[0] if found else tensor.split(".", 1)[0]


def split_names(name: str) -> tuple[str, ...]:
    """Return the names of all parts of a model, given that of its first; one name if it is not split."""
    found = _SPLIT.search(name)
    if found is None:
        return (name,)
    stem, count = name[: found.start()], int(found[2])
    return tuple(f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def read_header(read: Callable[[int], bytes], name: str) -> GgufHeader:
    """Read a header.

    Args:
        read: returns the next so many bytes of the file, fewer at its end.
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

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise self._wrong("it is not a GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise self._wrong(f"its version {version} is not known")
        tensors, entries = self._count(_MOST_ENTRIES), self._count(_MOST_ENTRIES)
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
        places = tuple((name, offset) for name, offset, _ in table)
        return GgufHeader(metadata, vocabulary, places, begin, begin + max(ends, default=0))

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
