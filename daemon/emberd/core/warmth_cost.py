"""What keeping a model warm costs. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class WarmthCost:
    """Costs of some time; whole numbers, so that sums are exact.

    Attributes:
        passes: passes that did something.
        read_bytes: brought back from the disk by the toucher.
        engine_ms: time that replays took of the engine.
        cpu_ms: processor time of the engine and the toucher in passes.
    """

    passes: int = 0
    read_bytes: int = 0
    engine_ms: int = 0
    cpu_ms: int = 0

    def __add__(self, more: WarmthCost) -> WarmthCost:
        """Return both together."""
        return WarmthCost(*(getattr(self, each.name) + getattr(more, each.name) for each in fields(self)))

    @property
    def total(self) -> int:
        """Whether there was anything: not zero."""
        return self.passes + self.read_bytes + self.engine_ms + self.cpu_ms
