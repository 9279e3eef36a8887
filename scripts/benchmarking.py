"""What the benchmarks share: programs that serve on a port of their own, and end with all that they started."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from typing import TYPE_CHECKING

import httpx
import psutil

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

LIMIT_S = 300.0
EMBERD = "from emberd.cli.main import main; main()"
"""What Python runs as emberd's command line."""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end(child: subprocess.Popen[str]) -> None:
    """End a program and all its descendants, wherever they went."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, LIMIT_S)
    child.wait(LIMIT_S)
    if child.stdout is not None:
        child.stdout.close()


def wait_for_word(url: str, child: subprocess.Popen[str], log: Path) -> None:
    """Wait until something answers."""
    deadline_s = time.monotonic() + LIMIT_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=LIMIT_S, trust_env=False).status_code == httpx.codes.OK:
                return
        if child.poll() is not None or time.monotonic() > deadline_s:
            sys.exit(f"{child.args!r} does not serve: {log.read_text()[-3000:]}")
        time.sleep(0.1)
