"""Where a Linux computer's power comes from: /sys/class/power_supply (Documentation/ABI/testing/sysfs-class-power).

Not psutil.sensors_battery: it takes any supply with "battery" in its name, so that a desktop with a wireless mouse
(hidpp_battery_0) would be on battery.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.memory import Power, PowerSource

if TYPE_CHECKING:
    from pathlib import Path

_EXTERNAL = frozenset({"Mains", "USB", "Wireless"})
_FULL_PERCENT = 100


def read_power(sys: Path) -> Power:
    """Read all supplies of the computer itself; those of a mouse or a headset have the scope "Device".

    Args:
        sys: root of the sys file system.
    """
    profile = _word(sys / "firmware/acpi/platform_profile")
    is_low_power = None if profile is None else profile == "low-power"
    try:
        folders = sorted((sys / "class/power_supply").iterdir())
    except OSError:
        return Power(is_low_power=is_low_power)
    supplies = [folder for folder in folders if _word(folder / "scope") != "Device"]
    batteries = [folder for folder in supplies if _word(folder / "type") == "Battery"]
    charges = [int(charge) for folder in batteries if (charge := _word(folder / "capacity") or "").isdecimal()]
    return Power(
        source=_source(supplies, batteries),
        battery_share=min(sum(charges) / len(charges) / _FULL_PERCENT, 1.0) if charges else None,
        is_low_power=is_low_power,
    )


def _source(supplies: list[Path], batteries: list[Path]) -> PowerSource:
    if any(_word(one / "type") in _EXTERNAL and _word(one / "online") not in {None, "0"} for one in supplies):
        return PowerSource.MAINS
    states = {_word(battery / "status") for battery in batteries}
    if "Discharging" in states:
        return PowerSource.BATTERY
    # No battery: a desktop. Charging, Full and Not charging need another source.
    return PowerSource.UNKNOWN if states & {"Unknown", None} else PowerSource.MAINS


def _word(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
