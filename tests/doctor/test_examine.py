"""What emberd doctor finds on a real computer: files, ports, programs and a daemon that are really so."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from emberd.cli.doctor import FOUND
from emberd.core.settings import ModelSettings, Settings, StateSettings
from emberd.doctor.examine import examine
from emberd.doctor.facts import EngineProblem, ModelProblem, Volume
from emberd.doctor.look import other_servers, psutil_failure, try_port
from emberd.doctor.look_engine import (
    examine_model,
    is_protected,
    is_synced,
    look_at_program,
    machines_of,
    volume_of,
)
from emberd.host import ThisHost
from emberd.host.darwin_health import read_health as read_darwin
from emberd.host.linux import LinuxHost
from emberd.host.linux_health import read_health as read_linux
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemon_process import Daemon


# --- the model's file ---------------------------------------------------------------------------------------------


def test_a_whole_model_is_measured_and_has_no_problem(tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf").path
    seen = examine_model(str(path), "linux")
    assert (seen.problem, seen.volume) == (None, Volume.INTERNAL)
    assert 0 < (seen.weights_bytes or 0) < path.stat().st_size


def test_a_download_that_broke_off_within_the_last_tensor_is_truncated(tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf").path
    os.truncate(path, path.stat().st_size - 64)
    seen = examine_model(str(path), "linux")
    assert seen.problem is ModelProblem.TRUNCATED
    assert "its header tells of" in seen.message


def make_problem(folder: Path, problem: ModelProblem) -> str:
    path = folder / "model-00001-of-00002.gguf"
    match problem:
        case ModelProblem.NOT_SET:
            return ""
        case ModelProblem.MISSING:
            pass
        case ModelProblem.FOLDER:
            path.mkdir()
        case ModelProblem.NOT_GGUF:
            path.write_text("<!DOCTYPE html>" + "x" * 100)
        case ModelProblem.TRUNCATED:
            path.write_bytes(b"GGUF\3\0\0\0")
        case ModelProblem.NOT_FIRST:
            path = folder / "model-00002-of-00002.gguf"
            write_gguf(path)
        case ModelProblem.COMPANION:
            path = folder / "adapter.gguf"
            write_gguf(path, kind="adapter")
        case _:
            write_gguf(path)
    return str(path)


@pytest.mark.parametrize(
    "problem",
    [
        ModelProblem.NOT_SET,
        ModelProblem.MISSING,
        ModelProblem.FOLDER,
        ModelProblem.NOT_GGUF,
        ModelProblem.TRUNCATED,
        ModelProblem.PART_MISSING,
        ModelProblem.NOT_FIRST,
        ModelProblem.COMPANION,
    ],
)
def test_what_is_wrong_with_a_models_file_is_told_apart(tmp_path: Path, problem: ModelProblem):
    seen = examine_model(make_problem(tmp_path, problem), "linux")
    assert seen.problem is problem
    assert seen.message


@pytest.mark.parametrize(
    ("number", "problem"),
    [(1, ModelProblem.DENIED), (13, ModelProblem.UNREADABLE), (5, ModelProblem.BROKEN_VOLUME)],
    ids=["EPERM", "EACCES", "EIO"],
)
def test_privacy_permissions_and_a_broken_volume_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, problem: ModelProblem
):
    """Root reads everything, and no privacy control is here: the error of open(2) is made."""
    path = write_gguf(tmp_path / "model.gguf").path

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    assert examine_model(str(path), "darwin").problem is problem


@pytest.mark.parametrize(
    ("path", "volume"),
    [
        ("/home/me/model.gguf", Volume.INTERNAL),
        ("/mnt/server/model.gguf", Volume.NETWORK),
        ("/Volumes/Stick/model.gguf", Volume.EXTERNAL),
        ("/Volumes/Share/model.gguf", Volume.NETWORK),
    ],
)
def test_the_deepest_mount_above_a_file_tells_its_volume(path: str, volume: Volume):
    mounts = [
        ("/", "apfs"),
        ("/mnt/server", "nfs4"),
        ("/Volumes/Stick", "exfat"),
        ("/Volumes/Share", "smbfs"),
    ]
    assert volume_of(Path(path), mounts) is volume
    assert volume_of(Path(path), []) is None


def test_folders_that_macos_guards_are_known():
    home = Path("/Users/me")
    assert is_protected(home / "Documents/models/m.gguf", home)
    assert is_protected(home / "Library/Mobile Documents/com~apple~CloudDocs/m.gguf", home)
    assert not is_protected(home / "Models/m.gguf", home)


# --- the engine's program -----------------------------------------------------------------------------------------


def test_a_program_is_judged_without_starting_it(tmp_path: Path):
    host = ThisHost()
    assert look_at_program(tmp_path / "none", host, None).problem is EngineProblem.MISSING
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    assert look_at_program(plain, host, None).problem is EngineProblem.NOT_EXECUTABLE
    assert look_at_program(Path(sys.executable).resolve(), host, os.uname().machine).problem is None


def test_a_program_for_another_processor_is_seen_by_its_header(tmp_path: Path):
    foreign = tmp_path / "foreign"
    other = 0xB7 if os.uname().machine == "x86_64" else 0x3E
    foreign.write_bytes(b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 2, other) + bytes(44))
    foreign.chmod(0o755)
    seen = look_at_program(foreign, ThisHost(), os.uname().machine)
    assert seen.problem is EngineProblem.WRONG_ARCHITECTURE
    assert os.uname().machine in seen.message


@pytest.mark.parametrize(
    ("head", "machines"),
    [
        (struct.pack("<II", 0xFEEDFACF, 0x0100000C), {"arm64"}),
        (struct.pack("<II", 0xFEEDFACF, 0x01000007), {"x86_64"}),
        (
            struct.pack(">II", 0xCAFEBABE, 2)
            + struct.pack(">IIIII", 0x01000007, 3, 0, 0, 0)
            + struct.pack(">IIIII", 0x0100000C, 0, 0, 0, 0),
            {"x86_64", "arm64"},
        ),
        (b"#!/bin/sh\nexec true\n", set()),
    ],
    ids=["arm64", "x86_64", "universal", "script"],
)
def test_mach_o_headers_are_read(tmp_path: Path, head: bytes, machines: set[str]):
    path = tmp_path / "program"
    path.write_bytes(head + bytes(64))
    assert machines_of(path) == machines


class Quarantined:
    """A host on which everything was downloaded by a browser."""

    @staticmethod
    def quarantine(_: Path) -> str:
        return "0083;00000000;Safari;"


def test_a_quarantined_program_is_told_with_the_command_that_frees_it(tmp_path: Path):
    program = tmp_path / "koboldcpp"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    host: Any = Quarantined()
    seen = look_at_program(program, host, None)
    assert seen.problem is EngineProblem.QUARANTINED
    assert "xattr -d" in seen.remedy


# --- others -------------------------------------------------------------------------------------------------------


@pytest.fixture
def named_ollama(tmp_path: Path) -> Iterator[int]:
    """Run a program of that name that does nothing."""
    program = tmp_path / "ollama"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    child = subprocess.Popen([program, "600"])
    yield child.pid
    child.kill()
    child.wait()


def test_another_model_server_is_found_with_what_it_holds(named_ollama: int):
    found = {each.pid: each for each in other_servers({0})}
    assert found[named_ollama].name == "ollama"
    assert (found[named_ollama].resident_bytes or 0) > 0
    assert named_ollama not in {each.pid for each in other_servers({named_ollama})}


def test_an_editor_that_has_a_server_open_is_no_server(tmp_path: Path):
    script = tmp_path / "koboldcpp.py"
    script.write_text("import time; time.sleep(600)\n")
    tail = shutil.which("tail")
    assert tail
    children = [
        subprocess.Popen([tail, script, "-f"], stdout=subprocess.DEVNULL),
        subprocess.Popen([sys.executable, "-I", script]),
    ]
    try:
        found = {each.pid for each in other_servers(set())}
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert children[0].pid not in found
    assert children[1].pid in found


def test_who_listens_on_the_port_is_named_and_nobody_connects_to_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        owner, problem = try_port("127.0.0.1", port)
        assert owner is not None
        assert (owner.pid, problem) == (os.getpid(), "")
        with pytest.raises(BlockingIOError):  # a connection would have started an emberd that is started on demand
            server.accept()
    assert try_port("127.0.0.1", port) == (None, "")


def test_an_address_of_another_computer_cannot_be_used():
    owner, problem = try_port("192.0.2.1", 5001)  # RFC 5737: nobody has it
    assert owner is None
    assert "192.0.2.1" in problem


# --- the systems --------------------------------------------------------------------------------------------------


def test_the_tightest_limit_of_the_cgroups_counts(tmp_path: Path):
    """cgroup v2 and v1, in made-up trees; a limit above the process's own group binds as well."""
    proc, groups = tmp_path / "proc", tmp_path / "root/sys/fs/cgroup"
    (proc / "7").mkdir(parents=True)
    (proc / "7/cgroup").write_text("0::/user.slice/emberd.service\n")
    (groups / "user.slice/emberd.service").mkdir(parents=True)
    (groups / "user.slice/emberd.service/memory.max").write_text("max\n")
    (groups / "user.slice/memory.max").write_text("4294967296\n")
    assert read_linux(7, proc, tmp_path / "root").cgroup_limit_bytes == 4 << 30
    (proc / "7/cgroup").write_text("4:memory:/docker\n")
    (groups / "memory/docker").mkdir(parents=True)
    (groups / "memory/docker/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert read_linux(7, proc, tmp_path / "root").cgroup_limit_bytes is None
    assert read_linux(8, proc, tmp_path / "root").cgroup_limit_bytes is None, "a process that is gone"


def test_lingering_and_the_journal_on_disk_are_asked_only_under_systemd(tmp_path: Path):
    assert read_linux(1, tmp_path, tmp_path).lingers is None
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    seen = read_linux(1, tmp_path, tmp_path)
    assert (seen.lingers, seen.logs_persist) == (False, False)
    (tmp_path / "var/log/journal").mkdir(parents=True)
    assert read_linux(1, tmp_path, tmp_path).logs_persist is True


class Numbers:
    """Stand-in of macOS' sysctlbyname(3)."""

    def __init__(self, translated: int | None) -> None:
        self._translated = translated

    def number(self, name: str) -> int | None:
        return {"sysctl.proc_translated": self._translated, "hw.optional.arm64": 1}[name]


@pytest.mark.parametrize(("priority", "is_throttled"), [("20", True), ("31", False), ("", None)])
def test_macos_throttling_is_read_from_the_priority(tmp_path: Path, priority: str, is_throttled: bool | None):
    """`ps` is a stand-in that prints what ps(1) would."""
    ps = tmp_path / "ps"
    ps.write_text(f'#!/bin/sh\n[ "$*" = "-o pri= -p 77" ] && echo " {priority}"\n')
    ps.chmod(0o755)
    calls: Any = Numbers(1)
    seen = read_darwin(77, calls, str(ps))
    assert (seen.is_throttled, seen.is_translated, seen.machine) == (is_throttled, True, "arm64")


# --- this process -------------------------------------------------------------------------------------------------


def test_a_psutil_that_fails_now_and_then_is_found():
    """On macOS 26 not every call fails (psutil issue 2853)."""
    answers = iter([None, None, RuntimeError("host_statistics64(HOST_VM_INFO64) syscall failed"), None, None])

    def ask() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    assert "HOST_VM_INFO64" in psutil_failure(ask)
    assert psutil_failure() == ""


def test_a_model_that_is_never_read_to_its_end_is_silent_and_the_others_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A pipe that nobody writes to hangs at its opening, as a lost network volume does."""
    pipe = tmp_path / "model.gguf"
    os.mkfifo(pipe)
    monkeypatch.setattr("emberd.doctor.examine.LIMIT_S", 0.3)
    settings = Settings(model=ModelSettings(str(pipe)), state=StateSettings(str(tmp_path / "state")))
    content = asyncio.run(examine(ThisHost(), settings, None))
    found = {each["code"]: each for each in content["conditions"]}
    assert "did not end within 0.3 s" in found["MODEL_SILENT"]["evidence"]
    assert "NOT_RUNNING" in found
    assert any("model: no answer" in line for line in content["unknown"])


@pytest.mark.parametrize(("swappiness", "is_told"), [("60", False), ("100", True)])
def test_swappiness_is_told_above_the_usual(tmp_path: Path, swappiness: str, is_told: bool):  # a parameter
    """A made-up /proc."""
    folder = tmp_path / "sys/vm"
    folder.mkdir(parents=True)
    (folder / "swappiness").write_text(f"{swappiness}\n")
    host = LinuxHost(proc=tmp_path)
    settings = Settings(state=StateSettings(str(tmp_path / "state")))
    content = asyncio.run(examine(host, settings, None))
    assert ("SWAPPINESS_HIGH" in {each["code"] for each in content["conditions"]}) is is_told


def test_folders_of_cloud_services_are_known():
    home = Path("/Users/me")
    assert is_synced(home / "Library/CloudStorage/Dropbox/m.gguf", home)
    assert is_synced(home / "Library/Mobile Documents/com~apple~CloudDocs/m.gguf", home)
    assert not is_synced(home / "Models/m.gguf", home)


# --- the verb -----------------------------------------------------------------------------------------------------


def doctor(daemon: Daemon, *words: str) -> tuple[int, dict[str, Any]]:
    ran = daemon.verb("doctor", "--json", *words)
    assert ran.returncode in {0, FOUND}, ran.stderr
    content: dict[str, Any] = json.loads(ran.stdout)
    assert set(content) == {"asked", "conditions", "hidden", "unknown"}
    for each in content["conditions"]:
        assert set(each) == {"code", "severity", "title", "evidence", "remedy", "page"}
    return ran.returncode, content


def codes(content: dict[str, Any]) -> list[str]:
    return [each["code"] for each in content["conditions"]]


def test_without_a_daemon_it_looks_for_itself(make_daemon: Any):
    daemon = make_daemon()
    daemon.write_settings(model__path="/nowhere/model.gguf")
    code, content = doctor(daemon)
    assert (code, content["asked"]) == (FOUND, "this program")
    assert {"NOT_RUNNING", "MODEL_MISSING"} <= set(codes(content))


def test_wrong_settings_are_the_cause_of_everything(make_daemon: Any):
    daemon = make_daemon()
    daemon.write_settings(endpoint__prot=1)
    code, content = doctor(daemon)
    assert (code, codes(content)) == (FOUND, ["SETTINGS_WRONG"])


def test_a_taken_port_is_the_cause_of_a_daemon_that_does_not_run(make_daemon: Any):
    daemon = make_daemon()
    daemon.write_settings()
    with socket.create_server(("127.0.0.1", daemon.port)):
        _, content = doctor(daemon)
        _, everything = doctor(daemon, "--all")
    assert "PORT_TAKEN" in codes(content)
    assert "NOT_RUNNING" not in codes(content)
    assert "NOT_RUNNING" in codes(everything)


def test_the_daemon_answers_for_itself_and_finds_nothing_fatal(make_daemon: Any):
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    _, content = doctor(daemon)
    assert content["asked"] == "the daemon"
    assert not [each for each in content["conditions"] if each["severity"] == "error"]


def test_an_option_that_unloads_the_idle_model_is_named(make_daemon: Any):
    daemon = make_daemon()
    daemon.write_settings(engine__extra_args=["--admin", "--adminunloadtimeout", "60"])
    _, content = doctor(daemon)
    assert "ENGINE_UNLOADS_WHEN_IDLE" in codes(content)


def test_damaged_history_is_told(make_daemon: Any):
    daemon = make_daemon()
    daemon.write_settings()
    daemon.state.directory.mkdir(mode=0o700)
    daemon.state.history.write_bytes(b"no database" * 100)
    _, content = doctor(daemon)
    assert "HISTORY_UNREADABLE" in codes(content)


def test_a_person_reads_cause_evidence_and_remedy(make_daemon: Any):
    daemon = make_daemon()
    daemon.write_settings(model__path="/nowhere/model.gguf")
    ran = daemon.verb("doctor")
    assert ran.returncode == FOUND
    assert "seen:   model not found: /nowhere/model.gguf" in ran.stdout
    assert "(MODEL_MISSING)" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_an_engine_that_dies_again_and_again_has_failed_with_its_last_words(make_daemon: Any):
    daemon = make_daemon({"lifecycle.crash_limit": 1})
    daemon.start()
    os.kill(daemon.wait_ready()["engine"]["pid"], signal.SIGKILL)
    daemon.wait_for(lambda status: status["state"] == "FAILED")
    _, content = doctor(daemon)
    assert "ENGINE_FAILED" in codes(content)


def test_an_emberd_that_waits_is_seen_through_to_the_cause(make_daemon: Any):
    """Under a service manager emberd stays up after a burst of failures; what keeps it down is shown, not that."""
    daemon = make_daemon({"model.path": "/nowhere/model.gguf"})
    daemon.environment["INVOCATION_ID"] = "1"
    daemon.write_settings()
    for _ in range(2):
        daemon.start()
        assert daemon.end() != 0
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "STANDBY")
    _, content = doctor(daemon)
    _, everything = doctor(daemon, "--all")
    assert (content["asked"], "MODEL_MISSING" in codes(content)) == ("the daemon", True)
    assert "WAITS" in codes(everything)
    assert not {"WAITS", "NOT_RUNNING", "PORT_TAKEN"} & set(codes(content))
