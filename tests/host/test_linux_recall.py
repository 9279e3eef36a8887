"""Memory of processes: what is told of it, and processes that were really swapped out and come back."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from array import array
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emberd.host.linux import LinuxHost
from emberd.host.linux_recall import Recall, pages_in_use, private_ranges
from memory_squeeze import can_squeeze, squeeze

if TYPE_CHECKING:
    from collections.abc import Iterator

PROC = Path("/proc")
MIB = 1 << 20
PRESENT, SWAPPED, UNUSED = 1 << 63, 1 << 62, 1 << 55
MAPS = """\
55d0c0000000-55d0c0001000 r-xp 00000000 fe:00 1234                       /usr/bin/python3
55d0c0002000-55d0c0003000 rw-p 00001000 fe:00 1234                       /usr/bin/python3
55d0c1000000-55d0c1021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000001000 ---p 00000000 00:00 0
7f0000001000-7f0000801000 rw-p 00000000 00:00 0
7fff00000000-7fff00021000 rw-p 00000000 00:00 0                          [stack]
7f0000900000-7f0000a00000 rw-s 00000000 00:01 77                         /dev/zero (deleted)
7fff00100000-7fff00102000 r-xp 00000000 00:00 0                          [vdso]
"""
PROGRAM = """
import ctypes, json, os, sys
from pathlib import Path
from emberd.host.linux import LinuxHost
def swapped():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmSwap:")[2].split()[0]) << 10
host = LinuxHost()
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as it was before setuid, which makes a process undumpable
host.forbid_core_dumps()
memory = bytearray(b"x" * int(sys.argv[1]))
print("up", flush=True)
sys.stdin.readline()
before = swapped()
host.recall_memory(None, lambda: False)
print(json.dumps([before, swapped()]))
"""


def test_what_is_shared_or_must_not_be_read_is_left_alone():
    assert list(private_ranges(MAPS)) == [
        (0x55D0C0000000, 0x55D0C0001000),
        (0x55D0C0002000, 0x55D0C0003000),
        (0x55D0C1000000, 0x55D0C1021000),
        (0x7F0000001000, 0x7F0000801000),
        (0x7FFF00000000, 0x7FFF00021000),
        (0x7FFF00100000, 0x7FFF00102000),
    ]


def test_pages_that_were_never_used_stay_unused():
    assert pages_in_use([UNUSED, PRESENT, SWAPPED | UNUSED, 0, 0, PRESENT]) == [1, 2, 5]
    assert pages_in_use([]) == pages_in_use([0, UNUSED]) == []


@can_squeeze
def test_a_process_that_was_swapped_out_comes_back_in_one_call(tmp_path: Path):
    with squeeze(tmp_path, 256 * MIB) as group:
        command = group.joining(sys.executable, "-c", PROGRAM, str(64 * MIB))
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "up\n"
            group.limit(group.used_bytes - 48 * MIB)
            group.limit(512 * MIB)
            before, after = json.loads(child.communicate("go\n", timeout=60)[0].splitlines()[-1])
        assert child.returncode == 0
    assert before > 40 * MIB
    assert after < MIB


ENGINE = """
import os, sys
os.setuid(65534)
memory = bytearray(b"x" * int(sys.argv[1]))
print("up", flush=True)
sys.stdin.readline()
"""


def swapped_bytes(pid: int) -> int:
    """Return VmSwap (proc_pid_status(5))."""
    return LinuxHost().engine_memory([pid]).swapped_bytes or 0


@contextmanager
def swapped_out(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Give a process of which 48 MiB are in swap, with room for them."""
    with squeeze(tmp_path, 256 * MIB) as group:
        command = group.joining(sys.executable, "-c", ENGINE, str(64 * MIB))
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "up\n"
            group.limit(group.used_bytes - 48 * MIB)
            group.limit(512 * MIB)
            assert swapped_bytes(child.pid) > 40 * MIB
            yield child
            child.communicate("go\n", timeout=60)


@can_squeeze
def test_another_process_that_was_swapped_out_comes_back(tmp_path: Path):
    with swapped_out(tmp_path) as child:
        LinuxHost().recall_memory(child.pid, lambda: False)
        assert swapped_bytes(child.pid) < MIB


@can_squeeze
def test_a_recall_that_is_stopped_leaves_the_rest(tmp_path: Path):
    asked = 0

    def is_stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3000 // 128

    with swapped_out(tmp_path) as child:
        LinuxHost().recall_memory(child.pid, is_stopped)
        assert asked == 3000 // 128 + 1
        assert swapped_bytes(child.pid) > 8 * MIB


def test_a_page_that_cannot_be_read_hides_none_behind_it(monkeypatch: pytest.MonkeyPatch):
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as memory:
        memory[:] = b"x" * len(memory)
        first = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(first)
        own = Recall(PROC, os.getpid())
        read, counts = own._readv, []

        def recorded(*arguments: int) -> int:
            counts.append(read(*arguments))
            return counts[-1]

        monkeypatch.setattr(own, "_readv", recorded)
        own._read(array("Q", [address, 0, address + mmap.PAGESIZE]))
        own.close()
        del first
    assert counts == [1, -1, 1]


def test_a_process_that_is_gone_is_an_error_here_and_nothing_to_the_host():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        memory = Recall(PROC, child.pid)
        child.communicate(b"\n")
    with pytest.raises(OSError, match=r".*"):
        memory.run(lambda: False)
    memory.close()
    LinuxHost().recall_memory(child.pid, lambda: False)
