"""A stand-in for macOS' libSystem, compiled from darwin_standin.c with this system's C compiler."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = "darwin_standin.c"
WARNINGS = ("-Wall", "-Wextra", "-Werror")


class Field(ctypes.Structure):
    """struct field of the stand-in: how the C compiler laid a field out."""

    _fields_ = (("name", ctypes.c_char_p), ("offset", ctypes.c_size_t), ("size", ctypes.c_size_t))


class DarwinStandin:
    """Says what the stand-in library answers."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.standin_usage.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint64]
        self.library.standin_sysctl.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64]
        self.library.standin_swap.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
        self.library.standin_statistic.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
        self.library.standin_region.argtypes = [
            ctypes.c_int,
            ctypes.c_char_p,
            *[ctypes.c_uint64] * 2,
            *[ctypes.c_uint32] * 2,
            ctypes.c_uint64,
        ]
        self.library.standin_attribute.argtypes = [*[ctypes.c_char_p] * 3, ctypes.c_size_t]
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.library.standin_reset()

    def layout(self, structure: str) -> tuple[list[tuple[str, int, int]], int]:
        """Return name, offset and size of each field, and the size of the whole, as the C compiler has them."""
        fields = []
        address = ctypes.addressof(Field.in_dll(self.library, f"standin_{structure}_fields"))
        while (field := Field.from_address(address)).name is not None:
            fields.append((field.name.decode(), field.offset, field.size))
            address += ctypes.sizeof(Field)
        return fields, field.size

    def process(self, pid: int, error: int = 0, **fields: int) -> None:
        """Add a process; one with an error cannot be asked."""
        assert self.library.standin_process(pid, error) == 0
        for name, value in fields.items():
            assert self.library.standin_usage(pid, name.encode(), value) == 0, name

    def region(
        self, pid: int, path: str, address: int, size: int, wired: int = 0, identity: tuple[int, int] = (0, 0)
    ) -> None:
        """Add a region that maps a file, above those that the process has."""
        device, inode = identity
        assert self.library.standin_region(pid, os.fsencode(path), address, size, wired, device, inode) == 0

    def sysctl(self, name: str, value: int, width: int = 8) -> None:
        """Add a number."""
        assert self.library.standin_sysctl(name.encode(), width, value) == 0, name

    def swap(self, **fields: int) -> None:
        """Set vm.swapusage."""
        for name, value in fields.items():
            assert self.library.standin_swap(name.encode(), value) == 0, name

    def statistics(self, **fields: int) -> None:
        """Set page counters."""
        for name, value in fields.items():
            assert self.library.standin_statistic(name.encode(), value) == 0, name

    def kernel(self, ints: int, *, is_strict: bool = False, fails_with: int = 0) -> None:
        """Say how host_statistics64 answers."""
        self.library.standin_kernel(ints, is_strict, fails_with)

    def launchd(self, *descriptors: int, error: int = 0) -> None:
        """Say which sockets launchd gives, or with which error it refuses."""
        array = (ctypes.c_int * len(descriptors))(*descriptors)
        assert self.library.standin_launchd(error, array, ctypes.c_size_t(len(descriptors))) == 0

    def attribute(self, path: Path, name: str, value: bytes) -> None:
        """Give a file its extended attribute."""
        assert self.library.standin_attribute(os.fsencode(path), name.encode(), value, len(value)) == 0


def build(source: Path, folder: Path) -> Path | None:
    """Compile the stand-in, None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "darwin_standin.so"
    subprocess.run([compiler, "-std=gnu11", *WARNINGS, "-shared", "-fPIC", "-o", library, source], check=True)
    return library
