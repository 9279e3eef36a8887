"""What the soaks share: emberd on a service manager's socket, faults to provoke."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from asking import TESTS  # it leads to the modules of the tests

import emberd
from emberd.core.errors import EmberdError
from emberd.core.settings import (
    EndpointSettings,
    EngineSettings,
    LifecycleSettings,
    ModelSettings,
    Settings,
    StateSettings,
    WarmthSettings,
    to_toml,
)
from emberd.host.paths import StatePaths
from emberd.services.control import ask
from small_disk import CAN_MOUNT, SmallDisk
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_S = 120.0
PAUSE_MS = "4"


# --- emberd on a socket of the service manager's -----------------------------------------------------------------


@dataclass
class Daemon:
    """A running emberd."""

    port: int
    control: Path
    command: list[str]
    pid: int
    log: Path
    versions: list[Path]
    finished: Path
    disk: SmallDisk | None = None

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://127.0.0.1:{self.port}"

    def status(self) -> dict[str, Any]:
        """Ask until it answers: while it replaces itself, nobody is there."""
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            try:
                return ask(self.control, "status")
            except EmberdError:
                if time.monotonic() > deadline_s:
                    sys.exit(f"emberd does not answer: {self.log.read_text()[-2000:]}")
                time.sleep(0.02)

    def wait_ready(self, other_than: int | None = None) -> dict[str, Any]:
        """Return the status of a ready engine."""
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            status = self.status()
            if status["state"] == "READY" and status["engine"]["pid"] != other_than:
                return status
            if time.monotonic() > deadline_s:
                sys.exit(f"no engine: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def replace(self) -> None:
        """Run `emberd restart --daemon`."""
        said = subprocess.run([*self.command, "restart", "--daemon"], capture_output=True, text=True, check=False)
        if said.returncode:
            sys.exit(f"restart --daemon: {said.stderr}")

    def upgrade(self) -> None:
        """Put the other version in the place of this one, and restart emberd.

        Exits if it is not that version afterwards.
        """
        self.versions.reverse()
        link = self.versions[0].with_name("next")
        link.symlink_to(self.versions[0])
        link.replace(link.with_name("current"))
        self.replace()
        deadline_s = time.monotonic() + LIMIT_S
        while (found := self.status()["version"]) != self.versions[0].name:
            if time.monotonic() > deadline_s:
                sys.exit(f"upgraded to {self.versions[0].name}, but it is {found}")
            time.sleep(0.02)

    def finished_twice(self) -> int:
        """Return how many requests the engine has answered more than once; for prompts that were sent only once."""
        lines = self.finished.read_text().splitlines() if self.finished.exists() else []
        return sum(count > 1 for count in Counter(lines).values())

    def memory_mib(self) -> float:
        """Return what memory it has of its own, in no file (proc(5), smaps_rollup, Pss_Anon).

        A library's share in Pss grows when other programs that map it end: 1.5 MiB within five minutes.
        """
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def open_files(self) -> int:
        """Return how many descriptors it has."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def tasks(self) -> int:
        """Return how many tasks its event loop has."""
        said = httpx.get(f"{self.url}/emberd/metrics", timeout=LIMIT_S, trust_env=False).text
        return int(float(said.partition("\nemberd_tasks ")[2].partition("\n")[0]))


def lay_out_versions(folder: Path) -> list[Path]:
    """Copy emberd twice, with different versions; `current` beside them leads to the first."""
    made = []
    for version in ("0.1.0", "0.1.1"):
        copy = folder / version / "emberd"
        shutil.copytree(Path(emberd.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "__init__.py").write_text(f'"""emberd."""\n\n__version__ = "{version}"\n')
        made.append(copy.parent)
    (folder / "current").symlink_to(made[0])
    return made


def small_disk(folder: Path) -> SmallDisk | None:
    """Return a small file system on this folder, None where this user may not mount one."""
    folder.mkdir()
    with contextlib.suppress(OSError):
        return SmallDisk(folder, "size=64m") if CAN_MOUNT else None
    return None


@contextlib.contextmanager
def running(warmth: WarmthSettings | None = None) -> Iterator[Daemon]:
    """Start emberd under systemd-socket-activate, and end it and its engine; keep-warm is off by default."""
    with tempfile.TemporaryDirectory(prefix="emberd-soak-") as name:
        folder = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        model = write_gguf(folder / "model.gguf").path
        versions, disk = lay_out_versions(folder), small_disk(folder / "disk")
        settings = Settings(
            model=ModelSettings(path=str(model)),
            engine=EngineSettings(kind="koboldcpp", path=str(TESTS / "koboldcpp_standin"), lock="never"),
            endpoint=EndpointSettings(port=port),
            lifecycle=LifecycleSettings(
                crash_limit=1000, backoff_initial_s=0, backoff_max_s=0, stable_after_s=0, probe_interval_s=0.2
            ),
            warmth=warmth or WarmthSettings(mode="off"),
            state=StateSettings(directory=str(folder / "disk" / "state")),
        )
        config = folder / "config.toml"
        config.write_text(to_toml(settings, with_help=False))
        command = [sys.executable, "-c", "from emberd.cli.main import main; main()", "--config", str(config)]
        log = folder / "emberd.log"
        fast = {
            "STANDIN_TOKEN_MS": PAUSE_MS,
            "STANDIN_PROMPT_MS_PER_TOKEN": "0.2",
            "STANDIN_VERSION": "1.115.1",
            "STANDIN_FINISHED_FILE": str(folder / "finished"),
            "PYTHONPATH": str(folder / "current"),
        }
        manager = str(shutil.which("systemd-socket-activate"))
        # The manager passes on nothing else of its environment.
        given = [f"--setenv={name}={value}" for name, value in fast.items()]
        with log.open("wb") as output:
            # The manager starts emberd with the first connection, and becomes it.
            child = subprocess.Popen(
                [manager, f"--listen=127.0.0.1:{port}", *given, *command, "run"],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        control = StatePaths(folder / "disk" / "state").control
        daemon = Daemon(port, control, command, child.pid, log, versions, folder / "finished", disk)
        try:
            first_answer(daemon.url)
            daemon.wait_ready()
            yield daemon
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(LIMIT_S)
            if disk is not None:
                disk.take_away()


def first_answer(url: str) -> None:
    """Wait until the manager listens and emberd answers."""
    deadline_s = time.monotonic() + LIMIT_S
    while True:
        with contextlib.suppress(httpx.ConnectError):
            httpx.get(f"{url}/api/v1/model", timeout=LIMIT_S, trust_env=False).raise_for_status()
            return
        if time.monotonic() > deadline_s:
            sys.exit("emberd does not answer")
        time.sleep(0.05)


# --- faults ------------------------------------------------------------------------------------------------------


def stop_for(pid: int, seconds: float) -> None:
    """Stop a process (SIGSTOP), and let it go on; nothing if it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def flooded(control: Path, programs: int) -> Iterator[None]:
    """Let so many programs send nonsense to the control socket, or say nothing."""
    with contextlib.ExitStack() as flood:
        for number in range(programs):
            one = flood.enter_context(socket.socket(socket.AF_UNIX))
            one.settimeout(10)
            with contextlib.suppress(OSError):
                one.connect(str(control))
                one.send(b"{" * 4000 if number % 2 else b"x\n")
        yield


@contextlib.contextmanager
def full(disk: SmallDisk) -> Iterator[None]:
    """Leave no room on a disk."""
    disk.fill()
    try:
        yield
    finally:
        disk.make_room()
