"""Knocks: somebody who was away is back; a page that polls all the time is not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from emberd.services import turns as turns_module
from emberd.services.turns import Knocks

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


async def hears(knocks: Knocks, act: Callable[[], None]) -> bool:
    waiting = asyncio.create_task(knocks.wait())
    await asyncio.sleep(0)
    act()
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    waiting.cancel()
    return bool(done)


async def test_only_who_was_away_for_a_while_is_back(monkeypatch: pytest.MonkeyPatch):
    now_s = 1000.0
    monkeypatch.setattr(turns_module.time, "monotonic", lambda: now_s)
    knocks = Knocks()
    assert knocks.seconds_since is None
    heard = []
    for pause_s in (0, 5, 30, 59, 60, 10, 3600):
        now_s += pause_s
        heard.append(knocks.is_back_at(now_s))
        knocks.knock()
    assert heard == [True, False, False, False, True, False, True]
    assert knocks.seconds_since == 0


async def test_who_waits_is_woken():
    knocks = Knocks()
    assert await hears(knocks, knocks.knock)
    assert not await hears(knocks, knocks.knock), "that was a poll"
