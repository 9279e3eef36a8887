"""emberd doctor as a person runs it, where what it tells is really so; doctor/test_conditions.py has all."""

from __future__ import annotations

import json
import os
import plistlib
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from emberd.cli.doctor import FOUND
from emberd.doctor.catalogue import CATALOGUE
from service_home import LaunchdHome
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemon_process import Daemon

GIB = 1 << 30
LABEL = "io.github.emberd"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and drops capabilities")


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    made = make_daemon()
    made.write_settings()
    return made


def content_of(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert ran.returncode in {0, FOUND}, ran.stderr
    content: dict[str, Any] = json.loads(ran.stdout)
    return content


def found_by(ran: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {each["code"]: each for each in content_of(ran)["conditions"]}


def examine(daemon: Daemon, *words: str) -> dict[str, dict[str, Any]]:
    return found_by(daemon.verb("doctor", "--json", *words))


def examine_within(daemon: Daemon, script: str) -> dict[str, dict[str, Any]]:
    """Run the verb as `"$@"` of a shell script, which makes the surroundings."""
    command = ["sh", "-c", script, "sh", *daemon.command("doctor", "--json")]
    environment = {**os.environ, **daemon.environment}
    return found_by(
        subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    )


# --- settings, key, endpoint --------------------------------------------------------------------------------------


def test_a_key_in_settings_that_others_can_read_is_the_cause_and_the_rest_is_looked_at(daemon: Daemon):
    daemon.write_settings(endpoint__api_key="secret", model__path="/nowhere/model.gguf")
    daemon.config.chmod(0o644)
    found = examine(daemon)
    assert f"{daemon.config} has mode 0644" in found["SETTINGS_OPEN"]["evidence"]
    assert found["SETTINGS_OPEN"]["remedy"].startswith(f"chmod 600 {daemon.config}")
    assert "MODEL_MISSING" in found
    assert not {"NOT_RUNNING", "SETTINGS_WRONG"} & set(found)
    assert "secret" not in json.dumps(found)
    daemon.config.chmod(0o600)
    assert "SETTINGS_OPEN" not in examine(daemon)


def test_a_keys_own_file_that_others_can_read_is_named(daemon: Daemon):
    key = daemon.folder / "key"
    key.write_text("secret\n")
    key.chmod(0o640)
    daemon.write_settings(endpoint__api_key_file=str(key))
    assert f"{key} has mode 0640" in examine(daemon)["SETTINGS_OPEN"]["evidence"]
    key.unlink()
    assert str(key) in examine(daemon)["SETTINGS_WRONG"]["evidence"]


def test_an_endpoint_that_others_reach_without_a_key_is_told(daemon: Daemon):
    daemon.write_settings(endpoint__host="0.0.0.0")  # refused by emberd
    found = examine(daemon)
    assert "0.0.0.0" in found["ENDPOINT_OPEN"]["evidence"]  # same
    assert "NOT_RUNNING" not in found


def test_an_address_of_another_computer_is_the_cause_of_a_daemon_that_does_not_run(daemon: Daemon):
    key = daemon.folder / "key"
    key.write_text("secret\n")
    key.chmod(0o600)
    daemon.write_settings(endpoint__host="192.0.2.1", endpoint__api_key_file=str(key))  # RFC 5737
    found = examine(daemon)
    assert "192.0.2.1" in found["ADDRESS_UNUSABLE"]["evidence"]
    assert "NOT_RUNNING" not in found


def test_settings_that_the_daemon_has_not_read_are_told_until_it_reloads(make_daemon: Callable[..., Daemon]):
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    assert "SETTINGS_NOT_IN_FORCE" not in examine(daemon)
    daemon.write_settings(lifecycle__drain_timeout_s=7)
    found = examine(daemon)
    assert str(daemon.config) in found["SETTINGS_NOT_IN_FORCE"]["evidence"]
    assert daemon.verb(*found["SETTINGS_NOT_IN_FORCE"]["remedy"].split()[1:]).returncode == 0
    assert "SETTINGS_NOT_IN_FORCE" not in examine(daemon)


# --- state directory, disk, limits --------------------------------------------------------------------------------


def test_an_examination_leaves_no_state_directory_behind(daemon: Daemon):
    assert "NOT_RUNNING" in examine(daemon)
    assert not daemon.state.directory.exists()


@needs_root
def test_a_state_directory_of_somebody_else_cannot_be_used(daemon: Daemon):
    daemon.state.directory.mkdir(mode=0o700)
    os.chown(daemon.state.directory, 65534, 65534)
    found = examine(daemon)
    assert "belongs to user 65534" in found["STATE_UNUSABLE"]["evidence"]
    assert "NOT_RUNNING" not in found


@needs_root
def test_a_state_directory_on_a_read_only_volume_cannot_be_used(daemon: Daemon):
    daemon.state.directory.mkdir(mode=0o700)
    state = daemon.state.directory
    found = examine_within(
        daemon, f'exec unshare -m sh -c \'mount -t tmpfs -o ro,size=1g none {state}; exec "$@"\' sh "$@"'
    )
    assert "read-only" in found["STATE_UNUSABLE"]["evidence"]


@needs_root
def test_a_full_disk_is_the_cause(daemon: Daemon):
    """A real volume of 8 MiB."""
    daemon.state.directory.mkdir(mode=0o700)
    state = daemon.state.directory
    found = examine_within(
        daemon, f'exec unshare -m sh -c \'mount -t tmpfs -o size=8m none {state}; exec "$@"\' sh "$@"'
    )
    assert f"MiB free for the state directory and the engine's log ({state})" in found["DISK_FULL"]["evidence"]
    assert "NOT_RUNNING" not in found


def test_a_huge_log_and_a_clock_that_was_set_back_are_told(daemon: Daemon):
    daemon.state.directory.mkdir(mode=0o700)
    daemon.state.output.touch()
    os.truncate(daemon.state.output, 2 * GIB)  # sparse
    soon = time.time() + 7200
    os.utime(daemon.state.output, (soon, soon))
    found = examine(daemon)
    assert "2.1 GB" in found["LOG_HUGE"]["evidence"]
    assert "2.0 h younger" in found["CLOCK_BEHIND"]["evidence"]


def test_a_low_limit_of_open_files_is_told(daemon: Daemon):
    found = examine_within(daemon, 'ulimit -n 128; exec "$@"')
    assert "limit is 128" in found["FEW_OPEN_FILES"]["evidence"]


# --- the model ----------------------------------------------------------------------------------------------------


@needs_root
def test_a_model_without_permission_to_read_is_unreadable_also_for_root_without_its_capabilities(daemon: Daemon):
    path = write_gguf(daemon.folder / "model.gguf").path
    path.chmod(0)
    daemon.write_settings(model__path=str(path))
    drop = (
        'exec setpriv --bounding-set -dac_override,-dac_read_search --inh-caps -dac_override,-dac_read_search "$@"'
    )
    found = examine_within(daemon, drop)
    assert "Permission denied" in found["MODEL_UNREADABLE"]["evidence"]
    assert "chmod" in found["MODEL_UNREADABLE"]["remedy"]


def test_a_model_that_was_written_after_the_engine_had_started_is_replaced(
    make_daemon: Callable[..., Daemon], tmp_path: Path
):
    path = write_gguf(tmp_path / "model.gguf").path
    daemon = make_daemon({"model.path": str(path)})
    daemon.start()
    daemon.wait_ready()
    assert "MODEL_REPLACED" not in examine(daemon)
    later = time.time() + 60
    os.utime(path, (later, later))
    assert "after the engine had started" in examine(daemon)["MODEL_REPLACED"]["evidence"]


def grown(folder: Path, size: int) -> Path:
    """Return a model that is really so large; the file has holes."""
    path = write_gguf(folder / "large.gguf").path
    os.truncate(path, size)
    return path


def test_a_model_larger_than_the_computer_hides_what_follows_from_it(daemon: Daemon):
    daemon.write_settings(model__path=str(grown(daemon.folder, psutil.virtual_memory().total + 8 * GIB)))
    found = examine(daemon)
    assert "in the computer" in found["RAM_TOO_SMALL"]["evidence"]
    assert not {"RAM_SHORT", "LOCK_WOULD_CHOKE", "LOCK_LIMIT"} & set(found)
    assert {"RAM_SHORT", "LOCK_WOULD_CHOKE"} <= set(examine(daemon, "--all"))


def test_a_model_that_fits_the_computer_and_not_what_is_free_is_short_of_memory(daemon: Daemon):
    found: dict[str, Any] = {}
    for _ in range(5):  # other tests may give back memory between the reading and the look
        memory = psutil.virtual_memory()
        in_use = memory.total - memory.available
        if in_use < GIB // 4:
            pytest.skip("this computer is empty")
        daemon.write_settings(model__path=str(grown(daemon.folder, memory.total - in_use // 2)))
        found = examine(daemon)
        if "RAM_SHORT" in found:
            break
    assert "are available" in found["RAM_SHORT"]["evidence"]
    assert "should" in found["LOCK_WOULD_CHOKE"]["evidence"]


@needs_root
def test_a_lock_that_rlimit_memlock_does_not_allow_is_told_with_its_figures(daemon: Daemon):
    script = 'ulimit -l 64; exec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock "$@"'
    found = examine_within(daemon, script)
    assert "RLIMIT_MEMLOCK is 64 KiB" in found["LOCK_LIMIT"]["evidence"]
    assert "LimitMEMLOCK" in found["LOCK_LIMIT"]["remedy"]


def test_a_lock_that_is_not_wanted_is_a_note(daemon: Daemon):
    daemon.write_settings(engine__lock="never")
    found = examine(daemon)
    assert found["LOCK_OFF"]["severity"] == "note"
    assert "LOCK_LIMIT" not in found


# --- the engine ---------------------------------------------------------------------------------------------------


def test_an_engine_that_is_not_there_or_may_not_be_executed_is_told(daemon: Daemon):
    program = daemon.folder / "koboldcpp"
    daemon.write_settings(engine__path=str(program))
    assert str(program) in examine(daemon)["ENGINE_MISSING"]["evidence"]
    program.write_text("#!/bin/sh\n")
    assert examine(daemon)["ENGINE_NOT_EXECUTABLE"]["remedy"] == f"chmod +x {program}"


def test_an_engine_that_is_looked_for_on_path_is_judged_as_one_that_is_named(daemon: Daemon):
    programs = daemon.folder / "programs"
    programs.mkdir()
    foreign = programs / "koboldcpp"
    other = 0xB7 if os.uname().machine == "x86_64" else 0x3E
    foreign.write_bytes(b"\x7fELF\2\1\1" + bytes(11) + bytes([other, 0]) + bytes(44))
    foreign.chmod(0o755)
    daemon.write_settings(engine__path="")
    daemon.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    assert str(foreign) in examine(daemon)["ENGINE_WRONG_ARCHITECTURE"]["evidence"]


@needs_root
def test_an_engine_on_a_volume_that_lets_nothing_be_executed_is_told(daemon: Daemon):
    folder = daemon.folder / "volume"
    folder.mkdir()
    program = folder / "koboldcpp"
    daemon.write_settings(engine__path=str(program))
    inner = f'mount -t tmpfs -o noexec,size=8m none {folder}; cp /bin/true {program}; exec "$@"'
    found = examine_within(daemon, f"exec unshare -m sh -c '{inner}' sh \"$@\"")
    assert "noexec" in found["ENGINE_NOT_EXECUTABLE"]["evidence"]
    assert "chmod" not in found["ENGINE_NOT_EXECUTABLE"]["remedy"]


def test_an_engine_that_goes_on_without_emberd_is_an_orphan_until_it_is_taken_over(
    make_daemon: Callable[..., Daemon],
):
    daemon = make_daemon()
    daemon.start()
    pid = daemon.wait_ready()["engine"]["pid"]
    assert "ENGINE_ORPHANED" not in examine(daemon)
    daemon.kill()
    found = examine(daemon)
    assert f"pid {pid} " in found["ENGINE_ORPHANED"]["evidence"]
    assert "NOT_RUNNING" in found
    daemon.start()
    daemon.wait_ready()
    assert not {"ENGINE_ORPHANED", "NOT_RUNNING"} & set(examine(daemon))


def test_an_engine_that_crashes_at_its_start_is_told_while_emberd_tries_again(make_daemon: Callable[..., Daemon]):
    slow = {"lifecycle.backoff_initial_s": 60.0, "lifecycle.backoff_max_s": 60.0}
    daemon = make_daemon(slow, STANDIN_CRASH_AT_START="SIGSEGV")
    daemon.start()
    daemon.wait_for(lambda status: status["state"] == "BACKOFF")
    found = examine(daemon)
    assert "in a row" in found["ENGINE_CRASHING"]["evidence"]
    assert "SIGSEGV" in found["ENGINE_CRASHING"]["evidence"]
    assert "ENGINE_FAILED" not in found


def test_an_old_koboldcpp_and_copied_weights_are_known_by_the_engines_log(make_daemon: Callable[..., Daemon]):
    daemon = make_daemon(STANDIN_VERSION="1.76")
    daemon.start()
    daemon.wait_ready()
    assert "continue_assistant_turn (1.76" in examine(daemon)["ENGINE_TOO_OLD"]["evidence"]
    daemon = make_daemon({"engine.extra_args": ["--nommap"]}, STANDIN_VERSION="1.104")
    daemon.start()
    daemon.wait_ready()
    found = examine(daemon)
    assert "WEIGHTS_COPIED" in found
    assert "ENGINE_TOO_OLD" not in found


def test_unloading_that_is_switched_off_is_no_unloading(daemon: Daemon):
    daemon.write_settings(engine__extra_args=["--admin", "--adminunloadtimeout", "0"])
    assert "ENGINE_UNLOADS_WHEN_IDLE" not in examine(daemon)
    kcpps = daemon.folder / "settings.kcpps"
    kcpps.write_text(json.dumps({"adminunloadtimeout": 300}))
    daemon.write_settings(engine__extra_args=[], engine__kcpps=str(kcpps))
    assert "--adminunloadtimeout" in examine(daemon)["ENGINE_UNLOADS_WHEN_IDLE"]["evidence"]


def test_a_pause_is_a_note_and_its_remedy_ends_it(make_daemon: Callable[..., Daemon]):
    daemon = make_daemon({"warmth.mode": "auto"})
    daemon.start()
    daemon.wait_ready()
    assert daemon.verb("pause", "30m").returncode == 0
    found = examine(daemon)
    assert found["WARMTH_PAUSED"]["severity"] == "note"
    assert daemon.verb(*found["WARMTH_PAUSED"]["remedy"].split()[1:]).returncode == 0
    assert "WARMTH_PAUSED" not in examine(daemon)


# --- the daemon ---------------------------------------------------------------------------------------------------


def test_a_daemon_that_does_not_answer_is_told_with_its_pid_and_doctor_looks_for_itself(
    make_daemon: Callable[..., Daemon],
):
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    assert daemon.child is not None
    daemon.signal(signal.SIGSTOP)
    try:
        content = content_of(daemon.verb("doctor", "--json"))
    finally:
        daemon.signal(signal.SIGCONT)
    found = {each["code"]: each for each in content["conditions"]}
    assert content["asked"] == "this program"
    assert f"kill -CONT {daemon.child.pid}" in found["DAEMON_SILENT"]["remedy"]
    assert not {"NOT_RUNNING", "PORT_TAKEN", "ENGINE_ORPHANED"} & set(found)


class OtherDaemon:
    """Stands in for a daemon of another version: answers these verbs and refuses the rest, on a real socket."""

    def __init__(self, path: Path, **answers: dict[str, Any]) -> None:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._answers = answers
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as stream:
                asked = json.loads(stream.readline())["verb"]
                answer = self._answers.get(asked, {"error": "not a verb of this emberd; it knows status"})
                stream.write(json.dumps(answer).encode() + b"\n")

    def close(self) -> None:
        """Serve no longer."""
        self._server.close()


def test_a_daemon_from_before_this_verb_is_old_and_not_silent(daemon: Daemon):
    daemon.state.directory.mkdir(mode=0o700)
    before = OtherDaemon(daemon.state.control, status={"version": "0.0.9", "pid": os.getpid(), "state": "READY"})
    try:
        content = content_of(daemon.verb("doctor", "--json"))
    finally:
        before.close()
    found = {each["code"]: each for each in content["conditions"]}
    assert content["asked"] == "this program"
    assert "0.0.9" in found["DAEMON_OLD"]["evidence"]
    assert not {"DAEMON_SILENT", "NOT_RUNNING"} & set(found)


def test_a_condition_that_only_the_daemons_version_knows_is_told_as_it_is(daemon: Daemon):
    daemon.state.directory.mkdir(mode=0o700)
    condition = {"code": "OF_TOMORROW", "evidence": "seen", "remedy": ""}
    told = {"conditions": [condition], "unknown": [], "settings": ""}
    status = {"version": "9.0.0", "pid": os.getpid(), "state": "READY"}
    other = OtherDaemon(daemon.state.control, status=status, doctor=told)
    try:
        content = content_of(daemon.verb("doctor", "--json"))
    finally:
        other.close()
    assert content["asked"] == "the daemon"
    assert "OF_TOMORROW: seen" in content["unknown"]


# --- the service --------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, make_daemon: Callable[..., Daemon]) -> Iterator[LaunchdHome]:
    made = LaunchdHome(tmp_path / "home", make_daemon)
    yield made
    made.close()


def at_home(home: LaunchdHome, *words: str) -> dict[str, dict[str, Any]]:
    return found_by(home.run("doctor", "--json", *words))


_OF_SERVICE = {code for code in CATALOGUE if code.startswith("SERVICE_")}


def test_a_service_is_missing_until_it_is_installed_and_then_nothing_is_wrong_with_it(home: LaunchdHome):
    assert _OF_SERVICE & set(at_home(home)) == {"SERVICE_MISSING"}
    home.done("install")
    assert not (_OF_SERVICE | {"THROTTLED", "NOT_RUNNING"}) & set(at_home(home))


def test_a_property_list_that_others_may_write_is_refused_and_install_mends_it(home: LaunchdHome):
    home.done("install")
    home.plist().chmod(0o666)
    assert "has mode 0666" in at_home(home)["SERVICE_FILE"]["evidence"]
    home.done("install")
    assert "SERVICE_FILE" not in at_home(home)


def test_a_property_list_of_other_settings_is_stale(home: LaunchdHome):
    home.done("install")
    home.daemon.write_settings(lifecycle__stop_timeout_s=55)
    assert "ExitTimeOut" in at_home(home)["SERVICE_STALE"]["evidence"]


def change(home: LaunchdHome, **keys: Any) -> None:
    job = home.job()
    job.update(keys)
    home.plist().write_bytes(plistlib.dumps(job))


def test_a_program_that_is_gone_is_the_cause_of_a_daemon_that_does_not_run(home: LaunchdHome):
    home.done("install")
    home.done("stop")
    change(home, ProgramArguments=["/nowhere/python3", *home.job()["ProgramArguments"][1:]])
    found = at_home(home)
    assert "/nowhere/python3" in found["SERVICE_PROGRAM_MISSING"]["evidence"]
    assert not {"SERVICE_STALE", "NOT_RUNNING"} & set(found)
    assert {"SERVICE_STALE", "NOT_RUNNING"} <= set(at_home(home, "--all"))


def test_a_service_that_was_switched_off_is_told_and_its_remedy_starts_it(home: LaunchdHome):
    home.done("install")
    home.done("stop")
    assert home.launchctl("disable", home.target()).returncode == 0
    found = at_home(home)
    assert "SERVICE_DISABLED" in found
    assert "NOT_RUNNING" not in found
    home.done("start")
    assert "SERVICE_DISABLED" not in at_home(home)


def test_a_job_of_the_standard_process_type_is_throttled(home: LaunchdHome):
    home.done("install")
    home.done("stop")
    change(home, ProcessType="Standard")
    assert home.launchctl("bootstrap", home.target().rpartition("/")[0], str(home.plist())).returncode == 0
    found = at_home(home, "--all")
    assert "THROTTLED" in found
    assert "ProcessType" in found["SERVICE_STALE"]["evidence"]


def test_a_socket_that_the_service_manager_holds_is_not_taken_by_another(home: LaunchdHome):
    home.done("install", "--on-demand")
    with pytest.raises(OSError, match="in use"), socket.socket() as probe:
        probe.bind(("127.0.0.1", home.daemon.port))  # it is held
    assert "pid = " not in home.launchctl("print", home.target()).stdout
    assert "PORT_TAKEN" not in at_home(home)
    assert "pid = " not in home.launchctl("print", home.target()).stdout, "doctor has started it by a connection"


# --- what is printed ----------------------------------------------------------------------------------------------


def test_json_has_a_shape_that_stays(daemon: Daemon):
    content = content_of(daemon.verb("doctor", "--json"))
    assert list(content) == ["asked", "conditions", "hidden", "unknown"]
    for each in content["conditions"]:
        assert list(each) == ["code", "severity", "title", "evidence", "remedy", "page"]
        assert each["code"] in CATALOGUE
        assert each["severity"] in {"error", "warning", "note"}
        assert each["page"] == f"docs/doctor.md#{each['code'].lower()}"
        assert all(isinstance(value, str) for value in each.values())
    assert isinstance(content["hidden"], int)


def test_what_could_not_be_told_is_counted_and_named_when_asked(home: LaunchdHome):
    home.done("install")
    short, long = (home.run("doctor", *words, PATH=str(home.folder)).stdout for words in ((), ("--verbose",)))
    assert "questions stay open (--verbose names them)" in short
    assert "not known: service: launchctl was not found on PATH" in long
    assert short.startswith("asked: the daemon\n")


def test_the_exit_code_tells_whether_there_is_something_to_mend(make_daemon: Callable[..., Daemon]):
    """Notes do not count: keeping warm is switched off in these tests. This computer is judged too."""
    daemon = make_daemon()
    daemon.start()
    daemon.wait_ready()
    ran = daemon.verb("doctor", "--json")
    found = found_by(ran)
    assert "WARMTH_OFF" in found
    assert ran.returncode == (FOUND if {each["severity"] for each in found.values()} - {"note"} else 0)
    daemon.write_settings(model__path="/nowhere/model.gguf")
    assert daemon.verb("reload").returncode != 0
    daemon.kill()
    assert daemon.verb("doctor").returncode == FOUND
