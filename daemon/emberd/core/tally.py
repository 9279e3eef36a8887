"""What is counted where it happens, for the history and the metrics. Pure."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass, field

_BOUNDS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, float("inf"))
"""A hot model answers below a second, a cold one reads for up to a minute."""


@dataclass(slots=True)
class Tally:
    """Counts since emberd's start.

    Attributes:
        state_changes: of the engine.
        starts: of engines.
        first_tokens: streamed replies that began.
        reused_tokens: of users' prompts, found in the prompt cache, as far as the engine told.
        processed_tokens: computed.
        cuts: replies that were cut by the end of an engine.
        continuations: of them, asked for the rest.
        lettings_go: how often the thrash guard or the owner let go of memory.
        pass_ms: how long passes took.
        pass_reasons: why passes were made, since the last look at it.
        first_tokens_s: how long users' first tokens took, together.
        first_tokens_up_to: how many took no longer than each bound, and longer than the one before.
    """

    state_changes: int = 0
    starts: int = 0
    first_tokens: int = 0
    reused_tokens: int = 0
    processed_tokens: int = 0
    cuts: int = 0
    continuations: int = 0
    lettings_go: int = 0
    pass_ms: int = 0
    pass_reasons: set[str] = field(default_factory=set)
    first_tokens_s: float = 0.0
    first_tokens_up_to: list[int] = field(default_factory=lambda: [0] * len(_BOUNDS_S))

    def note_first_token(self, seconds: float) -> None:
        """Count a streamed reply that began after so long."""
        self.first_tokens += 1
        self.first_tokens_s += seconds
        self.first_tokens_up_to[bisect_left(_BOUNDS_S, seconds)] += 1

    def first_token_buckets(self) -> list[tuple[float, int]]:
        """Return bounds in seconds, and how many first tokens took at most so long."""
        return list(zip(_BOUNDS_S, itertools.accumulate(self.first_tokens_up_to), strict=True))

    def take_reasons(self) -> str | None:
        """Return the reasons of the passes since the last call, with commas; None without a pass."""
        reasons, self.pass_reasons = self.pass_reasons, set()
        return ",".join(sorted(reasons)) or None
