"""What pmset(1) prints of power: `pmset -g batt` and `pmset -g`."""

from __future__ import annotations

import re

from emberd.core.memory import Power, PowerSource

_SOURCE = re.compile(r"^Now drawing from '([^']+)'", re.MULTILINE)
_SOURCES = {"AC Power": PowerSource.MAINS, "Battery Power": PowerSource.BATTERY, "UPS Power": PowerSource.BATTERY}
"""kIOPMACPowerKey, kIOPMBatteryPowerKey and kIOPMUPSPowerKey of <IOKit/pwr_mgt/IOPM.h>; on UPS power the mains are
gone."""
_CHARGE = re.compile(r"^\s*-InternalBattery\S*.*?\b(\d{1,3})%", re.MULTILINE)
"""Other lines are of an uninterruptible power supply."""
_MODE = re.compile(r"^\s*(lowpowermode|powermode)\s+(\d+)\b", re.MULTILINE)
"""Computers with a High Power Mode print powermode instead: 0 automatic, 1 low, 2 high."""
_LOW_POWER = 1
_FULL_PERCENT = 100


def read_power(battery_text: str | None, settings_text: str | None) -> Power:
    """Recognise where power comes from.

    Args:
        battery_text: what `pmset -g batt` printed, None if it could not be run.
        settings_text: what `pmset -g` printed, None if it could not be run.
    """
    source = _SOURCE.search(battery_text or "")
    charge = _CHARGE.search(battery_text or "")
    mode = _MODE.search(settings_text or "")
    return Power(
        source=PowerSource.UNKNOWN if source is None else _SOURCES.get(source[1], PowerSource.UNKNOWN),
        battery_share=None if charge is None else min(int(charge[1]) / _FULL_PERCENT, 1.0),
        is_low_power=None if mode is None else int(mode[2]) == _LOW_POWER,
    )
