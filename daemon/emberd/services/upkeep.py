"""Puts back what has to be in the state directory, as soon as it can be: a disk may be full, read-only or gone."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING

from emberd.core.errors import EmberdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from structlog.typing import FilteringBoundLogger

    Duty = Callable[[], Awaitable[None] | None]
    """Makes what is missing; does next to nothing if nothing is. Raises OSError or EmberdError if it cannot."""

_LOOK_S = 30.0
"""A look is a few calls of stat(2)."""
_RETRY_S = 1.0


class Upkeep:
    """Does its duties in turn, and says once what cannot be done, and once that it is done again."""

    def __init__(self, duties: Mapping[str, Duty], log: FilteringBoundLogger) -> None:
        self._duties = duties
        self._log = log
        self._troubles: dict[str, str] = {}

    async def run(self) -> None:
        """Look every 30 s, and every second while something is missing; until cancelled."""
        while True:
            for what, duty in self._duties.items():
                await self._do(what, duty)
            await asyncio.sleep(_RETRY_S if self._troubles else _LOOK_S)

    async def _do(self, what: str, duty: Duty) -> None:
        try:
            done = duty()
            if inspect.isawaitable(done):
                await done
        except (OSError, EmberdError) as error:
            message = error.message if isinstance(error, EmberdError) else str(error)
            if self._troubles.get(what) != message:
                self._troubles[what] = message
                remedy = getattr(error, "remedy", "") or "Free space or mend the folder's permissions."
                self._log.warning("state_not_kept", what=what, error=message, remedy=remedy)
        else:
            if self._troubles.pop(what, None) is not None:
                self._log.info("state_kept_again", what=what)
