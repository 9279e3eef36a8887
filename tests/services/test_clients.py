"""The programs that people use, each against the engine and against emberd in front of it: no difference shows."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import koboldapi
import ollama
import openai
import pytest

from client_requests import LITE, REPLY_TOKENS, STORY, TAVERN
from contract.targets import real_builds
from daemon_process import Daemon
from emberd.core.generation import continued, recognise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from client_requests import Request

LIMIT_S = 60.0
CHAT: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Tell me of the sea."}]
_CHANGING = re.compile(rb'"(created|created_at|uptime|idletime)": ?("[^"]*"|[\d.]+)')
"""What two equal requests are told differently: the time of day."""
_BY_THE_WAY = {"date", "server", "connection", "transfer-encoding", "keep-alive"}
"""Headers of one hop (RFC 9110, 7.6.1), and the time of day."""
_ENGINES = ["standin", "embedded", *(each.name for each in real_builds())]


@dataclass(frozen=True)
class Both:
    """One engine, asked directly and through emberd."""

    engine: str
    direct: int
    front: int
    daemon: Daemon

    @property
    def ports(self) -> tuple[int, int]:
        return self.direct, self.front


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, standin: Path, model: Path
) -> Iterator[Callable[[str], Both]]:
    """Start each engine once for all tests of this module."""
    real = {each.name: each.command[-1] for each in real_builds()}
    running: dict[str, Both] = {}

    def start(name: str) -> Both:
        if name not in running:
            folder = tmp_path_factory.mktemp(name)
            kinds = {"standin": {"engine.path": str(standin)}, "embedded": {"engine.kind": "embedded"}}
            settings = kinds.get(name) or {"engine.path": real[name]}
            daemon = Daemon(folder, {"model.path": str(model), "engine.context_size": 2048, **settings}, {})
            daemon.start()
            running[name] = Both(name, daemon.wait_ready()["engine"]["port"], daemon.port, daemon)
        return running[name]

    yield start
    for both in running.values():
        both.daemon.close()


@pytest.fixture(params=_ENGINES)
def both(request: pytest.FixtureRequest, engines: Callable[[str], Both]) -> Both:
    return engines(request.param)


@pytest.fixture(params=[name for name in _ENGINES if name != "embedded"])
def kobold(request: pytest.FixtureRequest, engines: Callable[[str], Both]) -> Both:
    return engines(request.param)


def ask(port: int, request: Request) -> tuple[int, dict[str, str], bytes]:
    """Send the bytes; return the status, the headers and the body without its framing."""
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as connection:
        connection.sendall(request.raw(port))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    kept = {name: value for name, value in headers.items() if name not in _BY_THE_WAY}
    return int(status.split()[1]), kept, _CHANGING.sub(rb'"\1": 0', body)


def unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        whole += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return whole


def text_of(events: bytes) -> tuple[str, list[str]]:
    """Join a stream's text; an engine's pieces fall differently each time. Also return why it ended."""
    text, reasons = "", []
    for line in events.decode().splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        choice = (event.get("choices") or [event])[0]
        text += choice.get("token", choice.get("text", choice.get("delta", {}).get("content"))) or ""
        reasons += [choice["finish_reason"]] if choice.get("finish_reason") else []
    return text, reasons


@pytest.mark.parametrize("request_", [*LITE, *TAVERN], ids=lambda each: f"{each.program} {each.path}")
def test_what_lite_and_sillytavern_send_gets_the_engines_own_answer(kobold: Both, request_: Request):
    (status, headers, body), through = (ask(port, request_) for port in kobold.ports)
    assert through[0] == status
    if request_.is_streamed:
        assert through[1] == headers
        assert text_of(through[2]) == text_of(body)
        assert text_of(body)[0]
    else:
        assert (through[1] | {"content-length": ""}) == (headers | {"content-length": ""})
        assert through[2] == body


@pytest.mark.parametrize("request_", [*LITE, *TAVERN], ids=lambda each: f"{each.program} {each.path}")
def test_a_cut_stream_of_theirs_can_be_continued_within_its_budget(request_: Request):
    if not request_.is_streamed:
        return
    generation = recognise("POST", request_.path, json.dumps(request_.body).encode())
    assert generation is not None
    assert generation.obstacle() == ""
    rest = continued(generation, " the sea", 2)
    budgets = {name: rest.body[name] for name in ("max_length", "max_tokens", "n_predict") if name in rest.body}
    assert set(budgets.values()) == {REPLY_TOKENS - 2}


def compare(says: Callable[[int], dict[str, Any]], both: Both) -> list[dict[str, Any]]:
    """Ask both ways; first once to fill the prompt cache, since what it holds changes a real model's last bits."""
    says(both.direct)
    return [says(port) for port in both.ports]


def koboldapi_says(port: int) -> dict[str, Any]:
    client = koboldapi.KoboldAPI(f"http://127.0.0.1:{port}", top_k=1)
    return {
        "text": client.generate(STORY, REPLY_TOKENS),
        "checked": client.check_generation(),
        "streamed": client.generate_sync(STORY, max_length=REPLY_TOKENS),
        "tokens": client.count_tokens(STORY),
        "model": client.get_model(),
        "version": client.get_version(),
        "context": client.get_max_context_length(),
    }


def test_the_koboldapi_package_sees_no_difference(kobold: Both):
    direct, through = compare(koboldapi_says, kobold)
    assert through == direct
    assert direct["text"]
    assert direct["streamed"] == direct["text"]


def openai_says(port: int) -> dict[str, Any]:
    address = f"http://127.0.0.1:{port}/v1"
    fixed: Any = {"temperature": 0, "seed": 1, "model": "any", "max_tokens": REPLY_TOKENS}
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        whole = client.completions.create(prompt=STORY, **fixed)
        chat = client.chat.completions.create(messages=CHAT, **fixed)
        pieces = list(client.completions.create(prompt=STORY, stream=True, **fixed))
        chat_pieces = list(client.chat.completions.create(messages=CHAT, stream=True, **fixed))
        models = [each.id for each in client.models.list()]
    return {
        "models": models,
        "text": whole.choices[0].text,
        "usage": whole.usage and whole.usage.total_tokens,
        "chat": chat.choices[0].message.content,
        "streamed": "".join(each.choices[0].text for each in pieces if each.choices),
        "chat streamed": "".join(each.choices[0].delta.content or "" for each in chat_pieces if each.choices),
        "ends": [each.choices[0].finish_reason for each in chat_pieces if each.choices][-1],
    }


def test_the_openai_package_sees_no_difference(both: Both):
    direct, through = compare(openai_says, both)
    assert through == direct
    assert direct["text"]
    assert direct["chat"]
    assert direct["streamed"] == direct["text"]


def ollama_says(port: int) -> dict[str, Any]:
    options = {"num_predict": REPLY_TOKENS, "temperature": 0.01, "top_k": 1, "seed": 1}
    with ollama.Client(f"http://127.0.0.1:{port}", timeout=LIMIT_S, trust_env=False) as client:
        return {
            "list": [each.model for each in client.list().models],
            "text": client.generate(model="any", prompt=STORY, options=options).response,
            "chat": client.chat(model="any", messages=CHAT, options=options).message.content,
            "streamed": [each.message.content for each in client.chat("any", CHAT, stream=True, options=options)],
        }


def test_the_ollama_package_sees_no_difference(kobold: Both):
    if "1.76" in kobold.engine:
        pytest.skip("KoboldCPP 1.76 has no /api/generate of Ollama's")
    direct, through = compare(ollama_says, kobold)
    for name in ("chat", "streamed"):
        assert direct[name]
        if kobold.engine != "standin":  # takes a chat's options for nothing (1.104), and so samples at random
            through[name] = direct[name] if through[name] else None
    assert through == direct
    assert direct["text"]


def curl(port: int, path: str, *words: str) -> bytes:
    done = subprocess.run(
        [
            str(shutil.which("curl")),
            "--silent",
            "--show-error",
            "--fail",
            "--noproxy",
            "*",
            *words,
            f"http://127.0.0.1:{port}{path}",
        ],
        capture_output=True,
        timeout=LIMIT_S,
        check=True,
    )
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    "words", [(), ("--http1.0",), ("-H", "Transfer-Encoding: chunked"), ("-H", "Expect: 100-continue")]
)
def test_curl_sees_no_difference(both: Both, words: tuple[str, ...]):
    if "chunked" in " ".join(words) and "1.76" in both.engine:
        pytest.skip("KoboldCPP 1.76 reads no chunked body")
    body = json.dumps({"prompt": STORY, "max_tokens": REPLY_TOKENS, "temperature": 0, "seed": 1, "stream": True})
    direct, through = (
        curl(port, "/v1/completions", "-N", *words, "-d", body, "-H", "Content-Type: application/json")
        for port in both.ports
    )
    assert text_of(through) == text_of(direct)
    assert text_of(direct)[0]
