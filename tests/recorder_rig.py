"""A real recorder with its services, on a clock and a host's memory that are dictated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from emberd.core.memory import EngineMemory, Pressure, SystemMemory
from emberd.core.tally import Tally
from emberd.core.turn import PromptCounts, Turn
from emberd.core.types import EngineSample
from emberd.host import ThisHost
from emberd.services import first_tokens, recorder, turns
from emberd.services.accounts import Accounts, Spending
from emberd.services.forecaster import Forecaster
from emberd.services.history import History
from emberd.services.observer import Observer
from emberd.services.recorder import Recorder
from emberd.services.swap_meter import SwapMeter
from emberd.services.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from emberd.core.minute import Minute
    from emberd.core.status import ResidencyStatus

GIB = 1 << 30
ENGINE = "1:a"
LOG = structlog.get_logger()


class DictatedHost(ThisHost):
    """This computer, but for its memory, which a test dictates."""

    engine = EngineMemory(resident_bytes=5 * GIB, locked_bytes=0, swapped_bytes=0)
    system = SystemMemory(swapped_out_bytes=0, available_bytes=8 * GIB, pressure=Pressure.NORMAL)

    def engine_memory(self, pids: Sequence[int]) -> EngineMemory:  # noqa: ARG002  # as the host has it
        return self.engine

    def system_memory(self) -> SystemMemory:
        return self.system


@dataclass
class IdleGate:
    """A gate whose engine is ready and idle."""

    port: int | None = 1
    requests: int = 0
    tally: Tally = field(default_factory=Tally)


class Rig:
    """A recorder of real services, on a clock of its own.

    Args:
        folder: where the history is kept.
        now_s: what the clock shows at first.
        patch: replaces an attribute of a module, as `setattr` does.
    """

    def __init__(self, folder: Path, now_s: float, patch: Callable[[object, str, object], None]) -> None:
        self.now_s = now_s
        self.residency: ResidencyStatus | None = None
        for module in (recorder, turns, first_tokens):
            patch(module, "time", type("Clock", (), {"time": self._time, "monotonic": self._time}))
        self.host, self.gate, self.path = DictatedHost(), IdleGate(), folder / "history.db"
        self.spending = Spending(Accounts(self.path, LOG))
        observer = Observer(self.host, LOG, lambda: EngineSample(ENGINE, (1,), is_idle=True, requests=0))
        self.observer = observer
        self.turns = Turns(lambda: 1 << 20, tally=self.gate.tally)
        self.forecaster = Forecaster(LOG, observer, self.turns, self._residency)
        self.recorder = Recorder(
            LOG,
            SwapMeter(observer, self.spending.accounts),
            self.gate,  # type: ignore[arg-type]  # a part of one
            self.forecaster,
            self.spending,
            self.turns,
            lambda: True,
        )

    def _time(self) -> float:
        return self.now_s

    async def _residency(self) -> ResidencyStatus | None:
        return self.residency

    async def minute(self) -> Minute:
        """Let a minute pass."""
        self.now_s += 60
        made = await self.recorder.tick()
        assert made is not None
        return made

    def turn(self, took_s: float, counts: PromptCounts) -> None:
        """Let a user have a reply."""
        first = self.turns.begin(ENGINE)
        self.turns.first_tokens.spoke(took_s, first)
        self.turns.end(ENGINE, lambda: Turn("/completion", {"prompt": "x"}, "y", counts), first=first)

    def kept(self) -> History:
        """Open the file as another program would."""
        return History(self.path, LOG)
