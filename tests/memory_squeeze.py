"""Memory pressure made for real: a swap file, and a memory cgroup that is too small for what runs in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTROLLER = Path("/sys/fs/cgroup/memory")
"""cgroup v1 (cgroup-v1/memory.rst)."""
TOOLS = {name: shutil.which(name, path=f"{os.defpath}:/sbin:/usr/sbin") for name in ("mkswap", "swapon", "swapoff")}

can_squeeze = pytest.mark.skipif(
    os.geteuid() != 0 or not (CONTROLLER / "memory.limit_in_bytes").exists() or None in TOOLS.values(),
    reason="needs root, the memory controller of cgroup v1, mkswap and swapon",
)


class Group:
    """A memory cgroup."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def limit(self, size_bytes: int) -> None:
        """Let the group hold so much memory; what is above it leaves at once."""
        (self._folder / "memory.limit_in_bytes").write_text(str(size_bytes))

    def joining(self, *command: str) -> list[str]:
        """Return a command line that runs `command` within the group."""
        return ["sh", "-c", f'echo $$ > {self._folder}/cgroup.procs; exec "$@"', "sh", *command]


@contextmanager
def squeeze(folder: Path, swap_bytes: int) -> Iterator[Group]:
    """Switch on a swap file in `folder` and make a cgroup; both are gone afterwards, its processes must be too."""
    group = CONTROLLER / f"emberd-test-{os.getpid()}"
    with ExitStack() as stack:
        stack.enter_context(_swap_file(folder / "swap", swap_bytes))
        group.mkdir()
        stack.callback(group.rmdir)
        yield Group(group)


@contextmanager
def _swap_file(path: Path, size_bytes: int) -> Iterator[None]:
    with path.open("wb") as file:
        file.write(bytes(size_bytes))  # a swap file must not have holes
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
