"""The gate to the engine: whether it is ready, a way in, and what it tells."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from emberd.core import lifecycle
from emberd.core.engine_files import is_model_mapped
from emberd.core.errors import NotReady
from emberd.core.lifecycle import Lifecycle, State
from emberd.core.lock import LockState
from emberd.core.reuse import CacheRoom
from emberd.core.tally import Tally
from emberd.core.types import EngineSample, Readiness, Serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emberd.core.lifecycle import Event
    from emberd.core.ports import Engine
    from emberd.core.turn import PromptCounts
    from emberd.core.types import Switch
    from emberd.engine.record import EngineRecord
    from emberd.services.engine_output import EngineOutput
    from emberd.services.lock_meter import LockMeter

PROBE_TIMEOUT_S = 2.0
RETRY_AFTER_S = 5
_RETRY_AT_REST_S = 60
_COOL_LIMIT_S = 120.0
"""Longer than a stop takes (`stop_timeout_s` is 20 s), shorter than `emberd cool` waits for its answer."""
_COOL_REASON = "its memory is given to other work; the next request for text starts it"
_LATE_EXIT_S = 0.5
"""An exit is noticed within milliseconds; the rest is for a machine that swaps."""
_ASK_AGAIN_S = 0.05
SERVING = frozenset({State.READY, State.DRAINING})


@dataclass(frozen=True, slots=True)
class EngineNow:
    """What is known of the engine at this moment.

    Attributes:
        life: where it is in its life.
        record: its process, None while there is none.
        pids: that process and its descendants.
        is_adopted: it served before this emberd was there.
        room: what its KV cache holds.
        serving: what it serves.
        has_begun: an event was handled; before that an engine may still be adopted, and nobody is refused.
        is_closing: emberd is shutting down.
    """

    life: Lifecycle
    record: EngineRecord | None = None
    pids: tuple[int, ...] = ()
    is_adopted: bool = False
    room: CacheRoom = field(default_factory=CacheRoom)
    serving: Serving = field(default_factory=Serving)
    has_begun: bool = False
    is_closing: bool = False


class Gate:
    """Through it requests and keep-warm ask the engine; it counts requests. The supervisor keeps it up to date."""

    def __init__(
        self,
        engine: Engine,
        now: EngineNow,
        meter: LockMeter,
        output: EngineOutput,
        post: Callable[[Event], None],
    ) -> None:
        self.engine = engine
        self.now = now
        self._meter = meter
        self._output = output
        self._post = post
        self._changed = asyncio.Event()
        self.must_not_lock = False
        """Whether the engine is no longer asked to lock, until emberd is restarted."""
        self.tally = Tally()
        """What has happened, for the history."""
        self.in_flight = 0
        """Requests on their way to the engine."""
        self.held = 0
        """Requests that wait until it is ready."""
        self.requests = 0
        """Requests sent so far."""
        self.hear_switch: Callable[[Switch], None] = lambda _: None
        """Called when a client has asked the engine to serve another model."""
        self.flowed_bytes = 0
        """Bytes of replies so far: a sign of life."""
        self.woken_s: float | None = None
        """When a cool engine was last needed again, on the monotonic clock; None for never."""

    # --- what the engine is ---------------------------------------------------------------------------------

    def change(self, **changes: Any) -> None:
        """Take over what has changed of the engine."""
        was_cool = self.now.life.is_cool
        self.now = replace(self.now, **changes)
        if was_cool and not self.now.life.is_cool:
            self.woken_s = time.monotonic()

    def wake_waiters(self) -> None:
        """Wake everybody who waits: an event was handled, whether or not the state has changed."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    @property
    def state(self) -> State:
        """Where the engine is in its life."""
        return self.now.life.state

    @property
    def since_s(self) -> float:
        """When this state began, on the monotonic clock."""
        return self.now.life.since_s

    @property
    def port(self) -> int | None:
        """The engine's port, None while it is not ready."""
        return self.now.record.port if self.now.record and self.state is State.READY else None

    @property
    def engine_key(self) -> str | None:
        """Text that tells this engine and its model from others, None while there is none.

        An engine that loads another model in place keeps its process, and nothing else.
        """
        record, loads = self.now.record, self.now.serving.loads
        if record is None or self.state not in lifecycle.HAS_PROCESS:
            return None
        return f"{record.pid}:{record.start_token}" + (f":{loads}" if loads else "")

    @property
    def is_adopted(self) -> bool:
        """Whether the engine served what it serves before this emberd was there."""
        return self.now.is_adopted and not self.now.serving.loads

    @property
    def is_empty(self) -> bool:
        """Whether the engine is ready, and somebody has unloaded its model."""
        return self.state in SERVING and self.now.serving.is_empty

    @property
    def lock_state(self) -> LockState:
        """The last verdict about the engine's lock."""
        return self._meter.verdict.state if self._meter.verdict else LockState.UNKNOWN

    @property
    def will_lock(self) -> bool:
        """Whether the engine was asked to lock: there is room, and the owner wants it."""
        return self.now.record is not None and self.now.record.will_lock and self.now.serving.may_lock

    @property
    def room(self) -> CacheRoom:
        """How much the engine's KV cache holds; slots share it unless the engine's log says that they do not."""
        return replace(self.now.room, is_shared=self._meter.is_cache_shared is not False)

    def sample(self) -> EngineSample:
        """Return the engine at this moment, for measurements."""
        serving = self.now.serving
        is_found = serving.name is not None or serving.model is not None
        return EngineSample(
            key=self.engine_key,
            pids=self.now.pids if self.state in lifecycle.HAS_PROCESS else (),
            is_idle=self.state is State.READY and not self.in_flight,
            requests=self.requests,
            model=serving.model if is_found else self.engine.model_path(),
            weights_bytes=self._meter.weights_bytes,
            is_mapped=is_model_mapped(serving.files) if self._meter.is_mapped is None else self._meter.is_mapped,
            keeps_state=self._meter.keeps_state,
            files=serving.files if self.state in SERVING else (),
        )

    async def wait_for(self, *states: State) -> State:
        """Return when the engine is in one of these states."""
        while self.state not in states:
            await self._changed.wait()
        return self.state

    async def wait_for_change(self) -> None:
        """Return when an event was handled, whether or not the state has changed."""
        await self._changed.wait()

    # --- requests -------------------------------------------------------------------------------------------

    async def ensure_ready(self, timeout_s: float, *, wakes: bool = True) -> int:
        """Return the engine's port as soon as it is READY; if the caller `wakes` it, start one that is cool.

        Raises:
            NotReady: not within `timeout_s`, or never (stopped, failed, cool, emberd is shutting down).
        """
        self._refuse_if_hopeless(wakes=wakes)
        port = self.port
        if port is not None:
            return port
        self.held += 1
        try:
            async with asyncio.timeout(timeout_s):
                while (port := self.port) is None or self.now.is_closing:
                    self._refuse_if_hopeless(wakes=wakes)
                    if wakes:
                        self.wake()
                    await self._changed.wait()
                return port
        except TimeoutError:
            raise NotReady(
                self.state.value, f"the engine was not ready within {timeout_s:g} s", RETRY_AFTER_S
            ) from None
        finally:
            self.held -= 1

    def _refuse_if_hopeless(self, *, wakes: bool) -> None:
        if self.now.is_closing:
            raise NotReady(self.state.value, "emberd is shutting down", RETRY_AFTER_S)
        will_start = wakes and self.state is State.COOL
        if self.state in lifecycle.AT_REST and self.now.has_begun and not will_start:
            reason = self.now.life.reason.splitlines()[0] if self.now.life.reason else "the engine is stopped"
            cause = self.now.life.cause
            if cause is not None:
                raise NotReady(self.state.value, f"{reason} ({cause.remedy})", RETRY_AFTER_S)
            raise NotReady(self.state.value, reason, _RETRY_AT_REST_S)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[Callable[[int], None]]:
        """Count a request on its way to the engine; yield a function that counts the bytes of its reply."""
        self.in_flight += 1
        self.requests += 1
        try:
            yield self._flowed
        finally:
            self.in_flight -= 1
            if not self.in_flight and self.state is State.DRAINING:
                self._post(lifecycle.Drained())

    def _flowed(self, count: int) -> None:
        self.flowed_bytes += count

    async def is_alive(self, port: int, engine_key: str | None) -> bool:
        """Return True if the engine on `port` outlived the reply that has just ended.

        Only an answer proves life. A closed port proves the end of what served there: KoboldCPP's process with
        `--admin` outlives its worker, and may start another one. A dying process closes its connections a moment
        before its listener, so what is neither is asked again, until the end is noticed or its time is over.

        Args:
            port: the engine's port.
            engine_key: the engine's key when the request was sent.
        """
        end_s = time.monotonic() + _LATE_EXIT_S
        while self._is_serving(port, engine_key):
            seen = await self.engine.probe_readiness(port, PROBE_TIMEOUT_S)
            left_s = end_s - time.monotonic()
            if seen is Readiness.REFUSED:
                return False
            if seen is Readiness.READY or left_s <= 0:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _ASK_AGAIN_S)):
                    await self._changed.wait()
        return self._is_serving(port, engine_key)

    def _is_serving(self, port: int, engine_key: str | None) -> bool:
        record = self.now.record
        is_same = record is not None and record.port == port and self.engine_key == engine_key
        return is_same and self.state in SERVING

    def doubt(self, port: int) -> None:
        """The engine on `port` refused or broke a connection: it loads again, or has just died."""
        if self.now.record and port == self.now.record.port:
            self._post(lifecycle.LostReadiness())

    def note_switch(self, method: str, path: str, body: bytes) -> None:
        """A request was answered: note it if it asks for another model."""
        switch = self.engine.switch_in_request(method, path, body)
        if switch is not None:
            self.hear_switch(switch)

    def forget_counts(self) -> None:
        """Forget counts in the engine's log: a generation is about to be sent."""
        self._output.forget_counts()

    def counts_in_log(self) -> PromptCounts:
        """Return the counts in the engine's log of the generation that has just ended."""
        return self._output.counts()

    async def cool(self) -> bool:
        """Stop the idle engine to give its memory to other work; return True if that was done.

        A request that has come meanwhile goes on, or makes the supervisor start the engine again.
        """
        self._post(lifecycle.Cool(_COOL_REASON))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_COOL_LIMIT_S):
                while self.state is State.STOPPING or (self.state is State.READY and not self.in_flight):
                    await self._changed.wait()
        return self.state is State.COOL

    def wake(self) -> bool:
        """Have an engine started that was stopped to give its memory away; return True if it was."""
        if self.now.life.is_cool:
            self._post(lifecycle.Wake())
        return self.now.life.is_cool

    def restart_without_lock(self) -> None:
        """Start the engine anew, without asking it to lock, until emberd itself is restarted."""
        self.must_not_lock = True
        self._post(lifecycle.Restart("its lock makes the computer swap"))
