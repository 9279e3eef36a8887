"""A stand-in for the tools that keep a computer awake: caffeinate(8) and systemd-inhibit(1), as their pages say.

`caffeinate -i -w PID` holds an assertion until that process ends; `systemd-inhibit [options] COMMAND...` holds one
while the command runs and ends with its status. The assertion is a file named after the process that holds it, in
the folder EMBERD_TEST_ASSERTIONS, with the command line in it. A refusal (EMBERD_TEST_REFUSES is a part of the
command line) ends with 1, as systemd-inhibit does when polkit says no.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SCRIPT = """#!{python}
import os, pathlib, signal, subprocess, sys, time
words = sys.argv[1:]
refused = os.environ.get("EMBERD_TEST_REFUSES")
if refused and refused in " ".join(words):
    print("Failed to inhibit: Access denied", file=sys.stderr)
    sys.exit(1)
mark = pathlib.Path(os.environ["EMBERD_TEST_ASSERTIONS"]) / str(os.getpid())
mark.write_text(" ".join([sys.argv[0].rpartition("/")[2], *words]))
child = None
def end(*_):
    if child is not None:
        child.terminate()
    mark.unlink()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
if "-w" in words:
    watched = int(words[words.index("-w") + 1])
    while True:
        try:
            os.kill(watched, 0)
            with open(f"/proc/{{watched}}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    break
        except OSError:
            break
        time.sleep(0.05)
else:
    child = subprocess.Popen([word for word in words if not word.startswith("--")])
    child.wait()
    child = None
end()
"""


def install(folder: Path, *names: str) -> None:
    """Put executables of these names into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name
        path.write_text(_SCRIPT.format(python=shutil.which("python3", path=os.defpath) or sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def held(folder: Path) -> list[str]:
    """Return the command lines that hold an assertion now."""
    return sorted(text for path in folder.iterdir() if (text := _read(path)))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
