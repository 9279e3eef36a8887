"""What the log service does with an event, and what a daemon leaves in its logs."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import structlog

from daemon_process import read_text_files
from emberd.core import log_lines
from emberd.core.errors import EngineFailed
from emberd.core.settings import LogSettings
from emberd.host import log_sinks
from emberd.host.darwin import DarwinHost
from emberd.host.linux import LinuxHost
from emberd.host.log_sinks import JournalSink
from emberd.services import logs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

PYOSLOG = Path(__file__).parent.parent / "pyoslog_standin"


class MacWithoutLibrary(DarwinHost):
    """A Mac as far as its logs go; its C library is not asked."""

    def __init__(self, *, is_job: bool) -> None:
        super().__init__(calls=object())  # type: ignore[arg-type]  # never used
        self._is_job = is_job

    def stderr_is_launchds(self) -> bool:
        return self._is_job


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    handlers = logging.getLogger().handlers
    yield
    logs.close()
    structlog.reset_defaults()
    logging.getLogger().handlers = handlers
    sys.modules.pop("pyoslog", None)


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_has_every_event_with_its_category(tmp_path: Path):
    path = tmp_path / "emberd.log"
    logs.configure(LogSettings(sink="file"), LinuxHost(), path, "")
    assert logs.places() == ["file"]
    logs.logger("supervisor").info("engine_started", pid=7)
    logs.logger("engine").debug("engine_line", line="hidden: level is info")
    logging.getLogger("uvicorn.error").warning("odd %s", "request")
    first, second = events(path)
    assert (first["category"], first["event"], first["level"], first["pid"]) == (
        "supervisor",
        "engine_started",
        "info",
        7,
    )
    assert first["timestamp"].endswith("Z")
    assert (second["category"], second["message"]) == ("library", "odd request")


def test_loggers_follow_new_settings(tmp_path: Path):
    log = logs.logger("memory")
    logs.configure(LogSettings(sink="file", level="error"), LinuxHost(), tmp_path / "a", "")
    log.warning("quiet")
    logs.configure(LogSettings(sink="file"), LinuxHost(), tmp_path / "b", "two")
    log.warning("loud")
    assert not (tmp_path / "a").exists()
    assert [(each["event"], each["instance"]) for each in events(tmp_path / "b")] == [("loud", "two")]


def test_a_traceback_quotes_nothing_that_was_said(tmp_path: Path):
    logs.configure(LogSettings(sink="file"), LinuxHost(), tmp_path / "log", "")
    log = logs.logger("daemon")
    said = "SECRETPROMPT"
    try:
        try:
            int(said)
        except ValueError as error:
            raise EngineFailed("the engine failed") from error
    except EngineFailed:
        log.exception("supervisor_bug", prompt=said)
    [event] = events(tmp_path / "log")
    assert "SECRETPROMPT" not in json.dumps(event)
    assert "ValueError" in event["exception"]
    assert "EngineFailed: the engine failed" in event["exception"]
    assert "int(said)" in event["exception"]
    assert event["prompt"] == "(withheld)"


def test_a_flood_is_cut_and_told_of_at_the_end(tmp_path: Path):
    logs.configure(LogSettings(sink="file", engine_lines_per_minute=100), LinuxHost(), tmp_path / "log", "")
    log = logs.logger("supervisor")
    for number in range(10_000):
        log.info("engine_line", category="engine", line=f"chatter {number}")
    log.warning("engine_exited", pid=7)
    logs.close()
    found = events(tmp_path / "log")
    lines = [each for each in found if each["event"] == "engine_line"]
    assert 100 <= len(lines) < 150
    assert [each["event"] for each in found if each["event"] != "engine_line"] == [
        "engine_exited",
        "log_lines_suppressed",
    ]
    assert (found[-1]["of"], found[-1]["category"]) == ("engine_line", "engine")
    assert found[-1]["count"] + len(lines) == 10_000


def test_lines_that_a_sink_lost_are_told_when_it_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log_sinks, "_MOST_WAITING", 1)
    blocker = tmp_path / "folder"
    blocker.touch()
    logs.configure(LogSettings(sink="file"), LinuxHost(), blocker / "log", "")
    log = logs.logger("daemon")
    log.info("one")
    log.info("two")
    blocker.unlink()
    log.info("three")
    assert [(each["event"], each.get("count")) for each in events(blocker / "log")] == [
        ("two", None),
        ("three", None),
        ("log_lines_lost", 1),
    ]


def test_on_a_mac_launchds_standard_error_gets_no_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(str(PYOSLOG))
    monkeypatch.setenv("PYOSLOG_STANDIN_FILE", str(tmp_path / "unified"))
    logs.configure(LogSettings(), MacWithoutLibrary(is_job=True), tmp_path / "log", "")
    assert logs.places() == ["unified", "file"]
    logs.logger("supervisor").info("engine_started", pid=7)
    [unified] = events(tmp_path / "unified")
    assert unified["eventMessage"] == "info engine_started pid=7"
    assert (unified["category"], unified["messageType"]) == ("supervisor", "Default")
    assert [each["event"] for each in events(tmp_path / "log")] == ["engine_started"]
    assert capfd.readouterr().err == ""


def test_on_a_mac_without_pyoslog_syslog_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyoslog", None)
    logs.configure(LogSettings(), MacWithoutLibrary(is_job=True), tmp_path / "log", "")
    assert logs.places() == ["syslog", "file"]
    logs.logger("daemon").info("emberd_started")
    assert len(events(tmp_path / "log")) == 1


def test_a_job_of_launchd_is_known_by_parent_and_label(monkeypatch: pytest.MonkeyPatch):
    host = DarwinHost(calls=object())  # type: ignore[arg-type]  # never used
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(os, "isatty", lambda _: False)
    for label, is_job in (
        ("io.github.emberd", True),
        ("0", False),
        ("", False),
        ("application.com.googlecode.iterm2.1.2", False),
    ):
        monkeypatch.setenv("XPC_SERVICE_NAME", label)
        assert host.stderr_is_launchds() is is_job
    monkeypatch.setenv("XPC_SERVICE_NAME", "io.github.emberd")
    monkeypatch.setattr(os, "getppid", lambda: 4242)
    assert not host.stderr_is_launchds()


# --- a whole daemon -----------------------------------------------------------------------------------------


def test_neither_prompts_nor_passwords_reach_any_sink(make_daemon: MakeDaemon, tmp_path: Path):
    """Standard error, the file at level debug, and the journal by a socket in its place."""
    daemon = make_daemon(
        {"engine.extra_args": ["--password", "SECRETWORD"], "log.level": "debug", "warmth.mode": "auto"}
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(str(tmp_path / "journal"))
        journald.setblocking(False)
        journald.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        daemon.start()
        daemon.wait_ready()
        headers = {"authorization": "Bearer SECRETWORD"}
        with httpx_client(daemon.url, headers) as client:
            body = {"prompt": "SECRETPROMPT", "max_length": 2}
            assert client.post("/api/v1/generate", json=body).status_code == 200
            assert client.post("/api/v1/generate", content=b'{"prompt": "SECRETBODY').status_code == 500
            chat = {"messages": [{"role": "user", "content": "SECRETCHAT"}], "max_tokens": 2, "stream": True}
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
            assert client.get("/api/v1/model?key=SECRETQUERY").status_code == 200
        assert daemon.verb("warm").returncode == 0
        os.kill(daemon.status()["engine"]["pid"], signal.SIGKILL)
        daemon.wait_event("engine_exited")
        daemon.wait_ready()
        daemon.signal(signal.SIGTERM)
        assert daemon.end() == 0
        everything = daemon.log.read_text()
        daemon.state.kcpps.unlink()  # the one place for the password
        files = read_text_files(daemon.state.directory)
        # What any sink gets is made of these same events; so the forms of the others are made of them here.
        sink = JournalSink(str(tmp_path / "journal"))
        entries = b""
        for event in events(daemon.state.directory / "emberd.log"):
            assert sink.write(event)
            entries += journald.recv(1 << 18)
            everything += log_lines.line(event) + log_lines.syslog_line(event)
        sink.close()
    everything += files + entries.decode(errors="replace")
    assert b"engine_exited" in entries
    for secret in ("SECRETWORD", "SECRETPROMPT", "SECRETBODY", "SECRETCHAT", "SECRETQUERY"):
        assert secret not in everything
    assert (daemon.state.directory / "emberd.log").stat().st_mode & 0o777 == 0o600


def httpx_client(url: str, headers: dict[str, str]) -> httpx.Client:
    return httpx.Client(base_url=url, headers=headers, timeout=20, trust_env=False)


def test_a_daemon_that_systemd_starts_logs_to_the_journal_only(make_daemon: MakeDaemon):
    """JOURNAL_STREAM names the device and inode of its standard error."""
    daemon = make_daemon()
    daemon.log.touch()
    seen = daemon.log.stat()
    daemon.environment["JOURNAL_STREAM"] = f"{seen.st_dev}:{seen.st_ino}"
    daemon.start()
    status = daemon.wait_ready()
    if Path("/run/systemd/journal/socket").is_socket() or Path("/dev/log").is_socket():
        assert status["log"] in (["journal"], ["syslog"])
        assert not daemon.events("emberd_started")
    else:
        assert status["log"] == ["stderr"]  # systemd without a journal socket: what it connected is all there is
        assert daemon.events("emberd_started")
    assert not (daemon.state.directory / "emberd.log").exists()


def test_the_log_moves_with_a_reload(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    elsewhere = daemon.folder / "elsewhere" / "my.log"
    daemon.write_settings(log__file=str(elsewhere), log__sink="file")
    assert daemon.verb("reload").returncode == 0
    assert [each["event"] for each in events(elsewhere)][-1] == "reloaded"
    assert daemon.status()["log"] == ["file"]


def test_a_failed_start_is_in_the_log_too(make_daemon: MakeDaemon):
    daemon = make_daemon({"model.path": "/nonexistent/model.gguf"})
    daemon.start()
    assert daemon.end() == 66
    last = events(daemon.state.directory / "emberd.log")[-1]
    assert (last["event"], last["level"]) == ("emberd_failed", "error")
    assert "model not found" in last["error"]
