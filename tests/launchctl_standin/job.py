"""One loaded job: when it runs, when it is stopped, when it is started again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import spawn
import texts

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

CRASHES = frozenset(
    {
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGABRT,
        signal.SIGFPE,
        signal.SIGBUS,
        signal.SIGSEGV,
        signal.SIGSYS,
        signal.SIGQUIT,
    }
)
"""Signals "typically associated with a crash" (launchd.plist(5), Crashed)."""
NOT_RUNNING, RUNNING, SCHEDULED, TERMINATED, KILLED = (
    "not running",
    "running",
    "spawn scheduled",
    "SIGTERMed",
    "SIGKILLed",
)


def keeps_alive(job: Mapping[str, Any]) -> Any:
    """Return KeepAlive, or what the older OnDemand says of it."""
    return job.get("KeepAlive", not job.get("OnDemand", True))


def runs_at_load(job: Mapping[str, Any]) -> bool:
    """Return True if loading starts the job; any use of KeepAlive implies it."""
    keep_alive = keeps_alive(job)
    waits = isinstance(keep_alive, dict) and keep_alive.get("AfterInitialDemand") is True
    return not waits and (bool(keep_alive) or job.get("RunAtLoad") is True)


def wants_restart(job: Mapping[str, Any], status: int, is_loaded: Callable[[str], bool]) -> bool:
    """Return True if a job that ended with this wait status is started again: the conditions are OR-ed.

    PathState and OtherJobEnabled are looked at when the job ends, not watched.
    """
    keep_alive = keeps_alive(job)
    if job.get("LaunchOnlyOnce"):
        return False
    if not isinstance(keep_alive, dict):
        return bool(keep_alive)
    is_success = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    is_crash = os.WIFSIGNALED(status) and os.WTERMSIG(status) in CRASHES
    holds = [
        keep_alive[key] is is_so
        for key, is_so in (("SuccessfulExit", is_success), ("Crashed", is_crash))
        if key in keep_alive
    ]
    holds += [Path(path).exists() is wanted for path, wanted in keep_alive.get("PathState", {}).items()]
    holds += [is_loaded(label) is wanted for label, wanted in keep_alive.get("OtherJobEnabled", {}).items()]
    return any(holds)


class Job:
    """A job in a domain. Times are monotonic; what launchd would wait is divided by `speed()`."""

    def __init__(self, plist: dict[str, Any], path: str, domain: str, speed: Callable[[], float]) -> None:
        self.plist, self.path, self.domain = plist, path, domain
        self.label: str = plist["Label"]
        self._speed = speed
        self.sockets: list[tuple[str, socket.socket]] = []
        self.state = NOT_RUNNING
        self.pid: int | None = None
        self.runs = 0
        self.last_status: int | None = None
        self.reason = ""
        self.started_s: float | None = None
        self.spawn_due_s: float | None = None
        self.kill_due_s: float | None = None
        self.is_leaving = False
        self.gone_due_s: float | None = None
        self.is_to_restart = False
        self.waiting: list[tuple[socket.socket, bool]] = []
        """Callers of `kickstart` that are told when it runs, and whether they want the pid."""

    @property
    def throttle_s(self) -> int:
        """Least seconds between two starts."""
        return int(self.plist.get("ThrottleInterval", texts.THROTTLE_S))

    @property
    def exit_timeout_s(self) -> int:
        """Seconds from SIGTERM to SIGKILL; 0 for never."""
        return int(self.plist.get("ExitTimeOut", texts.EXIT_TIMEOUT_S))

    def load(self) -> list[str]:
        """Open the sockets, start what starts at load; return what failed."""
        self.sockets, failures = spawn.open_sockets(self.plist)
        if runs_at_load(self.plist):
            self.schedule("speculative", throttled=False)
        return failures

    def schedule(self, reason: str, *, throttled: bool) -> None:
        """Have it started: now, or as soon as its throttle lets it."""
        now_s = time.monotonic()
        self.reason, self.spawn_due_s, self.state = reason, now_s, SCHEDULED
        if throttled and self.started_s is not None:
            self.spawn_due_s = max(now_s, self.started_s + self.throttle_s / self._speed())

    def start(self) -> None:
        """Start the process."""
        self.spawn_due_s = None
        self.pid = spawn.start(self.plist, self.sockets)
        self.started_s = time.monotonic()
        self.runs += 1
        self.state = RUNNING

    def send(self, number: int) -> None:
        """Send the job's process a signal; nobody else of its group gets it."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after ExitTimeOut; a second call changes nothing."""
        if self.pid is None:
            self.spawn_due_s, self.state = None, NOT_RUNNING
        elif self.state == RUNNING:
            if self.plist.get("EnableTransactions"):  # without an open transaction it is clean: no need to ask
                self.kill()
                return
            self.send(signal.SIGTERM)
            self.state = TERMINATED
            if self.exit_timeout_s:
                self.kill_due_s = time.monotonic() + self.exit_timeout_s / self._speed()

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send(signal.SIGKILL)
        self.state, self.kill_due_s = KILLED, None

    def has_ended(self) -> bool:
        """Reap the process if it has ended, and kill what is left of its group."""
        if self.pid is None:
            return False
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        if not self.plist.get("AbandonProcessGroup"):
            # Before it is reaped: the number is still its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        _, self.last_status = os.waitpid(self.pid, 0)
        self.pid, self.kill_due_s, self.state = None, None, NOT_RUNNING
        return True

    def close_sockets(self) -> None:
        """Close the sockets, and remove those with a path."""
        for _, each in self.sockets:
            place = each.getsockname()
            each.close()
            if isinstance(place, str):
                Path(place).unlink(missing_ok=True)
        self.sockets = []

    # --- words ----------------------------------------------------------------------------------------------

    def printed(self) -> str:
        """Return what `launchctl print` says of it."""
        job = self.plist
        arguments = job.get("ProgramArguments") or [job["Program"]]
        kinds = {"Interactive": "interactive (4)", "Adaptive": "adaptive (6)", "Background": "background"}
        lines = [
            f"{self.domain}/{self.label} = {{",
            f"\tactive count = {int(self.pid is not None)}",
            f"\tpath = {self.path}",
            "\ttype = LaunchAgent",
            f"\tstate = {self.state}",
            "",
            f"\tprogram = {job.get('Program', arguments[0])}",
            "\targuments = {",
            *(f"\t\t{each}" for each in arguments),
            "\t}",
            "",
            *(
                f"\t{words} = {job[key]}"
                for key, words in (
                    ("WorkingDirectory", "working directory"),
                    ("StandardOutPath", "stdout path"),
                    ("StandardErrorPath", "stderr path"),
                )
                if key in job
            ),
            "\tdefault environment = {",
            f"\t\tPATH => {spawn.PATH}",
            "\t}",
            "",
            "\tenvironment = {",
            *(f"\t\t{name} => {value}" for name, value in job.get("EnvironmentVariables", {}).items()),
            f"\t\tXPC_SERVICE_NAME => {self.label}",
            "\t}",
            "",
            f"\tdomain = {self.domain}",
            f"\tminimum runtime = {self.throttle_s}",
            f"\texit timeout = {self.exit_timeout_s}",
            f"\truns = {self.runs}",
            *([f"\tpid = {self.pid}"] if self.pid is not None else []),
            *([f"\timmediate reason = {self.reason}"] if self.reason else []),
            f"\t{self._last_words()}",
            "",
            f"\tspawn type = {kinds.get(job.get('ProcessType', ''), 'daemon (3)')}",
            "}",
        ]
        return "\n".join(lines)

    def _last_words(self) -> str:
        status = self.last_status
        if status is None:
            return "last exit code = (never exited)"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return f"last terminating signal = {signal.strsignal(number)}: {number}"
        return f"last exit code = {texts.exit_words(os.WEXITSTATUS(status))}"

    def listed(self) -> str:
        """Return what `launchctl list LABEL` says; the status is the raw one of wait(2)."""
        job = self.plist
        arguments = job.get("ProgramArguments") or [job["Program"]]
        lines = [
            "{",
            *(f'\t"{key}" = "{job[key]}";' for key in ("StandardOutPath", "StandardErrorPath") if key in job),
            f'\t"LimitLoadToSessionType" = "{"Aqua" if self.domain.startswith("gui/") else "Background"}";',
            f'\t"Label" = "{self.label}";',
            f'\t"OnDemand" = {"false" if keeps_alive(job) else "true"};',
            f'\t"LastExitStatus" = {self.last_status or 0};',
            *([f'\t"PID" = {self.pid};'] if self.pid is not None else []),
            f'\t"Program" = "{job.get("Program", arguments[0])}";',
            '\t"ProgramArguments" = (',
            *(f'\t\t"{each}";' for each in arguments),
            "\t);",
            "};",
        ]
        return "\n".join(lines)

    @property
    def list_status(self) -> str:
        """The middle column of `launchctl list`: exit code, or a signal as a negative number."""
        status = self.last_status or 0
        return str(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
