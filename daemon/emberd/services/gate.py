"""What requests and warmth may ask of the engine's owner, the supervisor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from emberd.core.lock import LockState
    from emberd.core.ports import Engine
    from emberd.core.turn import PromptCounts
    from emberd.core.types import EngineSample


class Gate(Protocol):
    """The way to the engine."""

    @property
    def engine(self) -> Engine:
        """The engine's adapter."""
        ...

    @property
    def engine_key(self) -> str | None:
        """Text that tells this engine's process from others, None while there is none."""
        ...

    @property
    def port(self) -> int | None:
        """The engine's port, None while it is not ready."""
        ...

    @property
    def is_adopted(self) -> bool:
        """Whether the engine served before this emberd was there."""
        ...

    @property
    def lock_state(self) -> LockState:
        """The last verdict about the engine's lock."""
        ...

    @property
    def will_lock(self) -> bool:
        """Whether the engine was asked to lock: there is room for it, and its owner wants it."""
        ...

    def sample(self) -> EngineSample:
        """Return what the engine is at this moment."""
        ...

    async def wait_for_change(self) -> None:
        """Return when the engine's state has changed."""
        ...

    async def ensure_ready(self, timeout_s: float) -> int:
        """Return the port of a ready engine.

        Raises:
            NotReady: there is none in time.
        """
        ...

    def admitted(self) -> AbstractContextManager[Callable[[int], None]]:
        """Count a request on its way to the engine; yields what is told of reply bytes that pass."""
        ...

    async def is_alive(self, port: int) -> bool:
        """Return True if the engine on `port` outlived the reply that has just ended; bounded."""
        ...

    def doubt(self, port: int) -> None:
        """The engine on `port` refused or broke a connection; it must show again that it is ready."""
        ...

    def forget_counts(self) -> None:
        """A generation is about to be sent: what the engine's log tells from now on is of that one."""
        ...

    def counts_in_log(self) -> PromptCounts:
        """Return what the engine's log tells of the generation that has just ended."""
        ...

    def restart_without_lock(self) -> None:
        """Start the engine anew, without asking it to lock."""
        ...
