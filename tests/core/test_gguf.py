"""The header of a GGUF: numbers without weights, and nothing believed of a broken file."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberd.core.errors import ModelError
from emberd.core.gguf import GgufHeader, read_header, split_names
from emberd.host.model_file import read_model_info
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from pathlib import Path


def parse(data: bytes) -> GgufHeader:
    return read_header(io.BytesIO(data).read, "test.gguf")


def test_the_numbers_of_a_model_are_read(tmp_path: Path):
    summary = write_gguf(tmp_path / "m.gguf")
    header = parse((tmp_path / "m.gguf").read_bytes())
    assert header.data_offset == summary.data_offset
    assert header.vocabulary_tokens == summary.vocabulary
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.block_count"] == summary.layers
    assert "tokenizer.ggml.tokens" not in header.metadata


def test_the_weights_are_what_lies_behind_the_header(tmp_path: Path):
    summary = write_gguf(tmp_path / "m.gguf", target_bytes=3_000_000)
    assert read_model_info(tmp_path / "m.gguf").weights_bytes == summary.file_bytes - summary.data_offset


def test_all_parts_of_a_split_model_count(tmp_path: Path):
    names = split_names("m-00001-of-00003.gguf")
    assert names == ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf")
    whole = sum(
        summary.file_bytes - summary.data_offset
        for summary in (write_gguf(tmp_path / name, seed=number) for number, name in enumerate(names))
    )
    assert read_model_info(tmp_path / names[0]).weights_bytes == whole
    (tmp_path / names[1]).unlink()
    with pytest.raises(ModelError, match="00002-of-00003"):
        read_model_info(tmp_path / names[0])


def test_a_model_that_is_not_split_has_one_name():
    assert split_names("m.gguf") == ("m.gguf",)


def header_of(version: int = 3, tensors: int = 0, entries: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends within"),
        (b"PK\x03\x04", "not a GGUF"),
        (header_of(version=1), "version 1"),
        (header_of(entries=1 << 60), "counts"),
        (header_of(entries=1), "ends within"),
        (header_of(entries=1, rest=text(b"k") + struct.pack("<I", 99)), "unknown type 99"),
        (header_of(entries=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "array of the unknown type 9"),
        (header_of(entries=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 40)), "counts"),
        (header_of(tensors=1, rest=text(b"t") + struct.pack("<I", 1000)), "1000 dimensions"),
        (header_of(entries=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0)), "alignment is 0"),
    ],
)
def test_a_broken_header_is_one_clear_error(data: bytes, words: str):
    with pytest.raises(ModelError) as refused:
        parse(data)
    assert words in refused.value.message


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 12_000), place=st.integers(0, 2_000), byte=st.integers(0, 255))
def test_no_damage_makes_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, place: int, byte: int
):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    if not path.exists():
        write_gguf(path)
    data = bytearray(path.read_bytes()[:12_800])
    data[place] = byte
    try:
        parse(bytes(data[:cut] if cut else data))
    except ModelError as refused:
        assert refused.remedy  # noqa: PT017  # either outcome is right; only another exception is wrong
