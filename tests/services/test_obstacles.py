"""What is seen of an engine's end: files and disks are looked at, and are not waited for."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import structlog

from emberd.core.settings import Settings
from emberd.services import obstacles as obstacles_module
from emberd.services.obstacles import Obstacles

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def test_the_news_of_an_engines_end_does_not_wait_for_a_dead_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    volume = threading.Event()
    monkeypatch.setattr(obstacles_module, "EXIT_LIMIT_S", 0.05)
    made = Obstacles(Settings, tmp_path, structlog.get_logger())
    monkeypatch.setattr(made, "_missing_model", lambda: volume.wait(30) and None)
    try:
        async with asyncio.timeout(5):
            assert await made.find_after_exit(1, "") is None
    finally:
        volume.set()


async def test_a_model_that_has_gone_is_named_as_the_cause_of_an_end(tmp_path: Path):
    model = tmp_path / "gone.gguf"
    settings = Settings()
    object.__setattr__(settings.model, "path", str(model))
    cause = await Obstacles(lambda: settings, tmp_path, structlog.get_logger()).find_after_exit(1, "")
    assert cause is not None
    assert "gone.gguf" in cause.message
