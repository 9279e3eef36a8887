"""Two emberds behind a real balancer, configured as docs/several.md says: nothing is lost, a warm one preferred."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from daemon_process import WAIT_S
from engine_process import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

PAGE = Path(__file__).parents[2] / "docs" / "several.md"
COMMANDS = {"haproxy": ["-f"], "nginx": ["-g", "daemon off; pid nginx.pid; error_log stderr;", "-c"]}


def configuration(program: str, port: int, *daemons: Daemon) -> str:
    """Return the page's configuration with the addresses of this test."""
    blocks = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    [text] = [block for block in blocks if ("upstream" in block) == (program == "nginx")]
    for number, daemon in enumerate(daemons, 11):
        text = text.replace(f"192.168.1.{number}:5001", f"127.0.0.1:{daemon.port}")
    return text.replace("127.0.0.1:5000", f"127.0.0.1:{port}")


@contextlib.contextmanager
def balancer(program: str, folder: Path, *daemons: Daemon) -> Iterator[str]:
    """Run it, and yield its address."""
    path, port = folder / f"{program}.conf", free_port()
    path.write_text(configuration(program, port, *daemons))
    log = (folder / "balancer.log").open("wb")
    command = [shutil.which(program) or program, *COMMANDS[program], str(path)]
    if program == "nginx":
        command += ["-p", str(folder)]
        (folder / "logs").mkdir()
    with subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as child:
        try:
            deadline_s = time.monotonic() + WAIT_S
            while True:
                assert child.poll() is None, (folder / "balancer.log").read_text()
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert time.monotonic() < deadline_s
            yield f"http://127.0.0.1:{port}"
        finally:
            child.terminate()
            child.wait(WAIT_S)
            log.close()


class Clients:
    """Four clients that ask without a pause."""

    def __init__(self, url: str) -> None:
        self.failures: list[str] = []
        self.answers = 0
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        body = {"prompt": "ba ke lo", "max_length": 8}
        while not self._stop.is_set():
            try:
                answer = httpx.post(f"{self._url}/api/v1/generate", json=body, timeout=WAIT_S, trust_env=False)
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                continue
            if answer.status_code == 200 and len(answer.json()["results"][0]["text"].split()) == 8:
                self.answers += 1
            else:
                self.failures.append(answer.text)

    def await_more(self, count: int = 8) -> None:
        wanted, deadline_s = self.answers + count, time.monotonic() + WAIT_S
        while self.answers < wanted:
            assert time.monotonic() < deadline_s, self.failures
            time.sleep(0.02)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)


def generations(daemon: Daemon) -> int:
    """Return how many replies its engine has made."""
    port = daemon.status()["engine"]["port"]
    told: dict[str, Any] = httpx.get(
        f"http://127.0.0.1:{port}/api/extra/perf", timeout=WAIT_S, trust_env=False
    ).json()
    return int(told["total_gens"])


def await_choice(url: str, daemon: Daemon) -> None:
    """Return when the balancer sends requests to `daemon`."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        before = generations(daemon)
        httpx.post(
            f"{url}/api/v1/generate", json={"prompt": "x", "max_length": 1}, timeout=WAIT_S, trust_env=False
        ).raise_for_status()
        if generations(daemon) > before:
            return
        assert time.monotonic() < deadline_s


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed"))
        for name in COMMANDS
    ],
)
def test_no_request_is_lost_and_a_warm_one_is_preferred(make_daemon: MakeDaemon, tmp_path: Path, program: str):
    cold = make_daemon({"warmth.mode": "off"}, STANDIN_TOKEN_MS="5")
    warm = make_daemon({"warmth.mode": "auto"}, STANDIN_TOKEN_MS="5", STANDIN_LOAD_SECONDS="1")
    for daemon in (cold, warm):
        daemon.start()
    for daemon in (cold, warm):
        daemon.wait_ready()
    assert warm.verb("warm").returncode == 0
    with balancer(program, tmp_path, cold, warm) as url:
        await_choice(url, warm)
        before = generations(cold)
        clients = Clients(url)
        try:
            clients.await_more()
            assert generations(cold) == before, "the warm one gets them, although it is the second"
            killed = warm.status()["engine"]["pid"]
            os.kill(killed, signal.SIGKILL)
            clients.await_more()
            warm.wait_ready(other_than=killed)
            clients.await_more()
            warm.signal(signal.SIGTERM)
            clients.await_more()
            assert warm.end() == 0
            clients.await_more()
        finally:
            clients.end()
    assert clients.failures == []
