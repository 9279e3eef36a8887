"""The stand-in for launchctl does what launchctl(1) and launchd.plist(5) say, failures included."""

from __future__ import annotations

import itertools
import json
import os
import plistlib
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from daemon_process import is_alive
from engine_process import free_port
from launchctl_process import FOLDER, Launchctl

sys.path.insert(0, str(FOLDER))

import job as standin_job
import schema

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLEEP = ("/bin/sleep", "100")
LABEL = "test.job"
ANSWERING = """
import os, socket, sys
listener = socket.socket(fileno=3)
is_for_me = os.environ["LISTEN_PID"] == str(os.getpid())
print(os.environ["LISTEN_FDS"], os.environ["LISTEN_FDNAMES"], is_for_me, flush=True)
while True:
    connection, _ = listener.accept()
    said = connection.recv(100).decode()
    if said == "crash":
        os._exit(1)
    connection.sendall(str(os.getpid()).encode())
    connection.close()
    if said == "leave":
        sys.exit(0)
"""


@pytest.fixture
def launchctl(tmp_path: Path) -> Iterator[Launchctl]:
    made = Launchctl(tmp_path / "launchd", tmp_path)
    yield made
    made.end()


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


# --- domains, verbs, codes ---------------------------------------------------------------------------------------


def test_a_job_that_runs_at_load_runs_and_is_printed(launchctl: Launchctl, tmp_path: Path):
    path = launchctl.write_list(tmp_path, LABEL, *SLEEP, RunAtLoad=True)
    launchctl.do("bootstrap", launchctl.gui, path)
    printed = launchctl.do("print", f"{launchctl.gui}/{LABEL}")
    pid = launchctl.pid(LABEL)
    assert pid is not None
    assert is_alive(pid)
    assert os.getpgid(pid) == pid
    for line in (
        "state = running",
        "runs = 1",
        "last exit code = (never exited)",
        "minimum runtime = 10",
        "exit timeout = 5",
        "spawn type = interactive (4)",
        f"path = {path}",
    ):
        assert f"\t{line}\n" in printed
    listed = launchctl.do("list", LABEL)
    assert f'"PID" = {pid};' in listed
    assert '"LastExitStatus" = 0;' in listed
    assert f"{pid}\t0\t{LABEL}" in launchctl.do("list")


def test_without_a_process_type_the_job_is_a_throttled_daemon(launchctl: Launchctl, tmp_path: Path):
    path = tmp_path / f"{LABEL}.plist"
    path.write_bytes(plistlib.dumps({"Label": LABEL, "ProgramArguments": [*SLEEP]}))
    launchctl.do("bootstrap", launchctl.gui, path)
    assert launchctl.value(LABEL, "spawn type") == "daemon (3)"
    assert launchctl.value(LABEL, "state") == "not running"


def test_bootout_returns_before_the_job_is_gone_and_bootstrap_fails_meanwhile(launchctl: Launchctl, tmp_path: Path):
    ignoring = python("import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()")
    out = tmp_path / "out"
    path = launchctl.write_list(tmp_path, LABEL, *ignoring, RunAtLoad=True, StandardOutPath=str(out), ExitTimeOut=0)
    launchctl.do("bootstrap", launchctl.gui, path)
    launchctl.wait(lambda: out.exists() and out.read_text(), "the job")
    pid = launchctl.pid(LABEL)
    assert pid is not None
    launchctl.do("bootout", f"{launchctl.gui}/{LABEL}")
    assert launchctl.value(LABEL, "state") == "SIGTERMed"
    again = launchctl.call("bootout", f"{launchctl.gui}/{LABEL}")
    assert (again.returncode, again.stderr) == (36, "Boot-out failed: 36: Operation now in progress\n")
    early = launchctl.call("bootstrap", launchctl.gui, path)
    assert early.returncode == 5
    assert early.stderr == (
        "Bootstrap failed: 5: Input/output error\nTry re-running the command as root for richer errors.\n"
    )
    launchctl.switch(loaded_code=37)
    early = launchctl.call("bootstrap", launchctl.gui, path)
    assert (early.returncode, early.stderr) == (37, "Bootstrap failed: 37: Operation already in progress\n")
    assert launchctl.call("kickstart", f"{launchctl.gui}/{LABEL}").returncode == 37
    assert is_alive(pid), "an ExitTimeOut of 0 is for ever"
    launchctl.do("kill", "KILL", f"{launchctl.gui}/{LABEL}")
    launchctl.wait_gone(LABEL)
    assert not is_alive(pid)
    launchctl.do("bootstrap", launchctl.gui, path)


def test_a_job_that_ignores_sigterm_is_killed_after_its_exit_timeout(launchctl: Launchctl, tmp_path: Path):
    ignoring = python("import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()")
    out = tmp_path / "out"
    path = launchctl.write_list(tmp_path, LABEL, *ignoring, RunAtLoad=True, StandardOutPath=str(out))
    launchctl.do("bootstrap", launchctl.gui, path)
    launchctl.wait(lambda: out.exists() and out.read_text(), "the job")
    pid = launchctl.pid(LABEL)
    assert pid is not None
    began_s = time.monotonic()
    launchctl.do("bootout", f"{launchctl.gui}/{LABEL}")
    launchctl.wait(lambda: not is_alive(pid), "the end")
    assert time.monotonic() - began_s > 0.5  # 5 s, ten times as fast
    assert "sending SIGKILL" in launchctl.log()


def test_what_is_not_loaded_has_codes_of_its_own(launchctl: Launchctl):
    target = f"{launchctl.gui}/nobody"
    missing = f'Could not find service "nobody" in domain for user gui: {os.getuid()}\n'
    answers = {
        ("print", target): (113, f"Bad request.\n{missing}"),
        ("kickstart", target): (113, missing),
        ("kill", "TERM", target): (113, missing),
        ("bootout", target): (3, "Boot-out failed: 3: No such process\n"),
        ("list", "nobody"): (113, 'Could not find service "nobody" in domain for port\n'),
    }
    for words, expected in answers.items():
        done = launchctl.call(*words)
        assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (112, "Could not find domain for user gui: {uid}\n"),
        (125, "Bootstrap failed: 125: Domain does not support specified action\n"),
    ],
)
def test_without_a_gui_login_its_domain_is_absent_and_user_is_there(
    launchctl: Launchctl, tmp_path: Path, code: int, words: str
):
    launchctl.switch(gui_absent=code)
    aqua = launchctl.write_list(tmp_path, "test.aqua", *SLEEP)
    both = launchctl.write_list(
        tmp_path, LABEL, *SLEEP, LimitLoadToSessionType=["Aqua", "Background"], RunAtLoad=True
    )
    done = launchctl.call("bootstrap", launchctl.gui, both)
    assert (done.returncode, done.stderr) == (code, words.format(uid=os.getuid()))
    assert launchctl.call("print", launchctl.gui).returncode == code
    launchctl.do("print", launchctl.user)
    assert launchctl.call("bootstrap", launchctl.user, aqua).returncode == 5
    launchctl.do("bootstrap", launchctl.user, both)
    assert launchctl.pid(LABEL, launchctl.user)
    assert launchctl.do("managername") == "Background\n"


def test_the_jobs_of_a_gui_login_end_with_it(launchctl: Launchctl, tmp_path: Path):
    launchctl.do("bootstrap", launchctl.gui, launchctl.write_list(tmp_path, LABEL, *SLEEP, RunAtLoad=True))
    pid = launchctl.pid(LABEL)
    assert pid
    launchctl.switch(gui_absent=112)
    launchctl.call("print", launchctl.gui)
    launchctl.wait(lambda: not is_alive(pid), "the end of the job")


def test_the_domain_of_another_user_is_not_there(launchctl: Launchctl):
    assert launchctl.call("print", f"gui/{os.getuid() + 1}").returncode == 112


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("bootstrap",),
        ("bootstrap", "gui"),
        ("bootout", "--wait", "gui/1/x"),
        ("kickstart", "-x", "gui/1/x"),
        ("kill", "NONSENSE", "gui/1/x"),
        ("print", "gui"),
        ("load",),
        ("frobnicate",),
    ],
)
def test_wrong_words_are_a_usage_error(launchctl: Launchctl, words: tuple[str, ...]):
    done = launchctl.call(*words)
    assert done.returncode == 64
    assert done.stderr


def test_a_disabled_job_is_not_loaded_until_it_is_enabled_and_that_outlives_launchd(
    launchctl: Launchctl, tmp_path: Path
):
    path = launchctl.write_list(tmp_path, LABEL, *SLEEP, RunAtLoad=True)
    launchctl.do("disable", f"{launchctl.gui}/{LABEL}")
    assert launchctl.call("bootstrap", launchctl.gui, path).returncode == 5
    launchctl.do("standin-end")
    launchctl.switch(disabled_code=119)
    done = launchctl.call("bootstrap", launchctl.gui, path)
    assert (done.returncode, done.stderr) == (119, "Bootstrap failed: 119: Service is disabled\n")
    assert f'"{LABEL}" => disabled' in launchctl.do("print-disabled", launchctl.gui)
    launchctl.do("enable", f"{launchctl.gui}/{LABEL}")
    assert f'"{LABEL}" => enabled' in launchctl.do("print-disabled", launchctl.user)
    launchctl.do("bootstrap", launchctl.gui, path)
    launchctl.do("disable", f"{launchctl.gui}/{LABEL}")
    assert launchctl.pid(LABEL), "what runs goes on"
    assert launchctl.call("kickstart", f"{launchctl.gui}/{LABEL}").returncode == 119


def test_load_and_unload_never_fail_and_unload_w_leaves_it_disabled(launchctl: Launchctl, tmp_path: Path):
    path = launchctl.write_list(tmp_path, LABEL, *SLEEP, RunAtLoad=True)
    launchctl.do("load", path)
    assert launchctl.pid(LABEL)
    twice = launchctl.call("load", path)
    assert twice.returncode == 0
    assert twice.stderr.startswith("Load failed: 5: Input/output error\nTry running `launchctl bootstrap` as root")
    launchctl.do("unload", "-w", path)
    launchctl.wait_gone(LABEL)
    assert "Load failed" in launchctl.call("load", path).stderr
    launchctl.do("load", "-w", path)
    assert launchctl.pid(LABEL)
    missing = launchctl.call("unload", tmp_path / "none.plist")
    assert (missing.returncode, missing.stderr[:14]) == (0, "Unload failed:")


def test_error_decodes(launchctl: Launchctl):
    assert launchctl.do("error", "113") == "113: Could not find specified service\n"
    assert launchctl.do("error", "5") == "5: Input/output error\n"


def test_a_login_loads_what_is_not_disabled(launchctl: Launchctl, tmp_path: Path):
    for label in ("test.a", "test.b"):
        launchctl.write_list(tmp_path, label, *SLEEP, RunAtLoad=True)
    launchctl.do("disable", f"{launchctl.gui}/test.b")
    launchctl.do("standin-login", tmp_path)
    assert launchctl.pid("test.a")
    assert launchctl.call("print", f"{launchctl.gui}/test.b").returncode == 113


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"KeepAlife": True},
        {"RunAtLoad": 1},
        {"ThrottleInterval": "10"},
        {"EnvironmentVariables": {"N": 1}},
        {"KeepAlive": {"SuccessfulExit": "no"}},
        {"Sockets": {"L": {"SockName": "x"}}},
        {"ProcessType": "Fast"},
        {"SoftResourceLimits": {"Files": 1}},
        {"LimitLoadToSessionType": "Background"},
        {"Disabled": True},
        {"ProgramArguments": []},
        {"ProgramArguments": ["sleep", "1"]},
        {"StandardOutPath": "~/log"},
    ],
)
def test_a_list_with_a_wrong_key_is_not_loaded(launchctl: Launchctl, tmp_path: Path, keys: dict[str, Any]):
    path = launchctl.write_list(tmp_path, LABEL, *SLEEP, **keys)
    assert launchctl.call("bootstrap", launchctl.gui, path).returncode == 5


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_list_that_others_may_write_is_not_loaded(launchctl: Launchctl, tmp_path: Path, mode: int):
    path = launchctl.write_list(tmp_path, LABEL, *SLEEP)
    path.chmod(mode)
    assert launchctl.call("bootstrap", launchctl.gui, path).returncode == 5
    assert "bad ownership or permissions" in launchctl.log()


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_list_of_another_owner_is_not_loaded(launchctl: Launchctl, tmp_path: Path):
    path = launchctl.write_list(tmp_path, LABEL, *SLEEP)
    os.chown(path, 12345, -1)
    assert launchctl.call("bootstrap", launchctl.gui, path).returncode == 5


def test_what_is_no_list_is_not_loaded(launchctl: Launchctl, tmp_path: Path):
    path = tmp_path / "x.plist"
    path.write_text("<plist><dict>")
    assert launchctl.call("bootstrap", launchctl.gui, path).returncode == 5
    assert launchctl.call("bootstrap", launchctl.gui, tmp_path / "none.plist").returncode == 5


# --- what the job gets -------------------------------------------------------------------------------------------


def test_the_job_gets_the_lists_environment_and_launchds_and_nothing_else(launchctl: Launchctl, tmp_path: Path):
    out = tmp_path / "out"
    code = "import json, os, resource; print(json.dumps([dict(os.environ), os.getcwd(), os.umask(0), "
    code += "resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_CORE)]))"
    path = launchctl.write_list(
        tmp_path,
        LABEL,
        sys.executable,
        "-c",
        code,
        RunAtLoad=True,
        EnvironmentVariables={"COLOUR": "blue"},
        WorkingDirectory=str(tmp_path),
        StandardOutPath=str(out),
        Umask="077",
        HardResourceLimits={"Core": 0},
    )
    launchctl.do("bootstrap", launchctl.gui, path)
    said = json.loads(launchctl.wait(lambda: out.exists() and out.read_text(), "its words"))
    environment, folder, mask, files, core = said
    environment.pop("LC_CTYPE", None)  # of Python's own making
    assert set(environment) == {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "COLOUR", "XPC_SERVICE_NAME", "XPC_FLAGS",
    }  # fmt: skip
    assert environment["PATH"] == "/usr/bin:/bin:/usr/sbin:/sbin"
    assert environment["HOME"] == str(tmp_path)
    assert environment["XPC_SERVICE_NAME"] == LABEL
    assert (folder, mask, files, core) == (str(tmp_path), 0o077, 256, [0, 0])
    assert oct(out.stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize("key", ["StandardErrorPath", "StandardOutPath", "WorkingDirectory"])
def test_a_job_whose_files_cannot_be_opened_ends_with_78(launchctl: Launchctl, tmp_path: Path, key: str):
    path = launchctl.write_list(tmp_path, LABEL, *SLEEP, RunAtLoad=True, **{key: str(tmp_path / "none" / "x")})
    launchctl.do("bootstrap", launchctl.gui, path)
    launchctl.wait(lambda: launchctl.value(LABEL, "last exit code") == "78: EX_CONFIG", "the exit code")


def test_a_program_that_is_not_there_ends_with_78(launchctl: Launchctl, tmp_path: Path):
    launchctl.do("bootstrap", launchctl.gui, launchctl.write_list(tmp_path, LABEL, "/none/x", RunAtLoad=True))
    launchctl.wait(lambda: launchctl.value(LABEL, "last exit code") == "78: EX_CONFIG", "the exit code")


@pytest.mark.parametrize("abandons", [False, True])
def test_what_is_left_of_the_group_dies_with_the_job(launchctl: Launchctl, tmp_path: Path, abandons: bool):
    out = tmp_path / "out"
    code = (
        "import subprocess, signal; print(subprocess.Popen(['/bin/sleep', '30']).pid, flush=True); signal.pause()"
    )
    path = launchctl.write_list(
        tmp_path, LABEL, *python(code), RunAtLoad=True, StandardOutPath=str(out), AbandonProcessGroup=abandons
    )
    launchctl.do("bootstrap", launchctl.gui, path)
    child = int(launchctl.wait(lambda: out.exists() and out.read_text(), "the child"))
    launchctl.do("bootout", f"{launchctl.gui}/{LABEL}")
    launchctl.wait_gone(LABEL)
    assert is_alive(child) is abandons
    if abandons:
        os.kill(child, signal.SIGKILL)


# --- starting again ----------------------------------------------------------------------------------------------


def runs(launchctl: Launchctl) -> int:
    return int(launchctl.value(LABEL, "runs") or 0)


def test_keep_alive_on_failure_restarts_a_killed_job_and_not_a_clean_end(launchctl: Launchctl, tmp_path: Path):
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print(1, flush=True); signal.pause()"
    out = tmp_path / "out"
    path = launchctl.write_list(
        tmp_path,
        LABEL,
        *python(code),
        KeepAlive={"SuccessfulExit": False},
        StandardOutPath=str(out),
        ThrottleInterval=5,
    )
    launchctl.do("bootstrap", launchctl.gui, path)
    launchctl.wait(lambda: out.exists() and out.read_text().count("1") == 1, "the start")
    launchctl.do("kill", "KILL", f"{launchctl.gui}/{LABEL}")
    launchctl.wait(lambda: launchctl.value(LABEL, "last terminating signal") == "Killed: 9", "the end")
    launchctl.wait(lambda: out.read_text().count("1") == 2, "the second start")
    assert launchctl.value(LABEL, "immediate reason") == "inefficient"
    launchctl.do("kill", "SIGTERM", f"{launchctl.gui}/{LABEL}")
    launchctl.wait(lambda: launchctl.value(LABEL, "last exit code") == "0", "the clean end")
    assert launchctl.value(LABEL, "state") == "not running"
    assert runs(launchctl) == 2


def test_starts_are_spaced_by_the_throttle(launchctl: Launchctl, tmp_path: Path):
    out = tmp_path / "out"
    code = "import time; print(time.monotonic(), flush=True); raise SystemExit(1)"
    path = launchctl.write_list(tmp_path, LABEL, *python(code), KeepAlive=True, StandardOutPath=str(out))
    launchctl.do("bootstrap", launchctl.gui, path)
    launchctl.wait(lambda: launchctl.value(LABEL, "state") == "spawn scheduled", "the wait")
    launchctl.wait(lambda: out.read_text().count("\n") >= 3, "three starts")
    times = [float(line) for line in out.read_text().split()]
    # ThrottleInterval of 10 s, ten times as fast; a start itself takes more or less long.
    assert all(later - earlier > 0.7 for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize(
    ("keep_alive", "status", "expected"),
    [
        (True, 0, True),
        (False, 9, False),
        ({"SuccessfulExit": False}, 0, False),
        ({"SuccessfulExit": False}, 256, True),
        ({"SuccessfulExit": False}, 9, True),
        ({"SuccessfulExit": True}, 0, True),
        ({"Crashed": True}, 9, False),  # a kill is no crash
        ({"Crashed": True}, 11, True),
        ({"Crashed": False}, 0, True),  # the trap
        ({"SuccessfulExit": False, "Crashed": False}, 0, True),  # OR-ed
        ({"PathState": {"/none": False}}, 0, True),
    ],
)
def test_keep_alive_conditions_are_or_ed(keep_alive: Any, status: int, expected: bool):
    assert standin_job.wants_restart({"KeepAlive": keep_alive}, status, lambda _: False) is expected


def test_kickstart_starts_what_waits_and_k_kills_first(launchctl: Launchctl, tmp_path: Path):
    launchctl.do("bootstrap", launchctl.gui, launchctl.write_list(tmp_path, LABEL, *SLEEP))
    first = int(launchctl.do("kickstart", "-p", f"{launchctl.gui}/{LABEL}"))
    assert int(launchctl.do("kickstart", "-p", f"{launchctl.gui}/{LABEL}")) == first
    second = int(launchctl.do("kickstart", "-kp", f"{launchctl.gui}/{LABEL}"))
    assert second != first
    assert not is_alive(first)
    assert launchctl.value(LABEL, "last terminating signal") == "Killed: 9"


def test_transactions_make_a_stop_a_kill(launchctl: Launchctl, tmp_path: Path):
    out = tmp_path / "out"
    code = "import signal, sys; signal.signal(15, lambda *_: print('asked', flush=True)); "
    code += "print('up', flush=True); signal.pause()"
    path = launchctl.write_list(
        tmp_path, LABEL, *python(code), RunAtLoad=True, EnableTransactions=True, StandardOutPath=str(out)
    )
    launchctl.do("bootstrap", launchctl.gui, path)
    launchctl.wait(lambda: out.exists() and out.read_text(), "the start")
    launchctl.do("bootout", f"{launchctl.gui}/{LABEL}")
    launchctl.wait_gone(LABEL)
    assert out.read_text() == "up\n"


# --- sockets -----------------------------------------------------------------------------------------------------


def ask(port: int, words: str) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(words.encode())
        return client.recv(100).decode()


def listening(launchctl: Launchctl, folder: Path, port: int, **keys: Any) -> Path:
    sockets = {"Listeners": {"SockNodeName": "127.0.0.1", "SockServiceName": str(port), "SockFamily": "IPv4"}}
    out = str(folder / "out")
    return launchctl.write_list(
        folder, LABEL, *python(ANSWERING), Sockets=sockets, StandardOutPath=out, StandardErrorPath=out, **keys
    )


def test_a_connection_starts_the_job_and_waits_for_it(launchctl: Launchctl, tmp_path: Path):
    port = free_port()
    launchctl.do("bootstrap", launchctl.gui, listening(launchctl, tmp_path, port))
    assert launchctl.pid(LABEL) is None
    assert ask(port, "hello") == str(launchctl.pid(LABEL))
    assert (tmp_path / "out").read_text() == "1 Listeners True\n"
    first = ask(port, "leave")
    launchctl.wait(lambda: launchctl.value(LABEL, "state") == "not running", "the end")
    assert ask(port, "hello") != first
    assert runs(launchctl) == 2


def test_the_sockets_outlive_a_crash_and_not_the_job(launchctl: Launchctl, tmp_path: Path):
    port = free_port()
    path = listening(launchctl, tmp_path, port, KeepAlive={"SuccessfulExit": False}, ThrottleInterval=2)
    launchctl.do("bootstrap", launchctl.gui, path)
    first = ask(port, "hello")
    assert not ask(port, "crash")
    assert ask(port, "hello") != first
    launchctl.do("bootout", f"{launchctl.gui}/{LABEL}")
    launchctl.wait_gone(LABEL)
    with pytest.raises(ConnectionRefusedError):
        ask(port, "hello")


def test_a_job_whose_port_is_taken_is_loaded_without_its_socket(launchctl: Launchctl, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = listening(launchctl, tmp_path, taken.getsockname()[1])
        launchctl.do("bootstrap", launchctl.gui, path)
        assert "socket Listeners: Address already in use" in launchctl.log()


# --- its own end -------------------------------------------------------------------------------------------------


def launchd_pid(launchctl: Launchctl) -> int:
    return int((launchctl.state / "launchd.pid").read_text())


def test_its_end_ends_the_jobs_with_sigterm_first(launchctl: Launchctl, tmp_path: Path):
    out = tmp_path / "out"
    code = "import signal, sys; signal.signal(15, lambda *_: (print('asked', flush=True), sys.exit(0))); "
    code += "print('up', flush=True); signal.pause()"
    path = launchctl.write_list(tmp_path, LABEL, *python(code), KeepAlive=True, StandardOutPath=str(out))
    launchctl.do("bootstrap", launchctl.gui, path)
    launchctl.wait(lambda: out.exists() and out.read_text(), "the start")
    pid, launchd = launchctl.pid(LABEL), launchd_pid(launchctl)
    assert pid
    launchctl.do("standin-end")
    assert out.read_text() == "up\nasked\n"
    assert not is_alive(pid)
    launchctl.wait(lambda: not is_alive(launchd), "its end")


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux'")
def test_if_it_is_killed_its_jobs_die_too(launchctl: Launchctl, tmp_path: Path):
    launchctl.do("bootstrap", launchctl.gui, launchctl.write_list(tmp_path, LABEL, *SLEEP, RunAtLoad=True))
    pid = launchctl.pid(LABEL)
    assert pid
    os.kill(launchd_pid(launchctl), signal.SIGKILL)
    launchctl.wait(lambda: not is_alive(pid), "the end of the job")


def test_it_ends_with_its_state_directory(tmp_path: Path):
    launchctl = Launchctl(tmp_path / "launchd", tmp_path)
    launchctl.do("bootstrap", launchctl.gui, launchctl.write_list(tmp_path, LABEL, *SLEEP, RunAtLoad=True))
    pid, launchd = launchctl.pid(LABEL), launchd_pid(launchctl)
    assert pid
    launchctl.state.rename(tmp_path / "elsewhere")
    launchctl.wait(lambda: not is_alive(launchd) and not is_alive(pid), "its end")


# --- the schema --------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "Label": LABEL,
    "ProgramArguments": [*SLEEP],
    "ProcessType": "Interactive",
    "ExitTimeOut": 60,
    "LimitLoadToSessionType": ["Aqua", "Background"],
    "KeepAlive": {"SuccessfulExit": False},
}


def test_a_good_list_has_neither_errors_nor_warnings():
    assert schema.errors(GOOD) == []
    assert schema.warnings(GOOD) == []


@pytest.mark.parametrize(
    ("keys", "trap"),
    [
        ({"EnableTransactions": True}, "EnableTransactions"),
        ({"EnablePressuredExit": True}, "EnablePressuredExit"),
        ({"KeepAlive": {"Crashed": False}}, "KeepAlive.Crashed"),
        ({"KeepAlive": {"NetworkState": True}}, "KeepAlive.NetworkState"),
        ({"KeepAlive": {"SuccessfulExit": False, "Crashed": True}}, "KeepAlive: conditions"),
        ({"RunAtLoad": False}, "KeepAlive: implies"),
        ({"ProcessType": "Background"}, "ProcessType"),
        ({"ExitTimeOut": 0}, "ExitTimeOut"),
        ({"LowPriorityIO": True}, "LowPriorityIO"),
        ({"Nice": 5}, "Nice"),
        ({"SessionCreate": True}, "SessionCreate"),
        ({"SoftResourceLimits": {"MemoryLock": 1}}, "MemoryLock"),
        ({"StandardOutPath": "/x/~/log"}, "paths"),
        ({"OnDemand": False}, "OnDemand"),
        ({"StartInterval": 5}, "StartInterval"),
    ],
)
def test_each_documented_trap_is_warned_of(keys: dict[str, Any], trap: str):
    job = {**GOOD, **keys}
    assert schema.errors(job) == []
    assert [said for said in schema.warnings(job) if said.startswith(trap)]


@pytest.mark.parametrize("key", ["ProcessType", "ExitTimeOut", "LimitLoadToSessionType"])
def test_a_default_that_harms_is_warned_of(key: str):
    assert [said for said in schema.warnings({k: v for k, v in GOOD.items() if k != key}) if said.startswith(key)]


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"Sockets": {"L": [{"SockType": "raw"}]}}, "Sockets.L"),
        ({"KeepAlive": {"SuccessfulExit": 0}}, "KeepAlive"),
        ({"MachServices": {"x": 1}}, "MachServices.x"),
        ({"StartCalendarInterval": [{"Hour": "1"}]}, "StartCalendarInterval"),
        ({"Umask": "99"}, "Umask"),
        ({"Nice": 40}, "Nice"),
        ({"Label": ""}, "Label"),
        ({"LimitLoadToSessionType": []}, "LimitLoadToSessionType"),
    ],
)
def test_an_error_names_its_place(keys: dict[str, Any], place: str):
    assert [said for said in schema.errors({**GOOD, **keys}) if said.startswith(place)]


def test_what_is_no_dictionary_or_lacks_a_required_key_is_wrong():
    assert schema.errors([]) == ["the property list must be a dictionary"]
    assert schema.errors({}) == ["Label: is required", "ProgramArguments: Program or ProgramArguments is required"]
