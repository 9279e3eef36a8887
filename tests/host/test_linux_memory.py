"""The daemon's own memory: what is told of it, and a process that was really swapped out and comes back."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from emberd.host.linux_memory import private_ranges, runs_in_use
from memory_squeeze import can_squeeze, squeeze

if TYPE_CHECKING:
    from pathlib import Path

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
host.recall_own_memory()
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
    assert list(runs_in_use([UNUSED, PRESENT, SWAPPED | UNUSED, 0, 0, PRESENT])) == [(1, 3), (5, 6)]
    assert list(runs_in_use([])) == list(runs_in_use([0, UNUSED])) == []


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


HEAPS = """
import ctypes, sys, threading
from pathlib import Path
from emberd.host.linux import LinuxHost
if len(sys.argv) > 1:
    LinuxHost().share_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
found = []
threads = [threading.Thread(target=lambda: found.append(libc.malloc(1000))) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
begin, _, end = line.split()[0].partition("-")
print(all(int(begin, 16) <= address < int(end, 16) for address in found))
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="other allocators have one heap")
def test_threads_allocate_from_one_heap_when_told():
    for words, is_shared in (((), "False"), (("share",), "True")):
        ran = subprocess.run([sys.executable, "-c", HEAPS, *words], capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == is_shared
