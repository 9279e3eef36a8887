"""Small charts of one line of text. Pure."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_BARS = "▁▂▃▄▅▆▇█"
_UNKNOWN = "·"


def evenly(
    times_s: Sequence[float], values: Sequence[float | None], since_s: float, until_s: float, step_s: int
) -> list[float | None]:
    """Return a value for each step between two times; a step of which there is none is unknown.

    Args:
        times_s: when the step of each value began.
        values: as many.
        since_s: the first step holds it.
        until_s: excluded.
        step_s: length of a step.
    """
    first = int(since_s // step_s)
    steps: list[float | None] = [None] * max(math.ceil(until_s / step_s) - first, 0)
    for at_s, value in zip(times_s, values, strict=True):
        place = int(at_s // step_s) - first
        if 0 <= place < len(steps):
            steps[place] = value
    return steps


def spark(values: Sequence[float | None], width: int, shown_of: Callable[[Iterable[float]], float] = max) -> str:
    """Return a chart of values in order, at most `width` characters wide.

    The highest value has the highest bar, zero the lowest. Where several values share a place, `shown_of` chooses:
    `min` where little is bad. Unknown is a dot.
    """
    if not values or width < 1:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * number // columns for number in range(columns + 1)]
    known = [
        [value for value in values[begin:end] if value is not None] for begin, end in itertools.pairwise(edges)
    ]
    shown = [shown_of(each) if each else None for each in known]
    highest = max((value for value in shown if value is not None), default=0) or 1
    return "".join(
        _UNKNOWN if value is None else _BARS[min(int(max(value, 0) / highest * len(_BARS)), len(_BARS) - 1)]
        for value in shown
    )
