"""A child process for tests: its output is read all the time, and its whole group ends with the test."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

POLL_S = 0.02
STOP_S = 10.0
_READ_BYTES = 65536
_LINE_END = re.compile(r"[\r\n]+")


class EngineProcess:
    """A running child in a session and process group of its own.

    Args:
        arguments: the command line.
        environment: variables on top of this process's own.
        directory: working directory.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [str(word) for word in arguments],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._grown = threading.Condition()
        self._texts = {"stdout": "", "stderr": ""}
        self._readers = [
            threading.Thread(target=self._read, args=(name, pipe), daemon=True)
            for name, pipe in (("stdout", self._process.stdout), ("stderr", self._process.stderr))
            if pipe is not None
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_group()

    def _read(self, name: str, pipe: IO[bytes]) -> None:
        with pipe:
            while chunk := os.read(pipe.fileno(), _READ_BYTES):
                with self._grown:
                    self._texts[name] += chunk.decode(errors="replace")
                    self._grown.notify_all()

    @property
    def stdout(self) -> str:
        """Everything printed on stdout so far."""
        return self._texts["stdout"]

    @property
    def stderr(self) -> str:
        """Everything printed on stderr so far."""
        return self._texts["stderr"]

    @property
    def output(self) -> str:
        """Both streams, one behind the other."""
        return self.stdout + self.stderr

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; None while the child runs."""
        return self._process.poll()

    def lines(self) -> list[str]:
        """Return both streams cut into lines; a carriage return ends a line too."""
        return _LINE_END.split(self.stdout) + _LINE_END.split(self.stderr)

    def wait_for_output(self, text: str, *, within_s: float = 30.0) -> None:
        """Wait until `text` has been printed on either stream.

        Raises:
            AssertionError: it was not printed in time, or the child ended without printing it.
        """
        end = time.monotonic() + within_s
        with self._grown:
            while text not in self.output:
                rest = end - time.monotonic()
                has_ended = not any(reader.is_alive() for reader in self._readers)
                assert rest > 0, f"{text!r} was not printed within {within_s} s:\n{self.output[-4000:]}"
                assert not has_ended, f"ended without {text!r}:\n{self.output[-4000:]}"
                self._grown.wait(min(rest, 0.2))

    def wait_for_answer(self, url: str, *, within_s: float = 30.0) -> float:
        """Wait for a 200 from `url`; return the monotonic time of it, in seconds.

        Raises:
            AssertionError: none came in time, or the child ended.
        """

        def answers() -> bool:
            assert self.exit_code is None, f"ended with {self.exit_code}:\n{self.output[-4000:]}"
            return is_answering(url)

        wait_until(answers, within_s=within_s, what=lambda: f"{url} answers\n{self.output[-4000:]}")
        return time.monotonic()

    def wait_for_exit(self, *, within_s: float = 30.0) -> int:
        """Return the exit code, negative for a signal, with all output read.

        Raises:
            AssertionError: the child still runs.
        """
        try:
            code = self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within_s} s:\n{self.output[-4000:]}") from None
        for reader in self._readers:
            # A descendant may hold the pipe open; its output is not waited for.
            reader.join(0.2)
        return code

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the child alone, not to its group."""
        self._process.send_signal(number)

    def stop_group(self) -> None:
        """Kill the whole group and wait for the pipes to close; idempotent."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(STOP_S)
        for reader in self._readers:
            reader.join(STOP_S)

    def group_lives(self) -> bool:
        """Whether any process of the group is left, zombies included."""
        self._process.poll()
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True


def _own_ports() -> Iterator[int]:
    """Give the ports of this test process, each once in a round.

    A port is free between being named and being bound. Processes that drew from the same ports met there.
    A bind to port 0 is never given one of these (Linux, ip_local_port_range: from 32768).
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = list(range(10_000 + number, 30_000, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    random.shuffle(own)
    return itertools.cycle(own)


_PORTS = _own_ports()


def free_port() -> int:
    """Return a loopback port that nothing listens on."""
    for port in itertools.islice(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port between 10000 and 30000")


def is_port_open(port: int) -> bool:
    """Whether a connection to the port on 127.0.0.1 is accepted."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_answering(url: str) -> bool:
    """Whether `url` answers 200 within two seconds."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:  # noqa: S310 - always http on loopback
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def wait_until(
    condition: Callable[[], bool], *, within_s: float = 10.0, what: Callable[[], str] = lambda: "the condition"
) -> None:
    """Poll `condition` until it holds.

    Raises:
        AssertionError: it did not hold in time; `what` names it.
    """
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s: {what()}"
        time.sleep(POLL_S)
