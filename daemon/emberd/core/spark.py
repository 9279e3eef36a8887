"""Small charts of one line of text. Pure."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_UNKNOWN = "·"


def spark(values: Sequence[float | None], width: int) -> str:
    """Return a chart of values in order, at most `width` characters wide.

    The highest value has the highest bar, zero the lowest. Where several values share a place the largest is
    shown. Unknown is a dot.
    """
    if not values or width < 1:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * number // columns for number in range(columns + 1)]
    shown = [
        max((value for value in values[begin:end] if value is not None), default=None)
        for begin, end in itertools.pairwise(edges)
    ]
    highest = max((value for value in shown if value is not None), default=0) or 1
    return "".join(
        _UNKNOWN if value is None else _BARS[min(int(max(value, 0) / highest * len(_BARS)), len(_BARS) - 1)]
        for value in shown
    )
