"""Preflight and lock verdict: what the model needs of this computer, and how much is locked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from emberd.core.engine_files import Held, Role
from emberd.core.errors import ModelError
from emberd.core.gguf import estimate_compute_buffer, estimate_kv_cache, keeps_state
from emberd.core.load_facts import KeepAliveState, LoadFacts, judge_keep_alive
from emberd.core.lock import LockEvidence, LockState, LockVerdict, judge_lock
from emberd.core.preflight import USUAL_PROMPT_CACHE_MIB, Preflight, PreflightFacts, preflight
from emberd.core.status import ContextStatus
from emberd.core.wishes import context_tokens, lock_policy
from emberd.engine import llama_log
from emberd.host.model_file import look_up, read_model_info

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from emberd.core.engine_files import EngineFile
    from emberd.core.load_facts import KeepAliveVerdict
    from emberd.core.lock_limits import WireRefusals
    from emberd.core.ports import Engine, Host
    from emberd.core.reuse import CacheRoom
    from emberd.core.settings import Settings
    from emberd.core.wishes import OwnerWishes
    from emberd.host.model_file import ModelInfo


_FIT_MARGIN_BYTES = 1 << 30
_LOCKED = frozenset({Role.DRAFT})
"""What KoboldCPP 1.104 and llama-server map and lock with the model; projectors and adapters are copied."""


class LockMeter:
    """Follows one engine from before its start: is it to lock, and does the lock hold?"""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._known: dict[Path, tuple[tuple[int, int], ModelInfo]] = {}
        self._info: ModelInfo | None = None
        self._others_bytes = 0
        self._load = LoadFacts()
        self._wired_before: int | None = None
        self._refusals_before: WireRefusals | None = None
        self._was_held = False
        self._estimate: Callable[[int], int | None] = lambda _: None
        self.verdict: LockVerdict | None = None
        """The last verdict, None before the first."""

    @property
    def weights_bytes(self) -> int | None:
        """Size of the tensors that a lock can reach, the model's and a draft's; None if the model's is unknown."""
        return self._info.weights_bytes + self._others_bytes if self._info else None

    @property
    def keeps_state(self) -> bool:
        """Whether the model keeps a state that cannot be cut back, as far as is known."""
        return self._info is not None and keeps_state(self._info.metadata)

    @property
    def is_mapped(self) -> bool | None:
        """Whether the weights are pages of the file, None if the engine's log does not tell."""
        return self._load.is_mapped

    @property
    def is_cache_shared(self) -> bool | None:
        """Whether the slots share the cells of one KV cache, None if the engine's log does not tell."""
        return self._load.is_cache_shared

    async def decide(self, settings: Settings, engine: Engine) -> Preflight:
        """Decide before a start whether the engine is to lock, and begin to follow it."""
        await engine.ask_build()
        wishes = engine.wishes()
        info = self._info = await self._model_info(engine.model_path())
        found = look_up(wishes.files)
        self._others_bytes = sum(each.size_bytes or 0 for each in found if each.role in _LOCKED)
        memory = self._host.system_memory()
        self._load, self._was_held, self.verdict = LoadFacts(), False, None
        self._estimate = lambda tokens: kv_bytes_of(info, wishes, tokens) if info else None
        self._wired_before = memory.wired_bytes
        self._refusals_before = self._host.wire_refusals()
        return preflight(
            PreflightFacts(
                limits=self._host.lock_limits(None),
                weights_bytes=self.weights_bytes,
                kv_bytes=kv_cache_bytes(info, settings, wishes, memory.total_bytes) if info else None,
                prompt_cache_bytes=prompt_cache_bytes(wishes),
                compute_bytes=estimate_compute_buffer(info.vocabulary_tokens) if info else None,
                others_bytes=sum(each.size_bytes or 0 for each in found if each.role not in _LOCKED),
                ram_bytes=memory.total_bytes,
                available_bytes=memory.available_bytes,
                wired_bytes=self._wired_before,
                users=_users(),
            ),
            lock_policy(settings, wishes),
        )

    async def adopt(self, model: Path | None, told: LoadFacts) -> None:
        """Begin to follow an engine that already runs; `told` is what is still known of its log."""
        self._info = await self._model_info(model)
        self._load, self._was_held, self.verdict = told, False, None
        self._estimate = lambda _: None
        self._wired_before = self._refusals_before = None

    async def follow(
        self, model: Path | None, files: Sequence[EngineFile], wishes: OwnerWishes | None = None
    ) -> None:
        """Follow what a ready engine really serves: of the other files, a lock reaches those that are mapped.

        `wishes` are those that this engine was started with, None if they are unknown.
        """
        info = self._info = await self._model_info(model)
        self._estimate = lambda tokens: kv_bytes_of(info, wishes, tokens) if info and wishes else None
        others = [each for each in files if each.role is not Role.MODEL and each.held is Held.MAPPED]
        infos = [await self._model_info(Path(each.path)) for each in others]
        self._others_bytes = sum(
            info.weights_bytes if info else each.size_bytes or 0 for each, info in zip(others, infos, strict=True)
        )

    def begin_again(self) -> None:
        """The engine loads another model in place: nothing is known of its log yet."""
        self._load, self._was_held, self.verdict = LoadFacts(), False, None

    def has_room(self, settings: Settings, wishes: OwnerWishes) -> bool:
        """Return True if a model that was loaded in place may be locked from outside."""
        memory = self._host.system_memory()
        facts = PreflightFacts(
            limits=self._host.lock_limits(None),
            weights_bytes=self.weights_bytes,
            kv_bytes=kv_cache_bytes(self._info, settings, wishes, memory.total_bytes) if self._info else None,
            prompt_cache_bytes=prompt_cache_bytes(wishes),
            compute_bytes=estimate_compute_buffer(self._info.vocabulary_tokens) if self._info else None,
            ram_bytes=memory.total_bytes,
            available_bytes=None,  # what the engine has taken already is missing from it
            wired_bytes=memory.wired_bytes,
            users=_users(),
        )
        return preflight(facts, lock_policy(settings, wishes)).will_lock

    def note(self, line: str) -> None:
        """Note what a line of the engine's log tells about memory."""
        self._load = llama_log.note(self._load, line)

    def judge(self, pids: Sequence[int], *, is_asked: bool) -> bool:
        """Judge the lock again; return True if the verdict has another state or reason."""
        refusals = self._host.wire_refusals()
        before = self._refusals_before
        verdict = judge_lock(
            LockEvidence(
                limits=self._host.lock_limits(pids[0] if pids else None),
                weights_bytes=self.weights_bytes,
                locked_bytes=self._host.engine_memory(pids).locked_bytes,
                is_asked=is_asked,
                load=self._load,
                wired_bytes=self._wired_before,
                refusals=refusals.since(before) if refusals and before else None,
                was_held=self._was_held,
            )
        )
        self._was_held = self._was_held or verdict.state is LockState.HELD
        last, self.verdict = self.verdict, verdict
        return last is None or (last.state, last.reason) != (verdict.state, verdict.reason)

    @property
    def told(self) -> LoadFacts:
        """What the engine's log has told of memory."""
        return self._load

    def context(self, room: CacheRoom) -> ContextStatus:
        """Return the context of the loaded engine, by its own words as far as they go."""
        tokens = self._load.context_tokens if room.cells is None else room.cells
        kv_bytes = self._load.kv_bytes
        is_measured = kv_bytes is not None
        if kv_bytes is None and tokens is not None:
            kv_bytes = self._estimate(tokens * (1 if room.is_shared else room.conversations))
        return ContextStatus(tokens, room.conversations, kv_bytes, is_measured)

    def heartbeat(self, wanted_s: int) -> KeepAliveVerdict | None:
        """Return what the engine's log says about Metal's heartbeat, None where it says nothing of Metal."""
        verdict = judge_keep_alive(self._load, wanted_s)
        return None if verdict.state is KeepAliveState.UNKNOWN else verdict

    async def _model_info(self, model: Path | None) -> ModelInfo | None:
        """Return the model's numbers, read once for each version of the file, None if they cannot be read."""
        if model is None:
            return None
        try:
            stat = model.stat()
            key = (stat.st_size, stat.st_mtime_ns)
            if model not in self._known or self._known[model][0] != key:
                self._known[model] = (key, await asyncio.to_thread(read_model_info, model))
        except (OSError, ModelError):
            return None  # the engine's adapter names what is wrong with the file
        return self._known[model][1]


def kv_cache_bytes(
    info: ModelInfo, settings: Settings, wishes: OwnerWishes, ram_bytes: int | None = None
) -> int | None:
    """Return the size of the KV cache that the engine will have, None if unknown.

    A llama-server that may choose its context takes the model's own, or as much of it as leaves 1 GiB of the memory
    (common/fit.cpp, `fit_params_target`): of the computer's without a graphics card, of the card's with one, so
    this is an upper bound.
    """
    tokens = context_tokens(settings, wishes)
    full, least_tokens = kv_bytes_of(info, wishes, tokens), wishes.least_context_tokens
    if tokens or full is None or least_tokens is None or ram_bytes is None:
        return full
    other_bytes = info.weights_bytes + (estimate_compute_buffer(info.vocabulary_tokens) or 0)
    least = kv_bytes_of(info, wishes, least_tokens) or 0
    return min(full, max(least, ram_bytes - _FIT_MARGIN_BYTES - other_bytes))


def kv_bytes_of(info: ModelInfo, wishes: OwnerWishes, tokens: int) -> int | None:
    """Return the size of a KV cache of so many tokens, None if unknown."""
    return estimate_kv_cache(
        info.metadata,
        tokens,
        key_bytes=wishes.key_bytes,
        value_bytes=wishes.value_bytes,
        window_slots=(wishes.slots or 1) if wishes.has_windows else None,
    ).size_bytes


def prompt_cache_bytes(wishes: OwnerWishes) -> int:
    """Return the size that copies of earlier prompts may reach besides the KV cache."""
    mib = wishes.prompt_cache_mib or 0
    return (USUAL_PROMPT_CACHE_MIB if mib < 0 else mib) << 20


def _users() -> int | None:
    """Return how many people have sessions here, this one included; None if the system does not tell."""
    try:
        return max(len({user.name for user in psutil.users()}), 1)
    except (OSError, RuntimeError, psutil.Error):
        return None
