"""Events, history and metrics of a real daemon over HTTP: who may see them, and who is dropped."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import fcntl
import http.client
import importlib.util
import itertools
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import structlog

from emberd.services import events
from emberd.services.events import MOST_VIEWERS, Events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

WAIT_S = 40.0
DOCS = Path(__file__).resolve().parents[2] / "docs"
needs_prometheus = pytest.mark.skipif(
    importlib.util.find_spec("prometheus_client") is None, reason="prometheus-client is not installed"
)
PROMTOOL = shutil.which("promtool") or ""
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="promtool (Debian: prometheus) is missing")


def get(daemon: Daemon, name: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{daemon.url}/emberd/{name}", headers=headers, timeout=WAIT_S, trust_env=False)


@contextlib.contextmanager
def viewer(daemon: Daemon) -> Iterator[http.client.HTTPResponse]:
    """Open the live view, and give the answer to read from."""
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=WAIT_S)
    try:
        connection.request("GET", "/emberd/events")
        yield connection.getresponse()
    finally:
        connection.close()


def next_event(answer: http.client.HTTPResponse) -> dict[str, Any]:
    while True:
        line = answer.readline()
        assert line, "the stream has ended"
        if line.startswith(b"data: "):
            told: dict[str, Any] = json.loads(line.removeprefix(b"data: "))["status"]
            return told


@pytest.fixture
def ready(make_daemon: MakeDaemon) -> Daemon:
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    return daemon


def test_all_viewers_are_told_the_same_and_one_too_many_is_sent_away(ready: Daemon):
    with contextlib.ExitStack() as stack:
        answers = [stack.enter_context(viewer(ready)) for _ in range(MOST_VIEWERS)]
        assert {answer.getheader("content-type") for answer in answers} == {"text/event-stream; charset=utf-8"}
        first = [next_event(answer) for answer in answers]
        assert all(told["state"] == "READY" for told in first)
        seen = [
            {told["uptime_s"], next_event(answer)["uptime_s"]} for told, answer in zip(first, answers, strict=True)
        ]
        assert set.intersection(*seen), "one observation is told to all"
        refused = get(ready, "events")
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_viewers")
    deadline_s = time.monotonic() + WAIT_S
    while True:
        with viewer(ready) as answer:
            if answer.status == 200:
                assert next_event(answer)["state"] == "READY", "a place that was left is free again"
                return
        assert time.monotonic() < deadline_s


def test_a_viewer_sees_the_engine_go_and_come(ready: Daemon):
    pid = ready.status()["engine"]["pid"]
    with viewer(ready) as answer:
        assert next_event(answer)["engine"]["pid"] == pid
        assert ready.verb("restart").returncode == 0
        while (told := next_event(answer))["state"] != "READY" or told["engine"]["pid"] == pid:
            pass
        assert told["starts"] == 2


def test_a_daemon_that_ends_waits_for_no_viewer(ready: Daemon):
    with viewer(ready) as answer:
        next_event(answer)
        began_s = time.monotonic()
        assert ready.verb("stop").returncode == 0
        assert time.monotonic() - began_s < ready.settings.get("lifecycle.drain_timeout_s", 30)
        while answer.readline():
            pass


class Tube:
    """An ASGI client: hears what is sent, or takes nothing after the beginning."""

    def __init__(self, *, is_deaf: bool = False) -> None:
        self.heard: list[Any] = []
        self.has_heard = asyncio.Event()
        self._is_deaf = is_deaf
        self.leaves = asyncio.Event()

    async def receive(self) -> Any:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self._is_deaf and message["type"] == "http.response.body":
            await asyncio.Event().wait()
        self.heard.append(message)
        self.has_heard.set()

    async def hear(self, count: int) -> None:
        while len(self.heard) < count:
            self.has_heard.clear()
            async with asyncio.timeout(WAIT_S):
                await self.has_heard.wait()


async def test_a_viewer_that_reads_nothing_is_dropped_and_the_others_are_told_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(events, "EVERY_S", 0.001)
    monkeypatch.setattr(events, "_SLOW_S", 0.05)
    asked = itertools.count(1)

    async def view() -> dict[str, Any]:
        return {"number": next(asked)}

    hub = Events(view, structlog.get_logger())
    deaf, well = Tube(is_deaf=True), Tube()
    serving = asyncio.create_task(hub.serve(well.receive, well.send))
    async with asyncio.timeout(WAIT_S):
        await hub.serve(deaf.receive, deaf.send)
    await well.hear(len(well.heard) + 3)
    well.leaves.set()
    async with asyncio.timeout(WAIT_S):
        await serving
    after = next(asked)
    await asyncio.sleep(0)
    assert next(asked) == after + 1, "nothing is looked at for nobody"
    assert [name for name in map(asyncio.Task.get_name, asyncio.all_tasks()) if name == "events"] == []


def test_pages_of_others_and_askers_without_the_key_are_told_nothing(make_daemon: MakeDaemon):
    daemon = make_daemon({"endpoint.origins": ["https://chat.example"]})
    key = daemon.folder / "key"
    key.write_text("let-me-in\n")
    key.chmod(0o600)
    daemon.settings["endpoint.api_key_file"] = str(key)
    daemon.start()
    daemon.wait_ready()
    mine = {"authorization": "Bearer let-me-in"}
    for name in ("events", "history", "metrics"):
        assert get(daemon, name).status_code == 401
        assert get(daemon, name, **mine, origin="https://chat.example").status_code == 403
        assert get(daemon, name, **mine, host="evil.example").status_code == 403
    assert get(daemon, "history", **mine).status_code == 200
    assert get(daemon, "healthz").status_code == 200


def test_a_viewer_that_came_in_by_an_old_key_is_ended_when_the_key_changes(make_daemon: MakeDaemon):
    daemon = make_daemon()
    key = daemon.folder / "key"
    key.write_text("let-me-in\n")
    key.chmod(0o600)
    daemon.settings["endpoint.api_key_file"] = str(key)
    daemon.start()
    daemon.wait_ready()
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=15)
    with contextlib.closing(connection):
        connection.request("GET", "/emberd/events", headers={"authorization": "Bearer let-me-in"})
        answer = connection.getresponse()
        assert answer.status == 200
        key.write_text("another-one\n")
        assert daemon.verb("reload").returncode == 0
        deadline_s = time.monotonic() + 10
        while answer.readline() and time.monotonic() < deadline_s:
            pass
        assert answer.isclosed(), "the view went on"


def test_the_history_of_a_real_daemon_outlives_it_and_is_read_without_it(ready: Daemon):
    ready.complete()
    assert ready.verb("stop").returncode == 0
    ready.end()
    shown = json.loads(ready.verb("history", "--json").stdout)
    assert sum(shown["requests"]) >= 1
    assert sum(shown["state_changes"]) >= 1
    assert sum(shown["observed_s"]) >= 0
    ready.start()
    ready.wait_ready()
    told = get(ready, "history").json()
    assert told["at_s"][0] == shown["at_s"][0]
    assert sum(told["requests"]) == sum(shown["requests"])
    assert get(ready, "history?step=60&since=0&until=60").json()["at_s"] == []
    assert get(ready, "history?since=yesterday").status_code == 400
    assert get(ready, "history?since=nan").status_code == 400
    assert httpx.post(f"{ready.url}/emberd/history", timeout=WAIT_S, trust_env=False).status_code == 403


@needs_prometheus
def test_metrics_are_openmetrics_and_tell_what_has_happened(ready: Daemon):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families  # noqa: PLC0415

    for _ in range(3):
        ready.complete()
    answer = get(
        ready, "metrics", accept="application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    )
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert families["emberd_requests"].samples[0].value == 3
    states = {
        sample.labels["emberd_engine_state"]: sample.value for sample in families["emberd_engine_state"].samples
    }
    assert [state for state, is_so in states.items() if is_so] == ["READY"]
    assert families["emberd_engine_resident_bytes"].unit == "bytes"
    assert families["emberd_engine_resident_bytes"].samples[0].value > 1 << 20
    assert get(ready, "metrics").headers["content-type"].startswith("application/openmetrics-text")
    assert get(ready, "metrics", accept="text/plain").headers["content-type"].startswith("text/plain")


@needs_prometheus
@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_metrics(ready: Daemon):
    ready.complete()
    text = get(ready, "metrics", accept="text/plain").text
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


# --- in the terminal ------------------------------------------------------------------------------------------


def test_history_is_csv_and_charts_without_a_daemon_too(ready: Daemon):
    ready.complete()
    running = ready.verb("history", "--csv")
    assert running.returncode == 0
    assert running.stdout.splitlines()[0].startswith("at_s,observed_s,ready_s")
    assert ready.verb("stop").returncode == 0
    rows = list(csv.DictReader(ready.verb("history", "--csv", "--since", "1h").stdout.splitlines()))
    assert sum(int(row["requests"]) for row in rows) == 1
    assert rows[0]["lettings_go"] == "0"
    assert json.loads(ready.verb("history", "--json", "--since", "7d").stdout)["step_s"] == 600
    assert json.loads(ready.verb("history", "--json", "--since", "7d", "--step", "1m").stdout)["step_s"] == 60
    said = ready.verb("history").stdout
    assert "requests" in said
    assert "first tokens" in said
    assert ready.verb("history", "--csv", "--json").returncode == 2
    assert ready.verb("history", "--since", "yesterday").returncode == 2


def test_a_history_that_is_not_there_or_cannot_be_read_is_one_clear_error(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.write_settings()
    missing = daemon.verb("history")
    assert (missing.returncode, missing.stderr.count("Traceback")) == (1, 0)
    assert "no history yet" in missing.stderr
    daemon.state.directory.mkdir(mode=0o700)
    daemon.state.history.write_bytes(b"no database" * 1000)
    damaged = daemon.verb("history")
    assert (damaged.returncode, damaged.stderr.count("Traceback")) == (1, 0)
    assert "cannot read the history" in damaged.stderr
    assert daemon.state.history.read_bytes() == b"no database" * 1000


class Terminal:
    """Runs a verb on a terminal of 80 columns, and reads what it draws."""

    def __init__(self, daemon: Daemon, *words: str, rows: int = 40) -> None:
        self._mine, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm"}
        self.child = subprocess.Popen(
            daemon.command(*words), stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        )
        os.close(theirs)
        self.drawn = ""

    def wait_for(self, words: str) -> None:
        deadline_s, begin = time.monotonic() + WAIT_S, len(self.drawn)
        while words not in self.drawn[begin:]:
            assert time.monotonic() < deadline_s, f"{words!r} was not drawn: {self.drawn[begin:][-2000:]}"
            if select.select([self._mine], [], [], 0.2)[0]:
                self.drawn += os.read(self._mine, 65536).decode(errors="replace")

    def interrupt(self) -> int:
        self.child.send_signal(signal.SIGINT)
        code = self.child.wait(WAIT_S)
        with contextlib.suppress(OSError):
            self.drawn += os.read(self._mine, 65536).decode(errors="replace")
        os.close(self._mine)
        return code


def test_watch_says_that_the_daemon_has_gone_comes_back_with_it_and_ends_at_an_interrupt(ready: Daemon):
    terminal = Terminal(ready, "status", "--watch")
    terminal.wait_for("READY for")
    assert ready.verb("stop").returncode == 0
    ready.end()
    terminal.wait_for("emberd is not running")
    ready.start()
    ready.wait_ready()
    terminal.wait_for("READY for")
    assert terminal.interrupt() == 0
    assert terminal.drawn.endswith("\x1b[?25h\x1b[?1049l"), "the terminal is as it was"
    assert "Traceback" not in terminal.drawn


def test_watch_shows_state_and_charts_on_a_low_terminal(ready: Daemon):
    ready.complete()
    assert ready.verb("stop").returncode == 0  # writes the minute that has begun
    ready.end()
    ready.start()
    os.kill(ready.wait_ready()["engine"]["pid"], signal.SIGKILL)
    ready.wait_for(lambda status: status["state"] == "READY" and status["last_exit"])
    terminal = Terminal(ready, "status", "--watch", rows=10)
    terminal.wait_for("at least")  # beside a chart
    assert terminal.interrupt() == 0
    frames = terminal.drawn.split("\x1b[H")
    assert any("READY for" in each and "at least" in each for each in frames), "the end of the status gives way"


def test_the_address_of_the_page_is_printed(ready: Daemon):
    assert ready.verb("page", "--print").stdout == f"{ready.url}/emberd/\n"
    assert json.loads(ready.verb("page", "--json").stdout) == {"address": f"{ready.url}/emberd/"}


# --- what is built on the metrics -----------------------------------------------------------------------------

RULES, DASHBOARD = DOCS / "emberd-alerts.yml", DOCS / "emberd-grafana.json"


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_alert_rules():
    checked = subprocess.run(
        [PROMTOOL, "check", "rules", str(RULES)], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert (checked.returncode, "7 rules found" in checked.stdout) == (0, True), checked.stderr


@needs_prometheus
def test_rules_dashboard_and_docs_name_only_metrics_that_are_there(ready: Daemon):
    text = get(ready, "metrics", accept="text/plain").text
    # This computer may have no swap, no stalls and no forecast yet.
    there = set(re.findall(r"^# HELP (\w+)", text, re.MULTILINE)) | {
        "emberd_swap_written_bytes_total",
        "emberd_memory_stall_ratio",
        "emberd_first_token_forecast_seconds",
        "emberd_warm_age_seconds",
        "emberd_weights_bytes",
        "emberd_weights_resident_bytes",
    }
    for file in (RULES, DASHBOARD, DOCS / "metrics.md"):
        named = set(re.findall(r"\bemberd_[a-z_]+[a-z]\b", file.read_text(encoding="utf-8")))
        named = {name.removesuffix("_bucket") for name in named}
        assert named
        assert named - there == set(), file.name
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert all(target["expr"] for panel in panels for target in panel["targets"])
