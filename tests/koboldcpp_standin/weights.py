"""The model file as memory: really mapped or really read, really locked, really touched."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pathlib import Path

PAGE_BYTES = mmap.PAGESIZE
KV_BYTES_PER_TOKEN = 256
_READ_BYTES = 8 << 20
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FLOAT32, _FLOAT16 = 0, 1
_SMALLEST_BYTES_PER_WEIGHT = 0.2
"""For the quantised types: less than any of them takes, so a whole file is never taken for a torn one."""
KNOWN_ARCHITECTURES = ("llama", "gemma", "qwen", "mistral", "phi", "gpt", "deepseek", "mamba", "granite", "glm")
"""Beginnings of names."""
WITH_STATE = ("mamba", "rwkv")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class NotAModelError(Exception):
    """The file is no model at all."""


class BrokenModelError(Exception):
    """A model that the original's loader does not survive; the text is the reason it prints."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What the header tells.

    Attributes:
        path: the file.
        size: its length in bytes.
        architecture: `general.architecture`.
    """

    path: Path
    size: int
    architecture: str


def inspect(path: Path) -> ModelFile:
    """Read the header.

    Raises:
        NotAModelError: no GGUF.
        BrokenModelError: an unknown architecture, or weights that end early.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise NotAModelError
        try:
            return ModelFile(path, size, _read_header(file, size))
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError) as error:
            raise BrokenModelError(f"failed to read the header: {error}") from error


class _Header:
    """Reads the header of a GGUF file from its version number on."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def number(self, layout: str) -> int:
        """Return the next number, of a width in the notation of `struct`."""
        layout = "<" + layout
        (value,) = struct.unpack(layout, self._file.read(struct.calcsize(layout)))
        return int(value)

    def text(self) -> bytes:
        """Return the next string."""
        return self._file.read(self.number("Q"))

    def value(self, kind: int) -> bytes:
        """Return the raw bytes of the next value, empty for a list."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self._file.read(_SCALAR_BYTES[kind])
        item, count = self.number("I"), self.number("Q")
        if item in _SCALAR_BYTES:
            self._file.seek(_SCALAR_BYTES[item] * count, os.SEEK_CUR)
        else:
            for _ in range(count):
                self.value(item)
        return b""

    def tensor(self) -> tuple[str, int]:
        """Return name and end of the next tensor, in bytes from the first weight on."""
        name, weights = self.text().decode(), 1
        for _ in range(self.number("I")):
            weights *= self.number("Q")
        kind, offset = self.number("I"), self.number("Q")
        width = {_FLOAT32: 4.0, _FLOAT16: 2.0}.get(kind, _SMALLEST_BYTES_PER_WEIGHT)
        return name, offset + int(weights * width)


def _read_header(file: BinaryIO, size: int) -> str:
    header = _Header(file)
    header.number("I")
    tensors, entries = header.number("Q"), header.number("Q")
    metadata = {}
    for _ in range(entries):
        key = header.text()
        metadata[key] = header.value(header.number("I"))
    architecture = metadata.get(b"general.architecture", b"").decode()
    if not architecture.startswith(KNOWN_ARCHITECTURES):
        raise BrokenModelError(f"error loading model architecture: unknown model architecture: '{architecture}'")
    ends = [header.tensor() for _ in range(tensors)]
    alignment = int.from_bytes(metadata.get(b"general.alignment", b"\x20"), "little")
    start = -(-file.tell() // alignment) * alignment
    for name, end in ends:
        if start + end > size:
            raise BrokenModelError(
                f"tensor '{name}' data is not within the file bounds, model is corrupted or incomplete"
            )
    return architecture


class Weights:
    """Weights and key-value cache of a loaded model.

    Args:
        model: the inspected file.
        is_mapped: map the file; otherwise its content is copied into anonymous memory.
        context_size: tokens that the key-value cache holds.
    """

    def __init__(self, model: ModelFile, context_size: int, *, is_mapped: bool) -> None:
        self.size = model.size
        self.draft: Weights | None = None
        self.is_mapped = is_mapped
        self.keeps_state = model.architecture.startswith(WITH_STATE)
        self._view, self._address = _map_file(model) if is_mapped else _read_file(model)
        self._pages = self._view[::PAGE_BYTES]
        self._kv = _anonymous(context_size * KV_BYTES_PER_TOKEN)
        self.kv_bytes = len(self._kv)
        for offset in range(0, self.kv_bytes, PAGE_BYTES):
            self._kv[offset] = 1

    def touch(self) -> None:
        """Read one byte of every page, as one token's work does."""
        self._pages.tobytes()

    def store_token(self, position: int) -> None:
        """Write the cache entry of the token at `position`."""
        start = position * KV_BYTES_PER_TOKEN % self.kv_bytes
        self._kv[start : start + KV_BYTES_PER_TOKEN] = bytes([position % 256]) * KV_BYTES_PER_TOKEN

    def lock(self, *, is_refused: bool) -> None:
        """Pin the weights; a refusal is only a warning on stderr."""
        refusal = errno.ENOMEM if is_refused else 0
        if not refusal and _libc.mlock(self._address, self.size) != 0:
            refusal = ctypes.get_errno()
        if refusal:
            _warn_about_refused_lock(self.size, refusal)


def _anonymous(size: int) -> mmap.mmap:
    # Shared anonymous memory, the default, would be counted as shared memory and not as the process's own.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)


def _map_file(model: ModelFile) -> tuple[memoryview, int]:
    # The mmap module cannot tell its address for a read-only mapping, and locking a writable private one
    # would copy every page of the file into anonymous memory.
    with model.path.open("rb") as file:
        address = _libc.mmap(None, model.size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address in {None, ctypes.c_void_p(-1).value}:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(model.path))
    return memoryview((ctypes.c_ubyte * model.size).from_address(address)).cast("B"), address


def _read_file(model: ModelFile) -> tuple[memoryview, int]:
    memory = _anonymous(model.size)
    view = memoryview(memory)
    with model.path.open("rb") as file:
        for offset in range(0, model.size, _READ_BYTES):
            file.readinto(view[offset : offset + _READ_BYTES])
    return view, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _warn_about_refused_lock(size: int, number: int) -> None:
    sys.stderr.write(
        f"warning: failed to mlock {size}-byte buffer (after previously locking 0 bytes): {os.strerror(number)}\n"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if number == errno.ENOMEM and sys.platform == "darwin":
        sys.stderr.write(
            "Try increasing the sysctl values 'vm.user_wire_limit' and 'vm.global_user_wire_limit' and/or "
            "decreasing 'vm.global_no_user_wire_amount'.  Also try increasing RLIMIT_MEMLOCK (ulimit -l).\n"
        )
    elif number == errno.ENOMEM and not (hard > soft + size):
        sys.stderr.write("Try increasing RLIMIT_MEMLOCK ('ulimit -l' as root).\n")
    sys.stderr.flush()
