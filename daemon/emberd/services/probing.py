"""Asks the engine whether it is ready, then repeatedly whether it lives."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from emberd.core import lifecycle, liveness
from emberd.core.types import Readiness
from emberd.services.gate import PROBE_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.core.lifecycle import Event
    from emberd.core.settings import LifecycleSettings
    from emberd.core.types import Activity
    from emberd.engine.record import EngineRecord
    from emberd.services.engine_output import EngineOutput
    from emberd.services.engine_run import EngineRun
    from emberd.services.gate import Gate

_FIRST_PROBE_S = 0.05
_SLOWEST_PROBE_S = 0.5
_JUDGE_LOCK_S = 60.0


class Probing:
    """Probes one engine after another."""

    def __init__(
        self,
        settings: Callable[[], LifecycleSettings],
        log: FilteringBoundLogger,
        gate: Gate,
        run: EngineRun,
        output: EngineOutput,
        post: Callable[[Event], None],
    ) -> None:
        self._settings = settings
        self._log = log
        self._gate = gate
        self._run = run
        self._output = output
        self._post = post
        self._generated_units = 0

    async def earn_ready(self, record: EngineRecord) -> bool:
        """Probe until the engine is ready; return False if another program answers in its place."""
        pause_s = _FIRST_PROBE_S
        while True:
            seen = await self._gate.engine.probe_readiness(record.port, PROBE_TIMEOUT_S)
            if seen is Readiness.READY and not self._run.is_ours(record.port):
                seen = Readiness.STRANGER
            if seen is Readiness.READY:
                break
            if seen is Readiness.STRANGER:
                self._post(lifecycle.Stuck(f"another program answers on port {record.port}"))
                return False
            self._output.has_progressed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._output.has_progressed.wait()
            pause_s = min(pause_s * 1.5, _SLOWEST_PROBE_S)
        self._output.read()  # the loading lines about memory: the verdict and the record need them
        await self._run.find_model(record)
        self._run.judge_lock()
        self._gate.change(room=self._gate.engine.room)
        return True

    async def _activity(self, port: int) -> Activity:
        seen = await self._gate.engine.probe_activity(port, PROBE_TIMEOUT_S)
        process = self._run.process
        if (not seen.answered or seen.is_generating) and process:
            if seen.generated_units is not None:
                self._generated_units = seen.generated_units
            return replace(
                seen,
                cpu_seconds=process.cpu_seconds(),
                generated_units=self._generated_units + self._gate.flowed_bytes,
            )
        return seen

    async def prove_alive(self, record: EngineRecord) -> None:
        """Probe repeatedly whether the engine lives; post and return when it hangs."""
        port = record.port
        watch = liveness.begin(time.monotonic())
        judged_s = time.monotonic()
        verdict = liveness.Verdict.ALIVE
        served_for_s: float | None = None
        while True:
            is_idle = not self._gate.in_flight
            await asyncio.sleep(liveness.pause_s(verdict, self._settings(), is_idle=is_idle))
            if time.monotonic() - judged_s >= _JUDGE_LOCK_S:
                judged_s = time.monotonic()
                self._run.judge_lock()
            try:
                seen = await self._activity(port)
            except OSError as error:  # too many open files prove nothing about the engine
                self._log.warning("engine_not_probed", error=error.strerror)
                continue
            if seen.serves_for_s is not None:
                if served_for_s is not None and seen.serves_for_s < served_for_s:
                    self._run.loads_again()
                    return
                served_for_s = seen.serves_for_s
            watch, verdict = liveness.judge(watch, seen, time.monotonic(), self._settings())
            if verdict is liveness.Verdict.HUNG:
                silent_s = time.monotonic() - watch.alive_at
                reason = f"hung: no sign of life or progress for {silent_s:.0f} s"
                self._post(lifecycle.Stuck(self._output.with_last_words(reason)))
                return
            if verdict is liveness.Verdict.SILENT:
                self._log.warning("engine_silent", answered=seen.answered, generating=seen.is_generating)
