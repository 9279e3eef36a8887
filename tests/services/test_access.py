"""The endpoint's doors, of the whole daemon: keys, pages, names, and the engine's own password."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from llama_server_standin import REAL_VARIABLE, real_program, write_program

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

KEY = "correct-horse-battery"
PASSWORD = "engine-password-4711"


PROGRAMS = [
    pytest.param(
        "standin",
        marks=pytest.mark.skipif(find_spec("xllamacpp") is None, reason="the embedded engine's wheel is missing"),
    ),
    pytest.param(
        "real", marks=pytest.mark.skipif(real_program() is None, reason=f"{REAL_VARIABLE} names no llama-server")
    ),
]


@pytest.fixture
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """A llama-server, real or played."""
    return real_program() if request.param == "real" else write_program(tmp_path)


def ask(daemon: Daemon, path: str = "/api/v1/generate", **headers: str) -> httpx.Response:
    body = {"prompt": "x", "max_length": 1, "n_predict": 1}  # KoboldCPP's name, and llama.cpp's
    return httpx.post(daemon.url + path, json=body, headers=headers, timeout=30, trust_env=False)


def key_file(folder: Path, mode: int = 0o600) -> str:
    path = folder / "key"
    path.write_text(f"{KEY}\n")
    path.chmod(mode)
    return str(path)


def test_a_key_is_wanted_by_the_endpoint_and_kept_from_everybody_else(make_daemon: MakeDaemon, tmp_path: Path):
    daemon = make_daemon({"endpoint.api_key_file": key_file(tmp_path)})
    daemon.start()
    daemon.wait_ready()
    refused = ask(daemon)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "wrong_key")
    assert ask(daemon, "/api/chat").json()["error"].startswith("the API key is missing")
    assert ask(daemon, authorization=f"Bearer {KEY}").status_code == 200
    for path in ("healthz", "readyz"):
        assert httpx.get(f"{daemon.url}/emberd/{path}", timeout=5, trust_env=False).status_code == 200
    assert daemon.wait_event("request_refused")["reason"] == "wrong_key"
    everything = (
        daemon.log.read_text() + daemon.verb("status", "--json").stdout + daemon.verb("config", "show").stdout
    )
    assert KEY not in everything
    assert daemon.child is not None
    assert KEY not in " ".join(psutil.Process(daemon.child.pid).cmdline())


def test_the_engines_password_is_kept_off_its_command_line_and_sent_for_the_client(
    make_daemon: MakeDaemon, tmp_path: Path
):
    daemon = make_daemon(
        {"endpoint.api_key_file": key_file(tmp_path), "engine.extra_args": ["--password", PASSWORD]}
    )
    daemon.start()
    status = daemon.wait_ready()
    assert ask(daemon, authorization=f"Bearer {KEY}").status_code == 200
    assert PASSWORD not in " ".join(psutil.Process(status["engine"]["pid"]).cmdline())
    assert PASSWORD not in daemon.log.read_text() + json.dumps(status) + daemon.state.output.read_text()
    direct = httpx.post(f"http://127.0.0.1:{status['engine']['port']}/api/v1/generate", json={}, timeout=5)
    assert direct.status_code == 401


def test_without_a_key_of_emberds_the_engines_own_password_counts(make_daemon: MakeDaemon):
    daemon = make_daemon({"engine.extra_args": ["--password", PASSWORD]})
    daemon.start()
    daemon.wait_ready()
    assert ask(daemon).status_code == 401
    assert ask(daemon, authorization=f"Bearer {PASSWORD}").status_code == 200


@pytest.mark.parametrize("program", PROGRAMS, indirect=True)
@pytest.mark.parametrize("named", ["argument", "file", "variable"])
def test_llama_servers_key_is_kept_off_its_command_line_and_used_for_emberds_own_questions(
    make_daemon: MakeDaemon, tmp_path: Path, program: Path, named: str
):
    keys = tmp_path / "keys"
    keys.write_text(f"# mine\n{PASSWORD}\n")
    words = {"argument": ["--api-key", f"{PASSWORD},other"], "file": ["--api-key-file", str(keys)]}.get(named, [])
    daemon = make_daemon(
        {
            "endpoint.api_key_file": key_file(tmp_path),
            "engine.kind": "llama-server",
            "engine.path": str(program),
            "engine.extra_args": [*words, "--threads", "1"],
            "engine.context_size": 512,
            "warmth.mode": "auto",
        }
    )
    if named == "variable":
        daemon.environment["LLAMA_API_KEY"] = PASSWORD
    daemon.start()
    status = daemon.wait_ready()
    body = {"prompt": "ba ke lo " * 20, "n_predict": 1}

    def post(url: str, key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{url}/completion", json=body, headers=headers, timeout=30, trust_env=False).status_code

    direct = f"http://127.0.0.1:{status['engine']['port']}"
    assert [post(daemon.url, KEY), post(daemon.url, PASSWORD)] == [200, 401]
    assert [post(direct, PASSWORD), post(direct, KEY)] == [200, 401]
    assert "replay" in daemon.verb("warm").stdout
    seen = psutil.Process(status["engine"]["pid"])
    assert PASSWORD not in " ".join(seen.cmdline())
    shown = daemon.log.read_text() + json.dumps(daemon.status()) + daemon.state.output.read_text()
    assert PASSWORD not in shown
    daemon.kill()
    daemon.start()
    assert daemon.wait_ready()["engine"]["pid"] == seen.pid, "it is adopted, and asked with its key"


@pytest.mark.parametrize("program", PROGRAMS, indirect=True)
def test_without_a_key_of_emberds_llama_servers_own_counts(make_daemon: MakeDaemon, program: Path):
    settings = {"engine.kind": "llama-server", "engine.path": str(program), "engine.context_size": 512}
    daemon = make_daemon({**settings, "engine.extra_args": ["--api-key", PASSWORD]})
    daemon.start()
    daemon.wait_ready()
    assert ask(daemon, "/completion").status_code == 401
    assert ask(daemon, "/completion", authorization=f"Bearer {PASSWORD}").status_code == 200


@pytest.mark.parametrize("program", PROGRAMS, indirect=True)
@pytest.mark.parametrize("named", ["argument", "variable"])
def test_keys_from_a_file_of_windows_serve_each_of_its_clients(
    make_daemon: MakeDaemon, tmp_path: Path, program: Path, named: str
):
    """llama-server keeps byte order mark and carriage return as parts of the keys, and was never READY."""
    keys = tmp_path / "keys"
    keys.write_bytes(b"\xef\xbb\xbf# mine\r\n" + f"{PASSWORD}\r\n\r\none,with a comma\r\nlast \r\n".encode())
    words = ["--api-key-file", str(keys)] if named == "argument" else ["--api-key", "fourth"]
    settings = {"engine.kind": "llama-server", "engine.path": str(program), "engine.context_size": 512}
    daemon = make_daemon({**settings, "engine.extra_args": words})
    if named == "variable":
        daemon.environment["LLAMA_ARG_API_KEY_FILE"] = str(keys)
    daemon.start()
    status = daemon.wait_ready()

    def answer(key: str) -> int:
        return ask(daemon, "/completion", authorization=f"Bearer {key}").status_code

    right = [PASSWORD, "one,with a comma", "last"] + ["fourth"] * (named == "variable")
    assert [answer(key) for key in right] == [200] * len(right)
    assert [answer(key) for key in ("one", "with a comma", "# mine")] == [401] * 3
    assert PASSWORD not in " ".join(psutil.Process(status["engine"]["pid"]).cmdline())
    (written,) = (
        each
        for each in daemon.state.directory.iterdir()
        if each.is_file() and PASSWORD in each.read_text(errors="ignore")
    )
    assert (written.name, written.stat().st_mode & 0o777) == ("engine-keys", 0o600)


def test_a_file_of_keys_that_cannot_be_read_is_named(make_daemon: MakeDaemon, tmp_path: Path):
    settings = {"engine.kind": "llama-server", "engine.path": str(write_program(tmp_path))}
    daemon = make_daemon({**settings, "engine.extra_args": ["--api-key-file", str(tmp_path / "none")]})
    daemon.start()
    assert daemon.end() == 78
    assert f"--api-key-file {tmp_path}/none: not found" in daemon.log.read_text()


def test_emberds_own_key_is_not_in_the_engines_environment(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.environment["EMBERD_API_KEY"] = KEY
    daemon.start()
    pid = daemon.wait_ready()["engine"]["pid"]
    assert KEY not in psutil.Process(pid).environ().values()
    assert ask(daemon, authorization=f"Bearer {KEY}").status_code == 200


def test_koboldcpps_password_can_come_from_the_environment(make_daemon: MakeDaemon):
    daemon = make_daemon({"warmth.mode": "auto"}, STANDIN_VERSION="1.115.1", KCPP_PASSWORD=PASSWORD)
    daemon.start()
    daemon.wait_ready()
    assert ask(daemon).status_code == 401
    assert ask(daemon, authorization=f"Bearer {PASSWORD}").status_code == 200
    assert "replay" in daemon.verb("warm").stdout
    assert not daemon.events("replay_refused")


def test_foreign_pages_and_rebound_names_are_refused_before_the_engine_hears_of_them(make_daemon: MakeDaemon):
    daemon = make_daemon({"endpoint.origins": ["https://lite.koboldai.net"], "endpoint.names": ["studio.local"]})
    daemon.start()
    daemon.wait_ready()
    assert ask(daemon, origin="https://evil.example").status_code == 403
    assert ask(daemon, host="evil.example").json()["error"]["code"] == "foreign_host"
    assert ask(daemon, origin="https://lite.koboldai.net").status_code == 200
    assert ask(daemon, host="studio.local").status_code == 200
    assert daemon.status()["requests_in_flight"] == 0


def test_listening_for_others_without_a_key_is_refused_with_the_remedy(make_daemon: MakeDaemon):
    daemon = make_daemon({"endpoint.host": "0.0.0.0"})  # that is the point
    daemon.start()
    assert daemon.end() == 78
    assert "can be reached by other computers, and there is no API key" in daemon.log.read_text()
    assert "Set endpoint.api_key_file" in daemon.verb("config", "check").stderr


def test_a_key_that_others_can_read_is_refused(make_daemon: MakeDaemon, tmp_path: Path):
    daemon = make_daemon({"endpoint.api_key_file": key_file(tmp_path, 0o644)})
    daemon.start()
    assert daemon.end() == 78
    assert f"chmod 600 {tmp_path / 'key'}" in daemon.log.read_text()
    inline = make_daemon({"endpoint.api_key": KEY})
    inline.write_settings()
    said = inline.verb("config", "check")
    assert (said.returncode, "can be read by others" in said.stderr) == (78, True)
    inline.config.chmod(0o600)
    shown = inline.verb("config", "show", "--json").stdout
    assert KEY not in shown
    assert json.loads(shown)["endpoint"]["api_key"] == "********"


def test_a_key_of_the_environment_counts_also_after_a_reload(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.environment["EMBERD_API_KEY"] = KEY
    daemon.start()
    daemon.wait_ready()
    assert ask(daemon).status_code == 401
    assert daemon.verb("reload").returncode == 0
    assert ask(daemon, authorization=f"Bearer {KEY}").status_code == 200
