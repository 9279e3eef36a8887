"""The model's file as a doctor sees it: whether it can be read, is whole, and where it lies."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from emberd.core.errors import ModelError
from emberd.core.gguf import split_names
from emberd.core.health_facts import ModelHealth, ModelProblem, Volume
from emberd.host.model_file import check_model, read_header_of

if TYPE_CHECKING:
    from collections.abc import Iterable

_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "webdav", "9p", "ceph", "fuse.sshfs", "fuse.rclone"}
)
_EXTERNAL = ("/Volumes/", "/media/", "/run/media/")
_SF_DATALESS = 0x40000000
"""st_flags of a file whose content is elsewhere (xnu, bsd/sys/stat.h)."""
_PROTECTED = ("Documents", "Desktop", "Downloads", "Library/Mobile Documents")
_SYNCED = ("Library/Mobile Documents", "Library/CloudStorage", "Dropbox", "OneDrive", "Google Drive", "Nextcloud")
"""Where the services put their folders by default; macOS has had Library/CloudStorage since 12.3."""
_AGAIN = "Download it again."


def examine_model(text: str, system: str) -> ModelHealth:
    """Open, read and measure the model; blocks on the disk.

    Args:
        text: model.path.
        system: darwin or linux.
    """
    try:
        path = check_model(text)
        weights = _measure(path)
    except _Cut as cut:
        return _where(Path(text), system, ModelHealth(text, ModelProblem.TRUNCATED, str(cut), _AGAIN))
    except ModelError as error:
        problem = _problem(text, error)
        return _where(Path(text), system, ModelHealth(text, problem, error.message, error.remedy))
    return _where(path, system, ModelHealth(str(path), weights_bytes=weights))


class _Cut(Exception):
    """A file is shorter than its header says."""


def _measure(path: Path) -> int:
    """Return the bytes of the weights in all parts.

    Raises:
        ModelError: a part is missing or broken.
        _Cut: a part is cut off.
    """
    weights = 0
    for name in split_names(path.name):
        part = path.with_name(name)
        header, file_bytes = read_header_of(part)
        if file_bytes < header.least_bytes:
            raise _Cut(f"{part} has {file_bytes:,} bytes, its header tells of {header.least_bytes:,}")
        weights += file_bytes - header.data_offset
    return weights


def _problem(text: str, error: ModelError) -> ModelProblem:
    if not text:
        return ModelProblem.NOT_SET
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        return ModelProblem.PART_MISSING if Path(text).expanduser().exists() else ModelProblem.MISSING
    if isinstance(cause, IsADirectoryError):
        return ModelProblem.FOLDER
    if isinstance(cause, PermissionError):
        return ModelProblem.DENIED if cause.errno == errno.EPERM else ModelProblem.UNREADABLE
    if isinstance(cause, OSError):
        return ModelProblem.BROKEN_VOLUME
    return ModelProblem.TRUNCATED if "truncated" in error.message else ModelProblem.NOT_GGUF


def _where(path: Path, system: str, health: ModelHealth) -> ModelHealth:
    """Add what the place of the file means, as far as the path leads anywhere."""
    path = path.expanduser()
    if not health.path:
        return health
    flags = None
    try:
        flags = getattr(path.stat(), "st_flags", None)
        path = path.resolve()
    except OSError:
        pass
    return ModelHealth(
        health.path,
        health.problem,
        health.message,
        health.remedy,
        health.weights_bytes,
        volume_of(path, _mounts()),
        None if flags is None else bool(flags & _SF_DATALESS),
        is_protected(path, Path.home()) if system == "darwin" else None,
        is_synced(path, Path.home()),
    )


def _mounts() -> list[tuple[str, str]]:
    try:
        return [(each.mountpoint, each.fstype) for each in psutil.disk_partitions(all=True)]
    except (OSError, psutil.Error):
        return []


def volume_of(path: Path, mounts: Iterable[tuple[str, str]]) -> Volume | None:
    """Return what kind of volume a path lies on; None if no mount is known.

    Args:
        path: absolute, without links.
        mounts: mount point and type of file system of each.
    """
    above = [(len(point), point, kind) for point, kind in mounts if path.is_relative_to(point)]
    if not above:
        return None
    _, point, kind = max(above)
    if kind.lower() in _NETWORK:
        return Volume.NETWORK
    return Volume.EXTERNAL if f"{point}/".startswith(_EXTERNAL) else Volume.INTERNAL


def is_protected(path: Path, home: Path) -> bool:
    """Tell whether macOS' privacy control guards the folder (TCC)."""
    return any(path.is_relative_to(home / folder) for folder in _PROTECTED)


def is_synced(path: Path, home: Path) -> bool:
    """Tell whether a cloud service keeps the folder in step, by the services' own names for it."""
    return any(path.is_relative_to(home / folder) for folder in _SYNCED)


def changed_after_start_s(path: Path, started_at: float) -> float | None:
    """Return by how much a file was written after a time of the wall clock, None if it cannot be asked."""
    try:
        return path.stat().st_mtime - started_at
    except OSError:
        return None
