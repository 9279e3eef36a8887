"""Looks at the model's file, the engine's program and its log; starts nothing."""

from __future__ import annotations

import errno
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from emberd.core.errors import ModelError
from emberd.core.gguf import split_names
from emberd.doctor.facts import EngineHealth, EngineProblem, ModelHealth, ModelProblem, Volume
from emberd.host.model_file import check_model, read_header_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emberd.core.ports import Host

# --- the model's file ---------------------------------------------------------------------------------------------

_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "webdav", "9p", "ceph", "fuse.sshfs", "fuse.rclone"}
)
_EXTERNAL = ("/Volumes/", "/media/", "/run/media/")
_SF_DATALESS = 0x40000000
"""In st_flags of a file whose content is elsewhere (xnu, bsd/sys/stat.h)."""
_PROTECTED = ("Documents", "Desktop", "Downloads", "Library/Mobile Documents")
"""Folders that macOS' privacy control protects (TCC)."""
_SYNCED = ("Library/Mobile Documents", "Library/CloudStorage", "Dropbox", "OneDrive", "Google Drive", "Nextcloud")
"""Where cloud services put their folders by default; macOS has had Library/CloudStorage since 12.3."""


def examine_model(text: str, system: str) -> ModelHealth:
    """Open, read and measure the model in `model.path`; blocks on the disk."""
    try:
        path = check_model(text)
        found = ModelHealth(str(path), weights_bytes=_measure(path))
    except _Cut as cut:
        found = ModelHealth(text, ModelProblem.TRUNCATED, str(cut), "Download it again.")
    except ModelError as error:
        found = ModelHealth(text, _problem(text, error), error.message, error.remedy)
    return _where(found, system) if found.path else found


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
    words = {
        "the model is part": ModelProblem.NOT_FIRST,
        "not a model, but": ModelProblem.COMPANION,
        "the model is truncated": ModelProblem.TRUNCATED,
    }
    return next((found for begin, found in words.items() if error.message.startswith(begin)), ModelProblem.NOT_GGUF)


def _where(found: ModelHealth, system: str) -> ModelHealth:
    """Add facts on the file's place, if it exists."""
    path, flags = Path(found.path).expanduser(), None
    try:
        flags = getattr(path.stat(), "st_flags", None)
        path = path.resolve()
    except OSError:
        pass
    return replace(
        found,
        volume=volume_of(path, _mounts()),
        is_dataless=None if flags is None else bool(flags & _SF_DATALESS),
        is_in_protected_folder=is_protected(path, Path.home()) if system == "darwin" else None,
        is_synced=is_synced(path, Path.home()),
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
    """Return True if macOS denies background programs this folder."""
    return any(path.is_relative_to(home / folder) for folder in _PROTECTED)


def is_synced(path: Path, home: Path) -> bool:
    """Return True if a cloud service syncs the folder, by the usual folder names."""
    return any(path.is_relative_to(home / folder) for folder in _SYNCED)


def changed_after_start_s(path: Path, started_at: float) -> float | None:
    """Return how long after a time of the wall clock a file was written, None if unknown."""
    try:
        return path.stat().st_mtime - started_at
    except OSError:
        return None


# --- the engine's program -----------------------------------------------------------------------------------------

_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64"}
"""ELF e_machine (elf.h)."""
_MACH_O = {0x01000007: "x86_64", 0x0100000C: "arm64"}
"""Mach-O cputype (<mach/machine.h>)."""
_HEAD_BYTES = 4096
_MOST_SLICES = 16
_NOEXEC = getattr(os, "ST_NOEXEC", 0)
"""Of statvfs(3), on Linux; macOS has no such flag."""


def look_at_program(path: Path, host: Host, machine: str | None) -> EngineHealth:
    """Judge an engine's file: a program, a folder with a checkout, or its script.

    `machine` is the computer's processor in uname's words, None if unknown.
    """
    if not path.exists():
        return EngineHealth(EngineProblem.MISSING, f"{path} does not exist", "Set engine.path.")
    if path.is_dir() or path.suffix == ".py":
        return EngineHealth()
    return _may_execute(path, host) or _is_of_this_processor(path, machine) or EngineHealth()


def _may_execute(path: Path, host: Host) -> EngineHealth | None:
    if os.statvfs(path).f_flag & _NOEXEC:
        words = f"{path} is on a volume that is mounted noexec"
        return EngineHealth(EngineProblem.NOT_EXECUTABLE, words, "Copy it to another volume and set engine.path.")
    if not os.access(path, os.X_OK):
        return EngineHealth(EngineProblem.NOT_EXECUTABLE, f"{path} is not executable", f"chmod +x {path}")
    if host.quarantine(path):
        words = (
            f"{path} was downloaded and not approved: started in the background it would be killed without a word"
        )
        return EngineHealth(EngineProblem.QUARANTINED, words, f"xattr -d com.apple.quarantine {path}")
    return None


def _is_of_this_processor(path: Path, machine: str | None) -> EngineHealth | None:
    built_for = machines_of(path)
    if not built_for or not machine or machine in built_for:
        return None
    words = f"{path} is built for {' and '.join(sorted(built_for))}, this computer is {machine}"
    if machine == "arm64":
        words += ": at best it runs under Rosetta, without Metal"
    return EngineHealth(EngineProblem.WRONG_ARCHITECTURE, words, "Download the build for this computer.")


def machines_of(path: Path) -> frozenset[str]:
    """Return the processors for which a program is built, in uname's words; none if it is neither ELF nor Mach-O.

    Layouts: elf(5); <mach-o/loader.h>, <mach-o/fat.h>.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    found: set[str | None] = set()
    if head[:4] == b"\x7fELF" and len(head) > 20:  # noqa: PLR2004  # e_machine's end
        found = {_MACHINES.get(struct.unpack_from("<H", head, 18)[0])}
    elif head[:4] == b"\xcf\xfa\xed\xfe":
        found = {_MACH_O.get(struct.unpack_from("<I", head, 4)[0])}
    elif head[:4] == b"\xca\xfe\xba\xbe":
        count = min(struct.unpack_from(">I", head, 4)[0], _MOST_SLICES)
        found = {_MACH_O.get(struct.unpack_from(">I", head, 8 + 20 * number)[0]) for number in range(count)}
    return frozenset(each for each in found if each)


# --- the engine's log ---------------------------------------------------------------------------------------------

_OFFLOADED = re.compile(r"offloaded (\d+)/\d+ layers to GPU")
"""llama.cpp, src/llama-model.cpp; a build that supports no GPU does not print it."""
_VERSION = re.compile(r"Welcome to KoboldCpp - Version (\S+)")
_LOADING = "llama_model_loader: loaded meta data"
_LOADED = "load_tensors:"
_NO_METAL = "failed to initialize Metal backend"
"""KoboldCPP issues 744 and 964."""


def printed_version(log: str) -> str:
    """Return the last version that KoboldCPP printed, empty if none."""
    found = _VERSION.findall(log)
    return str(found[-1]) if found else ""


def last_start(log: str) -> str:
    """Return the part of the engine's log since its last start, all of it if that is not found."""
    before, _, after = log.rpartition(_LOADING)
    version = printed_version(before)
    return f"Welcome to KoboldCpp - Version {version}\n{after}" if version else after


def has_gpu(log: str, *, is_mac: bool) -> bool | None:
    """Return True if the log of a start says that the GPU is used, None if nothing was loaded."""
    offloaded = _OFFLOADED.findall(log)
    if _NO_METAL in log:
        return False
    if offloaded:
        return int(offloaded[-1]) > 0
    return False if is_mac and _LOADED in log else None


def is_mapped(log: str) -> bool | None:
    """Return True if the weights are pages of the file, None if the log does not tell (1.76 has no such line)."""
    found = re.findall(r"\(mmap = (true|false)\)", log)
    return found[-1] == "true" if found else None
