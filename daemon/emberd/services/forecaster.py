"""Forecasts the next first token, and compares the forecast with what the user then saw."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from emberd.core.forecast import Condition, Experience, Forecast, Temperature, forecast
from emberd.core.minute import FirstToken
from emberd.core.status import FirstTokenStatus, ForecastStatus, to_plain

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.core.status import ResidencyStatus
    from emberd.services.observer import Observer
    from emberd.services.turns import Turns

_LOOK_AGAIN_S = 60.0
_LEAST_READ_BYTES = 64 << 20
"""Less is read too soon to tell a speed."""


class Forecaster:
    """Remembers how long this engine took on this computer, for as long as emberd runs.

    Args:
        residency: tells how much of the weights is in memory; None without an engine.
    """

    def __init__(
        self,
        log: FilteringBoundLogger,
        observer: Observer,
        turns: Turns,
        residency: Callable[[], Awaitable[ResidencyStatus | None]],
    ) -> None:
        self._log = log
        self._observer = observer
        self._turns = turns
        self._residency = residency
        self._experience = Experience()
        self._forecast = Forecast(Temperature.UNKNOWN, None)
        self._looked_s = float("-inf")
        self._learned: FirstToken | None = None
        self.missing_bytes: int | None = None
        """Of the weights, not in memory; None if unknown."""
        turns.first_tokens.foretell = self._foretell
        self._judged: FirstTokenStatus | None = None

    @property
    def hot_replay_s(self) -> float | None:
        """The fastest replay so far, in seconds."""
        return self._experience.hot_replay_s

    def status(self) -> ForecastStatus:
        """Return the forecast, and the last one with its outcome."""
        return ForecastStatus(self._forecast.temperature.value, self._forecast.seconds, self._judged)

    async def look(self) -> None:
        """Look how much of the model is missing now."""
        self._looked_s = time.monotonic()
        seen = await self._residency()
        if seen is None or seen.total_bytes is None or seen.resident_bytes is None:
            self._forecast, self.missing_bytes = Forecast(Temperature.UNKNOWN, None), None
            return
        memory = self._observer.recent().memory
        self.missing_bytes = seen.total_bytes - seen.resident_bytes
        condition = Condition(seen.total_bytes, self.missing_bytes, memory.swapped_bytes)
        self._forecast = forecast(condition, self._experience)

    async def learn(self, *, may_look: bool) -> None:
        """Judge the forecast by the last reply; look again now and then if nobody uses the model (`may_look`)."""
        told = self._turns.first_tokens.last
        if told is not None and told is not self._learned:
            self._learned = told
            self._experience = self._experience.with_first_token(Temperature(told.temperature), told.took_s)
            self._judged = FirstTokenStatus(told.temperature, told.forecast_s, told.took_s)
            self._log.info("first_token", **to_plain(self._judged))
            self._looked_s = float("-inf")
        if may_look and time.monotonic() - self._looked_s > _LOOK_AGAIN_S:
            await self.look()

    def _foretell(self) -> FirstToken:
        told = self._forecast
        return FirstToken(
            temperature=told.temperature.value, forecast_s=told.seconds, missing_bytes=self.missing_bytes
        )

    def note_replay(self, seconds: float) -> float | None:
        """Learn a replay's time; return it divided by a hot one, None for the first."""
        hot_s = self._experience.hot_replay_s
        self._experience = replace(self._experience, hot_replay_s=min(hot_s or seconds, seconds))
        return seconds / hot_s if hot_s else None

    def note_reading(self, cold_bytes: int | None, seconds: float) -> None:
        """Learn how long it took to bring pages back."""
        if cold_bytes and cold_bytes >= _LEAST_READ_BYTES and seconds > 0:
            self._experience = replace(self._experience, read_bytes_per_s=cold_bytes / seconds)
