"""The trial of the service on a Mac, end to end through the stand-in launchctl; and that it notices what is wrong.

Beside launchctl, macOS' other tools are played here: their answers are given where the trial runs a program.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import service_trial
from service_trial import (
    LABEL,
    Answer,
    Client,
    Computer,
    DiffersError,
    NotTriedError,
    Outcome,
    Trial,
    Verdict,
    run_program,
    settings_of_trial,
)

from emberd.core.settings import Settings, read
from engine_process import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LAUNCHCTL = Path(__file__).parents[1] / "launchctl_standin"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in launchctl is for Linux")


def locked_bytes(pids: Sequence[int]) -> int | None:
    for line in Path(f"/proc/{pids[0]}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return None


class Mac:
    """A Mac as far as the trial looks at it; `answers` by a tool's first words replace what it would say."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.slept_s = 1000.0
        self.asked: list[str] = []
        self.ran: list[tuple[str, ...]] = []
        self.answers: dict[tuple[str, ...], Answer] = {
            ("plutil",): Answer(0, "OK\n"),
            ("ps",): Answer(0, "31\n"),
            ("sudo",): Answer(1, "", "a password is required"),
            ("sysctl",): Answer(0, "{ sec = 1, usec = 2 }\n"),
        }

    def computer(self) -> Computer:
        return Computer(
            locked_bytes=locked_bytes,
            in_core_bytes=lambda path: path.stat().st_size,
            slept_s=lambda: self.slept_s,
            ask_person=lambda text: self.asked.append(text) is None,
            run=self.run,
        )

    def run(self, *words: str, limit_s: float = 30.0) -> Answer:
        self.ran.append(words)
        for first, answer in self.answers.items():
            if words[: len(first)] == first:
                return answer
        if words[:2] == ("pmset", "sleepnow"):
            self.slept_s += 42
            return Answer(0, "")
        if words[:2] == ("log", "show"):
            return Answer(0, self.unified(words[-1]))
        if "woken" in words:  # this computer does not sleep, so that emberd has nothing to notice
            return Answer(0, json.dumps({"event": "woken", "slept_s": 42}) + "\n")
        return run_program(*words, limit_s=limit_s)

    @staticmethod
    def unified(predicate: str) -> str:
        """Return emberd's log file as log(1) prints the unified log."""
        assert predicate.startswith('subsystem == "io.github.emberd" && processID == ')
        files = Path("/tmp").glob("emberd-trial-*/state/emberd.log")  # noqa: S108  # the trial's own place
        newest = max(files, key=lambda path: path.stat().st_mtime)
        lines = newest.read_text(encoding="utf-8").splitlines()
        return "\n".join(json.dumps({"eventMessage": line}) for line in lines)


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mac]:
    """A Mac with a home of its own, a launchd, and pyoslog."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAUNCHCTL_STANDIN_STATE", str(tmp_path / "launchd"))
    monkeypatch.setenv("PATH", f"{LAUNCHCTL}:{os.environ['PATH']}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: importlib.machinery.ModuleSpec("pyoslog", None))
    yield Mac(tmp_path)
    subprocess.run([LAUNCHCTL / "launchctl", "standin-end", "-k"], check=True, timeout=60)


@pytest.fixture
def own(model: Path, standin: Path) -> Settings:
    """What the owner of the Mac has set."""
    tables: dict[str, Any] = {"model": {"path": str(model)}, "engine": {"path": str(standin)}}
    return read(tables, "config.toml")


def take(mac: Mac, own: Settings, *, with_sleep: bool = False) -> dict[str, Outcome]:
    return {
        each.step: each for each in Trial(mac.computer(), own, with_sleep=with_sleep, tell=lambda _: None).run()
    }


def assert_nothing_is_left(mac: Mac) -> None:
    assert list((mac.home / "Library").rglob("*acceptance*")) == []
    assert not list(Path("/tmp").glob("emberd-trial-*"))  # noqa: S108  # the trial's own place
    for domain in ("gui", "user"):
        printed = subprocess.run(
            [LAUNCHCTL / "launchctl", "print", f"{domain}/{os.getuid()}/{LABEL}"], capture_output=True, check=False
        )
        assert printed.returncode != 0


# --- end to end ---------------------------------------------------------------------------------------------


def test_a_mac_on_which_all_is_well_passes_every_step(mac: Mac, own: Settings):
    outcomes = take(mac, own, with_sleep=True)
    assert {name: (each.verdict.value, each.saw) for name, each in outcomes.items()} == {
        name: ("agrees", each.saw) for name, each in outcomes.items()
    }
    assert len(outcomes) == 16
    assert "0 refused" in outcomes["upgrade"].saw
    assert "adopted" in outcomes["crash"].saw
    assert "wake it with a key" in mac.asked[0]
    assert ("pmset", "sleepnow") in mac.ran
    assert_nothing_is_left(mac)


def test_without_a_model_nothing_is_installed_and_the_rest_is_not_tried(mac: Mac, own: Settings):
    outcomes = take(mac, replace(own, model=replace(own.model, path="/no/such/model.gguf")))
    assert outcomes.pop("settings").verdict is Verdict.DIFFERS
    assert {each.verdict for each in outcomes.values()} == {Verdict.NOT_TRIED}
    assert_nothing_is_left(mac)


def test_an_engine_that_never_becomes_ready_is_uninstalled_all_the_same(
    mac: Mac, own: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service_trial, "LOAD_LIMIT_S", 0.5)
    monkeypatch.setattr(Trial, "_status", lambda _: {"state": "LOADING", "reason": "large"})
    outcomes = take(mac, own)
    assert (outcomes["ready"].verdict, outcomes["ready"].saw) == (
        Verdict.DIFFERS,
        "not READY within 0 s: LOADING large",
    )
    assert outcomes["upgrade"].verdict is Verdict.NOT_TRIED
    assert_nothing_is_left(mac)


def test_a_trial_that_is_interrupted_removes_what_it_has_made(mac: Mac, own: Settings):
    def interrupt(outcome: Outcome) -> None:
        if outcome.step == "ready":
            raise KeyboardInterrupt

    trial = Trial(mac.computer(), own, with_sleep=False, tell=interrupt)
    with pytest.raises(KeyboardInterrupt):
        trial.run()
    assert_nothing_is_left(mac)


# --- what each step notices ---------------------------------------------------------------------------------

READY = {
    "pid": 11,
    "state": "READY",
    "reason": "",
    "engine": {"pid": 22, "adopted": True},
    "lock": {"state": "HELD", "needed_bytes": 100, "message": "", "remedy": ""},
}


class Scripted(Trial):
    """A trial whose emberd says what the test wants."""

    def __init__(self, mac: Mac, own: Settings, **status: Any) -> None:
        super().__init__(mac.computer(), own, with_sleep=True, tell=lambda _: None)
        shutil.rmtree(self._folder)
        self.says = {**READY, **status}
        self.events: list[dict[str, Any]] = []
        self._pid, self._engine_pid = 11, 22

    def _status(self) -> dict[str, Any] | None:
        return self.says

    def _log(self, event: str, *_: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]

    def _verb(self, *_: str) -> Any:
        return {}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for."""
    for name in ("LOAD_LIMIT_S", "SETTLE_LIMIT_S", "RESTART_LIMIT_S", "AWAKE_LIMIT_S", "POLL_S"):
        monkeypatch.setattr(service_trial, name, 0.01)
    monkeypatch.setattr(os, "kill", lambda *_: None)


@pytest.mark.usefixtures("quick")
class TestNoticed:
    def test_throttled(self, mac: Mac, own: Settings):
        mac.answers["ps",] = Answer(0, "20\n")
        with pytest.raises(DiffersError, match="engine 20"):
            Scripted(mac, own)._priority()

    def test_a_lock_that_the_kernel_does_not_know(self, mac: Mac, own: Settings):
        trial = Scripted(mac, own)
        trial._computer = replace(mac.computer(), locked_bytes=lambda _: 94)
        with pytest.raises(DiffersError, match="HELD"):
            trial._lock()
        trial._computer = replace(mac.computer(), locked_bytes=lambda _: 95)
        assert trial._lock()

    def test_a_lock_that_is_not_held(self, mac: Mac, own: Settings):
        lock = {**READY["lock"], "state": "PARTIAL", "remedy": "Raise the limit."}  # type: ignore[dict-item]
        trial = Scripted(mac, own, lock=lock)
        trial._computer = replace(mac.computer(), locked_bytes=lambda _: 100)
        with pytest.raises(DiffersError, match="Raise the limit"):
            trial._lock()

    def test_a_model_that_is_not_in_core(self, mac: Mac, own: Settings):
        trial = Scripted(mac, own)
        trial._computer = replace(mac.computer(), in_core_bytes=lambda _: 0)
        with pytest.raises(DiffersError, match="0 of"):
            trial._in_core()

    def test_an_empty_log(self, mac: Mac, own: Settings):
        mac.answers["log", "show"] = Answer(0, '{"eventMessage": "another"}\n')
        with pytest.raises(DiffersError, match="1 lines"):
            Scripted(mac, own)._log_show()
        with pytest.raises(DiffersError):
            Scripted(mac, own)._logs()

    def test_an_engine_that_was_loaded_again(self, mac: Mac, own: Settings):
        other = {"pid": 23, "adopted": False}
        for act in (Scripted(mac, own, pid=12, engine=other)._crash, Scripted(mac, own, engine=other)._upgrade):
            with pytest.raises(DiffersError, match="another engine"):
                act()

    def test_a_mac_that_did_not_sleep(self, mac: Mac, own: Settings):
        mac.answers["pmset", "sleepnow"] = Answer(0, "")
        with pytest.raises(DiffersError, match="0 s"):
            Scripted(mac, own)._sleep()

    def test_a_mac_that_may_not_sleep(self, mac: Mac, own: Settings):
        mac.answers["pmset", "sleepnow"] = Answer(1, "", "not permitted")
        with pytest.raises(DiffersError, match="not permitted"):
            Scripted(mac, own)._sleep()

    def test_a_wake_that_emberd_missed(self, mac: Mac, own: Settings):
        with pytest.raises(DiffersError, match="woken"):
            Scripted(mac, own)._wake_noticed()

    def test_a_property_list_that_plutil_refuses(self, mac: Mac, own: Settings):
        mac.answers["plutil",] = Answer(1, "", "Unexpected character")
        with pytest.raises(DiffersError, match="Unexpected"):
            Scripted(mac, own)._lint()

    def test_a_missing_tool_is_no_difference(self, mac: Mac, own: Settings, monkeypatch: pytest.MonkeyPatch):
        mac.answers["plutil",] = Answer(127, "", "env: plutil: No such file or directory")
        mac.answers["ps",] = Answer(None, "", "cannot run")
        mac.answers["log", "show"] = Answer(64, "", "admin needed")
        trial = Scripted(mac, own)
        for act in (trial._lint, trial._priority, trial._log_show):
            with pytest.raises(NotTriedError):
                act()
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(NotTriedError, match="pyoslog"):
            trial._log_show()

    def test_nobody_to_be_asked(self, mac: Mac, own: Settings):
        trial = Scripted(mac, own)
        trial._computer = replace(mac.computer(), ask_person=lambda _: False)
        with pytest.raises(NotTriedError):
            trial._sleep()
        assert ("pmset", "sleepnow") not in mac.ran


def test_a_refused_connection_is_noticed():
    client = Client(free_port())
    client.start()
    client.ending.wait(0.1)
    with pytest.raises(DiffersError, match="0 requests answered"):
        client.end()


def test_a_trial_takes_model_and_engine_of_the_owner_and_nothing_else(own: Settings, tmp_path: Path):
    private = replace(own, endpoint=replace(own.endpoint, host="0.0.0.0", api_key="SECRET", port=5001))
    of_trial = settings_of_trial(private, tmp_path, 4321)
    assert (of_trial.model, of_trial.engine.path) == (own.model, own.engine.path)
    assert (of_trial.endpoint.host, of_trial.endpoint.api_key, of_trial.endpoint.port) == ("127.0.0.1", "", 4321)
    assert of_trial.state.directory == str(tmp_path / "state")


def test_the_command_line_comes_before_the_owners_settings(tmp_path: Path):
    config = tmp_path / "config.toml"
    config.write_text('[model]\npath = "/a.gguf"\n[engine]\npath = "/koboldcpp"\n')
    changes = {"model": {"path": "/b.gguf"}, "engine": {"path": "", "kind": ""}}
    settings = service_trial.own_settings(str(config), changes)
    assert (settings.model.path, settings.engine.path) == ("/b.gguf", "/koboldcpp")
