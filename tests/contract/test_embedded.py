from __future__ import annotations

import importlib.util
import json
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contract.targets import LONG_PROMPT, NO_REUSE, without_lock_permission
from engine_process import EngineProcess, free_port, is_port_open, wait_until
from synthetic_gguf import write_gguf, write_not_gguf, write_truncated, write_unknown_architecture

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")

START_S = 60.0
PROMPTLY_S = 5.0
COMMAND = (sys.executable, "-m", "emberd.engine.embedded")
DAEMON = Path(__file__).parents[2] / "daemon"


def start(model: Path, port: int, *more: str, command: tuple[str, ...] = COMMAND) -> EngineProcess:
    words: list[str | Path] = [
        *command,
        "--model",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--context-size",
        "2048",
    ]
    return EngineProcess([*words, *more], environment={"PYTHONPATH": str(DAEMON)})


@contextmanager
def serving(
    model: Path, *more: str, command: tuple[str, ...] = COMMAND
) -> Iterator[tuple[EngineProcess, httpx.Client]]:
    port = free_port()
    with start(model, port, *more, command=command) as process:
        process.wait_for_answer(f"http://127.0.0.1:{port}/health", within_s=START_S)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=60.0, trust_env=False, limits=NO_REUSE
        ) as client:
            yield process, client


@pytest.fixture(scope="module")
def embedded(model: Path) -> Iterator[tuple[EngineProcess, httpx.Client]]:
    """An embedded engine that the tests of this module share."""
    with serving(model, "--load-mode", "mmap") as running:
        yield running


@pytest.fixture
def client(embedded: tuple[EngineProcess, httpx.Client]) -> httpx.Client:
    """Talks to the shared engine."""
    return embedded[1]


def asked(prompt: str, length: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": length, "temperature": 0.0, "ignore_eos": True, **more}


def complete(client: httpx.Client, prompt: str, length: int) -> dict[str, Any]:
    response = client.post("/v1/completions", json=asked(prompt, length))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def is_processing(client: httpx.Client) -> bool:
    return any(slot["is_processing"] for slot in client.get("/slots").json())


def locked_bytes(pid: int) -> int:
    found = re.search(r"VmLck:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) * 1024


def test_nothing_but_refusal_or_503_is_answered_before_the_model_is_loaded(tmp_path: Path) -> None:
    big = write_gguf(tmp_path / "big.gguf", target_bytes=120 << 20).path
    port = free_port()
    url = f"http://127.0.0.1:{port}/health"
    statuses: list[int] = []
    with start(big, port, "--load-mode", "none") as process:
        end = time.monotonic() + START_S
        while 200 not in statuses:
            assert time.monotonic() < end, process.output
            assert process.exit_code is None, process.output
            if is_port_open(port):
                statuses.append(httpx.get(url, timeout=10, trust_env=False).status_code)
        assert set(statuses) <= {200, 503}


def test_health_and_the_model_list_answer_when_ready(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models").json()["data"][0]["id"]
    assert client.get("/props").json()["default_generation_settings"]["n_ctx"] == 2048


def test_a_completion_has_the_length_that_was_asked(client: httpx.Client) -> None:
    answer = complete(client, "ba ke lo", 5)
    assert len(answer["choices"][0]["text"].split()) == 5
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


def test_streams_end_with_a_mark(client: httpx.Client) -> None:
    chat = {"messages": [{"role": "user", "content": "ba ke lo"}], "max_tokens": 4, "ignore_eos": True}
    for path, body in (("/v1/completions", asked("ba ke lo", 4)), ("/v1/chat/completions", chat)):
        with client.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert all(json.loads(line.removeprefix("data: "))["object"] for line in lines[:-1])


def test_the_slot_is_busy_while_a_stream_runs_and_free_when_its_client_leaves(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json=asked("ba ke lo", 1800, stream=True)) as response:
        # An iterator that is dropped closes the connection.
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: is_processing(client))
        assert client.get("/health").status_code == 200
    wait_until(lambda: not is_processing(client), within_s=PROMPTLY_S)


def test_an_unreadable_body_and_an_unknown_path_are_refused(client: httpx.Client) -> None:
    assert client.post("/v1/completions", content=b"{nonsense").status_code in {400, 500}
    assert client.get("/no/such/path").status_code == 404


def test_a_replay_of_prompt_and_reply_keeps_the_cache(client: httpx.Client) -> None:
    first = complete(client, LONG_PROMPT, 20)
    replay = complete(client, LONG_PROMPT + first["choices"][0]["text"], 1)
    assert replay["timings"]["prompt_n"] <= 4
    assert replay["timings"]["cache_n"] > 1000


@pytest.mark.parametrize(
    ("writer", "code"),
    [(None, 2), (write_not_gguf, 3), (write_truncated, 3), (write_unknown_architecture, 3)],
    ids=["missing", "no-gguf", "truncated", "unknown-architecture"],
)
def test_a_bad_model_ends_the_process_with_its_code(tmp_path: Path, writer: object, code: int) -> None:
    path = tmp_path / "bad.gguf"
    if callable(writer):
        writer(path)
    with start(path, free_port()) as process:
        assert process.wait_for_exit(within_s=START_S) == code
        assert "error" in process.stderr


@pytest.mark.parametrize(
    ("sent", "codes"), [(signal.SIGTERM, {-15}), (signal.SIGINT, {-2, 0})], ids=["TERM", "INT"]
)
def test_a_signal_ends_an_idle_process(model: Path, sent: signal.Signals, codes: set[int]) -> None:
    with serving(model) as (process, client):
        assert complete(client, "ba ke", 1)
        process.send(sent)
        assert process.wait_for_exit(within_s=PROMPTLY_S) in codes
        assert not process.group_lives()


@pytest.mark.parametrize(
    ("sent", "codes"),
    [
        (signal.SIGTERM, {-15}),
        (signal.SIGINT, {-2}),
    ],
    ids=["TERM", "INT"],
)
def test_a_signal_ends_it_also_while_it_generates(model: Path, sent: signal.Signals, codes: set[int]) -> None:
    with (
        serving(model) as (process, client),
        client.stream("POST", "/v1/completions", json=asked("ba ke lo", 1800, stream=True)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send(sent)
        assert process.wait_for_exit(within_s=1) in codes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["mlock", "mmap+mlock"])
def test_the_weights_are_locked_when_told_so(model: Path, mode: str) -> None:
    with serving(model, "--load-mode", mode) as (process, client):
        assert complete(client, "ba ke", 1)
        if "failed to mlock" not in process.stderr:
            assert locked_bytes(process.pid) > 0.9 * model.stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="needs tools that take permissions away")
def test_a_refused_lock_is_only_a_warning(model: Path) -> None:
    command = without_lock_permission(COMMAND, 1 << 20)
    if command is None:
        pytest.skip("prlimit or setpriv is missing")
    with serving(model, "--load-mode", "mlock", command=command) as (process, client):
        assert "failed to mlock" in process.output
        assert complete(client, "ba ke", 1)


def test_a_synthetic_mixture_of_experts_loads_and_speaks(tmp_path: Path):
    model = write_gguf(tmp_path / "mixture.gguf", experts=8).path
    with serving(model) as (_, client):
        answer = client.post("/completion", json={"prompt": "ba ke", "n_predict": 4, "temperature": 0}).json()
    assert len(answer["content"].split()) == 4
