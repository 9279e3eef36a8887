"""A process that holds memory of one kind: anonymous, locked, or pages of a file."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HOLDER = """
import ctypes, mmap, sys
kind, size = sys.argv[1], int(sys.argv[2])
if kind in {"file", "locked file"}:
    with open(sys.argv[3], "rb") as file:
        area = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
else:
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for offset in range(0, size, mmap.PAGESIZE):
    if kind in {"file", "locked file"}:
        area[offset]
    else:
        area[offset] = 1
if kind == "locked":
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    failed = ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(size))
    if failed:
        print("refused", flush=True)
        sys.exit()
if kind == "locked file":
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    with open(sys.argv[3], "rb") as file:
        address = libc.mmap(None, ctypes.c_size_t(size), 1, 1, file.fileno(), ctypes.c_long(0))
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size // 2)):
        print("refused", flush=True)
        sys.exit()
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(
    kind: str, size_bytes: int, path: Path | None = None, within: Callable[..., list[str]] = lambda *words: [*words]
) -> Iterator[int]:
    """Run the process and yield its pid when it has touched everything.

    Args:
        kind: anonymous, locked or file.
        size_bytes: how much.
        path: the file.
        within: wraps the command line, to run it in a cgroup.
    """
    command = within(sys.executable, "-c", HOLDER, kind, str(size_bytes), str(path))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        word = process.stdout.readline().strip()
        if word == "refused":
            pytest.skip("this user may not lock so much")
        assert word == "ready"
        yield process.pid
        process.communicate("")
