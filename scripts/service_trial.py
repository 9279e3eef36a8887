"""The part of scripts/mac-acceptance that needs an engine: emberd as a LaunchAgent, from install to uninstall.

Everything is the trial's own: label, port, settings, state. What is there already is not touched, and whatever
happens, what the trial has made is removed. Each step says what it expects and what it saw.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import plistlib
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from emberd.core.settings import Settings, read, to_toml
from emberd.host.posix import ask_program

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LABEL = "io.github.emberd.acceptance"
SUBSYSTEM = "io.github.emberd"
VERB_LIMIT_S = 150.0
"""emberd's own verbs are bounded; an install waits for launchd, an uninstall for the engine."""
TOOL_LIMIT_S = 30.0
LOAD_LIMIT_S = 150.0
RESTART_LIMIT_S = 60.0
SETTLE_LIMIT_S = 30.0
"""Until what just happened is in status or log: emberd looks every 10 s, a lock is read every few seconds."""
AWAKE_LIMIT_S = 120.0
"""How long the trial waits, awake, for the Mac to have slept."""
WAKE_AFTER_S = 60
LEAST_SLEEP_S = 10.0
REPLY_LIMIT_S = 120.0
POLL_S = 0.2
SAME_PROCESS_S = 5.0
THROTTLED_PRIORITY = 20
"""Of a job that is not Interactive, and of its children (launchd reference, 7.2); others have 31 and more."""
HELD_SHARE = 0.95
"""As the verdict of emberd (docs/locking.md, tolerance)."""


class Verdict(Enum):
    """How a step ended."""

    AGREES = "agrees"
    DIFFERS = "differs"
    NOT_TRIED = "not tried"


class DiffersError(Exception):
    """What was seen is not what was expected."""


class NotTriedError(Exception):
    """The step makes no sense here, and why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step, for people and programs."""

    step: str
    expected: str
    saw: str
    verdict: Verdict
    seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """A step to take.

    Attributes:
        act: returns what it saw; raises DiffersError or NotTriedError.
        needs: steps that must have ended well.
    """

    name: str
    expected: str
    act: Callable[[], str]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program answered; code None if it could not be run."""

    code: int | None
    out: str
    errors: str = ""

    @property
    def words(self) -> str:
        """All that it said, in a line."""
        return " ".join(f"{self.errors} {self.out}".split()) or f"exit code {self.code}"


def run_program(*words: str, limit_s: float = TOOL_LIMIT_S) -> Answer:
    """Run a program found on PATH."""
    try:
        ran = ask_program(["/usr/bin/env", *words], limit_s)
    except (OSError, subprocess.SubprocessError) as error:
        return Answer(None, "", str(error))
    return Answer(ran.returncode, ran.stdout, ran.stderr)


@dataclass(frozen=True, slots=True)
class Computer:
    """What the trial asks of the computer; other answers in tests.

    Attributes:
        locked_bytes: what a process holds locked, as the kernel says, None if it does not.
        in_core_bytes: what of a file is in memory.
        slept_s: how long the computer has slept since it was started, in all.
        ask_person: shows a text and waits for Return; False if nobody is there.
    """

    locked_bytes: Callable[[Sequence[int]], int | None]
    in_core_bytes: Callable[[Path], int | None]
    slept_s: Callable[[], float]
    ask_person: Callable[[str], bool]
    run: Callable[..., Answer] = run_program
    python: str = sys.executable


def settings_of_trial(own: Settings, folder: Path, port: int) -> Settings:
    """Return a person's model and engine with nothing else of theirs, on the trial's port and in its folder."""
    defaults = Settings()
    return replace(
        defaults,
        model=own.model,
        engine=replace(own.engine, lock="always"),
        endpoint=replace(defaults.endpoint, port=port),
        state=replace(defaults.state, directory=str(folder / "state")),
    )


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Client(threading.Thread):
    """Asks for the model's name on a new connection, again and again, until told to end.

    Args:
        port: of the endpoint.
        may_break: how many connections may break: one that is open when emberd is killed does.
    """

    def __init__(self, port: int, may_break: int = 0) -> None:
        super().__init__(daemon=True)
        self._port, self._may_break = port, may_break
        self._answered = self._refused = self._broken = 0
        self._longest_s = 0.0
        self.ending = threading.Event()

    def run(self) -> None:
        """Ask until the end."""
        while not self.ending.is_set():
            began = time.monotonic()
            try:
                get(self._port, "/v1/models")
                self._answered += 1
            except ConnectionRefusedError:
                self._refused += 1
            except (OSError, ValueError, http.client.HTTPException, DiffersError):
                self._broken += 1
            self._longest_s = max(self._longest_s, time.monotonic() - began)
            self.ending.wait(0.02)

    def end(self) -> str:
        """End and say what happened.

        Raises:
            DiffersError: a request was refused or failed, or none was answered.
        """
        self.ending.set()
        self.join(REPLY_LIMIT_S)
        said = (
            f"{self._answered} requests answered, {self._refused} refused, {self._broken} broken, "
            f"the longest {self._longest_s:.1f} s"
        )
        if self._refused or self._broken > self._may_break or not self._answered:
            raise DiffersError(said)
        return said


def get(port: int, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Ask the endpoint.

    Raises:
        DiffersError: the answer is not 200.
        OSError, http.client.HTTPException: there was none.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REPLY_LIMIT_S)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise DiffersError(f"{path} answered {response.status}: {text[:200]!r}")
    answer: dict[str, Any] = json.loads(text)
    return answer


class Trial:
    """One run of all steps.

    Args:
        own: a person's settings, whose model and engine are used.
        with_sleep: let the Mac sleep, too.
        tell: hears of each step as it ends.
    """

    def __init__(
        self, computer: Computer, own: Settings, *, with_sleep: bool, tell: Callable[[Outcome], None]
    ) -> None:
        self._computer = computer
        self._with_sleep = with_sleep
        self._tell = tell
        self._folder = Path(tempfile.mkdtemp(prefix="emberd-trial-"))
        self._config = self._folder / "config.toml"
        self._settings = settings_of_trial(own, self._folder, free_port())
        self._port = self._settings.endpoint.port
        self._agent = Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self._pid = 0
        self._engine_pid = 0

    # --- tools ----------------------------------------------------------------------------------------------

    def _verb(self, *words: str) -> Any:
        """Run a verb of emberd and return what its --json prints.

        Raises:
            DiffersError: it failed.
        """
        command = (self._computer.python, "-m", "emberd", "--config", str(self._config), *words, "--json")
        asked = self._computer.run(*command, limit_s=VERB_LIMIT_S)
        if asked.code != 0:
            raise DiffersError(f"emberd {words[0]} ended with {asked.code}: {asked.words}")
        return json.loads(asked.out)

    def _log(self, event: str, *more: str) -> list[dict[str, Any]]:
        """Return the events of that name in emberd's log, by `emberd logs`."""
        words = ("logs", "--event", event, "--since", "30m", "--json", *more)
        command = (self._computer.python, "-m", "emberd", "--config", str(self._config), *words)
        asked = self._computer.run(*command)
        return [json.loads(line) for line in asked.out.splitlines() if line.startswith("{")]

    def _status(self) -> dict[str, Any] | None:
        with contextlib.suppress(DiffersError):
            status: dict[str, Any] = self._verb("status")
            return status
        return None

    def _wait(self, limit_s: float, is_so: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Return the first status for which it is so.

        Raises:
            DiffersError: it did not become so.
        """
        deadline_s = time.monotonic() + limit_s
        status = self._status()
        while status is None or not is_so(status):
            if time.monotonic() > deadline_s:
                seen = "no answer" if status is None else f"{status['state']} {status['reason']}".strip()
                raise DiffersError(f"not {what} within {limit_s:.0f} s: {seen}")
            time.sleep(POLL_S)
            status = self._status()
        return status

    def _wait_ready(self, limit_s: float) -> dict[str, Any]:
        return self._wait(limit_s, lambda status: status["state"] == "READY", "READY")

    def _loaded(self) -> tuple[str, str] | None:
        """Return the domain in which launchd has the job, and what it prints of it."""
        for domain in (f"gui/{os.getuid()}", f"user/{os.getuid()}"):
            printed = self._computer.run("launchctl", "print", f"{domain}/{LABEL}")
            if printed.code == 0:
                return domain, printed.out
        return None

    # --- steps ----------------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """Return all steps in order."""
        ready = ("install", "ready")
        asleep = "the Mac slept"
        return [
            Step("settings", "`config check` accepts model and engine", self._check),
            Step("install", "launchd runs the job; the list is 0644 and yours", self._install, ("settings",)),
            Step("property list", "plutil accepts it", self._lint, ("install",)),
            Step("ready", f"READY within {LOAD_LIMIT_S:.0f} s", self._ready, ("install",)),
            Step("priority", f"above {THROTTLED_PRIORITY}: not throttled", self._priority, ready),
            Step("reply", "a completion through the endpoint", self._reply, ready),
            Step("lock", "HELD, and the kernel says so of the engine", self._lock, ready),
            Step("in core", "all of the model", self._in_core, ("lock",)),
            Step("emberd logs", "the engine's way to READY", self._logs, ready),
            Step("log show", "the same in the unified log", self._log_show, ready),
            Step("crash", "launchd starts emberd, which adopts the engine; nobody is refused", self._crash, ready),
            Step("upgrade", "nobody is refused, the engine stays", self._upgrade, ready),
            Step(asleep, f"at least {LEAST_SLEEP_S:.0f} s", self._sleep, ready),
            Step("wake noticed", "an event `woken` in the log", self._wake_noticed, (*ready, asleep)),
            Step("reply after the wake", "the same engine, READY", self._reply_after_wake, (*ready, asleep)),
            Step("uninstall", "no job, no list, no process, the port is free", self._uninstall, ("install",)),
        ]

    def run(self) -> list[Outcome]:
        """Take all steps, and remove everything at the end, whatever happens."""
        outcomes: list[Outcome] = []
        self._remove()  # what a trial that was killed has left
        try:
            for step in self.steps():
                outcome = self._take(step, outcomes)
                outcomes.append(outcome)
                self._tell(outcome)
        finally:
            left = self._remove()
            shutil.rmtree(self._folder, ignore_errors=True)
            if left:
                outcomes.append(Outcome("clean up", "nothing is left", left, Verdict.DIFFERS, 0.0))
                self._tell(outcomes[-1])
        return outcomes

    @staticmethod
    def _take(step: Step, before: Sequence[Outcome]) -> Outcome:
        ended = {each.step: each.verdict for each in before}
        lacking = [need for need in step.needs if ended.get(need) is not Verdict.AGREES]
        if lacking:
            return Outcome(step.name, step.expected, f"needs: {lacking[0]}", Verdict.NOT_TRIED, 0.0)
        began = time.monotonic()
        try:
            saw, verdict = step.act(), Verdict.AGREES
        except NotTriedError as why:
            saw, verdict = str(why), Verdict.NOT_TRIED
        except (DiffersError, OSError, ValueError, KeyError, http.client.HTTPException) as error:
            saw, verdict = f"{error}" or type(error).__name__, Verdict.DIFFERS
        return Outcome(step.name, step.expected, saw, verdict, time.monotonic() - began)

    def _check(self) -> str:
        self._config.write_text(to_toml(self._settings), encoding="utf-8")
        self._verb("config", "check")
        return f"{self._settings.engine.kind}, {Path(self._settings.model.path).name}, port {self._port}"

    def _install(self) -> str:
        self._verb("install", "--manager", "launchd", "--label", LABEL)
        facts = self._agent.stat()
        found = self._loaded()
        if stat.S_IMODE(facts.st_mode) != 0o644 or facts.st_uid != os.getuid():  # noqa: PLR2004  # the text says it
            raise DiffersError(f"mode {stat.S_IMODE(facts.st_mode):o}, owner {facts.st_uid}")
        plistlib.loads(self._agent.read_bytes())
        if found is None or "state = running" not in found[1]:
            raise DiffersError("launchctl print does not say that it runs")
        return f"{found[0]}/{LABEL}, running"

    def _lint(self) -> str:
        linted = self._computer.run("plutil", "-lint", str(self._agent))
        if linted.code is None or "No such file" in linted.errors:
            raise NotTriedError(f"no plutil: {linted.words}")
        if linted.code != 0:
            raise DiffersError(linted.words)
        return linted.words

    def _ready(self) -> str:
        status = self._wait_ready(LOAD_LIMIT_S)
        self._pid, self._engine_pid = status["pid"], status["engine"]["pid"]
        return f"emberd {self._pid}, engine {self._engine_pid}"

    def _priority(self) -> str:
        said = []
        for name, pid in (("emberd", self._pid), ("engine", self._engine_pid)):
            asked = self._computer.run("ps", "-o", "pri=", "-p", str(pid))
            if not asked.out.strip().isdecimal():
                raise NotTriedError(f"ps says: {asked.words}")
            said.append((name, int(asked.out)))
        words = ", ".join(f"{name} {priority}" for name, priority in said)
        if any(priority <= THROTTLED_PRIORITY for _, priority in said):
            raise DiffersError(words)
        return words

    def _reply(self) -> str:
        began = time.monotonic()
        get(self._port, "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 4})
        return f"after {time.monotonic() - began:.2f} s"

    def _lock(self) -> str:
        status = self._wait(SETTLE_LIMIT_S, lambda now: bool(now["lock"]), "a verdict on the lock")
        lock = status["lock"]
        needed, locked = lock["needed_bytes"], self._computer.locked_bytes([self._engine_pid])
        words = f"{lock['state']}; {_mib(locked)} of {_mib(needed)} MiB locked by the engine"
        if lock["state"] != "HELD" or not needed or locked is None or locked < HELD_SHARE * needed:
            raise DiffersError(". ".join(word for word in (words, lock["message"], lock["remedy"]) if word))
        return words

    def _in_core(self) -> str:
        path = Path(self._settings.model.path).expanduser()
        size, inside = path.stat().st_size, self._computer.in_core_bytes(path)
        words = f"{_mib(inside)} of {_mib(size)} MiB"
        if inside is None or inside < HELD_SHARE * size:
            raise DiffersError(words)
        return words

    def _logs(self) -> str:
        deadline_s = time.monotonic() + SETTLE_LIMIT_S
        while time.monotonic() < deadline_s:
            found = self._log("engine_state")
            if any("READY" in json.dumps(event) for event in found):
                return f"{len(found)} events engine_state, READY among them"
            time.sleep(POLL_S)
        raise DiffersError("no event engine_state with READY")

    def _log_show(self) -> str:
        if importlib.util.find_spec("pyoslog") is None:
            raise NotTriedError("pyoslog is not installed here: pip install 'emberd[macos]'")
        predicate = f'subsystem == "{SUBSYSTEM}" && processID == {self._pid}'
        words = ("log", "show", "--last", "10m", "--info", "--style", "ndjson", "--predicate", predicate)
        deadline_s = time.monotonic() + SETTLE_LIMIT_S
        while True:
            shown = self._computer.run(*words)
            if shown.code != 0:
                raise NotTriedError(f"log show: {shown.words[:200]}")
            found = sum("engine_state" in line and "READY" in line for line in shown.out.splitlines())
            if found:
                return f"{found} events with READY"
            if time.monotonic() > deadline_s:
                raise DiffersError(f"{len(shown.out.splitlines())} lines, none with READY")
            time.sleep(POLL_S)

    def _crash(self) -> str:
        client = Client(self._port, may_break=1)
        client.start()
        try:
            os.kill(self._pid, signal.SIGKILL)
            status = self._wait(
                RESTART_LIMIT_S,
                lambda now: now["pid"] != self._pid and now["state"] == "READY",
                "a new emberd, READY",
            )
        finally:
            client.ending.set()
        engine = status["engine"]
        self._pid = status["pid"]
        if engine["pid"] != self._engine_pid or not engine["adopted"]:
            raise DiffersError(f"another engine: {engine['pid']} after {self._engine_pid}")
        return f"engine {engine['pid']} adopted; {client.end()}"

    def _upgrade(self) -> str:
        client = Client(self._port)
        client.start()
        try:
            self._verb("upgrade", "--manager", "launchd", "--label", LABEL)
            status = self._wait_ready(RESTART_LIMIT_S)
        finally:
            client.ending.set()
        self._pid = status["pid"]
        if status["engine"]["pid"] != self._engine_pid:
            raise DiffersError(f"another engine: {status['engine']['pid']} after {self._engine_pid}")
        return f"engine {self._engine_pid} kept; {client.end()}"

    def _sleep(self) -> str:
        if not self._with_sleep:
            raise NotTriedError("asked for with --sleep only")
        before, woken = self._computer.slept_s(), self._waketime()
        when = time.strftime("%m/%d/%y %H:%M:%S", time.localtime(time.time() + WAKE_AFTER_S))
        # Needs an administrator (pmset(1)); without one a key wakes the Mac.
        scheduled = self._computer.run("sudo", "-n", "pmset", "schedule", "wake", when).code == 0
        how = f"it wakes at {when}" if scheduled else f"wake it with a key after {LEAST_SLEEP_S:.0f} s or more"
        if not self._computer.ask_person(f"The Mac is about to sleep; {how}. Press Return."):
            raise NotTriedError("nobody is there to be asked: run it in a terminal")
        asked = self._computer.run("pmset", "sleepnow")
        if asked.code != 0:
            raise DiffersError(f"pmset sleepnow: {asked.words}")
        deadline_s = time.monotonic() + AWAKE_LIMIT_S  # monotonic() stands still while the Mac sleeps
        while self._computer.slept_s() - before < LEAST_SLEEP_S:
            if time.monotonic() > deadline_s:
                raise DiffersError(f"{self._computer.slept_s() - before:.0f} s")
            time.sleep(POLL_S)
        changed = "changed" if self._waketime() != woken else "did not change"
        return f"{self._computer.slept_s() - before:.0f} s; kern.waketime {changed}"

    def _waketime(self) -> str:
        return self._computer.run("sysctl", "-n", "kern.waketime").out.strip()

    def _wake_noticed(self) -> str:
        deadline_s = time.monotonic() + SETTLE_LIMIT_S
        while time.monotonic() < deadline_s:
            found = self._log("woken")
            if found:
                return json.dumps(found[-1])
            time.sleep(POLL_S)
        raise DiffersError("no event woken")

    def _reply_after_wake(self) -> str:
        status = self._wait_ready(RESTART_LIMIT_S)
        if status["engine"]["pid"] != self._engine_pid:
            raise DiffersError(f"another engine: {status['engine']['pid']} after {self._engine_pid}")
        return self._reply()

    def _uninstall(self) -> str:
        self._verb("uninstall", "--manager", "launchd", "--label", LABEL)
        left = [f"process {pid}" for pid in (self._pid, self._engine_pid) if pid and is_alive(pid)]
        left += [str(path) for path in self._agent.parent.glob(f"*{LABEL}*")]
        found = self._loaded()
        left += [] if found is None else [found[0]]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
            except OSError:
                left.append(f"port {self._port}")
        if left:
            raise DiffersError(f"left: {', '.join(left)}")
        return "nothing left"

    # --- cleaning up ----------------------------------------------------------------------------------------

    def _remove(self) -> str:
        """Remove the job, its list, its log and its engine; return what could not be removed, in words."""
        for domain in (f"gui/{os.getuid()}", f"user/{os.getuid()}"):
            self._computer.run("launchctl", "bootout", f"{domain}/{LABEL}")
        deadline_s = time.monotonic() + RESTART_LIMIT_S  # bootout does not wait
        while self._loaded() is not None and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        for path in (self._agent, Path.home() / "Library" / "Logs" / "emberd" / f"{LABEL}.log"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
            record = json.loads((self._folder / "state" / "engine.json").read_text(encoding="utf-8"))
            began_s = psutil.Process(record["pid"]).create_time()
            if abs(began_s - record["started_at"]) < SAME_PROCESS_S:  # the number may be another's by now
                os.killpg(record["pid"], signal.SIGKILL)
        return "" if self._loaded() is None else f"launchd still has {LABEL}"


def is_alive(pid: int) -> bool:
    """Return True if a process is there; one that has ended and waits to be collected is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size >> 20}"


def own_settings(config: str | None, changes: Mapping[str, Mapping[str, str]]) -> Settings:
    """Return a person's settings, with the model and engine of the command line in them.

    Raises:
        EmberdError: they are wrong.
    """
    from emberd.host import config_file  # noqa: PLC0415  # only here

    path = Path(config_file.locate(config)[0])
    tables = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for table, values in changes.items():
        chosen = {key: value for key, value in values.items() if value}
        tables[table] = {**tables.get(table, {}), **chosen}
    return read(tables, str(path))


def as_line(outcome: Outcome) -> str:
    """Write a step for people."""
    return (
        f"{outcome.verdict.value:9}  {outcome.step}: {outcome.saw}  "
        f"(expected: {outcome.expected}; {outcome.seconds:.1f} s)"
    )
