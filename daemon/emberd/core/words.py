"""Figures in words, as a person says them. Pure."""

from __future__ import annotations

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400
_GB = 1_000_000_000


def duration(seconds: float) -> str:
    """Return seconds in words: 4 s, 3 min, 2 h 5 min, 3 d 4 h."""
    whole = int(seconds)
    if whole < _MINUTE_S:
        return f"{whole} s"
    minutes, hours, days = whole // _MINUTE_S, whole // _HOUR_S, whole // _DAY_S
    if whole < _HOUR_S:
        return f"{minutes} min"
    if whole < _DAY_S:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def seconds(value: float) -> str:
    """Return a short time with two digits that count: 0.05 s, 3.1 s, 14 s; from two minutes on in minutes."""
    if value >= 2 * _MINUTE_S:
        return duration(value)
    return f"{round(value)} s" if value >= 10 else f"{float(f'{value:.2g}'):g} s"  # noqa: PLR2004  # two digits


def size(size_bytes: float) -> str:
    """Return bytes as a disk's maker counts them: 640 MB, 1.9 GB, 24 GB."""
    if size_bytes < _GB:
        return f"{size_bytes / 1e6:.0f} MB"
    return f"{size_bytes / _GB:.1f} GB" if size_bytes < 10 * _GB else f"{size_bytes / _GB:.0f} GB"


def count(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: 1 request, 3 requests."""
    return f"{number} {one if number == 1 else many or one + 's'}"
