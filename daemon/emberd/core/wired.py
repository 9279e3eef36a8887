"""Has the memory that a dead engine had locked come back? Judged from the whole system's wired memory."""

from __future__ import annotations

LEAST_HELD_BYTES = 64 * 1024 * 1024
"""Less than this is lost in what other programs lock and unlock meanwhile."""
_RELEASED_SHARE = 0.5
"""Other programs move too; half of what the engine added, gone again, cannot be chance."""


def is_released(before_load: int | None, loaded: int | None, now: int | None) -> bool | None:
    """Tell whether wired memory has fallen after the engine's end, None if that cannot be told.

    Args:
        before_load: bytes wired by the whole system before the engine started.
        loaded: the same when it was ready.
        now: the same now, after its end.
    """
    if before_load is None or loaded is None or now is None:
        return None
    held = loaded - before_load
    if held < LEAST_HELD_BYTES:
        return True
    return loaded - now >= held * _RELEASED_SHARE
