"""The engine's process tree: start it, watch it, take it over, end it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from emberd.core import causes
from emberd.core.errors import EngineNotUsable, StateUnusable
from emberd.engine.wishes import API_KEY_FILE_VARIABLE
from emberd.host import api_key, notify_socket
from emberd.host.files import has_text, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from emberd.core.ports import EventWatch, Host
    from emberd.core.types import LaunchPlan

KILL_WAIT_S = 5.0
"""How long the kernel may take to end a killed process, which includes freeing tens of GB of locked memory."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals of a stop, in order; engines handle the first best."""
FIRST_SIGNAL_S = 3.0
"""How long a signal that is not the last may take. An idle KoboldCPP obeys SIGINT in 0.1 s; in a streamed
generation it obeys only at the end."""


class ProcessTree:
    """A main process that leads (or led) its own session, and all that it started.

    Args:
        pid: the main process; its pid is also the process group, which outlives it while a worker does.
    """

    def __init__(self, pid: int, host: Host) -> None:
        self.pid = pid
        self._host = host

    def members(self) -> list[int]:
        """Return the pids of the living tree: the process group and every descendant.

        A worker that outlives its parent stays in the group, and one that left the group is still a descendant.
        """
        found: set[int] = set()
        with contextlib.suppress(psutil.Error, OSError):
            main = psutil.Process(self.pid)
            found |= {child.pid for child in main.children(recursive=True)}
        try:
            for process in psutil.process_iter():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    if os.getpgid(process.pid) == self.pid:
                        found.add(process.pid)
        except OSError:  # too many open files: the main process is known without a look
            found.add(self.pid)
        return sorted(pid for pid in found if is_alive(pid))

    def has_group(self) -> bool:
        """Return True if anything of the process group is left, zombies included; cheap."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def cpu_seconds(self) -> float | None:
        """Return CPU time used by the tree so far, None if it cannot be read."""
        total: float | None = None
        for pid in self.members():
            with contextlib.suppress(psutil.Error, OSError):
                times = psutil.Process(pid).cpu_times()
                total = (total or 0.0) + times.user + times.system
        return total

    async def terminate(self, signals: Sequence[signal.Signals], timeout_s: float) -> tuple[int, ...]:
        """End the whole tree: each signal in turn, then SIGKILL, within `timeout_s` plus KILL_WAIT_S.

        Each signal goes to the group, since a signal to the parent alone orphans a worker (KoboldCPP with
        --admin).

        Returns:
            The pids that had to be killed, empty if all ended by themselves.
        """
        deadline_s = time.monotonic() + timeout_s
        for number in signals:
            living = self.members()
            if not living:
                break
            self._signal(living, number)
            left_s = deadline_s - time.monotonic()
            is_last = number is signals[-1]
            await self._wait_for(living, left_s if is_last else min(FIRST_SIGNAL_S, left_s / len(signals)))
        killed = tuple(self.members())
        if killed:
            self._signal(list(killed), signal.SIGKILL)
            await self._wait_for(list(killed), KILL_WAIT_S)
        return killed

    def _signal(self, living: list[int], number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
        for pid in living:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) != self.pid:
                    os.kill(pid, number)

    async def _wait_for(self, pids: list[int], timeout_s: float) -> None:
        """Return when all of them have ended, or after `timeout_s`."""
        waits = [asyncio.ensure_future(self._ended(pid)) for pid in pids]
        try:
            await asyncio.wait(waits, timeout=max(timeout_s, 0.0))
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _ended(self, pid: int) -> None:
        try:
            watch = self._host.watch_exit(pid)
        except ProcessLookupError:
            return
        try:
            await watch.wait()
        finally:
            watch.close()


class EngineProcess(ProcessTree):
    """A tree whose main process is watched.

    Args:
        child: the handle if this emberd started it, None if it was adopted.

    Raises:
        ProcessLookupError: the process has ended already.
    """

    def __init__(self, pid: int, host: Host, child: subprocess.Popen[bytes] | None = None) -> None:
        super().__init__(pid, host)
        self.status: int | None = None
        """Exit code or negative signal number; None while it lives, and for ever if it is no child of emberd."""
        self.has_ended = False
        self.started_s = time.monotonic()
        self._child = child
        self._watch: EventWatch = host.watch_exit(pid)

    async def wait(self) -> None:
        """Return when the main process has ended; at once, not by polling."""
        if not self.has_ended:
            await self._watch.wait()
            self._note_end()

    async def terminate(self, signals: Sequence[signal.Signals], timeout_s: float) -> tuple[int, ...]:
        """End the tree as ProcessTree does, and note the main process's status."""
        killed = await super().terminate(signals, timeout_s)
        if not self.has_ended and not is_alive(self.pid):
            self._note_end()
        return killed

    def _note_end(self) -> None:
        self.has_ended = True
        if self._child is not None:
            self.status = self._child.wait(timeout=KILL_WAIT_S)
            return
        # An emberd that replaced itself is still the parent of the engine that it adopted.
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Stop watching; the process is not touched."""
        self._watch.close()


def is_alive(pid: int) -> bool:
    """Return True if a process lives; a zombie does not."""
    try:
        status: str = psutil.Process(pid).status()
    except psutil.Error:
        return False
    except OSError:  # too many open files
        return psutil.pid_exists(pid)
    return status != psutil.STATUS_ZOMBIE


HARMFUL = re.compile(r"(LLAMA_ARG_LOG|LLAMA_LOG)_|LLAMA_TRACE$|LLAMA_ARG_(MODEL_URL|HF_REPO|HF_FILE|DOCKER_REPO)$")
"""llama.cpp's variables that print prompts or change the lines that emberd reads, and those that name another model
(common/arg.cpp, build 11434; before, the first were LLAMA_LOG_*)."""


def inherited_environment() -> dict[str, str]:
    """Return what an engine's program gets of emberd's environment: all but what is emberd's alone, or harms."""
    own = {*notify_socket.VARIABLES, api_key.ENVIRONMENT, API_KEY_FILE_VARIABLE}  # emberd reads that file itself
    return {name: value for name, value in os.environ.items() if name not in own and not HARMFUL.match(name)}


@contextlib.contextmanager
def written(plan: LaunchPlan, say: Callable[[StateUnusable], None]) -> Iterator[tuple[LaunchPlan, tuple[int, ...]]]:
    """Write a plan's files. The text of one that cannot be written is in a pipe, whose name stands in its place.

    KoboldCPP reads its settings once (koboldcpp.py, load_config_cli, 1.76 to 1.115), llama-server its keys
    (common/arg.cpp), and a pipe is on no disk.

    Args:
        plan: what is to be started.
        say: is told why a file could not be written.

    Yields:
        The plan as it can be started now, and the descriptors that the engine needs for it.

    Raises:
        StateUnusable: a file can neither be written nor does it fit into a pipe.
    """
    pipes: dict[str, int] = {}
    try:
        for name, text in plan.files.items():
            try:
                if not has_text(Path(name), text):
                    write_atomically(Path(name), text, may_write_over=True)
            except StateUnusable as error:
                pipes[name] = _in_a_pipe(text, error)
                say(error)
        words = tuple(f"/dev/fd/{pipes[word]}" if word in pipes else word for word in plan.arguments)
        yield replace(plan, arguments=words), tuple(pipes.values())
    finally:
        for descriptor in pipes.values():
            os.close(descriptor)


def _in_a_pipe(text: str, why: StateUnusable) -> int:
    """Return the reading end of a pipe that has the text in it.

    Raises:
        StateUnusable: it is too long (pipe(7): 64 KiB; macOS: 16 KiB, grown to 64).
    """
    read_end, write_end = os.pipe()
    try:
        os.set_blocking(write_end, False)
        content = text.encode()
        if os.write(write_end, content) == len(content):
            return read_end
    except BlockingIOError:
        pass
    finally:
        os.close(write_end)
    os.close(read_end)
    raise why


def launch(plan: LaunchPlan, output: int, host: Host, descriptors: tuple[int, ...] = ()) -> EngineProcess:
    """Start the engine in its own session, with its output going to the descriptor `output`.

    emberd itself handles SIGINT, SIGTERM and SIGHUP, so the child gets their default actions back; a shell's
    background job would pass on an ignored SIGINT, which KoboldCPP needs.

    Raises:
        EngineNotUsable: the program cannot be started.
        OSError: this computer, or this process, has no room for another program now.
    """
    program = plan.arguments[0]
    try:
        child = subprocess.Popen(
            plan.arguments,
            env={**inherited_environment(), **plan.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=descriptors,
        )
    except FileNotFoundError as error:
        raise EngineNotUsable(f"engine not found: {program}", "Set engine.path in the settings.") from error
    except PermissionError as error:
        raise EngineNotUsable(f"not executable: {program}", f"Run: chmod +x {program}") from error
    except OSError as error:
        if error.errno in causes.SHORTAGES:
            raise
        raise EngineNotUsable(
            f"cannot start {program}: {error.strerror}",
            "Is it a program for this system and processor? Set engine.path in the settings.",
        ) from error
    try:
        return EngineProcess(child.pid, host, child)
    except OSError:  # no descriptor to watch it by: nobody would end it
        child.kill()
        child.wait(KILL_WAIT_S)
        raise
