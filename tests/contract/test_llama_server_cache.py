"""What llama.cpp's server tells of its prompt cache, and what its slots do to each other."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contract.targets import NO_REUSE
from emberd.core.load_facts import LoadFacts
from emberd.core.reuse import MOST_PROCESSED_TOKENS
from emberd.engine import llama_log
from emberd.engine.http import EngineHttp
from emberd.engine.llama_server import ExternalServer
from engine_process import EngineProcess, free_port
from llama_server_standin import REAL_VARIABLE, real_program, write_program
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from emberd.core.turn import PromptCounts

START_S = 90.0
CELLS = 1024
ADAPTER: Any = ExternalServer(None, None, EngineHttp(), None)  # type: ignore[arg-type]  # only what replies tell
STORY = " ".join(["ba ke lo mi"] * 90)
"""About 360 tokens for the synthetic model: three conversations of it do not fit into the cells."""

needs_xllamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="the embedded engine's wheel is not installed"
)
needs_real = pytest.mark.skipif(real_program() is None, reason=f"{REAL_VARIABLE} names no llama-server")


class Server:
    """A llama-server that runs."""

    def __init__(self, process: EngineProcess, client: httpx.Client) -> None:
        self.process = process
        self.client = client

    def say(self, prompt: str, length: int = 1) -> tuple[str, PromptCounts]:
        """Complete a text; return the reply, and what the adapter reads of its counts."""
        body = {"prompt": prompt, "n_predict": length, "temperature": 0, "cache_prompt": True, "ignore_eos": True}
        answer = self.client.post("/completion", json=body)
        assert answer.status_code == 200, answer.text
        content: dict[str, Any] = answer.json()
        return content["content"], ADAPTER.counts_in_reply(content)


@pytest.fixture(
    scope="module", params=[pytest.param("standin", marks=needs_xllamacpp), pytest.param("real", marks=needs_real)]
)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program under test."""
    if request.param == "real":
        found = real_program()
        assert found is not None
        return found
    return write_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of noise."""
    return write_gguf(tmp_path_factory.mktemp("model") / "noise.gguf", target_bytes=12 << 20).path


@pytest.fixture
def server(request: pytest.FixtureRequest, program: Path, model: Path) -> Iterator[Server]:
    """A fresh server, with the options that the test names."""
    port = free_port()
    words = [
        "--model",
        str(model),
        "--ctx-size",
        str(CELLS),
        "--threads",
        "1",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with EngineProcess([str(program), *words, *getattr(request, "param", [])]) as process:
        url = f"http://127.0.0.1:{port}"
        process.wait_for_answer(url + "/health", within_s=START_S)
        with httpx.Client(base_url=url, timeout=60, trust_env=False, limits=NO_REUSE) as client:
            yield Server(process, client)


def test_replies_tell_what_was_reused_and_processed(server: Server):
    reply, first = server.say(STORY, 8)
    assert first.reused == 0
    assert first.processed is not None
    assert first.processed > 300
    assert first.generated == 8
    _, again = server.say(STORY + reply)
    assert again.prompt is not None
    assert again.prompt >= first.processed
    assert again.processed is not None
    assert again.processed <= MOST_PROCESSED_TOKENS


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_openai_s_replies_tell_it_too(server: Server, path: str, is_streamed: bool):
    asked: dict[str, Any] = {"max_tokens": 3, "stream": is_streamed, "temperature": 0}
    asked |= {"prompt": STORY} if path == "/v1/completions" else {"messages": [{"role": "user", "content": STORY}]}
    found = []
    for _ in range(2):
        with server.client.stream("POST", path, json=asked) as answer:
            answer.read()
            lines = answer.text.splitlines() if is_streamed else [f"data: {answer.text}"]
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
        told = [httpx.Response(200, content=event).json() for event in events]
        found.append(ADAPTER.counts_in_reply(next(each for each in reversed(told) if "timings" in each)))
    assert found[0].reused == 0
    assert found[1].processed <= MOST_PROCESSED_TOKENS
    assert found[1].reused > 300


def test_four_slots_share_the_cells_unless_told_and_the_log_says_so(server: Server):
    props = server.client.get("/props").json()
    assert props["total_slots"] == 4
    assert props["default_generation_settings"]["n_ctx"] == CELLS, "each could take all of them"
    assert is_shared(server) is True


@pytest.mark.parametrize("server", [["--parallel", "4", "--no-kv-unified"]], indirect=True)
def test_slots_with_cells_of_their_own_have_a_share_of_the_context(server: Server):
    assert server.client.get("/props").json()["default_generation_settings"]["n_ctx"] == CELLS // 4
    assert is_shared(server) is False


def is_shared(server: Server) -> bool | None:
    facts = LoadFacts()
    for line in server.process.output.splitlines():
        facts = llama_log.note(facts, line)
    return facts.is_cache_shared


def test_conversations_that_fit_together_are_all_kept(server: Server):
    tales = [f"{word} {STORY}" for word in ("xu", "pa")]
    so_far = [tale + server.say(tale, 4)[0] for tale in tales]
    for _ in range(2):
        for tale in so_far:
            assert (server.say(tale)[1].processed or 0) <= MOST_PROCESSED_TOKENS


def test_conversations_that_do_not_fit_together_throw_each_other_out(server: Server):
    tales = [f"{word} {STORY} {STORY}" for word in ("xu", "pa", "ti", "du")]
    for tale in tales:
        server.say(tale, 4)
    processed = [server.say(tale)[1].processed or 0 for tale in tales * 2]
    assert sum(each > MOST_PROCESSED_TOKENS for each in processed) >= len(tales), processed
