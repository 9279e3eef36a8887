"""What the owner asks of the engine besides emberd's settings. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emberd.core.gguf import F16_BYTES

if TYPE_CHECKING:
    from emberd.core.engine_files import NamedFile
    from emberd.core.settings import LockPolicy, Settings

_KOBOLDCPP_CONTEXT = 8192
"""For a build whose help does not tell its default."""


@dataclass(frozen=True, slots=True)
class OwnerWishes:
    """What engine.extra_args, the .kcpps file and the engine's own variables say. None if they do not say it.

    The adapter fills in what its build does unless told, as far as it has asked the program.

    Attributes:
        locks: lock the model in memory.
        maps: map the model's file, or copy it.
        context_tokens: length of the context.
        default_context_tokens: length of the context unless told, 0 for the model's own.
        least_context_tokens: the engine itself shortens the context until it fits, to this at the least; None if
            it does not.
        key_bytes: bytes of one number in a key of the KV cache, more than a half if it is quantised.
        value_bytes: the same in a value.
        has_flash_attention: without it some engines do not quantise values.
        has_windows: layers with a sliding window keep no more than that.
        prompt_cache_mib: memory for copies of earlier prompts, besides the KV cache; negative for any.
        slots: conversations, or requests worked on at once.
        queue: requests that are taken while another one runs, that one counted.
        unloads_by: the option that unloads an idle model, empty for none.
        files: other files that are loaded: projectors, drafts, adapters, speech, images, embeddings.
        paths: files and folders that are read, and are no weights.
        reply_tokens: greatest reply where a request names none.
        serves: what it serves in place of text: embeddings or rerank; empty for text.
        is_renamed: the model is served under another name than its file's.
        can_switch: the engine may be told to serve another model.
        switch_folder: where what it can be switched to lies, empty for nowhere.
        switch_models: where further models for that lie, empty for nowhere.
        ignores_missing: files that are not there are left out.
        api_keys: what it wants of its clients, one of them as a bearer token. Never shown.
        api_key_files: files with further ones.
        password: KoboldCPP's one key, empty for none. Never shown.
    """

    locks: bool | None = None
    maps: bool | None = None
    context_tokens: int | None = None
    default_context_tokens: int | None = None
    least_context_tokens: int | None = None
    key_bytes: float = F16_BYTES
    value_bytes: float = F16_BYTES
    has_flash_attention: bool | None = None
    has_windows: bool | None = None
    prompt_cache_mib: int | None = None
    slots: int | None = None
    queue: int | None = None
    unloads_by: str = ""
    files: tuple[NamedFile, ...] = ()
    paths: tuple[NamedFile, ...] = ()
    reply_tokens: int | None = None
    serves: str = ""
    is_renamed: bool = False
    can_switch: bool = False
    switch_folder: str = ""
    switch_models: str = ""
    ignores_missing: bool = False
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_files: tuple[str, ...] = ()
    password: str = field(default="", repr=False)


def lock_policy(settings: Settings, wishes: OwnerWishes) -> LockPolicy:
    """Return engine.lock; under `auto`, an owner who asks the engine itself to lock has decided."""
    return "always" if settings.engine.lock == "auto" and wishes.locks else settings.engine.lock


def context_tokens(settings: Settings, wishes: OwnerWishes) -> int:
    """Return the context that the engine will have, 0 for the model's own."""
    default = wishes.default_context_tokens
    if default is None:
        default = _KOBOLDCPP_CONTEXT if settings.engine.kind == "koboldcpp" else 0
    return settings.engine.context_size or wishes.context_tokens or default
