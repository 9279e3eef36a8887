"""How much of the model is in memory? By counts of pages, or by the processes of an engine that does not map it.

A count comes from mincore(2) or cachestat(2) on the model's files. It is exact, or a sample with bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.gguf import layer_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emberd.core.gguf import TensorSpan
    from emberd.core.memory import EngineMemory

SAMPLED_PAGES = 192
"""Bounds of at most 10 percentage points either way, 2 at the ends, for some 0.6 ms of mincore."""
CONFIDENCE = 0.95
"""How often the true share lies within the bounds of a sample, at least."""
_BISECTIONS = 40
_ANONYMOUS_SHARE = 0.8
"""If anonymous memory is this share of the weights or more, it is a copy of them."""
_FILE_SHARE = 0.5
"""A small model's context and buffers can be larger than its weights (284 MB beside 235 MB in KoboldCPP 1.104);
so if resident pages of files are this share of the weights or more, the weights are mapped."""


@dataclass(frozen=True, slots=True)
class Paging:
    """What the system's calls about pages can do.

    Attributes:
        checks_owner: mincore answers truthfully only to a process that owns the file or may write it.
        cachestat: number of the system call, None where there is none.
        populate: the advice that faults a range in at once, None where there is none.
        touches_twice: a first pass over cold pages leaves them inactive, so that a second one is needed.
        keeps_executable: used pages of executable mappings are spared when others are reclaimed.
    """

    checks_owner: bool
    cachestat: int | None
    populate: int | None
    touches_twice: bool
    keeps_executable: bool


class Source(Enum):
    """Where a residency was read."""

    MINCORE = "mincore"
    CACHESTAT = "cachestat"
    PROCESS = "process"
    """The engine computes with a copy in anonymous memory; its processes' memory in swap was read."""


class Unknown(Enum):
    """Why a residency is unknown."""

    NOT_OWNER = "not_owner"
    """Linux answers truthfully only to a process that owns the file or may write it (mincore(2), since 5.2)."""
    NO_MODEL = "no_model"
    UNREADABLE = "unreadable"
    TOUCHER_LOST = "toucher_lost"
    NO_READING = "no_reading"


@dataclass(frozen=True, slots=True)
class PageCount:
    """Pages found resident.

    Attributes:
        resident: resident pages among those looked at.
        looked_at: pages looked at.
        total: pages there are; equal to `looked_at` in an exact count.
        page_bytes: size of a page.
        source: the call that told.
    """

    resident: int
    looked_at: int
    total: int
    page_bytes: int
    source: Source

    @property
    def is_exact(self) -> bool:
        """Whether every page was looked at."""
        return self.looked_at == self.total


@dataclass(frozen=True, slots=True)
class Residency:
    """What share of the model is in memory.

    Attributes:
        share: the estimate, from 0 to 1; None if it is unknown.
        at_least: lower bound; equal to `share` if the count was exact.
        at_most: upper bound.
        total_bytes: size of what was measured.
        source: where it was read, None if nowhere.
        unknown: why it is unknown, None if it is known.
        message: for a person: why it is unknown, or how it was read; may be empty.
    """

    share: float | None
    at_least: float | None = None
    at_most: float | None = None
    total_bytes: int | None = None
    source: Source | None = None
    unknown: Unknown | None = None
    message: str = ""

    @property
    def resident_bytes(self) -> int | None:
        """The estimate in bytes."""
        return None if self.share is None or self.total_bytes is None else round(self.share * self.total_bytes)


def from_pages(count: PageCount) -> Residency:
    """Return the residency of a count; a sample gets its bounds."""
    if not count.looked_at:
        return Residency(None, unknown=Unknown.NO_READING, message="there are no pages to look at")
    share = count.resident / count.looked_at
    low, high = (share, share) if count.is_exact else sample_bounds(count.resident, count.looked_at)
    return Residency(share, low, high, count.total * count.page_bytes, count.source)


def unknown(why: Unknown, message: str = "") -> Residency:
    """Return an unknown residency, and why it is unknown."""
    return Residency(None, unknown=why, message=message or _MESSAGES[why])


_MESSAGES = {
    Unknown.NOT_OWNER: "the kernel tells residency only to the file's owner or to who may write it",
    Unknown.NO_MODEL: "no model file is known",
    Unknown.UNREADABLE: "the file cannot be read",
    Unknown.TOUCHER_LOST: "the process that reads it has ended; the next reading starts it again",
    Unknown.NO_READING: "it has not been read yet",
}


def sample_bounds(resident: int, sampled: int) -> tuple[float, float]:
    """Return the bounds between which the true share lies with CONFIDENCE, from a sample of one page per stratum.

    Chernoff's bound with relative entropy: P(share seen ≥ q) ≤ exp(-n D(q || p)). It holds for independent draws
    with different chances, which is what one page from each of n equal stretches of the file is (W. Hoeffding,
    "Probability inequalities for sums of bounded random variables", JASA 58, 1963, theorem 1).
    """
    seen = resident / sampled
    allowed = math.log(2 / (1 - CONFIDENCE)) / sampled
    return _farthest(seen, 0.0, allowed), _farthest(seen, 1.0, allowed)


def _farthest(seen: float, end: float, allowed: float) -> float:
    """Return the share nearest to `end` whose relative entropy from `seen` is at most `allowed`."""
    near, far = seen, end
    for _ in range(_BISECTIONS):
        middle = (near + far) / 2
        if _relative_entropy(seen, middle) <= allowed:
            near = middle
        else:
            far = middle
    return near


def _relative_entropy(seen: float, true: float) -> float:
    def part(one: float, other: float) -> float:
        return 0.0 if one == 0 else math.inf if other == 0 else one * math.log(one / other)

    return part(seen, true) + part(1 - seen, 1 - true)


def is_copied(weights_bytes: int | None, memory: EngineMemory, *, is_mapped: bool | None) -> bool:
    """Return True if the engine computes with a copy of the weights in anonymous memory.

    Args:
        weights_bytes: size of the weights, None if unknown.
        memory: the engine's memory.
        is_mapped: by the engine's log, None if the log does not tell (the engine loads, or writes no log).
    """
    if is_mapped is not None:
        return not is_mapped
    if weights_bytes is None or memory.footprint_bytes is None:
        return False
    if memory.file_bytes is not None and memory.file_bytes >= weights_bytes * _FILE_SHARE:
        return False
    return memory.footprint_bytes >= weights_bytes * _ANONYMOUS_SHARE


def from_process(weights_bytes: int, memory: EngineMemory) -> Residency:
    """Return the residency of copied weights, from the memory of the engine's processes in swap.

    The kernel does not say which pages are in swap: at worst all are weights, at best everything else went first.
    The estimate is proportional.
    """
    swapped, footprint = memory.swapped_bytes, memory.footprint_bytes
    if swapped is None or footprint is None or not weights_bytes:
        return unknown(Unknown.NO_READING, "the engine holds a copy of the weights, and its memory cannot be read")
    swapped = min(swapped, footprint)
    worst = min(swapped, weights_bytes)
    best = min(max(swapped - max(footprint - weights_bytes, 0), 0), weights_bytes)
    return Residency(
        1 - swapped / footprint if footprint else 1.0,
        1 - worst / weights_bytes,
        1 - best / weights_bytes,
        weights_bytes,
        Source.PROCESS,
        message="the engine computes with a copy of the weights; told from what it has in swap",
    )


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a model and how much of it is resident.

    Attributes:
        name: a tensor's or layer's name.
        total_bytes: its size in bytes, without the padding to whole pages.
        resident_pages: resident pages that it lies in.
        pages: pages that it lies in; neighbours share the page between them.
    """

    name: str
    total_bytes: int
    resident_pages: int
    pages: int

    @property
    def share(self) -> float:
        """Share of its pages that are resident; an empty part counts as resident."""
        return self.resident_pages / self.pages if self.pages else 1.0


def by_tensor(spans: Sequence[TensorSpan], pages: Sequence[tuple[int, int]]) -> tuple[Part, ...]:
    """Return the parts of the tensors, from resident and all pages of each."""
    return tuple(
        Part(span.name, span.length, resident, total) for span, (resident, total) in zip(spans, pages, strict=True)
    )


def by_layer(tensors: Sequence[Part]) -> tuple[Part, ...]:
    """Sum tensors to layers, in the order in which the layers first appear."""
    sums: dict[str, Part] = {}
    for tensor in tensors:
        name = layer_of(tensor.name)
        last = sums.get(name, Part(name, 0, 0, 0))
        sums[name] = Part(
            name,
            last.total_bytes + tensor.total_bytes,
            last.resident_pages + tensor.resident_pages,
            last.pages + tensor.pages,
        )
    return tuple(sums.values())
