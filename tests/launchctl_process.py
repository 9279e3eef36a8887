"""The launchctl stand-in as tests use it: a state directory, its launchd, and their end."""

from __future__ import annotations

import json
import os
import plistlib
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parent / "launchctl_standin"
PROGRAM = FOLDER / "launchctl"
STATE_VARIABLE = "LAUNCHCTL_STANDIN_STATE"
LIMIT_S = 40.0
LIST_MODE = 0o644


class Launchctl:
    """One state directory of the stand-in.

    Args:
        state: the state directory; made by the first call.
        home: HOME of the jobs.
        speed: what launchd's waits are divided by.
    """

    def __init__(self, state: Path, home: Path, speed: float = 10.0) -> None:
        self.state, self.home = state, home
        self.gui, self.user = f"gui/{os.getuid()}", f"user/{os.getuid()}"
        state.mkdir(mode=0o700, parents=True)
        self.switch(speed=speed)

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs that is to find the stand-in as `launchctl`."""
        path = f"{FOLDER}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, STATE_VARIABLE: str(self.state), "HOME": str(self.home), "PATH": path}

    def switch(self, **switches: Any) -> None:
        """Set switches of `launchd.DEFAULTS`; the next call reads them."""
        path = self.state / "switches.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps({**known, **switches}))
        temporary.replace(path)

    def call(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the stand-in; its code and texts are the caller's to judge."""
        return subprocess.run(
            [PROGRAM, *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def do(self, *words: str | Path) -> str:
        """Run what must succeed, and return what it prints."""
        done = self.call(*words)
        assert done.returncode == 0, (words, done.returncode, done.stderr, self.log())
        return done.stdout

    def value(self, label: str, key: str, domain: str = "") -> str | None:
        """Return a value of `launchctl print`, None if it has none."""
        found = re.search(
            rf"^\t{key} = (.*)$", self.call("print", f"{domain or self.gui}/{label}").stdout, re.MULTILINE
        )
        return found[1] if found else None

    def pid(self, label: str, domain: str = "") -> int | None:
        """Return the pid of a job that runs."""
        found = self.value(label, "pid", domain)
        return int(found) if found else None

    def wait(self, is_so: Callable[[], Any], what: str) -> Any:
        """Return the first answer that is true."""
        deadline_s = time.monotonic() + LIMIT_S
        while not (answer := is_so()):
            assert time.monotonic() < deadline_s, f"{what} did not come; {self.log()}"
            time.sleep(0.02)
        return answer

    def wait_gone(self, label: str, domain: str = "") -> None:
        """Wait until a job is not known any more."""
        gone = 113
        self.wait(
            lambda: self.call("print", f"{domain or self.gui}/{label}").returncode == gone, "the end of the job"
        )

    def log(self) -> str:
        """Return what its launchd noted."""
        path = self.state / "launchd.log"
        return path.read_text()[-3000:] if path.exists() else ""

    def write_list(self, folder: Path, label: str, *arguments: str, **keys: Any) -> Path:
        """Write a property list and return its path."""
        path = folder / f"{label}.plist"
        job = {"Label": label, "ProgramArguments": [*arguments], "ProcessType": "Interactive", **keys}
        path.write_bytes(plistlib.dumps(job))
        path.chmod(LIST_MODE)
        return path

    def end(self) -> None:
        """Kill what runs and end its launchd."""
        done = self.call("standin-end", "-k")
        assert done.returncode == 0, done.stderr
