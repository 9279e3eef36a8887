"""What is counted where it happens, for the history and the metrics. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


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

    def take_reasons(self) -> str | None:
        """Return the reasons of the passes since the last call, with commas; None without a pass."""
        reasons, self.pass_reasons = self.pass_reasons, set()
        return ",".join(sorted(reasons)) or None
