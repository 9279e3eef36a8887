"""The observer: what the status shows, and when pressure is news."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import psutil
import structlog

from emberd.core.memory import Pressure, SystemMemory
from emberd.core.status import to_plain
from emberd.core.types import EngineSample
from emberd.host import ThisHost
from emberd.services import observer
from emberd.services.observer import Observer
from page_cache import MIB, on_linux

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]


class DictatedHost(ThisHost):
    """This computer, but for its memory, which a test dictates."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = SystemMemory()

    def system_memory(self) -> SystemMemory:
        return self.seen


def meter(host: ThisHost, events: list[dict[str, Any]]) -> Observer:
    def keep(_: Any, level: str, event: dict[str, Any]) -> Any:
        events.append({**event, "level_of_event": level})
        raise structlog.DropEvent

    log = structlog.wrap_logger(None, processors=[keep], wrapper_class=structlog.BoundLogger)
    sample = EngineSample("1:a", (os.getpid(),), is_idle=True, requests=0)
    return Observer(host, log, lambda: sample)


async def test_a_change_of_pressure_is_logged_once_and_the_unknown_is_no_change():
    host, events = DictatedHost(), []
    meters = meter(host, events)
    levels = ["normal", "normal", "warn", "warn", "unknown", "warn", "critical", "normal"]
    for level in levels:
        host.seen = SystemMemory(pressure=Pressure(level))
        meters.look()
    assert [(event["was"], event["level"]) for event in events] == [
        ("normal", "warn"),
        ("warn", "critical"),
        ("critical", "normal"),
    ]
    assert [event["level_of_event"] for event in events] == ["info", "warning", "info"]


async def test_pressure_that_is_there_at_the_start_is_news():
    host, events = DictatedHost(), []
    host.seen = SystemMemory(pressure=Pressure.CRITICAL)
    meter(host, events).look()
    assert [event["level"] for event in events] == ["critical"]


async def test_swap_traffic_is_told_over_the_last_readings(monkeypatch: pytest.MonkeyPatch):
    host = DictatedHost()
    meters = meter(host, [])
    now_s = 100.0
    monkeypatch.setattr(observer.time, "monotonic", lambda: now_s)
    assert (await meters.status()).system.swap_out_bytes_per_s is None, "one reading makes no rate"
    for written in (0, 1000 * MIB, 1000 * MIB, 1000 * MIB, 1020 * MIB):
        host.seen = SystemMemory(swapped_in_bytes=0, swapped_out_bytes=written)
        meters.look()
        now_s += 10
    host.seen = SystemMemory(swapped_in_bytes=60 * MIB, swapped_out_bytes=1030 * MIB)
    system = (await meters.status()).system
    # The oldest reading that counts is 30 s old: the burst of 1000 MiB before it is forgotten.
    assert system.swap_out_bytes_per_s == MIB
    assert system.swap_in_bytes_per_s == 2 * MIB


async def test_the_status_is_plain_values_with_everything_the_host_tells():
    seen = to_plain(await meter(ThisHost(), []).status())
    assert json.loads(json.dumps(seen)) == seen
    assert seen["system"]["total_bytes"] == psutil.virtual_memory().total
    assert seen["system"]["pressure"] in {"normal", "warn", "critical", "unknown"}
    assert seen["engine"]["resident_bytes"] > MIB
    assert seen["power"]["source"] in {"mains", "battery", "unknown"}


@on_linux
def test_the_status_shows_the_engines_memory_and_the_computers(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    status = daemon.wait_ready()
    pid, memory = status["engine"]["pid"], status["memory"]
    rss = psutil.Process(pid).memory_info().rss
    assert abs(memory["engine"]["resident_bytes"] - rss) < 8 * MIB
    assert memory["engine"]["locked_bytes"] == status["lock"]["locked_bytes"]
    assert memory["gpu"] is None
    said = daemon.verb("status").stdout
    assert "GiB resident" in said
    assert "GiB available" in said
