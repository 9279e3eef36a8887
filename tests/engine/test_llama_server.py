"""llama.cpp's server, external and embedded: flags, readiness, and the whole daemon on the real embedded engine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

import emberd
from emberd.core.errors import ConfigError
from emberd.core.reuse import MOST_PROCESSED_TOKENS
from emberd.core.settings import Settings
from emberd.engine.http import EngineHttp
from emberd.engine.llama_server import (
    EmbeddedServer,
    check_arguments,
    check_router,
    check_variables,
    inherited,
    notices_of,
    read_options,
)
from emberd.engine.process import inherited_environment
from emberd.engine.wishes import of_llama_server
from emberd.host import ThisHost
from llama_server_standin import write_program

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon_process import Daemon

needs_xllamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="the embedded engine's wheel is not installed"
)

HELP = """usage: llama-server [options]

----- common params -----

-h,    --help, --usage                  say how it is used
-t,    --threads N                      threads (default: -1)
                                        --not-an-option in a description
-c,    --ctx-size N                     context
-ngl,  --gpu-layers, --n-gpu-layers N   layers
{lock}
-m,    --model FNAME                    model
--host HOST                             address
--port PORT                             port
--no-mmap                               no mapping
--sleep-idle-seconds N                  unload
-v,    --verbose, --log-verbose         more words
"""
NEW_HELP = HELP.format(lock="-lm,   --load-mode MODE                 how to load")
OLD_HELP = HELP.format(lock="--mlock                                 lock")

LLAMA_SERVER_STANDIN = """#!{python}
# A stand-in for llama-server's command line over the real server of the embedded engine.
import sys
HELP = {help!r}
if "--help" in sys.argv:
    print(HELP)
    sys.exit(0)
sys.path.insert(0, {source!r})
from emberd.engine.embedded import main
words = sys.argv[1:]
if "--mlock" in words:
    words[words.index("--mlock"):words.index("--mlock") + 1] = ["--load-mode", "mmap+mlock"]
sys.exit(main(words))
"""


def test_options_are_read_from_the_first_column_only():
    options = read_options(NEW_HELP)
    assert {"-c", "--ctx-size", "-ngl", "--gpu-layers", "--n-gpu-layers", "--load-mode", "-lm"} <= options
    assert "--not-an-option" not in options
    assert "-----" not in options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--thread", "4"], "did you mean --threads?"),
        (["--host", "0.0.0.0"], "127.0.0.1 only"),
        (["--port=1"], "private port"),
        (["--verbose"], "prompts into the log"),
        (["--help"], "starts no server"),
        (["-m", "x"], "model.path"),
        (["--api-prefix", "/x"], "--api-prefix: emberd's questions and its endpoint"),
        (["--ssl-key-file", "x"], "--ssl-key-file: the engine is on 127.0.0.1"),
        (["--ssl-cert-file", "x"], "--ssl-cert-file: the engine is on 127.0.0.1"),
    ],
)
def test_an_argument_that_would_break_the_job_is_refused(words: list[str], message: str):
    with pytest.raises(ConfigError, match=r".") as refused:
        check_arguments(words, read_options(NEW_HELP))
    assert message in refused.value.message


@pytest.mark.parametrize("name", ["LLAMA_ARG_API_PREFIX", "LLAMA_ARG_SSL_KEY_FILE", "LLAMA_ARG_SSL_CERT_FILE"])
def test_a_variable_that_would_break_the_job_is_refused_by_its_name(name: str):
    with pytest.raises(ConfigError, match=f"^{name} in the environment: ") as refused:
        check_variables({name: "x"})
    assert refused.value.remedy == f"Unset {name}."
    check_variables({name: "", "LLAMA_API_KEY": "x"})


@pytest.mark.parametrize(
    ("words", "variables", "named"),
    [
        (["--models-dir", "/m"], {}, "--models-dir"),
        (["--models-preset=/m.ini"], {}, "--models-preset"),
        ([], {"LLAMA_ARG_MODELS_DIR": "/m"}, "LLAMA_ARG_MODELS_DIR in the environment"),
    ],
)
def test_the_router_is_refused_with_the_reason(words: list[str], variables: dict[str, str], named: str):
    with pytest.raises(ConfigError, match=f"^{named}: llama-server's router loads and unloads models") as refused:
        check_router(words, variables)
    assert "Set model.path" in (refused.value.remedy or "")
    check_router(["-c", "512"], {"LLAMA_ARG_MODELS_DIR": ""})


def test_a_router_s_settings_tell_why_it_is_not_served(make_daemon: Callable[..., Daemon], tmp_path: Path):
    """They said only that no model is set."""
    settings = {"engine.kind": "llama-server", "engine.path": str(write_program(tmp_path)), "model.path": ""}
    daemon = make_daemon({**settings, "engine.extra_args": ["--models-dir", str(tmp_path)]})
    daemon.write_settings()
    said = daemon.verb("config", "check")
    assert said.returncode == 78
    assert "--models-dir: llama-server's router loads and unloads models by itself" in said.stderr


def test_arguments_that_undo_keep_warm_are_named():
    notices = notices_of(of_llama_server(["--sleep-idle-seconds", "60", "--no-mmap"], {}))
    assert [notice.code for notice in notices] == ["idle_unloading", "mmap_off"]
    assert notices_of(of_llama_server(["--sleep-idle-seconds", "-1", "--mmap"], {})) == ()


def test_variables_that_the_engine_inherits_are_named_and_those_that_harm_are_kept_from_it(
    monkeypatch: pytest.MonkeyPatch,
):
    harmful = ["LLAMA_ARG_HF_REPO", "LLAMA_ARG_LOG_VERBOSITY", "LLAMA_LOG_FILE", "LLAMA_TRACE"]
    for name in [*harmful, "LLAMA_ARG_CTX_SIZE", "LLAMA_ARG_HF_TOKENS", "LLAMA_ARG_TOP_K"]:
        monkeypatch.setenv(name, "secret" if name != "LLAMA_ARG_TOP_K" else "")
    (notice,) = inherited(os.environ)
    kept, left_out = notice.message.split("; ")
    assert notice.code == "inherited_options"
    assert kept.endswith(": LLAMA_ARG_CTX_SIZE, LLAMA_ARG_HF_TOKENS")
    assert left_out.endswith(": " + ", ".join(harmful))
    assert "secret" not in notice.message
    assert {"LLAMA_ARG_CTX_SIZE", *harmful} & inherited_environment().keys() == {"LLAMA_ARG_CTX_SIZE"}
    assert inherited({"PATH": "/bin"}) == ()


@pytest.fixture
def llama_server(tmp_path: Path) -> Callable[[str], Path]:
    def write(help_text: str) -> Path:
        path = tmp_path / "llama-server"
        source = str(Path(emberd.__file__).parents[1])
        path.write_text(LLAMA_SERVER_STANDIN.format(python=sys.executable, help=help_text, source=source))
        path.chmod(0o755)
        return path

    return write


@needs_xllamacpp
@pytest.mark.parametrize(
    ("help_text", "lock"), [(NEW_HELP, ["--load-mode", "mmap+mlock"]), (OLD_HELP, ["--mlock"])]
)
def test_an_external_server_is_locked_by_what_its_help_offers(
    make_daemon: Callable[..., Daemon], llama_server: Callable[[str], Path], help_text: str, lock: list[str]
):
    daemon = make_daemon(
        {"engine.kind": "llama-server", "engine.path": str(llama_server(help_text)), "engine.context_size": 256}
    )
    daemon.start()
    command = daemon.wait_ready()["engine"]["command"]
    assert command[command.index(lock[0]) :][: len(lock)] == lock
    assert complete(daemon)


@needs_xllamacpp
def test_the_embedded_engine_serves_survives_a_kill_and_is_adopted(make_daemon: Callable[..., Daemon]):
    daemon = make_daemon({"engine.kind": "embedded", "engine.path": "", "engine.context_size": 256})
    daemon.start()
    first = daemon.wait_ready()["engine"]["pid"]
    assert "--load-mode" in daemon.status()["engine"]["command"]
    text = complete(daemon)
    os.kill(first, signal.SIGKILL)
    assert complete(daemon) == text
    second = daemon.wait_ready(other_than=first)["engine"]["pid"]
    daemon.kill()
    daemon.start()
    adopted = daemon.wait_ready()
    assert (adopted["engine"]["pid"], adopted["engine"]["adopted"]) == (second, True)
    assert complete(daemon) == text
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0


@needs_xllamacpp
def test_each_of_several_conversations_is_kept_in_its_own_slot(
    make_daemon: Callable[..., Daemon], llama_server: Callable[[str], Path]
):
    help_text = NEW_HELP + "--parallel N                            slots\n"
    daemon = make_daemon(
        {
            "engine.kind": "llama-server",
            "engine.path": str(llama_server(help_text)),
            "engine.extra_args": ["--parallel", "2"],
            "engine.context_size": 2048,
            "warmth.mode": "auto",
            "warmth.min_interval_s": 1.0,
            "warmth.max_interval_s": 1.0,
        }
    )
    daemon.start()
    port = daemon.wait_ready()["engine"]["port"]

    def tasks() -> dict[int, int]:
        slots = httpx.get(f"http://127.0.0.1:{port}/slots", timeout=30, trust_env=False).json()
        return {slot["id"]: slot["id_task"] for slot in slots}

    def new_tokens(prompt: str) -> int:
        body = {"prompt": prompt, "n_predict": 4, "temperature": 0}
        answer = httpx.post(f"{daemon.url}/completion", json=body, timeout=60, trust_env=False).json()
        count: int = answer["timings"]["prompt_n"]
        return count

    talks = [" ".join(["ba", "ke", "li", "mo"] * 40), " ".join(["zu", "wo", "xe", "ny"] * 40)]
    assert min(map(new_tokens, talks)) > 100
    before = tasks()
    assert len(before) == 2
    daemon.wait_for(lambda _: all(task > before[slot] for slot, task in tasks().items()), "a replay in each slot")
    assert max(map(new_tokens, talks)) < 10, "a replay took the other conversation's slot"


@needs_xllamacpp
def test_conversations_that_do_not_fit_into_the_cells_together_are_not_replayed_together(
    make_daemon: Callable[..., Daemon], tmp_path: Path
):
    """Four replays of 720 tokens into 1,024 cells threw each other out, pass after pass."""
    daemon = make_daemon(
        {
            "engine.kind": "llama-server",
            "engine.path": str(write_program(tmp_path)),
            "engine.extra_args": ["--threads", "1"],
            "engine.context_size": 1024,
            "warmth.mode": "auto",
            "warmth.min_interval_s": 1.0,
            "warmth.max_interval_s": 1.0,
        }
    )
    daemon.start()
    daemon.wait_ready()

    def say(word: str) -> dict[str, Any]:
        body = {"prompt": f"{word} " + " ".join(["ba", "ke", "li", "mo"] * 180), "n_predict": 4, "temperature": 0}
        answer = httpx.post(f"{daemon.url}/completion", json=body, timeout=60, trust_env=False).json()
        timings: dict[str, Any] = answer["timings"]
        return timings

    for word in ("zu", "wo", "xe", "ny"):
        assert say(word)["prompt_n"] > 600
    done = len(daemon.events("keepwarm"))
    daemon.wait_for(lambda _: len(daemon.events("keepwarm")) >= done + 4, "four passes")
    warmth = daemon.status()["warmth"]
    assert warmth["reuse"]["misses"] == 0
    assert warmth["reuse"]["last_replay"]["processed"] <= MOST_PROCESSED_TOKENS
    assert warmth["cost"]["processed_tokens"] < 400, "others than the latest one were replayed"
    assert say("ny")["prompt_n"] <= MOST_PROCESSED_TOKENS, "the latest one is never lost"


@needs_xllamacpp
def test_requests_that_wait_for_a_slot_leave_the_embedded_engine_able_to_answer(make_daemon: Callable[..., Daemon]):
    """With its own choice of five threads, five waiting requests would silence /health for as long."""
    daemon = make_daemon({"engine.kind": "embedded", "engine.path": "", "engine.context_size": 16_384})
    daemon.start()
    port = daemon.wait_ready()["engine"]["port"]
    body = {"prompt": "Once", "n_predict": 16_000, "ignore_eos": True}
    with ThreadPoolExecutor(12) as pool, httpx.Client(trust_env=False, timeout=60) as client:
        waiting = [pool.submit(client.post, f"{daemon.url}/completion", json=body) for _ in range(12)]
        daemon.wait_for(lambda status: status["requests_in_flight"] == 12, "twelve requests in flight")
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).json() == {"status": "ok"}
        assert not any(each.done() for each in waiting[1:])
        daemon.signal(signal.SIGTERM)
        daemon.signal(signal.SIGTERM)


def test_paths_that_are_not_there_are_one_error_before_the_start(
    make_daemon: Callable[..., Daemon], tmp_path: Path
):
    """`config check` called the settings good, and the engine ended at each start."""
    words = ["--chat-template-file", "t.jinja", "--mmproj", "~", "--api-key-file", "keys"]
    settings = {"engine.kind": "llama-server", "engine.path": str(write_program(tmp_path))}
    daemon = make_daemon({**settings, "engine.extra_args": words})
    daemon.write_settings()
    said = daemon.verb("config", "check")
    folder = daemon.config.parent
    assert said.returncode == 78
    assert f"--chat-template-file {folder}/t.jinja: not found" in said.stderr
    assert f"--api-key-file {folder}/keys: not found" in said.stderr
    assert f"--mmproj {Path.home()}: Is a directory" in said.stderr


def complete(daemon: Daemon) -> str:
    """Stream a completion and return its text."""
    text = ""
    body: dict[str, Any] = {"prompt": "a b c", "max_tokens": 8, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{daemon.url}/v1/completions", json=body, timeout=40, trust_env=False) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


@needs_xllamacpp
def test_settings_that_the_embedded_engine_does_not_know_are_refused(make_daemon: Callable[..., Daemon]):
    daemon = make_daemon({"engine.kind": "embedded", "engine.extra_args": ["--quiet"]})
    daemon.start()
    assert daemon.end() == 78
    assert "mean nothing to the embedded engine" in daemon.log.read_text()


@pytest.mark.parametrize(
    ("line", "loads"),
    [
        ("0.14 I srv  handle_sleep: server is entering sleeping state", True),
        ("0.23 I srv  handle_sleep: server is exiting sleeping state", True),
        ("0.15 I srv  update_slots: all slots are idle", False),
    ],
)
def test_both_ends_of_a_sleep_are_recognised(line: str, loads: bool):  # parametrized
    assert EmbeddedServer(Settings(), ThisHost(), EngineHttp()).loads_again(line) is loads
