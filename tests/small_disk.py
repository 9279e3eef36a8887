"""A small file system for tests and campaigns: to fill, to make read-only, to take away (Linux, root)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

CAN_MOUNT = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None


class SmallDisk:
    """A tmpfs on a folder.

    Args:
        folder: where it is mounted; made if it is not there.
        options: of mount(8) for a tmpfs, the size among them.

    Raises:
        OSError: this user may not mount here (a container).
    """

    def __init__(self, folder: Path, options: str = "size=16m,nr_inodes=200") -> None:
        self.folder = folder
        self._options = options
        folder.mkdir(exist_ok=True)
        self.mount()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.take_away()

    def mount(self) -> None:
        """Mount it, empty."""
        _run("mount", "-t", "tmpfs", "-o", self._options, "tmpfs", str(self.folder))

    def take_away(self) -> None:
        """Unmount it, whoever uses it."""
        with contextlib.suppress(OSError):
            _run("umount", "-l", str(self.folder))

    def remount(self, options: str) -> None:
        """Change how it is mounted: `ro`, `rw`. A file that is open for writing keeps a tmpfs from `ro`."""
        _run("mount", "-o", f"remount,{options}", str(self.folder))

    def fill(self) -> None:
        """Take the last byte."""
        with (self.folder / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(1 << 16))
        with (self.folder / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))

    def fill_inodes(self) -> None:
        """Take the last inode."""
        (self.folder / "many").mkdir(exist_ok=True)
        with contextlib.suppress(OSError):
            for number in range(1_000_000):
                (self.folder / "many" / str(number)).touch()

    def make_room(self) -> None:
        """Give back what `fill` and `fill_inodes` have taken."""
        (self.folder / "filler").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "many", ignore_errors=True)


def _run(program: str, *arguments: str) -> None:
    done = subprocess.run(
        [shutil.which(program) or program, *arguments], check=False, capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        raise OSError(f"{program}: {done.stderr.strip()}")
