"""emberd is replaced and restarted while clients ask: nobody is refused, nothing is lost or loaded again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from engine_process import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

ACTIVATE = shutil.which("systemd-socket-activate") or ""
LIMIT_S = 60


class Clients:
    """Ask all the time, each with a new connection; what fails is kept."""

    def __init__(self, url: str, count: int = 4) -> None:
        self.failures: list[str] = []
        self.answers = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url,)) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str) -> None:
        body = {"prompt": "ba ke", "max_length": 4}
        while not self._stop.is_set():
            try:
                answer = httpx.post(f"{url}/api/v1/generate", json=body, timeout=LIMIT_S, trust_env=False)
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                continue
            if answer.status_code == 200:
                self.answers += 1
            else:
                self.failures.append(answer.text)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(LIMIT_S)


def test_emberd_replaces_itself_under_load_without_refusing_anybody_or_loading_again(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_TOKEN_MS="5")
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    clients = Clients(daemon.url)
    try:
        for _ in range(3):
            said = daemon.verb("restart", "--daemon")
            assert said.returncode == 0, said.stderr
            assert "emberd replaced" in said.stdout
            before = clients.answers
            deadline_s = time.monotonic() + LIMIT_S
            while clients.answers < before + 4 and time.monotonic() < deadline_s:
                time.sleep(0.01)
    finally:
        clients.end()
    assert not clients.failures
    assert clients.answers >= 12
    status = daemon.wait_ready()
    assert (status["engine"]["pid"], status["engine"]["adopted"]) == (engine, True)
    assert daemon.child is not None
    assert status["pid"] == daemon.child.pid, "the same process, a new program"


def test_an_engine_that_dies_after_a_replacement_leaves_no_zombie_and_is_restarted(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    assert daemon.verb("restart", "--daemon").returncode == 0
    daemon.wait_ready()
    os.kill(engine, signal.SIGKILL)
    status = daemon.wait_ready(other_than=engine)
    assert status["last_exit"].startswith("SIGKILL")
    assert not psutil.pid_exists(engine), "a zombie"


def test_a_running_reply_ends_before_emberd_is_replaced(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_TOKEN_MS="50")
    daemon.start()
    daemon.wait_ready()
    replies: list[str] = []
    asking = threading.Thread(target=lambda: replies.append(daemon.complete("ba ke", 40)))
    asking.start()
    daemon.wait_for(lambda status: status["requests_in_flight"] == 1)
    assert daemon.verb("restart", "--daemon").returncode == 0
    asking.join(LIMIT_S)
    assert len(replies[0].split()) == 40


@pytest.mark.skipif(not ACTIVATE, reason="systemd-socket-activate is not installed")
def test_a_socket_of_systemds_outlives_emberd_and_no_connection_is_refused(make_daemon: MakeDaemon):
    daemon = make_daemon(STANDIN_TOKEN_MS="5")
    daemon.write_settings()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with daemon.log.open("ab") as log:
        manager = subprocess.Popen(
            [ACTIVATE, f"--listen=127.0.0.1:{port}", sys.executable, *daemon.command("run")[1:]],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    # The manager starts emberd with the first connection, and becomes it.
    daemon.child = manager
    clients = Clients(url)
    try:
        status = daemon.wait_ready()
        assert status["endpoint"] == url
        assert daemon.verb("restart", "--daemon").returncode == 0
        assert daemon.wait_ready()["engine"]["pid"] == status["engine"]["pid"]
    finally:
        clients.end()
    assert not clients.failures
    assert clients.answers
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0
