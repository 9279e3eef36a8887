"""The system's logs: the journal, real where it can run; os_log by a stand-in of pyoslog."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from emberd.core.log_lines import SUBSYSTEM
from emberd.core.log_reading import from_journal, from_unified
from emberd.host.linux import LinuxHost
from emberd.host.log_sinks import JournalSink, SyslogSink, is_connected, load_os_log

if TYPE_CHECKING:
    from collections.abc import Iterator

EVENT = {"event": "engine_exited", "level": "warning", "category": "supervisor", "pid": 7, "meaning": "a\nb"}
STANDIN = Path(__file__).parent.parent / "pyoslog_standin"


def parse(entry: bytes) -> dict[str, str]:
    """Read an entry of the native protocol, by its description and not by our code."""
    fields = {}
    while entry:
        name, mark, rest = entry[: entry.index(b"\n")].partition(b"=")
        entry = entry[entry.index(b"\n") + 1 :]
        if mark:
            fields[name.decode()] = rest.decode()
        else:
            size = int.from_bytes(entry[:8], "little")
            fields[name.decode()] = entry[8 : 8 + size].decode()
            assert entry[8 + size : 9 + size] == b"\n"
            entry = entry[9 + size :]
    return fields


class TestJournal:
    @pytest.fixture
    def journald(self, tmp_path: Path) -> Iterator[socket.socket]:
        """A real datagram socket in the place of journald's."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
            made.bind(str(tmp_path / "journal"))
            made.settimeout(10)
            yield made

    def test_an_event_is_one_datagram_with_its_fields(self, journald: socket.socket, tmp_path: Path):
        sink = JournalSink(str(tmp_path / "journal"))
        assert sink.write(EVENT)
        fields = parse(journald.recv(1 << 20))
        assert fields["MESSAGE"] == 'warning engine_exited pid=7 meaning="a\\nb"'
        assert fields["PRIORITY"] == "4"
        assert fields["EMBERD_MEANING"] == "a\nb"
        assert fields["EMBERD_CATEGORY"] == "supervisor"
        sink.close()

    def test_what_is_larger_than_a_datagram_comes_as_a_sealed_file(self, journald: socket.socket, tmp_path: Path):
        sink = JournalSink(str(tmp_path / "journal"))
        sink._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        assert sink.write({**EVENT, "text_of_it": "x" * 12_000})
        data, rights, *_ = journald.recvmsg(1 << 16, socket.CMSG_SPACE(4))
        assert data == b""
        descriptor = int.from_bytes(rights[0][2][:4], sys.byteorder)
        fields = parse(os.pread(descriptor, 1 << 20, 0))
        with pytest.raises(PermissionError):
            os.write(descriptor, b"x")
        os.close(descriptor)
        assert len(fields["EMBERD_TEXT_OF_IT"]) == 12_000
        sink.close()

    def test_a_journald_that_does_not_read_costs_entries_and_no_time(self, journald: socket.socket, tmp_path: Path):
        sink = JournalSink(str(tmp_path / "journal"))
        results = [sink.write(EVENT) for _ in range(5000)]
        assert sink.lost == results.count(False) > 0
        assert "unavailable" in sink.error
        journald.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:  # it reads again
                journald.recv(1 << 16)
        assert sink.write(EVENT)
        sink.close()

    def test_a_journald_that_is_away_costs_entries_only(self, tmp_path: Path):
        sink = JournalSink(str(tmp_path / "nothing"))
        assert not sink.write(EVENT)
        assert (sink.lost, sink.error) == (1, "No such file or directory")
        sink.close()

    def test_standard_error_is_the_journals_only_if_device_and_inode_match(self):
        seen = os.fstat(2)
        assert is_connected(2, f"{seen.st_dev}:{seen.st_ino}")
        for other in ("", f"{seen.st_dev}:{seen.st_ino + 1}", "nonsense"):
            assert not is_connected(2, other)
        assert not is_connected(10_000, "1:1")

    def test_the_host_knows_the_journal_by_its_socket(self, journald: socket.socket, tmp_path: Path):
        assert journald
        log = LinuxHost(journal=str(tmp_path / "journal")).system_log()
        assert log is not None
        assert log.name == "journal"
        log.close()

    @pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/lib/systemd/systemd-journald").exists() or not shutil.which("unshare"),
        reason="a journald of one's own needs root, systemd and unshare",
    )
    def test_a_real_journald_keeps_the_entries_and_journalctl_finds_them(self, tmp_path: Path):
        """In a mount namespace of its own, so that no journal of this computer is touched."""
        code = """
import json, os, subprocess, sys
from emberd.core import log_reading
from emberd.core.log_reading import Wanted
from emberd.host.linux import LinuxHost
sink = LinuxHost().system_log()
assert sink.name == "journal"
base = {"event": "engine_exited", "level": "warning", "category": "supervisor", "pid": 7, "meaning": "a\\nb"}
sink.write(base)
sink.write({**base, "instance": "two", "level": "info", "exception": "x" * 15000 + "\\n" + "y" * 15000})
sink.write({**base, "event": "engine_line", "category": "engine", "level": "info", "line": 'ü "quoted"'})
subprocess.run(["journalctl", "--sync"], check=False)
for wanted in (
    Wanted(instance="", user_id=0), Wanted(level="warning"), Wanted(categories=("engine",), instance=""),
    Wanted(events=("engine_exited",)), Wanted(instance="two"), Wanted(user_id=4242),
):
    words = log_reading.journalctl(wanted, lines=50, follow=False)
    found = subprocess.run(["journalctl", *words], capture_output=True, text=True, check=True).stdout
    entries = [log_reading.from_journal(line) for line in found.splitlines()]
    print(json.dumps([[entry.event, entry.instance, dict(entry.fields)] for entry in entries]))
"""
        script = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log/journal
/lib/systemd/systemd-journald 2>/dev/null &
journald=$!
trap 'kill $journald' EXIT
for try in $(seq 200); do [ -S /run/systemd/journal/socket ] && break; sleep 0.05; done
"$1" -c "$2"
"""
        ran = subprocess.run(
            [shutil.which("unshare") or "unshare", "--mount", "sh", "-c", script, "sh", sys.executable, code],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            cwd=tmp_path,
        )
        if "mount:" in ran.stderr or "unshare:" in ran.stderr:
            pytest.skip(f"no mount namespace here: {ran.stderr}")
        assert ran.returncode == 0, ran.stderr
        usual, warnings, of_engine, exits, second, strangers = map(json.loads, ran.stdout.splitlines())
        assert [each[:2] for each in usual] == [["engine_exited", ""], ["engine_line", ""]]
        assert usual[0][2] == {"pid": 7, "meaning": "a\nb"}
        assert [each[0] for each in warnings] == ["engine_exited"]
        assert of_engine == [["engine_line", "", {"pid": 7, "meaning": "a\nb", "line": 'ü "quoted"'}]]
        assert [each[1] for each in exits] == ["", "two"]
        assert second[0][2]["exception"].startswith("xxx")
        assert strangers == []


class TestUnifiedLog:
    @pytest.fixture
    def written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """pyoslog's stand-in on the path; the file that it writes."""
        monkeypatch.syspath_prepend(str(STANDIN))
        monkeypatch.setenv("PYOSLOG_STANDIN_FILE", str(tmp_path / "unified"))
        sys.modules.pop("pyoslog", None)
        yield tmp_path / "unified"
        sys.modules.pop("pyoslog", None)

    def records(self, written: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in written.read_text().splitlines()]

    def test_an_event_is_a_line_under_its_category(self, written: Path):
        sink = load_os_log()
        assert sink is not None
        assert sink.write(EVENT)
        assert sink.write({**EVENT, "event": "engine_line", "category": "engine", "level": "info"})
        first, second = self.records(written)
        assert (first["subsystem"], first["category"], first["messageType"]) == (SUBSYSTEM, "supervisor", "Default")
        assert (second["category"], second["messageType"]) == ("engine", "Info")
        entry = from_unified(json.dumps(first))
        assert entry is not None
        assert (entry.level, entry.event, entry.fields["meaning"]) == ("warning", "engine_exited", "a\nb")

    def test_a_nul_and_a_long_text_are_no_trouble(self, written: Path):
        sink = load_os_log()
        assert sink is not None
        assert sink.write({**EVENT, "line": "a\0b" + "ü" * 2000})
        [record] = self.records(written)
        assert len(record["eventMessage"].encode()) <= 1000
        assert record["eventMessage"].endswith("…")
        assert not sink.lost

    def test_a_refusal_of_the_module_is_counted_and_not_raised(self, written: Path):
        sink = load_os_log()
        assert sink is not None
        assert not sink.write({**EVENT, "category": "x" * 300})
        assert sink.lost == 1
        assert "too long" in sink.error
        assert not written.exists()

    def test_an_unsupported_system_has_none_of_its_names(self, written: Path, monkeypatch: pytest.MonkeyPatch):
        assert written
        monkeypatch.setenv("PYOSLOG_STANDIN_UNSUPPORTED", "1")
        assert load_os_log() is None
        assert not hasattr(sys.modules["pyoslog"], "os_log_create")

    def test_without_the_module_there_is_none(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "pyoslog", None)
        assert load_os_log() is None


@pytest.mark.skipif(Path("/dev/log").exists(), reason="there is a syslog that would get the test's line")
def test_syslog_gets_the_category_in_the_line(tmp_path: Path):
    """A real datagram socket in the place of /dev/log, as libc connects to it (syslog(3), _PATH_LOG)."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make /dev/log")
    assert tmp_path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind("/dev/log")
        try:
            made.settimeout(10)
            sink = SyslogSink()
            assert sink.write(EVENT)
            said = made.recv(4096).decode()
            sink.close()
        finally:
            Path("/dev/log").unlink()
    assert said.startswith("<12>")  # LOG_USER, LOG_WARNING
    assert f"emberd[{os.getpid()}]: supervisor: warning engine_exited pid=7" in said


def test_a_journal_line_that_is_not_emberds_own_is_shown_as_it_is():
    entry = from_journal(
        json.dumps({"__REALTIME_TIMESTAMP": "1", "MESSAGE": "emberd: port 5001 is taken", "PRIORITY": "6"})
    )
    assert entry is not None
    assert (entry.event, entry.text) == ("", "emberd: port 5001 is taken")
