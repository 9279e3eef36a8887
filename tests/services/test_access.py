"""The endpoint's doors, of the whole daemon: keys, pages, names, and the engine's own password."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import httpx
import psutil

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

KEY = "correct-horse-battery"
PASSWORD = "engine-password-4711"


def ask(daemon: Daemon, path: str = "/api/v1/generate", **headers: str) -> httpx.Response:
    body = {"prompt": "x", "max_length": 1}
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
