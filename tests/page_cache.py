"""Files that are really on disk, and what of them is in memory."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_process import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
VMTOUCH = shutil.which("vmtouch") or ""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="evicts with posix_fadvise, reads /proc")
with_vmtouch = pytest.mark.skipif(not VMTOUCH, reason="vmtouch is not installed")


def write(path: Path, size: int) -> Path:
    """Write a file that is really on disk."""
    with path.open("wb") as file:
        file.write(os.urandom(MIB) * (size // MIB) + os.urandom(size % MIB))
        file.flush()
        os.fsync(file.fileno())
    return path


def evict(path: Path) -> None:
    """Drop the file's pages from the page cache; only those that nobody has mapped go."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path, offset: int, length: int) -> None:
    """Read a stretch of the file, and nothing ahead of it."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(offset)
        file.read(length)


@contextmanager
def slow_disk(path: Path, bytes_per_s: int) -> Iterator[Callable[[int], None]]:
    """Let processes read from this file's disk no faster; skips the test where that cannot be.

    Source: kernel, cgroup-v1/blkio-controller.rst.

    Yields:
        What puts a process under that limit.
    """
    device = path.stat().st_dev
    group = Path("/sys/fs/cgroup/blkio") / f"emberd-test-{os.getpid()}"
    try:
        group.mkdir()
        rule = f"{os.major(device)}:{os.minor(device)} {bytes_per_s}"
        (group / "blkio.throttle.read_bps_device").write_text(rule)
    except OSError as error:
        pytest.skip(f"reads cannot be slowed down here: {error}")
    try:
        yield lambda pid: (group / "cgroup.procs").write_text(str(pid)) and None
    finally:
        wait_until(lambda: _remove_group(group), what=lambda: f"the end of {group}")


def _remove_group(group: Path) -> bool:
    """Move a group's processes up, and remove it; return False if one came meanwhile."""
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            (group.parent / "cgroup.procs").write_text(pid)
    try:
        group.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def vmtouch_pages(path: Path) -> tuple[int, int]:
    """Return resident and all pages by vmtouch's count."""
    said = subprocess.run([VMTOUCH, str(path)], capture_output=True, text=True, check=True).stdout
    line = next(line for line in said.splitlines() if "Resident Pages:" in line)
    resident, total = line.split()[2].split("/")
    return int(resident), int(total)
