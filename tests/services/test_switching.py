"""The engine's files, and another model while it runs: followed, kept by a restart, and told."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from page_cache import on_linux
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

pytestmark = on_linux


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of --admin with another model, and settings files that load it."""
    made = tmp_path / "admin"
    made.mkdir()
    write_gguf(made / "other.gguf", seed=1)
    content = {"model_param": str(made / "other.gguf"), "contextsize": 1024, "usemmap": True}
    (made / "other.kcpps").write_text(json.dumps(content))
    (made / "broken.kcpps").write_text(json.dumps({"model_param": str(made / "missing.gguf")}))
    return made


def admin(make_daemon: MakeDaemon, folder: Path, **settings: Any) -> Daemon:
    words = ["--admin", "--admindir", str(folder)]
    return make_daemon({"engine.extra_args": words, "engine.lock": "always", **settings})


def switch(daemon: Daemon, filename: str) -> None:
    asked = httpx.post(f"{daemon.url}/api/admin/reload_config", json={"filename": filename}, trust_env=False)
    assert asked.json() == {"success": True}


def serves(daemon: Daemon, name: str) -> dict[str, Any]:
    return daemon.wait_for(
        lambda status: status["state"] == "READY" and status["serving"]["name"] == name, f"{name} served"
    )


def held(status: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(each["path"].rpartition("/")[2], each["role"], each["held"]) for each in status["files"]]


def test_every_file_is_told_counted_and_locked(make_daemon: MakeDaemon, tmp_path: Path, model: Path):
    draft, projector = tmp_path / "draft.gguf", tmp_path / "projector.gguf"
    write_gguf(draft, seed=1)
    write_gguf(projector, seed=2)
    words = ["--draftmodel", str(draft), "--mmproj", str(projector)]
    daemon = make_daemon({"engine.extra_args": words, "engine.lock": "always"})
    daemon.start()
    status = daemon.wait_ready()
    assert held(status) == [
        (model.name, "model", "mapped"),
        ("draft.gguf", "draft", "mapped"),
        ("projector.gguf", "projector", "copied"),
    ]
    sizes = model.stat().st_size, draft.stat().st_size
    for each, size in zip(status["files"], sizes, strict=False):
        assert each["size_bytes"] == size
        assert each["resident_bytes"] >= size
        assert each["locked_bytes"] >= size
    assert status["files"][2]["resident_bytes"] is None
    assert status["residency"]["total_bytes"] >= sum(sizes)
    assert status["lock"]["state"] == "HELD"
    assert status["lock"]["needed_bytes"] > sizes[0]
    told = daemon.verb("status").stdout
    assert "projector.gguf: projector" in told
    assert "only use" in told
    shown = json.loads(daemon.verb("residency", "--json").stdout)
    assert shown["files"] == [str(model), str(draft)]
    assert len(shown["engine_files"]) == 3
    assert f"projector {projector}" in daemon.verb("doctor", "--json").stdout
    touched = json.loads(daemon.verb("touch", "--json").stdout)
    assert touched["files"] == [str(model), str(draft)]


def test_a_missing_file_is_one_clear_error_before_the_start(make_daemon: MakeDaemon):
    words = ["--mmproj", "gone.gguf", "--lora", "~/gone-too.gguf"]
    daemon = make_daemon({"engine.extra_args": words})
    daemon.write_settings()
    checked = daemon.verb("config", "check")
    assert checked.returncode == 78
    assert f"--mmproj {daemon.folder}/gone.gguf: not found" in checked.stderr
    assert f"--lora {os.path.expanduser('~')}/gone-too.gguf: not found" in checked.stderr  # noqa: PTH111
    assert "ENGINE_REFUSES" in daemon.verb("doctor").stdout
    daemon.write_settings(engine__extra_args=[*words, "--ignoremissing"])
    assert daemon.verb("config", "check").returncode == 0


def test_a_switch_is_followed(make_daemon: MakeDaemon, folder: Path, model: Path):
    daemon = admin(make_daemon, folder)
    daemon.start()
    before = daemon.wait_ready()
    assert before["serving"]["is_of_settings"]
    switch(daemon, "other.kcpps")
    status = serves(daemon, "koboldcpp/other")
    assert status["serving"] == {
        "name": "koboldcpp/other",
        "model": str(folder / "other.gguf"),
        "is_of_settings": False,
        "switched_by": "other.kcpps",
        "survives_restart": True,
    }
    assert status["model"] == str(model)
    assert held(status) == [("other.gguf", "model", "mapped")]
    assert status["engine"]["pid"] == before["engine"]["pid"]
    assert (status["lock"]["state"], status["lock"]["reason"]) == ("ABSENT", "not_asked")
    told = daemon.verb("status").stdout
    assert "other.gguf (switched by other.kcpps" in told
    assert f"the settings: {model.name}" in told
    assert daemon.wait_event("model_switched")["config"] == "other.kcpps"
    assert "ENGINE_SWITCHED" in daemon.verb("doctor", "--json").stdout


def test_a_restart_keeps_a_switch_with_emberds_own_options(make_daemon: MakeDaemon, folder: Path):
    daemon = admin(make_daemon, folder, **{"engine.context_size": 2048})
    daemon.start()
    daemon.wait_ready()
    switch(daemon, "other.kcpps")
    pid = serves(daemon, "koboldcpp/other")["engine"]["pid"]
    os.kill(pid, signal.SIGKILL)
    status = daemon.wait_ready(other_than=pid)
    assert status["serving"]["switched_by"] == "other.kcpps"
    assert status["lock"]["state"] == "HELD"
    assert "--quiet" in status["engine"]["command"]
    told = httpx.get(f"{daemon.url}/api/extra/true_max_context_length", trust_env=False)
    assert told.json() == {"value": 1024}
    # An adopted engine that was restarted with a switch is not restarted for it.
    daemon.kill()
    daemon.start()
    adopted = daemon.wait_ready()
    assert adopted["engine"]["pid"] == status["engine"]["pid"]
    assert adopted["serving"]["switched_by"] == "other.kcpps"
    # New settings are a newer wish than the switch.
    daemon.write_settings(engine__context_size=4096)
    assert json.loads(daemon.verb("reload", "--json").stdout)["engine_restarts"]
    status = daemon.wait_ready(other_than=status["engine"]["pid"])
    assert status["serving"]["is_of_settings"]


def test_an_unloaded_engine_is_ready_and_left_alone(make_daemon: MakeDaemon, folder: Path):
    daemon = admin(make_daemon, folder, **{"warmth.mode": "auto"})
    daemon.start()
    pid = daemon.wait_ready()["engine"]["pid"]
    switch(daemon, "unload_model")
    status = serves(daemon, "")
    assert (status["engine"]["pid"], status["files"], status["lock"]) == (pid, [], None)
    assert "it was unloaded" in daemon.verb("status").stdout
    assert "nothing done" in daemon.verb("warm").stdout
    switch(daemon, "other.gguf")
    status = serves(daemon, "koboldcpp/other")
    assert status["serving"]["switched_by"] == "other.gguf"
    assert held(status) == [("other.gguf", "model", "copied")]


def test_a_switch_that_fails_ends_with_the_model_of_the_settings(make_daemon: MakeDaemon, folder: Path):
    daemon = admin(make_daemon, folder)
    daemon.start()
    daemon.wait_ready()
    switch(daemon, "broken.kcpps")
    daemon.wait_event("model_switched")
    assert daemon.wait_ready()["serving"]["is_of_settings"]


def test_a_switch_without_emberd_is_found_by_what_the_engine_maps(make_daemon: MakeDaemon, folder: Path):
    daemon = admin(make_daemon, folder)
    daemon.start()
    engine = daemon.wait_ready()["engine"]
    daemon.kill()
    asked = httpx.post(
        f"http://127.0.0.1:{engine['port']}/api/admin/reload_config",
        json={"filename": "other.kcpps"},
        trust_env=False,
    )
    assert asked.json() == {"success": True}
    name = f"http://127.0.0.1:{engine['port']}/api/v1/model"
    while not is_called(name, "koboldcpp/other"):
        pass
    daemon.start()
    status = serves(daemon, "koboldcpp/other")
    assert status["serving"]["model"] == str(folder / "other.gguf")
    assert status["serving"]["switched_by"] is None
    assert not status["serving"]["is_of_settings"]
    assert held(status)[0] == ("other.gguf", "model", "mapped")


def is_called(address: str, name: str) -> bool:
    try:
        return httpx.get(address, trust_env=False, timeout=5).json() == {"result": name}
    except httpx.HTTPError:
        return False


# --- the worker dies, and the process that supervises it lives on ------------------------------------------------

WORDS = 40


def worker_of(engine: dict[str, Any]) -> int:
    """Return the process that serves: the one that listens on the engine's port."""
    for each in psutil.Process(engine["pid"]).children(recursive=True):
        if any(it.status == "LISTEN" and it.laddr.port == engine["port"] for it in each.net_connections("tcp")):
            return each.pid
    raise AssertionError("nobody listens")


def text_across_the_death(daemon: Daemon, worker: int, then: Callable[[], None] = lambda: None) -> str:
    """Stream a chat, kill the worker after some words, and return the words of the whole stream."""
    body = {"messages": [{"role": "user", "content": "ba ke"}], "max_tokens": WORDS, "stream": True}
    words: list[str] = []
    with httpx.stream(
        "POST", f"{daemon.url}/v1/chat/completions", json=body, timeout=60, trust_env=False
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                words.append(json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or "")
            if len(words) == 5 and line:
                os.kill(worker, signal.SIGKILL)
                then()
    assert line in {"", "data: [DONE]"}
    return "".join(words)


def test_a_reply_goes_on_when_the_supervising_process_outlives_the_worker(make_daemon: MakeDaemon, folder: Path):
    daemon = admin(make_daemon, folder)
    daemon.environment["STANDIN_TOKEN_MS"] = "30"
    daemon.start()
    daemon.wait_ready()
    switch(daemon, "other.kcpps")
    before = serves(daemon, "koboldcpp/other")["engine"]
    text = text_across_the_death(daemon, worker_of(before))
    assert len(text.split()) == WORDS
    assert daemon.events("reply_cut")
    assert len(daemon.events("reply_continued")) == 1
    after = daemon.wait_ready()
    assert after["engine"]["pid"] == before["pid"], "it has started another worker by itself"
    assert not daemon.events("supervisor_bug")


def test_a_reply_goes_on_when_the_worker_dies_before_the_supervising_process_can_see_it(
    make_daemon: MakeDaemon, folder: Path
):
    daemon = admin(make_daemon, folder)
    daemon.environment["STANDIN_TOKEN_MS"] = "30"
    daemon.start()
    engine = daemon.wait_ready()["engine"]

    def then() -> None:
        daemon.wait_event("reply_cut")
        os.kill(engine["pid"], signal.SIGCONT)

    worker = worker_of(engine)
    os.kill(engine["pid"], signal.SIGSTOP)
    assert len(text_across_the_death(daemon, worker, then).split()) == WORDS
    assert daemon.wait_ready(other_than=engine["pid"])
