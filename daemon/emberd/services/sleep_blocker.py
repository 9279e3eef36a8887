"""Keeps the computer from going to sleep by itself, by a child process that runs the system's own tool."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import DEVNULL, PIPE
from typing import TYPE_CHECKING

from emberd.core.lifecycle import State
from emberd.core.memory import Power, must_stay_awake

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from emberd.core.ports import Host
    from emberd.core.settings import Settings
    from emberd.services.gate import Gate

LOOK_S = 30.0
"""How soon a change of power is seen. Reading it takes some 10 ms on macOS, and is done only if needed."""
_REFUSAL_S = 1.0
"""A refused tool has ended by then."""
_END_S = 2.0


class SleepBlocker:
    """Holds the assertion while `must_stay_awake` says so.

    The child ends with emberd, however that ends: caffeinate waits for emberd's pid, and the child of
    systemd-inhibit reads a pipe that closes.
    """

    def __init__(self, host: Host, log: FilteringBoundLogger, settings: Callable[[], Settings], gate: Gate) -> None:
        self._host = host
        self._log = log
        self._settings = settings
        self._gate = gate
        self._child: asyncio.subprocess.Process | None = None
        self._is_on_trial = False
        self._is_given_up = False

    @property
    def is_held(self) -> bool:
        """Whether sleep is prevented."""
        return self._child is not None and self._child.returncode is None and not self._is_on_trial

    async def run(self) -> None:
        """Look every LOOK_S and at each change of the engine's state, until cancelled."""
        try:
            while True:
                try:
                    await self._look()
                except Exception:  # noqa: BLE001  # a night's sleep is not worth the daemon
                    self._log.exception("sleep_blocker_bug")
                state = self._gate.state
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        while self._gate.state is state:
                            await self._gate.wait_for_change()
        finally:
            await self._release("emberd ends")

    async def _look(self) -> None:
        is_wanted = self._settings().power.prevent_sleep
        is_ready = self._gate.state is State.READY
        may_be = is_wanted and is_ready
        power = await asyncio.to_thread(self._host.power) if may_be else Power()
        if must_stay_awake(power, is_wanted=is_wanted, is_ready=is_ready):
            await self._hold()
            return
        self._is_given_up = False
        reason = "it is switched off" if not is_wanted else "the engine is not ready" if not is_ready else "power"
        await self._release(reason)

    async def _hold(self) -> None:
        if self.is_held or self._is_given_up:
            return
        if self._child is not None:
            self._log.info("sleep_blocker_ended", status=self._child.returncode)
            self._child = None
        for command in self._host.sleep_blockers():
            if await self._start(command):
                self._log.info("sleep_prevented", command=command[0])
                return
        self._is_given_up = True  # until something changes
        self._log.warning("sleep_not_prevented", remedy="Set the computer's own settings, or power.prevent_sleep.")

    async def _start(self, command: tuple[str, ...]) -> bool:
        try:
            child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL)
        except OSError:
            return False
        self._child = child  # from here on it is ended with us
        self._is_on_trial = True
        try:
            async with asyncio.timeout(_REFUSAL_S):
                await child.wait()
        except TimeoutError:
            return True
        finally:
            self._is_on_trial = False
        self._child = None
        return False

    async def _release(self, reason: str) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.returncode is None:
            if child.stdin is not None:
                child.stdin.close()
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            try:
                async with asyncio.timeout(_END_S):
                    await child.wait()
            except TimeoutError:
                child.kill()
        self._log.info("sleep_allowed", reason=reason)
