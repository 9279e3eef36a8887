"""How long the next first token will take, by what is missing now and what was measured here. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from statistics import median

_HOT_SHARE = 0.002
"""The engine never touches some pages (header, rows of the vocabulary), so this share may be missing of a hot
model."""
_WARM_SHARE = 0.25
KEPT = 9
"""How many observations of each state are kept."""
_SOUND = 3
"""This many observations of a state count for more than a computed forecast."""


class Temperature(Enum):
    """How much of the model is missing in memory."""

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Condition:
    """The state of the idle model. Unknown is None.

    Attributes:
        weights_bytes: size of the weights.
        missing_bytes: of the weights, not in memory.
        swapped_bytes: of the engine, in swap.
        knows_cache: the KV cache holds the last turn.
    """

    weights_bytes: int | None = None
    missing_bytes: int | None = None
    swapped_bytes: int | None = None
    knows_cache: bool | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The next first token.

    Attributes:
        temperature: how it will find the model.
        seconds: how long it will take, None if nothing was measured yet.
    """

    temperature: Temperature
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Experience:
    """Measurements on this computer with this engine.

    Attributes:
        first_tokens_s: of users' streamed replies, by the state of the model, oldest first.
        hot_replay_s: the fastest replay.
        read_bytes_per_s: how fast the toucher brought missing pages back.
    """

    first_tokens_s: tuple[tuple[Temperature, float], ...] = ()
    hot_replay_s: float | None = None
    read_bytes_per_s: float | None = None

    def of(self, temperature: Temperature) -> list[float]:
        """Return the observations of a state."""
        return [seconds for each, seconds in self.first_tokens_s if each is temperature]

    def with_first_token(self, temperature: Temperature, seconds: float) -> Experience:
        """Return the experience with one more observation; the oldest of that state goes."""
        kept = [*self.first_tokens_s, (temperature, seconds)]
        mine = [each for each in kept if each[0] is temperature]
        if len(mine) > KEPT:
            kept.remove(mine[0])
        return Experience(tuple(kept), self.hot_replay_s, self.read_bytes_per_s)


def temperature_of(seen: Condition) -> Temperature:
    """Return how much is missing."""
    if seen.missing_bytes is None or not seen.weights_bytes:
        return Temperature.UNKNOWN
    share = (seen.missing_bytes + (seen.swapped_bytes or 0)) / seen.weights_bytes
    if share <= _HOT_SHARE:
        return Temperature.HOT
    return Temperature.WARM if share <= _WARM_SHARE else Temperature.COLD


def forecast(seen: Condition, experience: Experience) -> Forecast:
    """Return how long the next first token will take.

    Enough observations of the same state decide. Otherwise it is a hot first token, and the time to bring back
    what is missing at the measured speed. A prompt that is new to the cache takes longer by its length.
    """
    temperature = temperature_of(seen)
    observed = experience.of(temperature)
    if len(observed) >= _SOUND:
        return Forecast(temperature, median(observed))
    hot = experience.of(Temperature.HOT)
    hot_s = median(hot) if hot else experience.hot_replay_s
    if temperature is Temperature.HOT and hot_s is not None:
        return Forecast(temperature, hot_s)
    missing_bytes = (seen.missing_bytes or 0) + (seen.swapped_bytes or 0)
    is_computable = temperature is not Temperature.UNKNOWN and hot_s is not None
    if is_computable and hot_s is not None and experience.read_bytes_per_s:
        return Forecast(temperature, hot_s + missing_bytes / experience.read_bytes_per_s)
    return Forecast(temperature, median(observed) if observed else None)
