"""Files that are really on disk, and what of them is in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

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


def vmtouch_pages(path: Path) -> tuple[int, int]:
    """Return resident and all pages by vmtouch's count."""
    said = subprocess.run([VMTOUCH, str(path)], capture_output=True, text=True, check=True).stdout
    line = next(line for line in said.splitlines() if "Resident Pages:" in line)
    resident, total = line.split()[2].split("/")
    return int(resident), int(total)
