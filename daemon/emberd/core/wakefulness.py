"""When emberd keeps the computer from going to sleep by itself. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.memory import PowerSource

if TYPE_CHECKING:
    from emberd.core.memory import Power


def must_stay_awake(power: Power, *, is_wanted: bool, is_ready: bool) -> bool:
    """Tell whether sleep is to be prevented now.

    Only on mains that are known to be there, never in low power mode, and only while there is a model to be asked:
    an engine that failed is not worth a night's energy.

    Args:
        power: of the computer.
        is_wanted: the setting power.prevent_sleep.
        is_ready: whether the engine is READY.
    """
    return is_wanted and is_ready and power.source is PowerSource.MAINS and power.is_low_power is not True
