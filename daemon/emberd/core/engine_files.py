"""The files that an engine works with: what its options name, and what its processes really map. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from emberd.core.settings import Settings


class Role(Enum):
    """What a file is to the engine."""

    MODEL = "model"
    PROJECTOR = "projector"
    DRAFT = "draft"
    ADAPTER = "adapter"
    CONTROL_VECTOR = "control_vector"
    EMBEDDINGS = "embeddings"
    SPEECH = "speech"
    VOICE = "voice"
    IMAGE = "image"
    MUSIC = "music"
    TEXT = "text"
    """Read, and no weights: a template, a grammar, a list of servers."""
    FOLDER = "folder"
    """It must be there."""
    MADE = "made"
    """A file or folder that the engine writes, and makes if it is not there."""
    OTHER = "other"
    """Mapped, and named by no option that emberd knows."""


OPTIONS: Mapping[str, Role] = {
    "--mmproj": Role.PROJECTOR,
    "-mm": Role.PROJECTOR,
    "--draftmodel": Role.DRAFT,
    "--model-draft": Role.DRAFT,
    "-md": Role.DRAFT,
    "--spec-draft-model": Role.DRAFT,
    "--lora": Role.ADAPTER,
    "--lora-scaled": Role.ADAPTER,
    "--control-vector": Role.CONTROL_VECTOR,
    "--control-vector-scaled": Role.CONTROL_VECTOR,
    "--embeddingsmodel": Role.EMBEDDINGS,
    "--whispermodel": Role.SPEECH,
    "--ttsmodel": Role.VOICE,
    "--ttswavtokenizer": Role.VOICE,
    "--model-vocoder": Role.VOICE,
    "-mv": Role.VOICE,
    **dict.fromkeys(
        (
            "--sdmodel",
            "--sdlora",
            "--sdvae",
            "--sdaudiovae",
            "--sdt5xxl",
            "--sdclip1",
            "--sdclip2",
            "--sdclipl",
            "--sdclipg",
            "--sdphotomaker",
            "--sdupscaler",
        ),
        Role.IMAGE,
    ),
    **dict.fromkeys(("--musicllm", "--musicembeddings", "--musicdiffusion", "--musicvae"), Role.MUSIC),
}
"""Options that name files with weights: KoboldCPP 1.76 to 1.115 (koboldcpp.py), llama-server (common/arg.cpp)."""
PATHS: Mapping[str, Role] = {
    **dict.fromkeys(
        (
            "--api-key-file",
            "--chat-template-file",
            "--grammar-file",
            "--jinjatemplate",
            "--json-schema-file",
            "-jf",
            "--lookup-cache-static",
            "-lcs",
            "--mcp-servers-config",
            "--mcpfile",
            "--models-preset",
            "--preloadstory",
            "--ui-config-file",
            "--webui-config-file",
        ),
        Role.TEXT,
    ),
    **dict.fromkeys(
        (
            "--admindir",
            "--admindocsdir",
            "--media-path",
            "--models-dir",
            "--path",
            "--slot-save-path",
            "--ttsdir",
            "--video-ffmpeg-dir",
        ),
        Role.FOLDER,
    ),
    **dict.fromkeys(
        (
            "--admindatadir",
            "--admintextmodelsdir",
            "--downloaddir",
            "--fsdir",
            "--tmpfsdir",
            "--log-file",
            "--lookup-cache-dynamic",
            "-lcd",
            "--savedatafile",
        ),
        Role.MADE,
    ),
}
"""Further options whose value can only be a path, in the same sources."""
_MODEL_KEYS = ("model", "model_param")
_ADDRESS = re.compile(r"https?://")
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)")
_INLINE = re.compile(r"\s*[{\[]")
"""KoboldCPP's --preloadstory also takes the story itself."""
_LISTED = re.compile(r"(.+?\.gguf(?::-?[\d.]+)?)(?:,|$)")
_WEIGHTS_SUFFIXES = (".gguf", ".ggml", ".bin", ".safetensors")
_LEAST_WEIGHTS_BYTES = 64 * 1024 * 1024
"""A mapped file of this size is weights even without a suffix, as in a download cache; libraries have one."""
_LIBRARY = re.compile(r"\.(so|dylib)(\.|$)|\.framework/|/dyld_shared_cache")
_DELETED = " (deleted)"
"""What the kernel appends to the path of a mapped file that has been removed or replaced (proc_pid_maps(5))."""


class Held(Enum):
    """How an engine holds a file."""

    MAPPED = "mapped"
    """Its pages are those of the file: they can be counted, touched and locked from outside."""
    COPIED = "copied"
    """It was read into the engine's own memory: only use, or the engine's own lock, keeps it there."""
    REPLACED = "replaced"
    """Another file has taken its place since; the engine maps the old one, which nothing else can reach."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file that an option names.

    Attributes:
        path: as it is named.
        role: what it is.
        option: the option, for messages.
    """

    path: str
    role: Role
    option: str = ""


@dataclass(frozen=True, slots=True)
class FileOnDisk:
    """A named file, as it lies on the disk.

    Attributes:
        path: absolute, as it is named.
        role: what it is.
        real_path: without symbolic links, as kernels name mapped files.
        identity: device and inode, None if the file is not there.
        size_bytes: its size, None if it is not there.
    """

    path: str
    role: Role
    real_path: str
    identity: tuple[int, int] | None
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A file that processes map.

    Attributes:
        path: as the kernel names it.
        identity: device and inode.
        size_bytes: the mapped part.
        locked_bytes: the part of it that mlock(2) keeps; None if it was not asked.
    """

    path: str
    identity: tuple[int, int]
    size_bytes: int
    locked_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class EngineFile:
    """One of the engine's files.

    Attributes:
        path: absolute.
        role: what it is to the engine.
        size_bytes: the file's size, None if unknown.
        held: how the engine holds it.
        locked_bytes: locked by the engine, None if unknown.
    """

    path: str
    role: Role
    size_bytes: int | None
    held: Held
    locked_bytes: int | None = None


def merge(named: Sequence[FileOnDisk], mapped: Sequence[MappedFile] | None) -> tuple[EngineFile, ...]:
    """Return the engine's files: those that are named, in order, then those that are only mapped.

    Args:
        named: what the engine's options name, the model's parts first.
        mapped: what its processes map (those that may be weights), None if they cannot be asked.
    """
    left = {each.path: each for each in _summed(mapped or ())}
    files: list[EngineFile] = []
    for each in named:
        if any(each.path == file.path for file in files):
            continue
        found = next((one for one in left.values() if _is_same(each, one)), None)
        replaced = None if found else left.get(each.real_path + _DELETED)
        held = Held.UNKNOWN if mapped is None else Held.COPIED
        if found or replaced:
            held = Held.MAPPED if found else Held.REPLACED
        used = found or replaced
        if used:
            del left[used.path]
        locked = used.locked_bytes if used else None
        files.append(EngineFile(each.path, each.role, each.size_bytes, held, locked))
    if is_model_mapped(files):
        # An engine maps a draft as it maps its model, or does not use it (llama-server without --spec-type).
        files = [
            replace(each, held=Held.UNKNOWN) if (each.role, each.held) == (Role.DRAFT, Held.COPIED) else each
            for each in files
        ]
    # A file that has gone cannot be touched, and one that no option names is not missed.
    others = (each for each in left.values() if _is_weights(each) and not each.path.endswith(_DELETED))
    files += (EngineFile(each.path, Role.OTHER, each.size_bytes, Held.MAPPED, each.locked_bytes) for each in others)
    return tuple(files)


def is_model_mapped(files: Sequence[EngineFile]) -> bool | None:
    """Return True if the model's parts are mapped, False if one is copied, None if unknown."""
    held = {each.held for each in files if each.role is Role.MODEL}
    return None if not held or Held.UNKNOWN in held else Held.COPIED not in held


def weights_of(mapped: Sequence[MappedFile]) -> tuple[str, ...]:
    """Return the paths of mapped files that are weights by their name or size."""
    return tuple(each.path for each in _summed(mapped) if _is_weights(each))


def touchable(files: Sequence[EngineFile]) -> tuple[str, ...]:
    """Return the paths of the mapped files."""
    return tuple(each.path for each in files if each.held is Held.MAPPED)


def _is_same(named: FileOnDisk, mapped: MappedFile) -> bool:
    """Compare by path or by inode: some file systems tell a mapping's device otherwise than a file's (btrfs)."""
    return named.real_path == mapped.path or (named.identity is not None and named.identity == mapped.identity)


def may_be_weights(path: str) -> bool:
    """Return True if a mapped file can be a model: it is no library, device or piece of memory."""
    return path.startswith("/") and not path.startswith("/dev/") and _LIBRARY.search(path) is None


def _is_weights(mapped: MappedFile) -> bool:
    return mapped.path.endswith(_WEIGHTS_SUFFIXES) or mapped.size_bytes >= _LEAST_WEIGHTS_BYTES


def _summed(mapped: Sequence[MappedFile]) -> Iterator[MappedFile]:
    """Yield each file once: a file is mapped in pieces, and by several processes."""
    sums: dict[str, MappedFile] = {}
    for each in mapped:
        before = sums.get(each.path)
        if before is not None:
            locked = (before.locked_bytes, each.locked_bytes)
            each = replace(  # noqa: PLW2901  # the sum so far
                each,
                size_bytes=before.size_bytes + each.size_bytes,
                locked_bytes=None if None in locked else sum(part or 0 for part in locked),
            )
        sums[each.path] = each
    yield from sums.values()


# --- paths in options ---------------------------------------------------------------------------------------------


def anchored(settings: Settings, folder: str, home: str) -> Settings:
    """Return the settings with absolute paths of model, engine and the engine's options.

    Args:
        settings: as they stand in the file.
        folder: absolute path of the file's folder, to which relative paths belong.
        home: what ~ stands for.
    """
    model, engine = settings.model, settings.engine
    is_path = "/" in engine.path  # else a name on PATH
    return replace(
        settings,
        model=replace(model, path=_anchored(model.path, folder, home)),
        engine=replace(
            engine,
            path=_anchored(engine.path, folder, home) if is_path else engine.path,
            kcpps=_anchored(engine.kcpps, folder, home),
            extra_args=anchored_arguments(engine.extra_args, folder, home),
        ),
    )


def anchored_arguments(words: Sequence[str], folder: str, home: str) -> tuple[str, ...]:
    """Return a command line with absolute paths; an option keeps its form: `--x y`, `--x=y`."""
    found, option, place = list[str](), "", 0
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            option, equals, value = word.partition("=")
            place = 1 if equals else 0
            found.append(f"{option}={_of_option(option, value, folder, home)}" if equals else word)
        else:
            found.append(word if is_scale(word, place) else _of_option(option, word, folder, home))
            place += 1
    return tuple(found)


def anchored_file(content: Mapping[str, object], folder: str, home: str) -> dict[str, object]:
    """Return what a .kcpps file says, with absolute paths."""

    def one(key: str, value: Any, place: int = 0) -> Any:
        if isinstance(value, list):
            return [one(key, each, number) for number, each in enumerate(value)]
        if not isinstance(value, str) or is_scale(value, place):
            return value
        return _anchored(value, folder, home) if key in _MODEL_KEYS else _of_option(f"--{key}", value, folder, home)

    return {key: one(key, value) for key, value in content.items()}


def _of_option(option: str, value: str, folder: str, home: str) -> str:
    if option in OPTIONS:
        return ",".join(_anchored(part, folder, home) for part in listed(value))
    if option in PATHS or value == "~" or value.startswith("~/"):
        return _anchored(value, folder, home)
    return value


def _anchored(path: str, folder: str, home: str) -> str:
    if not path or _ADDRESS.match(path) or is_inline(path):
        return path
    if path == "~" or path.startswith("~/"):
        path = home + path[1:]
    return path if path.startswith("/") else f"{folder.rstrip('/')}/{path.removeprefix('./')}"


def listed(value: str) -> list[str]:
    """Return the files in a value: llama-server takes several with commas between, each perhaps with a scale."""
    return _LISTED.findall(value) or [value]


def is_scale(value: str, place: int) -> bool:
    """Return True if a value behind a file is a number: older builds take `--lora-scaled FILE 0.5`.

    Args:
        value: one value of an option.
        place: how many values stand before it.
    """
    return place > 0 and _NUMBER.fullmatch(value) is not None


def is_inline(value: str) -> bool:
    """Return True if a value is JSON in place of a file that has it."""
    return _INLINE.match(value) is not None


def is_address(path: str) -> bool:
    """Return True if a file is to be downloaded."""
    return _ADDRESS.match(path) is not None
