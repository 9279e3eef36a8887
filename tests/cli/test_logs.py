"""`emberd logs`, on the file log, on a stand-in of macOS' log(1), and on one of journalctl(1)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from click.testing import CliRunner

from emberd.cli import logs as logs_verb
from emberd.core.errors import EmberdError
from emberd.host.darwin import DarwinHost
from emberd.host.log_sinks import load_os_log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

TESTS = Path(__file__).parent.parent
WAIT_S = 30.0
EVENTS: list[dict[str, Any]] = [
    {"event": "emberd_started", "category": "daemon", "level": "info", "version": "0.1.0"},
    {"event": "engine_line", "category": "engine", "level": "info", "line": "llama_load: 100 %"},
    {"event": "engine_exited", "category": "supervisor", "level": "warning", "pid": 7},
    {"event": "emberd_failed", "category": "daemon", "level": "error", "error": "no model"},
    {"event": "engine_started", "category": "supervisor", "level": "info", "instance": "other-123456"},
]


class Asked:
    """What the verb printed."""

    def __init__(self, *words: str, config: Path) -> None:
        ran = CliRunner().invoke(logs_verb.command, list(words), obj=str(config))
        self.error = ran.exception if isinstance(ran.exception, EmberdError) else None
        if ran.exception is not None and self.error is None and not isinstance(ran.exception, SystemExit):
            raise ran.exception
        self.code = ran.exit_code
        self.lines = ran.stdout.splitlines()
        self.said = ran.stderr

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.lines]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(f'[log]\nfile = "{tmp_path}/emberd.log"\n')
    return path


class TestOnAMac:
    """The verb in this process, with the host of a Mac; log(1) is the stand-in."""

    @pytest.fixture(autouse=True)
    def _mac(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        class Mac(DarwinHost):
            def __init__(self) -> None:
                super().__init__(calls=object(), log=str(TESTS / "unified_log_standin" / "log"))  # type: ignore[arg-type]

        monkeypatch.setattr(logs_verb, "ThisHost", Mac)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state-home"))
        monkeypatch.syspath_prepend(str(TESTS / "pyoslog_standin"))
        monkeypatch.setenv("PYOSLOG_STANDIN_FILE", str(tmp_path / "unified"))
        monkeypatch.setenv("UNIFIED_LOG_STANDIN_FILE", str(tmp_path / "unified"))
        sys.modules.pop("pyoslog", None)
        sink = load_os_log()
        assert sink is not None
        for event in EVENTS:
            assert sink.write(event)
        yield
        sys.modules.pop("pyoslog", None)

    def test_the_unified_log_is_read_in_emberds_form(self, config: Path):
        asked = Asked("--source", "system", config=config)
        assert len(asked.lines) == 4
        assert asked.lines[2].split(maxsplit=2)[2] == "warning supervisor engine_exited pid=7"

    @pytest.mark.parametrize(
        ("words", "events"),
        [
            ([], ["emberd_started", "engine_line", "engine_exited", "emberd_failed"]),
            (["--level", "warning"], ["engine_exited", "emberd_failed"]),
            (["--level", "error"], ["emberd_failed"]),
            (["--category", "engine", "--category", "supervisor"], ["engine_line", "engine_exited"]),
            (["--event", "engine_exited"], ["engine_exited"]),
            (["-n", "1"], ["emberd_failed"]),
            (["--since", "1h", "--all-instances"], [each["event"] for each in EVENTS]),
        ],
    )
    def test_filters_reach_the_predicate(self, config: Path, words: list[str], events: list[str]):
        assert Asked("--source", "system", "--json", *words, config=config).events() == events

    def test_auto_reads_the_unified_log_and_falls_back_to_the_file_if_it_refuses(
        self, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "emberd.log").write_text(json.dumps(EVENTS[0]) + "\n")
        assert len(Asked("--json", config=config).events()) == 4
        monkeypatch.setenv("UNIFIED_LOG_STANDIN_REFUSES", "1")
        config.write_text(config.read_text() + 'sink = "system"\n')
        asked = Asked("--json", config=config)
        assert asked.events() == ["emberd_started"]
        assert "Could not open local log store: Operation not permitted" in asked.said
        assert "emberd.log" in asked.said

    @pytest.mark.parametrize("how", ["REFUSES", "BREAKS"])
    def test_a_store_that_refuses_or_breaks_off_is_one_clear_error(
        self, config: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ):
        monkeypatch.setenv(f"UNIFIED_LOG_STANDIN_{how}", "1")
        error = Asked("--source", "system", config=config).error
        assert error is not None
        assert "did not let the unified log be read" in error.message
        assert "--source file" in error.remedy

    def test_following_goes_on_with_the_stream_and_ends_its_program(self, config: Path):
        reader = logs_verb._system_reader(
            logs_verb.config_file.load(str(config))[0], config, logs_verb.Wanted(), "system"
        )
        assert reader is not None
        entries = reader.follow(logs_verb.Wanted(), 1)
        assert next(entries).event == "engine_started"
        deadline_s = time.monotonic() + WAIT_S
        done = threading.Event()

        def write() -> None:
            sink = load_os_log()
            assert sink is not None
            while not done.wait(0.05) and time.monotonic() < deadline_s:
                sink.write(EVENTS[2])

        # The stream begins at the end of the file: lines are written until its first one is there.
        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert next(entries).event == "engine_exited"
            assert streams() == 1
        finally:
            done.set()
            writer.join()
        entries.close()  # type: ignore[attr-defined]  # a generator
        assert streams() == 0


def streams() -> int:
    """Return how many children of this process are a `log stream`."""
    found = 0
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # what another test has ended has no command line
            found += "stream" in child.cmdline()
    return found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--since", "soon"], "no time"),
        (["--event", 'x" || TRUE'], "no name of an event"),
        (["--level", "loud"], "is not one of"),
        (["--category", "prompts"], "is not one of"),
    ],
)
def test_a_typing_mistake_is_a_usage_error(config: Path, words: list[str], said: str):
    asked = Asked(*words, config=config)
    assert (asked.code, said in asked.said) == (2, True)


def test_without_a_log_that_is_said(config: Path):
    error = Asked("--source", "file", config=config).error
    assert error is not None
    assert "there is no log yet" in error.message


def test_journalctl_is_asked_and_its_refusal_shown(make_daemon: MakeDaemon, tmp_path: Path):
    """A stand-in of journalctl on PATH: prints its arguments as an entry, or refuses as to who may read nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "journalctl"
    program.write_text(
        f"""#!{sys.executable}
import json, os, sys
if os.environ.get("REFUSES"):
    sys.exit("No journal files were opened due to insufficient permissions.")
print(json.dumps({{"__REALTIME_TIMESTAMP": "1780230605000000", "PRIORITY": "6", "MESSAGE": " ".join(sys.argv)}}))
"""
    )
    program.chmod(0o755)
    daemon = make_daemon()
    daemon.write_settings()
    daemon.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    said = daemon.verb("logs", "--source", "system", "--json", "-n", "7")
    assert said.returncode == 0, said.stderr
    [line] = said.stdout.splitlines()
    for word in ("--identifier=emberd", "--lines=7", f"_UID={os.geteuid()}", "EMBERD_INSTANCE=state-"):
        assert word in json.loads(line)["text"]
    daemon.environment["REFUSES"] = "1"
    said = daemon.verb("logs", "--source", "system")
    assert said.returncode == 1
    assert "insufficient permissions" in said.stderr
    assert "systemd-journal" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_daemons_file_log_is_read_filtered_and_followed_across_a_rotation(make_daemon: MakeDaemon):
    daemon = make_daemon({"log.file_mib": 1})
    daemon.start()
    daemon.wait_ready()
    shown = daemon.verb("logs", "--since", "1h", "--event", "emberd_started")
    assert shown.returncode == 0, shown.stderr
    assert "info    daemon" in shown.stdout
    assert "emberd_started" in shown.stdout
    engine = [
        json.loads(line) for line in daemon.verb("logs", "--json", "--category", "engine").stdout.splitlines()
    ]
    assert engine
    assert {each["category"] for each in engine} == {"engine"}
    assert daemon.verb("logs", "-n", "3").stdout.count("\n") == 3
    follower = subprocess.Popen(
        daemon.command("logs", "--follow", "--json", "--event", "reloaded"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **daemon.environment},
    )
    try:
        assert follower.stdout is not None
        path = daemon.state.directory / "emberd.log"
        wait_until_open(follower.pid, path)
        for _ in range(2):
            daemon.signal(signal.SIGHUP)
            assert json.loads(follower.stdout.readline())["event"] == "reloaded"
            # The next event of the daemon makes room: the file is made as large as it may be.
            with path.open("a") as file:
                file.write("x" * (1 << 20) + "\n")
        assert (daemon.state.directory / "emberd.log.1").exists()
        follower.send_signal(signal.SIGINT)
        assert follower.wait(WAIT_S) == 130
        assert follower.stderr is not None
        assert follower.stderr.read().strip() == ""
    finally:
        follower.kill()
        follower.communicate()


def wait_until_open(pid: int, path: Path) -> None:
    """Wait, bounded, until a process has opened a file."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        if str(path) in {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()}:
            return
        time.sleep(0.02)
    raise AssertionError(f"{pid} did not open {path}")
