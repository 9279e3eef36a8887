"""The one reader of the owner's wishes for the engine: engine.extra_args, the .kcpps file, LLAMA_ARG_* variables.

KoboldCPP's options are argparse's, with llama.cpp's spellings beside its own from 1.102 on (koboldcpp.py); a key of
a .kcpps file is the option's name. llama-server's are those of common/arg.cpp (build 11434), each with a variable;
an argument wins over it, but keys add up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emberd.core.engine_files import OPTIONS, PATHS, NamedFile, Role, is_inline, is_scale, listed
from emberd.core.gguf import F16_BYTES
from emberd.core.wishes import OwnerWishes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

API_KEY, API_KEY_VARIABLE = "--api-key", "LLAMA_API_KEY"
API_KEY_FILE, API_KEY_FILE_VARIABLE = "--api-key-file", "LLAMA_ARG_API_KEY_FILE"
PROMPT_CACHE = "--cache-ram"
PASSWORD_VARIABLE = "KCPP_PASSWORD"  # noqa: S105  # its name
"""What KoboldCPP takes for --password (1.115)."""
_OFF = frozenset({"", "0", "-1", "false", "none", "off", "disabled", "no"})
_NUMBER_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 1.0625,
    "q5_1": 0.75,
    "q5_0": 0.6875,
    "q4_1": 0.625,
    "q4_0": 0.5625,
    "iq4_nl": 0.5625,
    # KoboldCPP's --quantkv until 1.113
    "0": 2.0,
    "1": 1.0625,
    "2": 0.5625,
}
"""Bytes of one number in each type (ggml/src/ggml-common.h: a block of 32 numbers and its scale)."""


@dataclass(frozen=True, slots=True)
class _Names:
    """How one kind of engine spells each question."""

    lock: tuple[str, ...]
    map: tuple[str, ...]
    copy: tuple[str, ...]
    context: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    slots: tuple[str, ...]
    unload: tuple[str, ...]
    load_mode: tuple[str, ...] = ()
    queue: tuple[str, ...] = ()
    one_slot: tuple[str, ...] = ()
    reply: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    flash: tuple[str, ...] = ()
    no_flash: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    no_windows: tuple[str, ...] = ()
    fit: tuple[str, ...] = ()
    fit_context: tuple[str, ...] = ()
    prompt_cache: tuple[str, ...] = ()
    switch: tuple[str, ...] = ()
    switch_folder: tuple[str, ...] = ()
    switch_models: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    rerank: tuple[str, ...] = ()
    api_key: tuple[str, ...] = ()
    api_key_file: tuple[str, ...] = ()
    password: tuple[str, ...] = ()


_KOBOLDCPP = _Names(
    lock=("--usemlock", "--mlock"),
    map=("--usemmap",),
    copy=("--nommap", "--no-mmap"),
    context=("--contextsize", "--ctx-size", "-c"),
    keys=("--quantkv",),
    values=("--quantkv",),
    slots=("--parallelrequests", "--continuous-batching", "--contbatch"),
    queue=("--multiuser",),
    one_slot=("--smartcontext", "--draftmodel", "--model-draft", "-md", "--enableguidance"),
    unload=("--adminunloadtimeout", "--autoswapmode"),
    reply=("--defaultgenamt",),
    rename=("--hordemodelname",),
    flash=("--flashattention", "--flash-attn", "-fa"),
    no_flash=("--noflashattention", "--no-flash-attn", "-nofa"),
    windows=("--useswa",),
    no_windows=("--noswa", "--swa-full"),
    switch=("--admin", "--routermode", "--autoswapmode"),
    switch_folder=("--admindir",),
    switch_models=("--admintextmodelsdir",),
    missing=("--ignoremissing",),
    password=("--password",),
)
_LLAMA_SERVER = _Names(
    lock=("--mlock",),
    map=("--mmap",),
    copy=("--no-mmap",),
    load_mode=("--load-mode", "-lm"),
    context=("--ctx-size", "--context-size", "-c"),
    keys=("--cache-type-k", "-ctk"),
    values=("--cache-type-v", "-ctv"),
    slots=("--parallel", "-np"),
    unload=("--sleep-idle-seconds",),
    no_windows=("--swa-full",),
    fit=("--fit", "-fit"),
    fit_context=("--fit-ctx", "-fitc"),
    prompt_cache=(PROMPT_CACHE, "-cram"),
    embeddings=("--embeddings", "--embedding"),
    rerank=("--reranking", "--rerank"),
    api_key=(API_KEY,),
    api_key_file=(API_KEY_FILE,),
)
_VARIABLES = {
    "LLAMA_ARG_MLOCK": "--mlock",
    "LLAMA_ARG_MMAP": "--mmap",
    "LLAMA_ARG_NO_MMAP": "--no-mmap",
    "LLAMA_ARG_LOAD_MODE": "--load-mode",
    "LLAMA_ARG_CTX_SIZE": "--ctx-size",
    "LLAMA_ARG_CACHE_TYPE_K": "--cache-type-k",
    "LLAMA_ARG_CACHE_TYPE_V": "--cache-type-v",
    "LLAMA_ARG_N_PARALLEL": "--parallel",
    "LLAMA_ARG_MMPROJ": "--mmproj",
    "LLAMA_ARG_MODEL_DRAFT": "--model-draft",
    "LLAMA_ARG_SPEC_DRAFT_MODEL": "--spec-draft-model",
    "LLAMA_ARG_CHAT_TEMPLATE_FILE": "--chat-template-file",
    "LLAMA_ARG_MCP_SERVERS_CONFIG": "--mcp-servers-config",
    "LLAMA_ARG_STATIC_PATH": "--path",
    "LLAMA_ARG_UI_CONFIG_FILE": "--ui-config-file",
    "LLAMA_ARG_VIDEO_FFMPEG_DIR": "--video-ffmpeg-dir",
    "LLAMA_ARG_FIT": "--fit",
    "LLAMA_ARG_FIT_CTX": "--fit-ctx",
    "LLAMA_ARG_SWA_FULL": "--swa-full",
    "LLAMA_ARG_CACHE_RAM": PROMPT_CACHE,
    "LLAMA_ARG_EMBEDDINGS": "--embeddings",
    "LLAMA_ARG_RERANKING": "--reranking",
    API_KEY_VARIABLE: API_KEY,
    API_KEY_FILE_VARIABLE: API_KEY_FILE,
}

FIT_CONTEXT_TOKENS = 4096
"""llama.cpp, common/common.h, `fit_params_min_ctx`."""
_REPEATED = frozenset({"--lora", "--lora-scaled", "--control-vector", "--control-vector-scaled"})
_SPELLINGS = {option: role.value for option, role in OPTIONS.items() if role in {Role.PROJECTOR, Role.DRAFT}}
"""Options of which only the last one counts, whatever its spelling."""
_SCALE = re.compile(r":-?[\d.]+$")

_Given = tuple[str, tuple[str, ...]]
"""An option and its values."""


def of_koboldcpp(extra_args: Sequence[str], file: Mapping[str, object]) -> OwnerWishes:
    """Return the wishes for KoboldCPP; an argument wins over the file, as in the merged one."""
    return _answer(_KOBOLDCPP, [*_of_file(file), *given(extra_args)])


def of_llama_server(extra_args: Sequence[str], environment: Mapping[str, str]) -> OwnerWishes:
    """Return the wishes for llama-server."""
    said = [(option, (environment[name],)) for name, option in _VARIABLES.items() if environment.get(name)]
    return _answer(_LLAMA_SERVER, [*said, *given(extra_args)])


def given(words: Sequence[str]) -> list[_Given]:
    """Split a command line into options and their values: `--x y`, `--x=y`, `--x y z`, `-x y`."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    return [(name, tuple(values)) for name, values in found]


def without(words: Sequence[str], option: str) -> tuple[str, ...]:
    """Return a command line without an option and its values."""
    kept, is_it = list[str](), False
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            is_it = word.partition("=")[0] == option
        if not is_it:
            kept.append(word)
    return tuple(kept)


def _of_file(file: Mapping[str, object]) -> Iterator[_Given]:
    """Yield what a .kcpps file says; an exported one has every key, most of them empty."""
    for key, value in file.items():
        values = value if isinstance(value, list) else [value]
        said = tuple("" if each is True else str(each) for each in values if each not in (None, False, ""))
        if said:
            yield f"--{key}", said if said != ("",) else ()


def _files(said: Sequence[_Given]) -> Iterator[NamedFile]:
    """Yield the files that options name; of one that takes a single file the last word counts."""
    last = {_SPELLINGS.get(option, option): number for number, (option, _) in enumerate(said)}
    for number, (option, values) in enumerate(said):
        is_old = option not in _REPEATED and last[_SPELLINGS.get(option, option)] != number
        if option not in OPTIONS or is_old:
            continue
        files = (value for place, value in enumerate(values) if not is_scale(value, place))
        for part in (part for value in files for part in listed(value)):
            path = _SCALE.sub("", part) if option.endswith("-scaled") else part
            if path:
                yield NamedFile(path, OPTIONS[option], option)


def _paths(said: Sequence[_Given]) -> Iterator[NamedFile]:
    """Yield what options name and the engine reads, besides weights."""
    for option, values in said:
        role = PATHS.get(option, Role.MADE)
        for value in values[:1]:
            if role is Role.MADE or not value or is_inline(value):
                continue
            adds_suffix = option == "--mcpfile" and not value.lower().endswith(".json")  # koboldcpp.py
            yield NamedFile(f"{value}.json" if adds_suffix else value, role, option)


def _answer(names: _Names, said: Sequence[_Given]) -> OwnerWishes:
    """Answer every question; the last word counts."""

    def last(*options: str) -> _Given | None:
        return next((each for each in reversed(said) if each[0] in options), None)

    def value(*options: str) -> str:
        found = last(*options)
        return found[1][0] if found and found[1] else ""

    def is_asked(*options: str) -> bool | None:
        found = last(*options)
        return None if found is None else not found[1] or found[1][0].lower() not in _OFF

    def count(*options: str) -> int | None:
        text = value(*options)
        return int(text) if text.isdecimal() and int(text) else None

    def parts(*options: str) -> tuple[str, ...]:
        found = (
            part for option, values in said if option in options for each in values for part in each.split(",")
        )
        return tuple(part for part in found if part)

    def switch(on: tuple[str, ...], off: tuple[str, ...]) -> bool | None:
        found = last(*on, *off)
        return None if found is None else bool(is_asked(found[0])) is (found[0] in on)

    fits = bool(names.fit) and is_asked(*names.fit) is not False and last(*names.context) is None
    prompt_cache = value(*names.prompt_cache)
    can_switch = any(is_asked(name) for name in names.switch)
    mode = value(*names.load_mode)
    maps = switch(names.map, names.copy)
    locks = is_asked(*names.lock)
    if mode and mode != "auto":
        locks, maps = "mlock" in mode or locks, "mmap" in mode
    return OwnerWishes(
        locks=locks,
        maps=maps,
        context_tokens=count(*names.context),
        least_context_tokens=(count(*names.fit_context) or FIT_CONTEXT_TOKENS) if fits else None,
        key_bytes=_NUMBER_BYTES.get(value(*names.keys).lower(), F16_BYTES),
        value_bytes=_NUMBER_BYTES.get(value(*names.values).lower(), F16_BYTES),
        has_flash_attention=switch(names.flash, names.no_flash),
        has_windows=switch(names.windows, names.no_windows),
        prompt_cache_mib=int(prompt_cache) if re.fullmatch(r"-?\d+", prompt_cache) else None,
        slots=None if any(is_asked(name) for name in names.one_slot) else count(*names.slots),
        queue=count(*names.queue),
        unloads_by=next((name for name in names.unload if is_asked(name)), ""),
        files=tuple(_files(said)),
        paths=tuple(each for each in _paths(said) if can_switch or each.option not in names.switch_folder),
        reply_tokens=count(*names.reply),
        serves="rerank" if is_asked(*names.rerank) else "embeddings" if is_asked(*names.embeddings) else "",
        is_renamed=bool(is_asked(*names.rename)),
        can_switch=can_switch,
        switch_folder=value(*names.switch_folder),
        switch_models=value(*names.switch_models),
        ignores_missing=bool(is_asked(*names.missing)),
        api_keys=parts(*names.api_key),
        api_key_files=tuple(values[0] for option, values in said if option in names.api_key_file and values),
        password=value(*names.password),
    )
