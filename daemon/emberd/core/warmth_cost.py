"""What keeping a model warm costs. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BUDGET_SHARE = 0.02
"""Share of a core that keep-warm may take while no memory is taken from the model."""
BUDGET_WINDOW_S = 600.0


@dataclass(frozen=True, slots=True)
class WarmthCost:
    """Costs of some time; whole numbers, so that sums are exact.

    Attributes:
        passes: passes that did something.
        read_bytes: brought back from the disk by the toucher.
        engine_ms: the engine's time for replays.
        cpu_ms: processor time of the engine and the toucher in passes.
        processed_tokens: tokens of prompts that replays made the engine compute.
    """

    passes: int = 0
    read_bytes: int = 0
    engine_ms: int = 0
    cpu_ms: int = 0
    processed_tokens: int = 0

    def __add__(self, more: WarmthCost) -> WarmthCost:
        """Return both together."""
        return WarmthCost(*(getattr(self, each.name) + getattr(more, each.name) for each in fields(self)))

    @property
    def total(self) -> int:
        """The sum of all, 0 if nothing was spent."""
        return sum(getattr(self, each.name) for each in fields(self))


def budget_wait_s(spent: Sequence[tuple[float, float]], now_s: float) -> float:
    """Return the seconds until the cost within the window is below BUDGET_SHARE of it; 0 if it is.

    Args:
        spent: time and processor time in seconds of each pass since memory was taken last, oldest first.
        now_s: the present, on the same clock.
    """
    recent = [(when_s, cpu_s) for when_s, cpu_s in spent if now_s - when_s < BUDGET_WINDOW_S]
    over_s = sum(cpu_s for _, cpu_s in recent) - BUDGET_SHARE * BUDGET_WINDOW_S
    for when_s, cpu_s in recent:
        if over_s <= 0:
            break
        over_s -= cpu_s
        if over_s <= 0:
            return when_s + BUDGET_WINDOW_S - now_s
    return 0.0
