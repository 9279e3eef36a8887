"""The model in memory, layer by layer, for who looks at the page. Reads nothing while nobody looks."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from emberd.core.errors import EmberdError
from emberd.core.gguf import layer_of, split_names
from emberd.host.model_file import read_spans
from emberd.host.toucher import Toucher, ToucherLost, ToucherRefused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emberd.core.residency import Paging
    from emberd.core.types import EngineSample
    from emberd.host.toucher import Span

_LOOKED_AT = 16
"""Pages of each stretch of a layer: a stretch with an edge in it is drawn to a sixteenth."""
_FRESH_S = 0.2
"""Sixteen viewers cost as much as one."""
_UNSEEN_S = 30.0
"""After so long without a question the process ends, which takes 6 MB."""


class ResidencyMap:
    """Owns a toucher that touches nothing: the other one answers nobody while a pass is under way.

    Args:
        paging: what this system's calls can do.
        sample: tells which model the engine has.
    """

    def __init__(self, paging: Paging, sample: Callable[[], EngineSample]) -> None:
        self._sample = sample
        self._toucher = Toucher(paging)
        self._looking = asyncio.Lock()
        self._layers: list[tuple[str, int, list[int]]] = []
        self._spans: list[Span] = []
        self._of: Path | None = None
        self._last: tuple[float, dict[str, Any]] | None = None
        self._ending: asyncio.TimerHandle | None = None

    async def look(self) -> dict[str, Any]:
        """Return the model's layers, each with its size and its share in memory; none if it cannot be told.

        Returns:
            `layers`, a list of `name`, `total_bytes` and `share`; and `unknown`, why it is empty.
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
        model = engine.model
        if engine.key is None or model is None:
            return {"layers": [], "unknown": "there is no engine, or its model is not known"}
        if engine.is_mapped is False:
            words = "the engine computes with a copy of the weights, and the system tells nothing of its layers"
            return {"layers": [], "unknown": words}
        try:
            if model != self._of:
                await self._use(model)
            counts = await self._toucher.look(self._spans, _LOOKED_AT)
        except (ToucherRefused, ToucherLost, EmberdError) as error:
            return {"layers": [], "unknown": str(error)}
        return {
            "layers": [
                {
                    "name": name,
                    "total_bytes": total_bytes,
                    "share": _share([(self._spans[number][2], *counts[number]) for number in numbers]),
                }
                for name, total_bytes, numbers in self._layers
            ],
            "unknown": "",
        }

    async def _use(self, model: Path) -> None:
        """Read the header: which stretches of the files each layer takes."""
        files = [model.with_name(name) for name in split_names(model.name)]
        layers: dict[str, tuple[int, list[int]]] = {}
        spans: list[Span] = []
        for number, file in enumerate(files):
            for tensor in await asyncio.to_thread(read_spans, file):
                name = layer_of(tensor.name)
                total_bytes, mine = layers.get(name, (0, []))
                is_next = mine and spans[mine[-1]][0] == number and sum(spans[mine[-1]][1:]) == tensor.offset
                if is_next:
                    first = spans[mine[-1]]
                    spans[mine[-1]] = (number, first[1], first[2] + tensor.length)
                else:
                    mine.append(len(spans))
                    spans.append((number, tensor.offset, tensor.length))
                layers[name] = total_bytes + tensor.length, mine
        self._layers = [(name, *rest) for name, rest in layers.items()]
        self._spans, self._of = spans, model
        self._toucher.use(files)

    def _end_later(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        loop = asyncio.get_running_loop()
        self._ending = loop.call_later(_UNSEEN_S, lambda: loop.create_task(self._toucher.close()))


def _share(seen: list[tuple[int, int, int]]) -> float | None:
    """Return the share in memory of stretches: length, resident pages, pages looked at."""
    known = [(length, resident / pages) for length, resident, pages in seen if pages]
    total = sum(length for length, _ in known)
    return sum(length * share for length, share in known) / total if total else None
