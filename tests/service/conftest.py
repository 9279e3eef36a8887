"""emberd as a job of the launchctl stand-in."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from daemon_process import Daemon
from launchctl_process import Launchctl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

LABEL = "io.github.emberd"


class Service(Daemon):
    """A daemon that launchd's stand-in runs; its verbs see the stand-in as `launchctl`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], launchctl: Launchctl) -> None:
        super().__init__(folder, settings, launchctl.environment)
        self.launchctl = launchctl
        self.list = launchctl.home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self.log = launchctl.home / "Library" / "Logs" / "emberd" / f"{LABEL}.log"
        self.write_settings()

    def do(self, verb: str, *words: str) -> str:
        """Run a verb on launchd that must succeed; return what it prints."""
        done = self.verb(verb, "--manager", "launchd", *words)
        assert done.returncode == 0, (verb, done.returncode, done.stdout, done.stderr, self.launchctl.log())
        return done.stdout

    @property
    def pid(self) -> int | None:
        """The job's process."""
        return self.launchctl.pid(LABEL)

    def engine_pid(self) -> int:
        """Return the ready engine's pid."""
        pid: int = self.wait_ready()["engine"]["pid"]
        return pid

    def leftovers(self) -> list[psutil.Process]:
        """Return the processes that have this daemon's folder in their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and str(self.folder) in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def close(self) -> None:
        """End launchd, emberd and the engine, whatever the test has left."""
        self.launchctl.switch(gui_absent=0)
        self.launchctl.end()
        super().close()
        for process in self.leftovers():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)


@pytest.fixture
def make_service(tmp_path: Path, standin: Path, model: Path) -> Iterator[Callable[..., Service]]:
    """Make services on the KoboldCPP stand-in, not installed yet; settings as `table.key`."""
    made: list[Service] = []

    def make(speed: float = 10.0, **settings: Any) -> Service:
        folder = tmp_path / f"service{len(made)}"
        home = folder / "home"
        home.mkdir(parents=True)
        base = {"model.path": str(model), "engine.path": str(standin), "engine.lock": "never"}
        changes = {key.replace("__", ".", 1): value for key, value in settings.items()}
        service = Service(folder, {**base, **changes}, Launchctl(folder / "launchd", home, speed))
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()
