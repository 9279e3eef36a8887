"""The engine of a killed emberd is ended when nobody is to adopt it; a stranger or a supervised one is not."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

from daemon_process import is_alive
from emberd.engine.record import end_leftover
from emberd.host import ThisHost

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon_process import Daemon


async def test_the_engine_of_a_killed_emberd_is_ended_and_forgotten(make_daemon: Callable[..., Daemon]):
    daemon = make_daemon()
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    assert await end_leftover(daemon.state, ThisHost(), 5.0) is None, "an emberd runs"
    assert is_alive(engine)
    daemon.kill()
    assert await end_leftover(daemon.state, ThisHost(), 5.0) == engine
    assert not is_alive(engine)
    assert not daemon.state.record.exists()
    assert await end_leftover(daemon.state, ThisHost(), 5.0) is None


async def test_a_stranger_with_the_same_pid_is_left_alone(make_daemon: Callable[..., Daemon]):
    daemon = make_daemon()
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    daemon.kill()
    record = json.loads(daemon.state.record.read_text())
    daemon.state.record.write_text(json.dumps({**record, "start_token": "another time"}))
    assert await end_leftover(daemon.state, ThisHost(), 5.0) is None
    assert is_alive(engine)
    os.killpg(engine, signal.SIGKILL)


async def test_an_engine_that_ignores_signals_is_killed(make_daemon: Callable[..., Daemon]):
    daemon = make_daemon(STANDIN_IGNORE_SIGTERM="1", STANDIN_IGNORE_SIGINT="1")
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    daemon.kill()
    assert await end_leftover(daemon.state, ThisHost(), 0.5) == engine
    assert not is_alive(engine)
