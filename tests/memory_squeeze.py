"""Memory pressure made for real: a swap file, and a memory cgroup that is too small for what runs in it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_process import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

_V1 = Path("/sys/fs/cgroup/memory")
"""memory.limit_in_bytes, memory.usage_in_bytes (kernel, cgroup-v1/memory.rst)."""
_V2 = Path("/sys/fs/cgroup")
"""memory.max, memory.current (kernel, cgroup-v2.rst)."""
_CONTROLLERS = _V2 / "cgroup.controllers"
IS_V2 = _CONTROLLERS.exists() and "memory" in _CONTROLLERS.read_text().split()
CONTROLLER = _V2 if IS_V2 else _V1
TOOLS = {name: shutil.which(name, path=f"{os.defpath}:/sbin:/usr/sbin") for name in ("mkswap", "swapon", "swapoff")}
_SHRINK_LIMIT_S = 30.0


def can_squeeze_here() -> bool:
    """Return True if swap files and memory cgroups can be made here."""
    has_controller = IS_V2 or (_V1 / "memory.limit_in_bytes").exists()
    return os.geteuid() == 0 and has_controller and None not in TOOLS.values()


can_squeeze = pytest.mark.skipif(
    not can_squeeze_here(),
    reason="needs root, the memory controller of cgroups, mkswap and swapon",
)


class Group:
    """A memory cgroup; its processes must have ended before it does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def used_bytes(self) -> int:
        """Memory of the group, the page cache that it filled included."""
        return int((self._folder / ("memory.current" if IS_V2 else "memory.usage_in_bytes")).read_text())

    def limit(self, size_bytes: int) -> None:
        """Let the group hold so much memory; what is above it leaves at once.

        cgroup v1 gives up with EBUSY when that takes long.
        """
        deadline_s = time.monotonic() + _SHRINK_LIMIT_S
        while True:
            try:
                (self._folder / ("memory.max" if IS_V2 else "memory.limit_in_bytes")).write_text(str(size_bytes))
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                    raise
            else:
                return

    def take(self, pid: int) -> None:
        """Move a process into the group; what it holds already stays counted elsewhere."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def joining(self, *command: str) -> list[str]:
        """Return a command line that runs `command` within the group."""
        return ["sh", "-c", f'echo $$ > {self._folder}/cgroup.procs; exec "$@"', "sh", *command]


@contextmanager
def squeeze(folder: Path, swap_bytes: int) -> Iterator[Group]:
    """Switch on a swap file in `folder` and make a cgroup; both are gone afterwards, its processes must be too."""
    with swap_file(folder / "swap", swap_bytes), memory_group(f"emberd-test-{os.getpid()}") as group:
        yield group


@contextmanager
def memory_group(name: str) -> Iterator[Group]:
    """Make a cgroup; it is gone afterwards, when its processes have ended."""
    folder = CONTROLLER / name
    if IS_V2:
        (_V2 / "cgroup.subtree_control").write_text("+memory")
    folder.mkdir()
    try:
        yield Group(folder)
    finally:
        wait_until(
            lambda: not (folder / "cgroup.procs").read_text(), what=lambda: "the end of the group's processes"
        )
        folder.rmdir()


@contextmanager
def swap_file(path: Path, size_bytes: int) -> Iterator[None]:
    """Switch on a swap file; it is gone afterwards."""
    with path.open("wb") as file:
        for _ in range(size_bytes >> 20):  # a swap file must not have holes
            file.write(bytes(1 << 20))
        os.fsync(file.fileno())
    path.chmod(0o600)
    _run("mkswap", path)
    try:
        _run("swapon", path)
    except subprocess.CalledProcessError:
        path.unlink()
        pytest.skip("this file system takes no swap file")
    try:
        yield
    finally:
        _run("swapoff", path)
        path.unlink()


def _run(tool: str, path: Path) -> None:
    program = TOOLS[tool]
    assert program is not None
    subprocess.run([program, str(path)], check=True, capture_output=True)
