"""A model's files: can an engine of this user read them, and what do their headers say? No weights are touched."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.core.engine_files import FileOnDisk, Role, is_address
from emberd.core.errors import ConfigError, ModelError
from emberd.core.gguf import MAGIC, read_header, read_kind, split_names, split_place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from emberd.core.engine_files import NamedFile
    from emberd.core.gguf import GgufHeader, TensorSpan

_LEAST_BYTES = 24
"""magic, version, tensor count, metadata count: the fixed part of a GGUF header."""
_COMPANIONS = {
    "adapter": ("an adapter (LoRA)", ", and name it by --lora in engine.extra_args"),
    "mmproj": ("a projector", ", and name it by --mmproj in engine.extra_args"),
    "imatrix": ("an importance matrix", ""),
}
"""general.type, except for models, and what to do with it."""
_BUFFER_BYTES = 1024 * 1024
_linux_os: Any = os
"""typeshed knows posix_fadvise on Linux only."""
_F_RDAHEAD = 45
"""macOS: read-ahead of one descriptor on or off (fcntl(2); xnu, bsd/sys/fcntl.h)."""


def check_model(text: str) -> Path:
    """Return the model's absolute path.

    The file is opened and read, not only looked at: macOS lets an agent `stat` a file in a protected folder and
    refuses the read.

    Raises:
        ModelError: missing, a folder, unreadable, not a GGUF, a later part of a split model or one whose parts are
            not all there, or a file that goes with a model and is none.
    """
    if not text:
        raise ModelError("no model is set", "Set model.path to the GGUF file.")
    path = Path(text).expanduser().absolute()
    try:
        with path.open("rb") as file:
            head = file.read(_LEAST_BYTES)
    except FileNotFoundError as error:
        raise ModelError(f"model not found: {path}", "Set model.path to the GGUF file.") from error
    except IsADirectoryError as error:
        raise ModelError(
            f"the model is a folder: {path}",
            "Set model.path to the GGUF file in it (the first part, if split).",
        ) from error
    except PermissionError as error:
        raise ModelError(f"cannot read the model: {path} ({error.strerror})", _permission_remedy(error)) from error
    except OSError as error:
        raise ModelError(f"cannot read the model: {path} ({error.strerror})", "Is its volume mounted?") from error
    if not head.startswith(MAGIC):
        raise ModelError(
            f"not a GGUF model: {path} (it begins with {head[:4]!r})",
            "Download it again, or convert it; a page saved instead of the file begins with '<'.",
        )
    if len(head) < _LEAST_BYTES:
        raise ModelError(f"the model is truncated: {path} ({len(head)} bytes)", "Download it again.")
    _check_parts(path)
    _check_kind(path)
    return path


def _check_parts(path: Path) -> None:
    """Refuse a split model that no engine can load: they look for the other parts by the name of the first."""
    place = split_place(path.name)
    if place is None:
        return
    names = split_names(path.name)
    if place[0] != 1:
        raise ModelError(
            f"the model is part {place[0]} of {place[1]}: {path}", f"Set model.path to the first part, {names[0]}."
        )
    missing = [name for name in names if not path.with_name(name).exists()]
    if not missing:
        return
    is_link = any(path.with_name(name).is_symlink() for name in missing)
    why = "what its link points to is gone" if is_link else "all parts belong side by side"
    raise ModelError(
        f"the model has {place[1]} parts, and {len(missing)} are missing in {path.parent}: {', '.join(missing)}",
        f"Download it again: {why}.",
    ) from FileNotFoundError(missing[0])


def _check_kind(path: Path) -> None:
    """Refuse what goes with a model: its kind stands in the header (ggml, docs/gguf.md, general.type)."""
    with path.open("rb") as file:
        _turn_off_read_ahead(file.fileno())
        try:
            said = read_kind(file.read, str(path))
        except ModelError:
            return  # the engine names what is wrong with it
    named = said.get("general.type")
    kind = "mmproj" if said.get("general.architecture") == "clip" else named
    if isinstance(kind, str) and kind in _COMPANIONS:
        what, option = _COMPANIONS[kind]
        raise ModelError(
            f"not a model, but {what}: {path}",
            f"Set model.path to the model that it belongs to{option}.",
        )


def check_files(files: Iterable[NamedFile], source: str) -> None:
    """Refuse a file or folder that the engine could not read.

    Args:
        files: what its options name; addresses are for the engine to download.
        source: where the options stand, for the remedy.

    Raises:
        ConfigError: naming every file that is missing or unreadable.
    """
    problems = []
    for each in files:
        if is_address(each.path):
            continue
        path = Path(each.path).expanduser().absolute()
        try:
            if each.role is Role.FOLDER or (path.is_dir() and each.role is Role.IMAGE):
                with os.scandir(path):  # --sdlora takes a folder, too (KoboldCPP 1.115)
                    continue
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            why = "not found" if isinstance(error, FileNotFoundError) else error.strerror
            problems.append(f"{each.option} {path}: {why}")
    if problems:
        raise ConfigError("; ".join(problems), f"Mend the path in {source}, or its permissions.")


def look_up(files: Iterable[NamedFile]) -> tuple[FileOnDisk, ...]:
    """Return the files as they lie on the disk, all parts of a split model."""
    found = []
    for each in files:
        if is_address(each.path):
            continue
        first = Path(each.path).expanduser().absolute()
        for path in (first.with_name(name) for name in split_names(first.name)):
            try:
                facts = path.stat()
            except OSError:
                found.append(FileOnDisk(str(path), each.role, str(path), None, None))
                continue
            real, identity = os.path.realpath(path), (facts.st_dev, facts.st_ino)
            found.append(FileOnDisk(str(path), each.role, real, identity, facts.st_size))
    return tuple(found)


def _permission_remedy(error: PermissionError) -> str:
    """Tell a privacy denial (EPERM) from file permissions (EACCES)."""
    if sys.platform == "darwin" and error.errno == errno.EPERM:
        return (
            "macOS denies background programs this folder (Documents, Desktop, Downloads, iCloud Drive, external "
            "volumes). Move the model, say to ~/Models, or give Python Full Disk Access in System Settings."
        )
    return "Give yourself read permission: chmod u+r on the file, and x on the folders above it."


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a model's files say.

    Attributes:
        weights_bytes: the tensors' data in all parts; the headers before it are unmapped after loading.
        metadata: the first part's numbers.
        vocabulary_tokens: size of the vocabulary, None if unknown.
    """

    weights_bytes: int
    metadata: Mapping[str, Any]
    vocabulary_tokens: int | None


def read_spans(path: Path) -> tuple[TensorSpan, ...]:
    """Return where the tensors of one file lie.

    Raises:
        ModelError: the file is missing, unreadable or no GGUF.
    """
    header, file_bytes = read_header_of(path)
    return header.spans(file_bytes)


def read_header_of(path: Path) -> tuple[GgufHeader, int]:
    """Return the header of one file, and the file's size in bytes.

    Raises:
        ModelError: the file is missing, unreadable or no GGUF.
    """
    try:
        with path.open("rb", buffering=_BUFFER_BYTES) as file:
            _turn_off_read_ahead(file.fileno())
            return read_header(file.read, str(path)), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror}", "All parts of a model belong side by side."
        ) from error


def _turn_off_read_ahead(descriptor: int) -> None:
    """Read the header and nothing behind it: read-ahead would bring in weights, 16 MiB of a cold model."""
    with contextlib.suppress(OSError):
        if hasattr(os, "posix_fadvise"):
            _linux_os.posix_fadvise(descriptor, 0, 0, _linux_os.POSIX_FADV_RANDOM)
        else:
            fcntl.fcntl(descriptor, _F_RDAHEAD, 0)


def read_model_info(path: Path) -> ModelInfo:
    """Read the headers of a model, all parts of a split one.

    Blocks for some 0.1 s on a vocabulary of 262,144 tokens.

    Raises:
        ModelError: a part is missing, unreadable or broken.
    """
    weights = 0
    first = None
    for name in split_names(path.name):
        header, file_bytes = read_header_of(path.with_name(name))
        weights += max(file_bytes - header.data_offset, 0)
        first = first or header
    if first is None:
        raise ModelError(f"no model at {path}", "Set model.path.")
    return ModelInfo(weights, first.metadata, first.vocabulary_tokens)
