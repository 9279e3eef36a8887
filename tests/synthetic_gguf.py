"""Small GGUF files that llama.cpp loads and generates from, made without downloading anything.

The architecture is `llama`, the weights are deterministic noise in 32-bit floats, so no runtime repacks them and
a mapped file stays mapped. The vocabulary is chosen so that text survives the round trip through the tokenizer:
the model speaks only in tokens such as ` ba` or ` ke`, each of which is one token again when it is read back.
A reply can therefore be appended to its prompt and finds the engine's prompt cache intact.
"""

from __future__ import annotations

import math
import random
import struct
from array import array
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

ALIGNMENT_BYTES = 32
FLOAT_BYTES = 4
HEAD_WIDTH = 32
SPACE_MARK = "\u2581"
"""What the sentencepiece tokenizer writes for a space."""

_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
"""Token types of the GGUF format."""
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
"""Metadata value types of the GGUF format."""
_INT32 = 5

_NOISE_FLOATS = 262_139
"""A prime, so that repeating the noise never lines up with a row of a matrix and makes rows equal."""
_MOST_LAYERS = 24
_LOGIT_SPREAD = 4.0
"""Standard deviation of the logits of speakable tokens; the silent ones stay at zero and are rarely drawn."""


@dataclass(frozen=True, slots=True)
class GgufSummary:
    """What was written.

    Attributes:
        path: the file.
        file_bytes: its whole size.
        tensor_bytes: how much of it is weights.
        data_offset: bytes before the first weight.
        layers: transformer blocks.
        embedding: width of the residual stream.
        feed_forward: width inside each block.
        vocabulary: number of tokens.
        context_length: trained context, in tokens.
    """

    path: Path
    file_bytes: int
    tensor_bytes: int
    data_offset: int
    layers: int
    embedding: int
    feed_forward: int
    vocabulary: int
    context_length: int


@dataclass(frozen=True, slots=True)
class _Shape:
    """The numbers that fix the size of every tensor."""

    layers: int
    embedding: int
    feed_forward: int
    vocabulary: int
    experts: int = 0
    has_state: bool = False

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and dimensions, fastest-running dimension first."""
        wide, narrow, inner = self.embedding, HEAD_WIDTH, self.feed_forward
        yield "token_embd.weight", (wide, self.vocabulary)
        for layer in range(self.layers):
            block = f"blk.{layer}."
            yield block + "attn_norm.weight", (wide,)
            if self.has_state:
                yield from self._state_space(block)
                continue
            yield block + "attn_q.weight", (wide, wide)
            yield block + "attn_k.weight", (wide, narrow)
            yield block + "attn_v.weight", (wide, narrow)
            yield block + "attn_output.weight", (wide, wide)
            yield block + "ffn_norm.weight", (wide,)
            if self.experts:
                yield block + "ffn_gate_inp.weight", (wide, self.experts)
            several, many = ("_exps", (self.experts,)) if self.experts else ("", ())
            yield block + f"ffn_gate{several}.weight", (wide, inner, *many)
            yield block + f"ffn_up{several}.weight", (wide, inner, *many)
            yield block + f"ffn_down{several}.weight", (inner, wide, *many)
        yield "output_norm.weight", (wide,)
        yield "output.weight", (wide, self.vocabulary)

    def _state_space(self, block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the tensors of a block that keeps a state in place of a KV cache (Mamba)."""
        wide, inner, rank = self.embedding, 2 * self.embedding, self.embedding // _STATE_SIZE
        yield block + "ssm_in.weight", (wide, 2 * inner)
        yield block + "ssm_conv1d.weight", (_CONVOLUTION, inner)
        yield block + "ssm_conv1d.bias", (inner,)
        yield block + "ssm_x.weight", (inner, rank + 2 * _STATE_SIZE)
        yield block + "ssm_dt.weight", (rank, inner)
        yield block + "ssm_dt.bias", (inner,)
        yield block + "ssm_a", (_STATE_SIZE, inner)
        yield block + "ssm_d", (inner,)
        yield block + "ssm_out.weight", (inner, wide)

    def tensor_bytes(self) -> int:
        """Return the size of all weights; every tensor is a multiple of the alignment."""
        return sum(math.prod(dimensions) for _, dimensions in self.tensors()) * FLOAT_BYTES


def write_gguf(
    path: Path,
    *,
    layers: int = 2,
    embedding: int = 64,
    feed_forward: int | None = None,
    vocabulary: int = 512,
    context_length: int = 8192,
    target_bytes: int | None = None,
    experts: int = 0,
    architecture: str = "llama",
    kind: str = "model",
    seed: int = 0,
    fills_in: bool = False,
) -> GgufSummary:
    """Write a model that really loads and generates nonsense.

    Args:
        path: file to write; an existing one is replaced.
        layers: number of blocks; raised as needed when `target_bytes` is given.
        embedding: width, a multiple of 64; raised as needed when `target_bytes` is given.
        feed_forward: inner width, four times `embedding` if None.
        vocabulary: number of tokens, at least 512; those beyond the alphabet are never spoken.
        context_length: trained context in tokens.
        target_bytes: exact size of the file. Nearly all of it is weights that every token reads.
        experts: makes a mixture of so many experts in each block, of which each token uses two; not with
            `target_bytes`.
        architecture: name that the loader must know; with "mamba" the blocks keep a state in place of a KV cache
            (not with `target_bytes`).
        kind: its general.type.
        seed: another seed gives other weights of the same size.
        fills_in: it has the tokens with which it is asked for the middle of a text.

    Raises:
        ValueError: a width or the vocabulary does not fit, or `target_bytes` is too small.
    """
    words = _vocabulary(vocabulary)
    if embedding % (2 * HEAD_WIDTH):
        raise ValueError(f"embedding must be a multiple of {2 * HEAD_WIDTH}, not {embedding}")
    has_state = architecture == _WITH_STATE
    shape = _Shape(layers, embedding, feed_forward or 4 * embedding, vocabulary, experts, has_state)
    if target_bytes is not None:
        shape = _grown(shape, target_bytes)
    header = _header(shape, words, context_length, architecture, kind, fills_in=fills_in)
    with path.open("wb") as file:
        file.write(header)
        _write_weights(file, shape, words, seed)
        size = file.tell()
        if target_bytes is not None:
            if size > target_bytes:
                raise ValueError(f"{target_bytes} bytes are too few: the smallest such model takes {size}")
            # Loaders look only at the ranges that the header names, so bytes behind them are allowed.
            file.truncate(target_bytes)
            size = target_bytes
    return GgufSummary(
        path,
        size,
        shape.tensor_bytes(),
        len(header),
        shape.layers,
        shape.embedding,
        shape.feed_forward,
        vocabulary,
        context_length,
    )


def write_truncated(path: Path, *, kept_fraction: float = 0.5, seed: int = 0) -> GgufSummary:
    """Write a model whose header is whole and whose weights end early."""
    summary = write_gguf(path, seed=seed)
    kept_bytes = summary.data_offset + int(summary.tensor_bytes * kept_fraction)
    with path.open("r+b") as file:
        file.truncate(kept_bytes)
    return GgufSummary(
        summary.path,
        kept_bytes,
        summary.tensor_bytes,
        summary.data_offset,
        summary.layers,
        summary.embedding,
        summary.feed_forward,
        summary.vocabulary,
        summary.context_length,
    )


def write_projector(path: Path, *, embedding: int, seed: int = 0) -> None:
    """Write a projector that turns each image into 16 embeddings of noise, for a model of this width.

    Its shape is that of Gemma 3's (llama.cpp, tools/mtmd/clip.cpp, build 11434), with one block.
    """
    side, patch, wide = 224, 14, 64
    square = (wide, wide)
    block = {f"attn_{name}": square for name in ("q", "k", "v", "out")} | {"ffn_up": square, "ffn_down": square}
    tensors: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (patch, patch, 3, wide),
        "v.patch_embd.bias": (wide,),
    }
    tensors["v.position_embd.weight"] = (wide, (side // patch) ** 2)
    for name, dimensions in {**block, "ln1": (wide,), "ln2": (wide,)}.items():
        tensors |= {f"v.blk.0.{name}.weight": dimensions, f"v.blk.0.{name}.bias": (wide,)}
    tensors |= {"v.post_ln.weight": (wide,), "v.post_ln.bias": (wide,)}
    tensors |= {"mm.input_projection.weight": (embedding, wide), "mm.soft_emb_norm.weight": (wide,)}
    numbers = {"image_size": side, "patch_size": patch, "embedding_length": wide, "feed_forward_length": wide}
    numbers |= {"projection_dim": embedding, "block_count": 1, "attention.head_count": 2}
    half = [struct.pack("<f", 0.5)] * 3
    metadata = [
        _entry("general.architecture", _STRING, _text("clip")),
        _entry("general.type", _STRING, _text("mmproj")),
        _entry("clip.projector_type", _STRING, _text("gemma3")),
        _entry("clip.has_vision_encoder", _BOOL, b"\x01"),
        _entry("clip.use_gelu", _BOOL, b"\x01"),
        _entry("clip.vision.attention.layer_norm_epsilon", _FLOAT32, struct.pack("<f", 1e-6)),
        _list("clip.vision.image_mean", _FLOAT32, half),
        _list("clip.vision.image_std", _FLOAT32, half),
        *(_number(f"clip.vision.{name}", value) for name, value in numbers.items()),
    ]
    source = random.Random(seed)  # noqa: S311  # noise is no secret
    with path.open("wb") as file:
        file.write(_laid_out(metadata, tensors.items()))
        for dimensions in tensors.values():
            array("f", (source.uniform(-0.1, 0.1) for _ in range(math.prod(dimensions)))).tofile(file)


def write_unknown_architecture(path: Path, *, seed: int = 0) -> GgufSummary:
    """Write a well-formed file of an architecture that no runtime knows."""
    return write_gguf(path, architecture="emberdtest", seed=seed)


def write_not_gguf(path: Path, *, size_bytes: int = 65536) -> None:
    """Write a file that no loader takes for a model."""
    line = b"This is not a model.\n"
    path.write_bytes((line * (size_bytes // len(line) + 1))[:size_bytes])


def speakable_words() -> tuple[str, ...]:
    """Return the texts of the tokens that the model speaks, each with its leading space."""
    return tuple(" " + syllable for syllable in _syllables())


def _syllables() -> list[str]:
    return ["".join(pair) for pair in product("bcdfghjklmnpqrstvwxyz", "aeiou")]


def _vocabulary(size: int) -> list[tuple[str, float, int]]:
    """Return text, score and type of every token.

    Merging goes letter by letter to a syllable and then to the syllable with its space, so every step of the
    way is a token of its own; a higher score is merged first.
    """
    words = [("<unk>", 0.0, _UNKNOWN), ("<s>", 0.0, _CONTROL), ("</s>", 0.0, _CONTROL)]
    words += [(f"<0x{byte:02X}>", 0.0, _BYTE) for byte in range(256)]
    words += [(letter, -1000.0, _NORMAL) for letter in SPACE_MARK + "abcdefghijklmnopqrstuvwxyz"]
    words += [(syllable, -1.0, _NORMAL) for syllable in _syllables()]
    words += [(SPACE_MARK + syllable, -2.0, _NORMAL) for syllable in _syllables()]
    if size < len(words):
        raise ValueError(f"the vocabulary needs at least {len(words)} tokens, not {size}")
    words += [(f"<unused{number}>", -2000.0, _UNUSED) for number in range(size - len(words))]
    return words


def _grown(shape: _Shape, target_bytes: int) -> _Shape:
    """Return the widest and deepest shape that stays under `target_bytes`, leaving room for the header."""
    room = target_bytes - _HEADER_ROOM_BYTES - shape.vocabulary * 64
    embedding = shape.embedding
    while embedding < 4096 and _layer_bytes(embedding, 4 * embedding) * _MOST_LAYERS < room:
        embedding += 2 * HEAD_WIDTH
    fixed = _Shape(0, embedding, 0, shape.vocabulary).tensor_bytes()
    if room - fixed < _layer_bytes(embedding, HEAD_WIDTH):
        raise ValueError(f"{target_bytes} bytes are too few for one layer")
    layers = max(1, (room - fixed) // _layer_bytes(embedding, 4 * embedding))
    bare = _Shape(layers, embedding, 0, shape.vocabulary).tensor_bytes()
    column_bytes = 3 * embedding * FLOAT_BYTES * layers
    feed_forward = (room - bare) // column_bytes // HEAD_WIDTH * HEAD_WIDTH
    return _Shape(layers, embedding, feed_forward, shape.vocabulary)


_HEADER_ROOM_BYTES = 16384
_EXPERTS_USED = 2
_WITH_STATE = "mamba"
_STATE_SIZE, _CONVOLUTION = 16, 4


def _layer_bytes(embedding: int, feed_forward: int) -> int:
    matrices = 2 * embedding * embedding + 2 * embedding * HEAD_WIDTH + 3 * embedding * feed_forward
    return (matrices + 2 * embedding) * FLOAT_BYTES


def _header(
    shape: _Shape,
    words: list[tuple[str, float, int]],
    context_length: int,
    architecture: str,
    kind: str,
    *,
    fills_in: bool,
) -> bytes:
    """Return everything before the weights, padded to the alignment."""
    metadata = [
        _entry("general.architecture", _STRING, _text(architecture)),
        _entry("general.type", _STRING, _text(kind)),
        _entry("general.name", _STRING, _text("synthetic noise")),
        _number("general.alignment", ALIGNMENT_BYTES),
        _number("general.file_type", 0),
        _number(f"{architecture}.context_length", context_length),
        _number(f"{architecture}.embedding_length", shape.embedding),
        _number(f"{architecture}.block_count", shape.layers),
        _number(f"{architecture}.feed_forward_length", shape.feed_forward),
        _number(f"{architecture}.attention.head_count", shape.embedding // HEAD_WIDTH),
        _number(f"{architecture}.attention.head_count_kv", 1),
        _number(f"{architecture}.rope.dimension_count", HEAD_WIDTH),
        _number(f"{architecture}.vocab_size", shape.vocabulary),
        _entry(f"{architecture}.attention.layer_norm_rms_epsilon", _FLOAT32, struct.pack("<f", 1e-5)),
        _entry(f"{architecture}.rope.freq_base", _FLOAT32, struct.pack("<f", 10000.0)),
        _entry("tokenizer.ggml.model", _STRING, _text("llama")),
        _list("tokenizer.ggml.tokens", _STRING, [_text(word) for word, _, _ in words]),
        _list("tokenizer.ggml.scores", _FLOAT32, [struct.pack("<f", score) for _, score, _ in words]),
        _list("tokenizer.ggml.token_type", _INT32, [struct.pack("<i", kind) for _, _, kind in words]),
        _number("tokenizer.ggml.unknown_token_id", 0),
        _number("tokenizer.ggml.bos_token_id", 1),
        _number("tokenizer.ggml.eos_token_id", 2),
        _entry("tokenizer.ggml.add_bos_token", _BOOL, b"\x01"),
        _entry("tokenizer.ggml.add_eos_token", _BOOL, b"\x00"),
    ]
    if fills_in:
        parts = enumerate(("pre", "suf", "mid"), start=len(words) - 3)
        metadata += [_number(f"tokenizer.ggml.fim_{part}_token_id", number) for number, part in parts]
    if shape.experts:
        metadata += [
            _number(f"{architecture}.expert_count", shape.experts),
            _number(f"{architecture}.expert_used_count", _EXPERTS_USED),
        ]
    if shape.has_state:
        metadata += [
            _number(f"{architecture}.ssm.conv_kernel", _CONVOLUTION),
            _number(f"{architecture}.ssm.inner_size", 2 * shape.embedding),
            _number(f"{architecture}.ssm.state_size", _STATE_SIZE),
            _number(f"{architecture}.ssm.time_step_rank", shape.embedding // _STATE_SIZE),
        ]
    return _laid_out(metadata, shape.tensors())


def _laid_out(metadata: list[bytes], tensors: Iterable[tuple[str, tuple[int, ...]]]) -> bytes:
    """Return a header of these entries and tensors, padded to the alignment."""
    infos = bytearray()
    offset = count = 0
    for name, dimensions in tensors:
        infos += _text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        infos += struct.pack("<IQ", 0, offset)  # type 0 is a 32-bit float
        offset += math.prod(dimensions) * FLOAT_BYTES
        count += 1
    header = b"GGUF" + struct.pack("<IQQ", 3, count, len(metadata)) + b"".join(metadata) + infos
    return header + b"\x00" * (-len(header) % ALIGNMENT_BYTES)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


def _number(key: str, value: int) -> bytes:
    return _entry(key, _UINT32, struct.pack("<I", value))


def _list(key: str, kind: int, items: list[bytes]) -> bytes:
    return _entry(key, _ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(items))


def _write_weights(file: BinaryIO, shape: _Shape, words: list[tuple[str, float, int]], seed: int) -> None:
    # Noise is no secret.
    source = random.Random(seed)  # noqa: S311
    width = 1 / math.sqrt(shape.embedding)
    floats = min(_NOISE_FLOATS, shape.tensor_bytes() // FLOAT_BYTES)
    noise = array("f", (source.uniform(-width, width) for _ in range(floats)))
    start = 0
    for name, dimensions in shape.tensors():
        count = math.prod(dimensions)
        if name.endswith("norm.weight"):
            array("f", [1.0] * count).tofile(file)
        elif name.endswith("ssm_a"):
            array("f", [-1.0] * count).tofile(file)  # the state fades
        elif name == "output.weight":
            _output_rows(shape, words, source).tofile(file)
        else:
            start = _write_repeated(file, noise, start, count)


def _write_repeated(file: BinaryIO, noise: array[float], start: int, count: int) -> int:
    """Write `count` floats from the endless repetition of `noise`; return where the next tensor goes on."""
    while count:
        piece = noise[start : start + count]
        piece.tofile(file)
        count -= len(piece)
        start = (start + len(piece)) % len(noise)
    return start


def _output_rows(shape: _Shape, words: list[tuple[str, float, int]], source: random.Random) -> array[float]:
    """Return the last matrix: noise for tokens that may be spoken, zero for the rest."""
    width = _LOGIT_SPREAD * math.sqrt(3 / shape.embedding)
    silence = array("f", [0.0] * shape.embedding)
    rows = array("f")
    for word, _, kind in words:
        is_spoken = kind == _NORMAL and word.startswith(SPACE_MARK) and len(word) > 1
        rows += (
            array("f", (source.uniform(-width, width) for _ in range(shape.embedding))) if is_spoken else silence
        )
    return rows
