"""A real emberd in a child process, as launchd would run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from emberd.core.errors import EmberdError
from emberd.host.paths import StatePaths
from emberd.services.control import ask
from engine_process import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

WAIT_S = 40.0
FAST = {
    "lifecycle.probe_interval_s": 0.2,
    "lifecycle.backoff_initial_s": 0.1,
    "lifecycle.backoff_max_s": 0.2,
    "lifecycle.stop_timeout_s": 5.0,
    "warmth.mode": "off",
}


class Daemon:
    """One state directory, its settings, and the emberd that runs on it."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.port = free_port()
        self.state = StatePaths(folder / "state")
        self.config = folder / "config.toml"
        self.log = folder / "emberd.log"
        self.settings: dict[str, Any] = {
            "state.directory": str(self.state.directory),
            "endpoint.port": self.port,
            **FAST,
            **settings,
        }
        self.environment = dict(environment)
        self.launcher: list[str] = []
        """Words before the command line of `emberd run`."""
        self.child: subprocess.Popen[bytes] | None = None
        self.engine_pids: set[int] = set()

    @property
    def url(self) -> str:
        """Base address of the endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def write_settings(self, **changes: Any) -> None:
        """Write the settings file; keyword `table__key` changes one."""
        self.settings.update({key.replace("__", ".", 1): value for key, value in changes.items()})
        tables: dict[str, list[str]] = {}
        for key, value in self.settings.items():
            table, _, name = key.partition(".")
            tables.setdefault(table, []).append(f"{name} = {json.dumps(value)}")
        self.config.write_text("".join(f"[{table}]\n" + "\n".join(lines) + "\n" for table, lines in tables.items()))

    def command(self, *words: str) -> list[str]:
        """Return the command line of an emberd verb on these settings."""
        return [
            sys.executable,
            "-c",
            "from emberd.cli.main import main; main()",
            "--config",
            str(self.config),
            *words,
        ]

    def verb(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a verb and return what it printed."""
        return subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
            env=self._environment(),
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def start(self) -> None:
        """Start `emberd run`; its log goes to a file as JSON lines."""
        self.write_settings()
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [*self.launcher, *self.command("run")],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment(),
            )

    def status(self) -> dict[str, Any]:
        """Ask the daemon for its status."""
        status = ask(self.state.control, "status")
        if status["engine"]:
            self.engine_pids.add(status["engine"]["pid"])
        return status

    def wait_for(self, is_so: Callable[[dict[str, Any]], bool], what: str = "the status") -> dict[str, Any]:
        """Return the first status for which `is_so` holds."""
        deadline_s = time.monotonic() + WAIT_S
        status: dict[str, Any] = {}
        while time.monotonic() < deadline_s:
            try:
                status = self.status()
            except EmberdError:
                assert self.child is None or self.child.poll() is None, (
                    f"emberd ended: {self.log.read_text()[-3000:]}"
                )
            else:
                if is_so(status):
                    return status
            time.sleep(0.02)
        raise AssertionError(f"{what} did not come; status {status}, log {self.log.read_text()[-3000:]}")

    def wait_ready(self, *, other_than: int | None = None) -> dict[str, Any]:
        """Return the status of a ready engine, with another pid than `other_than`."""
        return self.wait_for(
            lambda status: status["state"] == "READY" and status["engine"]["pid"] != other_than, "a ready engine"
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log's events of that name."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def wait_event(self, name: str, count: int = 1) -> dict[str, Any]:
        """Return the `count`-th event of that name as soon as it is logged."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            found = self.events(name)
            if len(found) >= count:
                return found[count - 1]
            time.sleep(0.02)
        raise AssertionError(f"no event {name}; log {self.log.read_text()[-3000:]}")

    def signal(self, number: signal.Signals) -> None:
        """Send emberd a signal."""
        assert self.child is not None
        self.child.send_signal(number)

    def end(self) -> int:
        """Wait for emberd to end and return its exit code."""
        assert self.child is not None
        return self.child.wait(WAIT_S)

    def kill(self) -> None:
        """Kill emberd with -9, as a crash would."""
        self.signal(signal.SIGKILL)
        self.end()

    def complete(self, prompt: str = "Hello there", length: int = 4, timeout_s: float = WAIT_S) -> str:
        """Ask KoboldCPP's API for a completion through the endpoint."""
        body = {"prompt": prompt, "max_length": length}
        answer = httpx.post(f"{self.url}/api/v1/generate", json=body, timeout=timeout_s, trust_env=False)
        answer.raise_for_status()
        text: str = answer.json()["results"][0]["text"]
        return text

    def close(self) -> None:
        """End emberd and every engine that it ever reported."""
        if self.child is not None and self.child.poll() is None:
            # An engine that emberd has just begun is in no record yet; stopped, emberd begins no other.
            self.child.send_signal(signal.SIGSTOP)
            self.engine_pids |= {child.pid for child in psutil.Process(self.child.pid).children()}
            self.child.kill()
            self.child.wait(WAIT_S)
        if self.state.record.exists():
            self.engine_pids.add(json.loads(self.state.record.read_text())["pid"])
        for pid in self.engine_pids:
            try:
                os.killpg(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue


def is_alive(pid: int) -> bool:
    """Return True if a process lives; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def group_members(group: int) -> list[int]:
    """Return the living processes of a process group."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and is_alive(process.pid):
                members.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def read_text_files(folder: Path) -> str:
    """Return the text of every file below a folder, sockets left out."""
    return "\n".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())
