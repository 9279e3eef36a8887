"""The engine's files in memory, layer by layer, for who looks at the page. Reads nothing while nobody looks."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.core.engine_files import Role
from emberd.core.errors import EmberdError
from emberd.core.gguf import layer_of
from emberd.host.model_file import read_spans
from emberd.host.toucher import Toucher, ToucherLost, ToucherRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from emberd.core.residency import Paging
    from emberd.core.types import EngineSample
    from emberd.host.toucher import Span

_LOOKED_AT = 16
"""Pages of each stretch of a layer: a stretch with an edge in it is drawn to a sixteenth."""
_PIECES = 32
"""A file without layers is shown in so many equal pieces."""
_FRESH_S = 0.2
"""Sixteen viewers cost as much as one."""
_UNSEEN_S = 30.0
"""After so long without a question the process ends, which takes 6 MB."""


@dataclass(slots=True)
class _Layer:
    """A layer, or a piece of a file: its size, and the numbers of its stretches."""

    name: str
    total_bytes: int = 0
    stretches: list[int] = field(default_factory=list)


class ResidencyMap:
    """Owns a toucher that touches nothing: the other one answers nobody while a pass is under way.

    Args:
        paging: what this system's calls can do.
        sample: tells which files the engine maps.
    """

    def __init__(self, paging: Paging, sample: Callable[[], EngineSample]) -> None:
        self._sample = sample
        self._toucher = Toucher(paging)
        self._looking = asyncio.Lock()
        self._strips: list[tuple[str, str, list[_Layer]]] = []
        self._spans: list[Span] = []
        self._of: tuple[str, ...] = ()
        self._last: tuple[float, dict[str, Any]] | None = None
        self._ending: asyncio.TimerHandle | None = None

    async def look(self) -> dict[str, Any]:
        """Return the engine's mapped files, each with its layers, their sizes and their shares in memory.

        Returns:
            `files`, a list of `name`, `role` and `layers` (`name`, `total_bytes`, `share`): the parts of a model
            count as one; and `unknown`, why there are none.
        """
        async with self._looking:
            if self._last is None or time.monotonic() - self._last[0] > _FRESH_S:
                self._last = time.monotonic(), await self._look()
            self._end_later()
            return self._last[1]

    async def close(self) -> None:
        """End the process."""
        if self._ending is not None:
            self._ending.cancel()
        await self._toucher.close()

    async def _look(self) -> dict[str, Any]:
        engine = self._sample()
        paths = engine.touchable
        if engine.key is None or not paths:
            return {"files": [], "unknown": _why_none(engine)}
        try:
            if paths != self._of:
                await self._use(engine, paths)
            counts = await self._toucher.look(self._spans, _LOOKED_AT)
        except (ToucherRefused, ToucherLost, EmberdError) as error:
            return {"files": [], "unknown": str(error)}
        strips = [
            {"name": name, "role": role, "layers": [self._describe(layer, counts) for layer in layers]}
            for name, role, layers in self._strips
        ]
        return {"files": strips, "unknown": ""}

    def _describe(self, layer: _Layer, counts: list[tuple[int, int]]) -> dict[str, Any]:
        seen = [(self._spans[number][2], *counts[number]) for number in layer.stretches]
        return {"name": layer.name, "total_bytes": layer.total_bytes, "share": _share(seen)}

    async def _use(self, engine: EngineSample, paths: tuple[str, ...]) -> None:
        """Read the headers: which stretches of the files each layer takes."""
        roles = {each.path: each.role for each in engine.files}
        self._strips, self._spans, self._of = [], [], ()
        strips: dict[str, dict[str, _Layer]] = {}
        for number, path in enumerate(paths):
            role = roles.get(path, Role.MODEL)
            strip = Role.MODEL.value if role is Role.MODEL else path
            if strip not in strips:
                strips[strip] = {}
                self._strips.append((Path(path).name, role.value, []))
            await asyncio.to_thread(self._add, number, Path(path), strips[strip])
        for strip_of, found in zip(self._strips, strips.values(), strict=True):
            strip_of[2].extend(found.values())
        self._toucher.use(paths)
        self._of = paths

    def _add(self, number: int, path: Path, layers: dict[str, _Layer]) -> None:
        """Add a file's layers, or its pieces if it is no GGUF, and their stretches."""
        try:
            found = [(layer_of(each.name), each.offset, each.length) for each in read_spans(path)]
        except (EmberdError, ValueError):
            size = path.stat().st_size
            edges = [size * piece // _PIECES for piece in range(_PIECES + 1)]
            pieces = pairwise(edges)
            found = [(f"part {piece + 1}", begin, end - begin) for piece, (begin, end) in enumerate(pieces)]
        for name, offset, length in found:
            layer = layers.setdefault(name, _Layer(name))
            layer.total_bytes += length
            last = self._spans[layer.stretches[-1]] if layer.stretches else None
            if last is not None and last[0] == number and last[1] + last[2] == offset:
                self._spans[layer.stretches[-1]] = (number, last[1], last[2] + length)
            else:
                layer.stretches.append(len(self._spans))
                self._spans.append((number, offset, length))

    def _end_later(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        loop = asyncio.get_running_loop()
        self._ending = loop.call_later(_UNSEEN_S, lambda: loop.create_task(self._toucher.close()))


def _why_none(engine: EngineSample) -> str:
    if engine.key is None:
        return "there is no engine"
    if engine.files:
        return "the engine computes with a copy of the weights, and the system tells nothing of its layers"
    return "the engine's model is not known"


def _share(seen: list[tuple[int, int, int]]) -> float | None:
    """Return the share in memory of stretches: length, resident pages, pages looked at."""
    known = [(length, resident / pages) for length, resident, pages in seen if pages]
    total = sum(length for length, _ in known)
    return sum(length * share for length, share in known) / total if total else None
