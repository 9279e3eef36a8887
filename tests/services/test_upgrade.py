"""An emberd of today takes over from one of commit 21eed80: engine, files and clients."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from daemon_process import is_alive
from old_emberd import MANAGED, SETTINGS, leave
from page_cache import on_linux

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

pytestmark = on_linux
GIVE_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="bound-by-emberd")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes another program that has the endpoint's socket, as `emberd upgrade` lets that emberd do."""


def take_over(daemon: Daemon, listener: socket.socket) -> None:
    """Start today's emberd on the socket of the one before."""
    daemon.write_settings()
    with daemon.log.open("ab") as log:
        daemon.child = subprocess.Popen(
            [sys.executable, "-c", GIVE_SOCKET, str(listener.fileno()), *daemon.command("run")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **daemon.environment},
            pass_fds=[listener.fileno()],
        )


def rows(daemon: Daemon, table: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(daemon.state.history)
    try:
        return connection.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608  # a table's name
    finally:
        connection.close()


def test_an_upgrade_keeps_the_engine_the_waiting_request_and_all_that_was_written(make_daemon: MakeDaemon):
    daemon = make_daemon(SETTINGS, **MANAGED)
    engine = leave(daemon)
    answers, record = daemon.state.answers.read_text(), json.loads(daemon.state.record.read_text())
    runs = json.loads(daemon.state.starts.read_text())["runs"]
    said = daemon.state.output.read_text()
    with socket.create_server(("127.0.0.1", daemon.port)) as listener:
        replies: list[str] = []
        asking = threading.Thread(target=lambda: replies.append(daemon.complete()))
        asking.start()  # it waits in the backlog: nobody accepts yet
        take_over(daemon, listener)
        status = daemon.wait_ready()
        asking.join(40)
    assert replies[0]
    assert daemon.child is not None
    assert status["pid"] == daemon.child.pid
    assert (status["engine"]["pid"], status["engine"]["adopted"], status["starts"]) == (engine.pid, True, 0)
    assert daemon.complete()
    assert daemon.status()["engine"]["pid"] == engine.pid

    written = json.loads(daemon.state.record.read_text())
    known = ("format", "pid", "start_token", "command", "command_digest", "plan_digest", "port", "started_at")
    assert [written[name] for name in known] == [record[name] for name in known], "the one before could adopt it"
    assert daemon.state.answers.read_text() == answers, "the program was not asked again"
    daemon.wait_for(lambda _: len(json.loads(daemon.state.starts.read_text())["runs"]) == len(runs) + 1)
    assert json.loads(daemon.state.starts.read_text())["runs"][: len(runs)] == runs
    assert [run["end"] for run in runs] == ["failed", "failed", "ready"]

    assert status["swap"]["written_today_bytes"] == 1 + 2 + 4 + 8 + 16 + 32
    assert daemon.status()["warmth"]["cost_today"]["passes"] >= 3
    assert daemon.state.output.read_text().startswith(said)
    events = [json.loads(line)["event"] for line in daemon.verb("logs", "--json").stdout.splitlines()]
    assert events.index("engine_started") < events.index("engine_adopted")

    assert daemon.verb("stop").returncode == 0
    engine.wait(20)
    assert not is_alive(engine.pid)
    ((_, *writes),) = rows(daemon, "swap_writes")
    assert all(now >= before for now, before in zip(writes, (1, 2, 4, 8, 16, 32), strict=True))
    ((_, passes, read_bytes, engine_ms, cpu_ms, processed_tokens),) = rows(daemon, "warmth_costs")
    assert (passes >= 3, read_bytes >= 4096, engine_ms >= 1500, cpu_ms >= 2500) == (True,) * 4
    assert processed_tokens >= 0, "a column that came later"
