"""Keep the daemon's own memory in memory (Linux).

Under pressure an idle daemon is swapped out before the engine is: 18 of its 35 MB were, and the first request after
30 s met some 100 major faults in emberd itself, measured in a group that was 0.3 GiB short.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MADV_POPULATE_READ = 22
"""Linux 5.14 (<asm-generic/mman-common.h>): faults a range in, and marks what is there as used."""
_IN_USE = 3 << 62
"""Bits 63, present, and 62, swapped (proc_pid_pagemap(5)). What was never used has neither, and is left alone."""
_ENTRY_BYTES = 8


def private_ranges(maps: str) -> Iterator[tuple[int, int]]:
    """Yield first and last address (exclusive) of what can hold pages of one's own (proc_pid_maps(5))."""
    for line in maps.splitlines():
        words = line.split(maxsplit=2)
        if words[1].startswith("r") and words[1].endswith("p"):
            first, _, last = words[0].partition("-")
            yield int(first, 16), int(last, 16)


def runs_in_use(entries: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last index (exclusive) of each run of pages that are present or swapped."""
    begin = None
    number = -1
    for number, entry in enumerate(entries):
        if entry & _IN_USE:
            begin = number if begin is None else begin
        elif begin is not None:
            yield begin, number
            begin = None
    if begin is not None:
        yield begin, number + 1


class OwnMemory:
    """This process's own memory.

    Made before PR_SET_DUMPABLE is taken away: from then on pagemap belongs to root, and only who has it open may
    read it (proc_pid(5)).

    Args:
        proc: root of the proc file system.

    Raises:
        OSError: /proc cannot be read.
    """

    def __init__(self, proc: Path) -> None:
        self._maps = proc / "self" / "maps"
        self._pagemap = os.open(proc / "self" / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def recall(self) -> None:
        """Bring this process's own memory back from swap, and mark it as used.

        Raises:
            OSError: /proc cannot be read.
        """
        page_bytes = mmap.PAGESIZE
        for first, last in private_ranges(self._maps.read_text()):
            pages = (last - first) // page_bytes
            told = os.pread(self._pagemap, pages * _ENTRY_BYTES, first // page_bytes * _ENTRY_BYTES)
            entries = array("Q", told[: len(told) // _ENTRY_BYTES * _ENTRY_BYTES])
            for begin, end in runs_in_use(entries):
                # Fails on kernels before 5.14, and for what was unmapped meanwhile: both harmless.
                self._libc.madvise(first + begin * page_bytes, (end - begin) * page_bytes, MADV_POPULATE_READ)
