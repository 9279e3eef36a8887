"""What llama.cpp's server tells of its prompt cache, and what its slots do to each other."""

from __future__ import annotations

import base64
import importlib.util
import json
import struct
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contract.targets import NO_REUSE
from emberd.core.generation import recognise
from emberd.core.load_facts import LoadFacts
from emberd.core.replay import make_replays, tiny
from emberd.core.reuse import MOST_PROCESSED_TOKENS
from emberd.core.settings import Settings
from emberd.core.streamed import StreamedReply
from emberd.core.turn import UNTOLD, messages_of
from emberd.engine import llama_log
from emberd.engine.http import EngineHttp
from emberd.engine.llama_server import ExternalServer
from emberd.services.turns import Ended
from engine_process import EngineProcess, free_port
from llama_server_standin import REAL_VARIABLE, real_program, write_program
from synthetic_gguf import write_gguf, write_projector

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from emberd.core.turn import PromptCounts, Turn

START_S = 90.0
CELLS = 1024
PROJECTOR = "projector.gguf"
ADAPTER: Any = ExternalServer(Settings(), None, EngineHttp(), None, None)  # type: ignore[arg-type]  # asks, starts none
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
    """A small model of noise, with a projector beside it."""
    made = write_gguf(tmp_path_factory.mktemp("model") / "noise.gguf", target_bytes=12 << 20, fills_in=True)
    write_projector(made.path.with_name(PROJECTOR), embedding=made.embedding)
    return made.path


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
    more = [str(model.with_name(word)) if word == PROJECTOR else word for word in getattr(request, "param", [])]
    with EngineProcess([str(program), *words, *more]) as process:
        url = f"http://127.0.0.1:{port}"
        process.wait_for_answer(url + "/health", within_s=START_S)
        with httpx.Client(base_url=url, timeout=60, trust_env=False, limits=NO_REUSE) as client:
            yield Server(process, client)


@pytest.mark.parametrize("server", [["--api-key", "a,b"]], indirect=True)
def test_each_key_opens_all_and_health_needs_none(server: Server):
    assert server.client.get("/health").status_code == 200
    for path in ("/props", "/slots"):
        assert server.client.get(path).status_code == 401
        for key in ("a", "b"):
            answer = server.client.get(path, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code in ({200} if path == "/props" else {200, 501}), "slots can be switched off"
    assert server.client.post("/completion", json={"prompt": "ba"}).status_code == 401


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


TOOL = {"name": "read", "description": "Read a file", "parameters": {"type": "object", "properties": {}}}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": STORY}], "max_tokens": 60},
    "/v1/messages": {"messages": [{"role": "user", "content": STORY}], "system": "lo mi", "max_tokens": 60},
    "/v1/responses": {"input": STORY, "instructions": "lo mi", "max_output_tokens": 60},
}
WITH_TOOLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"tools": [{"type": "function", "function": TOOL}]},
    "/v1/messages": {"tools": [{"name": "read", "input_schema": TOOL["parameters"]}]},
    "/v1/responses": {"tools": [{"type": "function", **TOOL}]},
}


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("has_tools", [False, True])
def test_every_api_s_next_turn_finds_what_replays_have_kept(
    server: Server, path: str, *, is_streamed: bool, has_tools: bool
):
    body = {
        **ASKED[path],
        **(WITH_TOOLS[path] if has_tools else {}),
        "temperature": 0,
        "stream": is_streamed,
        "ignore_eos": True,
    }
    turn = say(server, path, body)
    assert turn.said, "what a client sends back is read from the reply"
    assert turn.counts.reused is not None
    assert (turn.counts.prompt or 0) > 300
    for number in range(3):
        (replay,) = make_replays(turn, "llama-server")
        answer = server.client.post(replay.path, json=replay.body)
        assert answer.status_code == 200, answer.text
        counts = ADAPTER.counts_in_reply(answer.json())
        assert (counts.processed or 0) <= (MOST_PROCESSED_TOKENS if number == 0 else 4)
    place = "input" if path.endswith("responses") else "messages"
    history = [*messages_of(body), *turn.said, {"role": "user", "content": "ba ke lo"}]
    following = say(server, path, {**body, place: history})
    assert (following.counts.reused or 0) >= (turn.counts.prompt or 0)
    assert 0 < (following.counts.processed or 0) < 50, "the reply of 60 tokens is in the cache, too"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_infill_is_kept_with_one_token_and_the_next_one_finds_its_beginning(
    server: Server, *, is_streamed: bool
):
    body = {"input_prefix": STORY, "input_suffix": "ke lo mi " * 20, "temperature": 0, "ignore_eos": True}
    turn = say(server, "/infill", {**body, "n_predict": 8, "stream": is_streamed})
    assert len(turn.reply.split()) == 8
    server.say("xu pa ti du", 4)
    assert costs_of_replays(server, turn)[-1] <= 4
    following = say(server, "/infill", {**body, "input_prefix": STORY + turn.reply, "n_predict": 1})
    assert (following.counts.reused or 0) > 300
    assert turn.counts.prompt is not None


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
def test_the_replay_of_several_replies_is_one_of_one_token(server: Server, path: str):
    turn = say(server, path, {"prompt": STORY, "n_predict": 8, "n_cmpl": 2, "temperature": 0, "ignore_eos": True})
    (replay,) = make_replays(turn, "llama-server")
    for _ in range(2):
        answer = server.client.post(replay.path, json=replay.body)
        assert answer.status_code == 200, answer.text
        assert isinstance(answer.json(), dict)
        assert len(answer.json().get("choices", [0])) == 1
    assert (ADAPTER.counts_in_reply(answer.json()).processed or 0) <= 4


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string"}}}},
        {"grammar": 'root ::= "ba" | "ke"'},
    ],
)
def test_a_grammar_stays_and_its_replay_costs_one_token(server: Server, more: dict[str, Any]):
    turn = say(server, "/v1/chat/completions", {**ASKED["/v1/chat/completions"], "temperature": 0, **more})
    assert costs_of_replays(server, turn)[-1] <= 4


@pytest.mark.parametrize("begun", ["ba ke", [{"type": "text", "text": "ba ke"}]])
def test_words_that_the_client_put_into_the_assistants_mouth_are_kept(server: Server, begun: Any):
    user = {"role": "user", "content": STORY}
    body = {"messages": [user, {"role": "assistant", "content": begun}], "max_tokens": 60, "ignore_eos": True}
    turn = say(server, "/v1/messages", body)
    assert costs_of_replays(server, turn)[-1] <= 4
    replied = {"role": "assistant", "content": "ba ke" + turn.reply}
    following = {**body, "messages": [user, replied, {"role": "user", "content": "ba ke lo"}]}
    assert 0 < (say(server, "/v1/messages", following).counts.processed or 0) < 50


def costs_of_replays(server: Server, turn: Turn) -> list[int]:
    """Return how many tokens each of three replays had to process."""
    costs = []
    for _ in range(3):
        (replay,) = make_replays(turn, "llama-server")
        answer = server.client.post(replay.path, json=replay.body)
        assert answer.status_code == 200, answer.text
        costs.append(ADAPTER.counts_in_reply(answer.json()).processed or 0)
    return costs


def picture(shade: int) -> str:
    """Return a picture as clients send one: a PNG (W3C) of one pixel, as an address that has it in it."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes((0, shade)))))
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in (*chunks, (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return "data:image/png;base64," + base64.b64encode(png).decode()


@pytest.mark.parametrize("server", [["--mmproj", PROJECTOR]], indirect=True)
def test_a_chat_with_pictures_is_kept(server: Server):
    pictures = [{"type": "image_url", "image_url": {"url": picture(shade)}} for shade in (0, 200)]
    user = {"role": "user", "content": [{"type": "text", "text": STORY}, *pictures]}
    body = {"messages": [user], "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    turn = say(server, "/v1/chat/completions", body)
    assert costs_of_replays(server, turn)[-1] <= 4
    history = [user, *turn.said, {"role": "user", "content": "ba ke lo"}]
    following = say(server, "/v1/chat/completions", {**body, "messages": history})
    assert 0 < (following.counts.processed or 0) < 50
    other = {**user, "content": [user["content"][0], *reversed(pictures)]}
    assert (say(server, "/v1/chat/completions", {**body, "messages": [other]}).counts.processed or 0) > 30


THINKS = """
{%- set found = namespace(last=-1) %}
{%- for each in messages %}{% if each.role == 'user' %}{% set found.last = loop.index0 %}{% endif %}{% endfor %}
{%- for each in messages %}<{{ each.role }}>
{%- if each.reasoning_content and loop.index0 > found.last %}<think>
{{ each.reasoning_content }}
</think>

{% endif %}{{ each.content }}
{%- for call in each.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}</{{ each.role }}>{% endfor %}
{%- if add_generation_prompt %}<assistant><think>
{% endif %}"""
"""It opens a thought, and leaves out those before the user's last message, as Qwen 3's does."""


@pytest.mark.parametrize("server", [["--chat-template", THINKS]], indirect=True)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_next_turn_after_a_thought_finds_what_the_template_leaves(
    server: Server, path: str, *, is_streamed: bool
):
    body = {**ASKED[path], "stream": is_streamed, "temperature": 0, "ignore_eos": True}
    turn = say(server, path, body)
    assert not turn.reply, "all of it is a thought"
    assert costs_of_replays(server, turn)[-1] <= 4
    history = [*messages_of(body), *turn.said, {"role": "user", "content": "ba ke lo"}]
    following = say(server, path, {**body, "messages": history})
    assert (following.counts.reused or 0) > 300
    assert 0 < (following.counts.processed or 0) < 60


CALL = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": "{}"}}
ANSWERED = {"role": "tool", "tool_call_id": "c1", "content": "ba ke lo"}


@pytest.mark.parametrize("server", [["--chat-template", THINKS]], indirect=True)
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("calls", "sends_thoughts"), [(1, True), (2, True), (2, False)])
def test_the_answer_of_a_tool_finds_the_thought_before_its_call_if_the_client_sends_it_back(
    server: Server, calls: int, *, is_streamed: bool, sends_thoughts: bool
):
    """This model of noise makes thoughts, and no calls: these are made up, and processed by the first replay."""
    path = "/v1/chat/completions"
    body = {**ASKED[path], **WITH_TOOLS[path], "stream": is_streamed, "temperature": 0, "ignore_eos": True}
    messages = messages_of(body)
    for _ in range(calls):
        turn = say(server, path, {**body, "messages": messages})
        turn = replace(turn, said=({**turn.said[0], "tool_calls": [CALL]},))
        sent = dict(turn.said[0])
        if not sends_thoughts:
            del sent["reasoning_content"]
        messages = [*messages, sent, ANSWERED]
    assert costs_of_replays(server, turn)[-1] <= 4
    following = say(server, path, {**body, "messages": messages})
    assert (following.counts.reused or 0) > 300
    assert 0 < (following.counts.processed or 0) < 40, "neither thought nor call is processed again"


@pytest.mark.parametrize("server", [[], ["--no-prefill-assistant"]], indirect=True)
async def test_the_rest_of_a_chat_is_a_prompt_that_ends_with_the_reply(server: Server):
    body = {"messages": [{"role": "user", "content": "ba ke"}], "max_tokens": 20, "stream": True}
    asked = recognise("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert asked is not None
    rest = await ADAPTER.rest(server.client.base_url.port, asked, "lo mi", 2, START_S)
    assert rest is not None
    prompt = server.client.post("/apply-template", json=body).json()["prompt"]
    assert rest.body["prompt"] == prompt + "lo mi"
    answer = server.client.post(rest.path, json=rest.body)
    assert answer.text.count("data: ") >= 2
    assert '"error"' not in answer.text


@pytest.mark.parametrize("server", [["--embeddings"]], indirect=True)
def test_a_server_for_embeddings_is_warmed_by_one(server: Server):
    request = tiny("llama-server", "embeddings")
    answer = server.client.post(request.path, json=request.body)
    assert answer.status_code == 200, answer.text
    assert answer.json()[0]["embedding"]


def say(server: Server, path: str, body: dict[str, Any]) -> Turn:
    """Ask as a client does; return the turn as emberd remembers it."""
    asked = recognise("POST", path, json.dumps(body).encode())
    assert asked is not None
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    stream = StreamedReply(asked, 1 << 20) if asked.is_streamed else None
    if stream is not None:
        assert stream.take(answer.content) == answer.content
        stream.read()
        assert stream.is_finished
    turn = Ended(asked, stream, answer.content, ADAPTER, UNTOLD).turn()
    assert turn is not None
    return turn


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
