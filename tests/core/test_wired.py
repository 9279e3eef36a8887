"""Locked memory after an engine's end."""

from __future__ import annotations

import pytest

from emberd.core.wired import is_released

GIB = 1024**3


@pytest.mark.parametrize(
    ("before_load", "loaded", "now", "released"),
    [
        (2 * GIB, 10 * GIB, 10 * GIB, False),
        (2 * GIB, 10 * GIB, 9 * GIB, False),
        (2 * GIB, 10 * GIB, 3 * GIB, True),
        (2 * GIB, 2 * GIB, 5 * GIB, True),
        (None, 10 * GIB, 3 * GIB, None),
        (2 * GIB, None, 3 * GIB, None),
        (2 * GIB, 10 * GIB, None, None),
    ],
)
def test_release_is_seen_in_the_wired_memory_of_the_system(
    before_load: int | None, loaded: int | None, now: int | None, released: bool | None
):
    assert is_released(before_load, loaded, now) is released
