"""Keep a process's own memory in memory, from outside or inside (Linux).

What an idle daemon or engine has of its own is swapped out under pressure. Of emberd's 35 MB 18 were, and the first
request after 30 s met some 100 major faults in it; of an engine whose weights are locked it is the KV cache and the
compute buffers. Reading one byte of a page brings it back, and moves it to the pages that leave last.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

_IN_USE = 3 << 62
"""Bits 63, present, and 62, swapped (proc_pid_pagemap(5)). What was never used has neither, and is left alone."""
_ENTRY_BYTES = 8
_CHUNK_PAGES = 1 << 13
"""So much of pagemap is read at once, 64 KiB: a copied model has millions of pages."""
_BATCH_PAGES = 128
"""So many in one call, of IOV_MAX = 1024: each can be a read from the disk, and meanwhile somebody may come."""
_TIMES = 2
"""The kernel notes the first use of an inactive page, and takes it among the active ones with the second
(mm/swap.c, folio_mark_accessed)."""


def private_ranges(maps: str) -> Iterator[tuple[int, int]]:
    """Yield first and last address (exclusive) of what can hold pages of one's own (proc_pid_maps(5))."""
    for line in maps.splitlines():
        words = line.split(maxsplit=2)
        if words[1].startswith("r") and words[1].endswith("p"):
            first, _, last = words[0].partition("-")
            yield int(first, 16), int(last, 16)


def pages_in_use(entries: Iterable[int]) -> list[int]:
    """Return the numbers of the pages that are present or swapped."""
    return [number for number, entry in enumerate(entries) if entry & _IN_USE]


class Recall:
    """Brings the memory of one process back, again and again.

    Of another process this asks for what a debugger may (ptrace(2), PTRACE_MODE_ATTACH_REALCREDS): the same user's,
    and where Yama restricts it, a descendant's. Of this process it must be made before PR_SET_DUMPABLE is taken
    away: from then on pagemap belongs to root, and only who has it open may read it (proc_pid(5)).

    Args:
        proc: root of the proc file system.
        pid: whose memory.

    Raises:
        OSError: there is no such process, or its memory may not be seen.
    """

    def __init__(self, proc: Path, pid: int) -> None:
        self._pid = pid
        self._maps = proc / str(pid) / "maps"
        self._pagemap = os.open(proc / str(pid) / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
        word, size = ctypes.c_void_p, ctypes.c_ulong
        self._readv.argtypes = [ctypes.c_int, word, size, word, size, size]
        self._readv.restype = ctypes.c_ssize_t

    def run(self, is_stopped: Callable[[], bool]) -> None:
        """Bring all of the process's own memory back that it ever used, and mark it as used.

        Args:
            is_stopped: asked again and again, between calls of some milliseconds; ends it.

        Raises:
            OSError: the process has ended, or its memory may not be read.
        """
        page_bytes = mmap.PAGESIZE
        for first, last in private_ranges(self._maps.read_text()):
            for begin in range(first, last, _CHUNK_PAGES * page_bytes):
                pages = min(_CHUNK_PAGES, (last - begin) // page_bytes)
                told = os.pread(self._pagemap, pages * _ENTRY_BYTES, begin // page_bytes * _ENTRY_BYTES)
                entries = array("Q", told[: len(told) // _ENTRY_BYTES * _ENTRY_BYTES])
                addresses = array("Q", [begin + page * page_bytes for page in pages_in_use(entries)])
                for number in range(0, len(addresses), _BATCH_PAGES):
                    if is_stopped():
                        return
                    for _ in range(_TIMES):
                        self._read(addresses[number : number + _BATCH_PAGES])

    def close(self) -> None:
        """Let go of the process."""
        os.close(self._pagemap)

    def _read(self, addresses: array[int]) -> None:
        """Read a byte at each address into the same one (process_vm_readv(2)).

        Raises:
            OSError: the process has ended, or its memory may not be read.
        """
        vectors = array("Q", bytes(2 * _ENTRY_BYTES * len(addresses)))  # struct iovec: address, length
        vectors[0::2] = addresses
        vectors[1::2] = array("Q", [1]) * len(addresses)
        place = vectors.buffer_info()[0]
        bytes_read = (ctypes.c_char * len(addresses))()
        local = array("Q", [ctypes.addressof(bytes_read), len(addresses)])
        done = 0
        while done < len(addresses):
            count = self._readv(
                self._pid,
                local.buffer_info()[0],
                1,
                place + done * 2 * _ENTRY_BYTES,
                len(addresses) - done,
                0,
            )
            if count < 0:
                error = ctypes.get_errno()
                if error != errno.EFAULT:
                    raise OSError(error, os.strerror(error))
                count = 1  # unmapped meanwhile, or a page of the kernel's own, such as [vvar]
            done += count
