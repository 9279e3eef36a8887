"""A home with an emberd to be installed in it, and the service managers that it can be installed with."""

from __future__ import annotations

import json
import os
import plistlib
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon_process import Daemon

LAUNCHCTL = Path(__file__).parent / "launchctl_standin" / "launchctl"
UNSHARE, SYSTEMCTL = shutil.which("unshare") or "", shutil.which("systemctl") or ""
SYSTEMD = Path("/lib/systemd/systemd")
LIMIT_S = 90.0
_CLEAN = ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "DBUS_SESSION_BUS_ADDRESS", "SSH_TTY", "SSH_CONNECTION", "SUDO_USER")
_START_SYSTEMD = (
    "mount -t tmpfs none /run/systemd && mkdir /run/systemd/system && "
    f"exec {SYSTEMD} --user --log-target=console --log-level=info"
)
"""systemd refuses to run where no systemd has booted (sd_booted(3)); only this process sees that folder."""


class Home:
    """A home, and verbs of emberd in it."""

    def __init__(self, folder: Path, make_daemon: Callable[..., Daemon]) -> None:
        self.folder = folder
        self.folder.mkdir(exist_ok=True)
        self.environment: dict[str, str] = {"HOME": str(folder)}
        self._make_daemon = make_daemon
        self.daemon = self.another()

    manager = ""

    def another(self, **settings: Any) -> Daemon:
        """Return settings of an emberd, written."""
        daemon = self._make_daemon({key.replace("__", ".", 1): value for key, value in settings.items()})
        daemon.environment.update(self.environment)
        daemon.write_settings()
        daemon.log.touch()
        return daemon

    def run(
        self, *words: str, daemon: Daemon | None = None, python: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a verb of emberd with this manager."""
        command = (daemon or self.daemon).command(*words, "--manager", self.manager)
        clean = {name: value for name, value in os.environ.items() if name not in _CLEAN}
        return subprocess.run(
            [python or command[0], *command[1:]],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**clean, **self.environment, **environment},
        )

    def done(self, *words: str, daemon: Daemon | None = None, **environment: str) -> dict[str, Any]:
        """Run a verb that must succeed, and return its JSON."""
        ran = self.run(*words, "--json", daemon=daemon, **environment)
        assert ran.returncode == 0, ran.stderr
        content: dict[str, Any] = json.loads(ran.stdout)
        return content


class LaunchdHome(Home):
    """With the stand-in of launchctl first on PATH."""

    manager = "launchd"

    def __init__(self, folder: Path, make_daemon: Callable[..., Daemon]) -> None:
        self.state = folder.parent / "launchd-state"
        self.state.mkdir()
        programs = folder.parent / "programs"
        programs.mkdir()
        (programs / "launchctl").symlink_to(LAUNCHCTL)
        super().__init__(folder, make_daemon)
        self.environment |= {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "LAUNCHCTL_STANDIN_STATE": str(self.state),
        }

    def plist(self, label: str = "io.github.emberd") -> Path:
        """Return where the property list belongs."""
        return self.folder / "Library" / "LaunchAgents" / f"{label}.plist"

    def job(self, label: str = "io.github.emberd") -> dict[str, Any]:
        """Return what is installed."""
        content: dict[str, Any] = plistlib.loads(self.plist(label).read_bytes())
        return content

    def launchctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the stand-in."""
        return subprocess.run(
            [LAUNCHCTL, *words],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**os.environ, **self.environment},
        )

    def switch(self, **switches: Any) -> None:
        """Have the stand-in behave otherwise."""
        (self.state / "switches.json").write_text(json.dumps(switches))

    def target(self, label: str = "io.github.emberd", domain: str = "gui") -> str:
        """Return the job's name for launchctl."""
        return f"{domain}/{os.getuid()}/{label}"

    def is_loaded(self, label: str = "io.github.emberd", domain: str = "gui") -> bool:
        """Ask the stand-in."""
        return self.launchctl("print", self.target(label, domain)).returncode == 0

    def close(self) -> None:
        """End the jobs and the stand-in."""
        self.launchctl("standin-end", "-k")


class SystemdHome(Home):
    """With a real user manager of systemd, in a mount namespace of its own."""

    manager = "systemd"

    def __init__(self, folder: Path, make_daemon: Callable[..., Daemon]) -> None:
        super().__init__(folder, make_daemon)
        runtime = folder.parent / "r"  # short: a socket's path is limited
        runtime.mkdir(mode=0o700)
        (folder / ".config").mkdir()
        self.environment["XDG_RUNTIME_DIR"] = str(runtime)
        self.log = folder.parent / "systemd.log"
        clean = {name: value for name, value in os.environ.items() if name not in _CLEAN}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [UNSHARE, "--mount", "--propagation", "private", "sh", "-c", _START_SYSTEMD],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**clean, **self.environment},
            )
        deadline_s = time.monotonic() + LIMIT_S
        while not (runtime / "systemd" / "private").exists() and self._process.poll() is None:
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.02)

    @property
    def is_up(self) -> bool:
        """It runs."""
        return self._process.poll() is None

    def unit(self, name: str) -> Path:
        """Return where a unit belongs."""
        return self.folder / ".config" / "systemd" / "user" / name

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Ask this manager."""
        return subprocess.run(
            [SYSTEMCTL, "--user", *words],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**os.environ, **self.environment},
        )

    def show(self, unit: str, key: str) -> str:
        """Return one property of a unit."""
        return self.systemctl("show", unit, f"--property={key}", "--value").stdout.strip()

    def close(self) -> None:
        """End the manager, which ends its services."""
        self._process.terminate()
        self._process.wait(LIMIT_S)


def can_run_systemd() -> bool:
    """Return True if a user manager can be tried here: as root, with unshare(1)."""
    return os.geteuid() == 0 and SYSTEMD.exists() and bool(UNSHARE and SYSTEMCTL)
