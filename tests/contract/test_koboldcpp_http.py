from __future__ import annotations

import json
import re
import socket
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contract.targets import Server, Target, events, request
from emberd.engine.koboldcpp import KoboldCpp
from engine_process import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OLD_PERF = {
    "last_process",
    "last_eval",
    "last_token_count",
    "last_seed",
    "total_gens",
    "stop_reason",
    "total_img_gens",
}
OLD_PERF |= {"queue", "idle", "hordeexitcounter", "uptime", "idletime", "quiet"}
NEW_PERF = OLD_PERF | {"last_input_count", "last_process_time", "last_eval_time", "last_process_speed"}
NEW_PERF |= {
    "last_eval_speed",
    "last_draft_success",
    "last_draft_failed",
    "total_tts_gens",
    "total_transcribe_gens",
}
ADAPTER: Any = None
LONG = 600
"""Tokens of a generation that is meant to be interrupted."""


def raw_exchange(port: int, text: str) -> bytes:
    """Send one request and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(text.replace("\n", "\r\n").encode())
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


def test_the_model_is_named_after_its_file(server: Server) -> None:
    assert server.client.get("/api/v1/model").json() == {"result": "koboldcpp/noise-24"}
    card = server.client.get("/v1/models").json()["data"][0]
    assert {"id", "object", "created", "owned_by", "permission", "root"} <= card.keys()
    assert card["id"] == "koboldcpp/noise-24"


def test_versions_and_context_sizes_are_told(server: Server) -> None:
    version = server.client.get("/api/extra/version").json()
    assert version["result"] == "KoboldCpp"
    assert version["version"].startswith(".".join(map(str, server.target.version)))
    assert version["protected"] is False
    assert ("llm" in version) != server.target.is_old
    assert server.client.get("/api/v1/info/version").json() == {"result": "1.2.5"}
    for path in ("/api/v1/config/max_context_length", "/api/extra/true_max_context_length"):
        assert server.client.get(path).json() == {"value": 2048}
    assert server.client.get("/api/v1/config/max_length").json()["value"] > 0


def test_ping_answers_in_newer_versions_only(server: Server) -> None:
    response = server.client.get("/ping")
    assert response.status_code == (404 if server.target.is_old else 200)
    if not server.target.is_old:
        assert response.json() == {"status": "healthy"}


def test_perf_has_the_fields_of_its_version(server: Server) -> None:
    perf = server.perf()
    assert perf.keys() >= (OLD_PERF if server.target.is_old else NEW_PERF)
    assert ("last_input_count" in perf) != server.target.is_old
    assert perf["queue"] == 0
    assert perf["hordeexitcounter"] == -1
    assert perf["uptime"] > 0


def test_the_connection_closes_after_each_response_also_when_asked_to_stay(server: Server) -> None:
    received = raw_exchange(server.port, "GET /api/v1/model HTTP/1.1\nHost: x\nConnection: keep-alive\n\n")
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 ")
    assert b"content-length: %d\r\n" % len(body) in head.lower() + b"\r\n"
    assert b"access-control-allow-origin: *" in head.lower()


def test_an_unknown_path_is_a_page_of_html_without_a_length(server: Server) -> None:
    response = server.client.get("/no/such/path")
    assert response.status_code == 404
    assert response.headers["content-type"] == "text/html"
    assert "content-length" not in response.headers
    assert response.text
    assert server.client.get("/health").status_code == 404


def test_an_unknown_post_is_an_empty_404(server: Server) -> None:
    response = server.client.post("/no/such/path", json={})
    assert (response.status_code, response.text) == (404, "")


def test_paths_match_by_their_end_and_queries_are_forgiven_by_newer_versions(server: Server) -> None:
    for path in ("/prefix/api/v1/model", "/api/v1/model/", "/api/latest/model"):
        assert server.client.get(path).json() == {"result": "koboldcpp/noise-24"}, path
    for path in ("/api/v1/model?x=1", "/models"):
        assert server.client.get(path).status_code == (404 if server.target.is_old else 200), path


def test_options_and_head_answer_200_to_any_path(server: Server) -> None:
    assert server.client.options("/no/such/path").status_code == 200
    assert server.client.head("/no/such/path").status_code == 200


def test_a_generation_has_the_length_that_was_asked(server: Server) -> None:
    before = server.perf()["total_gens"]
    response = server.client.post("/api/v1/generate", json=request("ba ke lo", 5))
    result = response.json()["results"][0]
    assert len(result["text"].split()) == 5
    assert result["finish_reason"] == "length"
    assert ("prompt_tokens" in result) != server.target.is_old
    if not server.target.is_old:
        assert (result["prompt_tokens"], result["completion_tokens"]) == (4, 5)
    wait_until(server.is_idle)
    perf = server.perf()
    assert (perf["last_token_count"], perf["total_gens"], perf["stop_reason"]) == (5, before + 1, 0)
    assert perf["idletime"] < 5


@pytest.mark.parametrize("length", [0, -1])
def test_no_length_means_no_text_and_counts_as_a_generation(server: Server, length: int) -> None:
    before = server.perf()["total_gens"]
    assert not server.generate("ba ke lo mi", length)
    assert server.perf()["total_gens"] == before + 1


def test_a_stop_sequence_ends_the_text_and_is_reported_as_length(server: Server) -> None:
    words = server.generate("ba ke lo", 12).split()
    stop = " " + words[4]
    response = server.client.post(
        "/api/v1/generate", json=request("ba ke lo", 12, stop_sequence=[stop], trim_stop=True)
    )
    result = response.json()["results"][0]
    assert len(result["text"].split()) < 12
    assert result["finish_reason"] == "length"
    assert server.perf()["stop_reason"] == 2


def test_a_stream_is_pairs_of_event_and_data_and_says_what_a_whole_answer_says(server: Server) -> None:
    body = request("ba ke lo", 6)
    with server.client.stream("POST", "/api/extra/generate/stream", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["connection"] == "keep-alive"
        assert "content-length" not in response.headers
        lines = [line for line in response.iter_lines() if line]
    assert lines[::2] == ["event: message"] * (len(lines) // 2)
    told = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert "".join(event["token"] for event in told) == server.generate("ba ke lo", 6)
    assert told[-1]["finish_reason"] == "length"
    assert (told[-1]["token"] == "") != server.target.is_old


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "ba ke lo"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ba ke lo"}]}),
    ],
)
def test_the_openai_paths_answer_whole_and_streamed(server: Server, path: str, asked: dict[str, Any]) -> None:
    body = {"max_tokens": 4, "temperature": 0.01, "ban_eos_token": True, **asked}
    answer = server.client.post(path, json=body).json()
    choice = answer["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert len(text.split()) == 4
    expected = (100, 100) if server.target.is_old else (answer["usage"]["prompt_tokens"], 4)
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == expected
    with server.client.stream("POST", path, json=body | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    identifier = answer["id"].partition("-")[0] + "-" if server.target.is_batching else 'koboldcpp"'
    assert f'"id": "{identifier}' in lines[0]


def test_max_tokens_zero_means_the_default_in_newer_versions(server: Server) -> None:
    body = {"prompt": "ba ke lo", "max_tokens": 0, "ban_eos_token": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        told = next(events(response))["choices"][0]["text"]
    assert bool(told) != server.target.is_old
    wait_until(server.is_idle)


def test_an_unreadable_body_is_refused_and_printed_in_full(server: Server) -> None:
    response = server.client.post("/api/v1/generate", content=b"{nonsense")
    assert response.status_code == 500
    assert response.json() == {"detail": {"msg": "Error parsing input.", "type": "bad_input"}}
    assert "content-length" not in response.headers
    server.process.wait_for_output("Body Err: b'{nonsense'", within_s=5)


def test_tokens_are_counted_without_counting_as_activity(server: Server) -> None:
    before = server.perf()
    answer = server.client.post("/api/extra/tokencount", json={"prompt": "ba ke lo"}).json()
    assert answer["value"] == len(answer["ids"]) == 4
    after = server.perf()
    assert after["idletime"] >= before["idletime"]
    assert after["total_gens"] == before["total_gens"]


def test_a_chunked_request_body_is_understood_by_newer_versions(server: Server) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "ba ke lo"'
        yield b"}"

    count = server.client.post("/api/extra/tokencount", content=pieces()).json()["value"]
    assert count == (-1 if server.target.is_old else 4)


def test_idletime_grows_and_idle_is_zero_while_a_generation_runs(server: Server) -> None:
    with server.streaming("ba ke lo", LONG, genkey="growing") as stream:
        next(stream)
        first = server.perf()
        assert first["idle"] == 0
        assert first["idletime"] < 5
        wait_until(lambda: server.perf()["idletime"] > first["idletime"] + 0.3)
        assert server.perf()["idle"] == 0
        assert server.client.get("/api/v1/model", timeout=2.0).status_code == 200
        server.client.post("/api/extra/abort", json={"genkey": "growing"})
        list(stream)
    wait_until(server.is_idle)


def test_tools_data_and_files_are_answered_while_a_generation_runs(server: Server) -> None:
    """They waited for the model's place: 30 s during a stream of 300 tokens."""
    if not server.target.is_batching:
        pytest.skip("not in this version")
    data = [f"/api/data/{act}" for act in ("list", "metadata", "get", "put", "delete")]
    acts = ("write_lines", "mkdir", "rmdir", "delete", "write", "move", "copy", "replace_regex", "upload")
    light = ["/mcp", "/set_tts_settings", *data, *(f"/api/extra/fs/{act}" for act in acts)]
    with server.streaming("ba ke lo", LONG, genkey="mine") as stream:
        next(stream)
        for path in light:
            answer = server.client.post(path, json={"method": "tools/list"}, timeout=10.0)
            assert answer.status_code == (503 if "/fs/" in path else 200), path
            assert "disabled" in answer.text or answer.status_code == 200, "it is not the queue that refuses"
            assert not KoboldCpp.is_work(ADAPTER, "POST", path)
        assert server.perf()["idle"] == 0, "the generation has ended meanwhile"
        server.client.post("/api/extra/abort", json={"genkey": "mine"})
        list(stream)
    wait_until(server.is_idle)


def test_what_uses_a_model_waits_for_its_place() -> None:
    uses = ("/api/extra/embeddings", "/api/extra/fs/semantic_search", "/api/extra/fs/search_all_documents")
    for path in (*uses, "/v1/audio/transcriptions", "/api/extra/tts", "/sdapi/v1/txt2img", "/v1/completions"):
        assert KoboldCpp.is_work(ADAPTER, "POST", path), path


def test_only_the_right_key_aborts_a_generation(server: Server) -> None:
    def abort(key: str) -> Any:
        return server.client.post("/api/extra/abort", json={"genkey": key}).json()

    with server.streaming("ba ke lo", LONG, genkey="mine") as stream:
        text = next(stream)["token"]
        assert abort("another") == {"success": "false", "done": "false"}
        assert abort("mine") == {"success": "true", "done": "true"}
        text += "".join(event["token"] for event in stream)
    assert 0 < len(text.split()) < LONG
    wait_until(server.is_idle)
    assert abort("") == {"success": "true", "done": "true"}


def test_the_text_so_far_is_told_to_the_right_key(server: Server) -> None:
    def check(key: str) -> str:
        answer = server.client.post("/api/extra/generate/check", json={"genkey": key}).json()
        text: str = answer["results"][0]["text"]
        return text

    with server.streaming("ba ke lo", LONG, genkey="mine") as stream:
        next(stream)
        first = check("mine")
        assert first
        assert not check("another")
        wait_until(lambda: len(check("mine")) > len(first))
        assert not check("")
        server.client.post("/api/extra/abort", json={"genkey": "mine"})
        list(stream)
    wait_until(server.is_idle)
    assert check("mine")


def test_the_text_of_a_keyless_generation_is_told_to_who_names_no_key(server: Server) -> None:
    text = server.generate("ba ke lo", 3)
    assert server.client.get("/api/extra/generate/check").json() == {"results": [{"text": text}]}


def test_a_client_that_leaves_a_stream_ends_the_generation(server: Server) -> None:
    with server.streaming("ba ke lo", LONG, genkey="left") as stream:
        next(stream)
    wait_until(server.is_idle, within_s=2.5)
    assert server.perf()["last_token_count"] < LONG


def test_a_generation_without_a_stream_outlives_its_client(server: Server) -> None:
    length = 300  # 1.115 makes 800 of these tokens a second
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/api/v1/generate", json=request("ba ke lo", length), timeout=0.15)
    wait_until(server.is_idle, within_s=20)
    assert server.perf()["last_token_count"] == length


def test_six_requests_wait_or_nine_and_the_next_is_refused(server: Server) -> None:
    statuses: list[int] = []
    waiting = 9 if server.target.is_batching else 6

    def ask() -> None:
        answer = httpx.post(f"{server.client.base_url}/api/v1/generate", json=request("ba ke lo", 2), timeout=60)
        statuses.append(answer.status_code)

    with server.streaming("ba ke lo", LONG, genkey="first") as stream:
        next(stream)
        askers = [threading.Thread(target=ask) for _ in range(waiting + 2)]
        for asker in askers:
            asker.start()
        wait_until(lambda: statuses == [503, 503] and server.perf()["queue"] == waiting)
        refused = server.client.post("/api/v1/generate", json=request("ba ke lo", 2))
        assert refused.json()["detail"]["type"] == "service_unavailable"
        later = server.client.post("/api/extra/abort", json={"genkey": "nobody"}).json()
        assert later == {"success": "true", "done": "false"}
        server.client.post("/api/extra/abort", json={"genkey": "first"})
        list(stream)
    for asker in askers:
        asker.join(30)
    assert sorted(statuses) == [200] * waiting + [503] * 2
    wait_until(server.is_idle)


def test_a_doomed_key_makes_its_queued_request_return_empty(server: Server) -> None:
    texts: list[str] = []

    def ask() -> None:
        body = request("ba ke lo", 20, genkey="doomed")
        answer = httpx.post(f"{server.client.base_url}/api/v1/generate", json=body, timeout=60)
        texts.append(answer.json()["results"][0]["text"])

    with server.streaming("ba ke lo", LONG, genkey="first") as stream:
        next(stream)
        asker = threading.Thread(target=ask)
        asker.start()
        wait_until(lambda: server.perf()["queue"] == 1)
        assert server.client.post("/api/extra/abort", json={"genkey": "doomed"}).json()["done"] == "false"
        server.client.post("/api/extra/abort", json={"genkey": "first"})
        list(stream)
    asker.join(30)
    assert texts == [""]
    wait_until(server.is_idle)


def test_twenty_four_silent_connections_block_everybody(server: Server) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(24)]
    try:
        with pytest.raises(httpx.ReadTimeout):
            server.client.get("/api/v1/model", timeout=0.4)
    finally:
        for connection in silent:
            connection.close()
    assert server.client.get("/api/v1/model", timeout=5.0).status_code == 200


def test_a_password_protects_generation_and_masks_the_name(target: Target, model: Path) -> None:
    with target.serving(model, "--password", "secret", "--quiet") as server:
        ask, key = server.client, {"Authorization": "Bearer secret"}
        assert re.search(r"Namespace\(.*password='secret'", server.process.stdout)
        assert ask.get("/api/v1/model").json() == {"result": "koboldcpp/protected-model"}
        assert ask.get("/api/v1/model", headers=key).json() == {"result": "koboldcpp/noise-24"}
        assert ask.get("/api/extra/version").json()["protected"] is True
        assert ask.get("/v1/models").json()["data"][0]["id"] == "koboldcpp/noise-24"
        assert ask.get("/api/extra/perf").json()["quiet"] is True
        for path in ("/api/v1/generate", "/v1/chat/completions", "/api/extra/tokencount", "/api/extra/abort"):
            refused = ask.post(path, json={"prompt": "x"})
            assert refused.status_code == 401, path
            assert refused.json()["detail"]["type"] == "unauthorized"
        assert ask.get("/api/extra/generate/check").status_code == 401
        said = ask.post("/api/v1/generate", json=request("ba ke lo", 3), headers=key)
        assert len(said.json()["results"][0]["text"].split()) == 3
        server.process.wait_for_output("CtxLimit:", within_s=5)
        assert ask.post("/api/v1/generate", content=b"not json", headers=key).status_code == 500
        server.process.wait_for_output("Body Err: b'not json'", within_s=5)
        assert "Input:" not in server.process.output
        assert "Output:" not in server.process.output
        assert "Generating (" not in server.process.output


def test_a_generation_is_written_to_the_log_unless_quiet(server: Server) -> None:
    server.generate("ba ke lo xu", 2)
    for sign in ("Input: {", "Processing Prompt", "Generating (2 / 2 tokens)", "CtxLimit:", "Output: "):
        server.process.wait_for_output(sign, within_s=5)


def test_without_a_queue_the_second_request_is_refused(target: Target, model: Path) -> None:
    with target.serving(model, "--multiuser", "0", "--quiet") as server:
        with server.streaming("ba ke lo", LONG) as stream:
            next(stream)
            assert server.client.post("/api/v1/generate", json=request("x", 1)).status_code == 503
        wait_until(server.is_idle)


def test_several_requests_run_together_if_told_and_only_a_closed_connection_ends_one(
    batching_target: Target, model: Path
) -> None:
    with batching_target.serving(model, "--parallelrequests", "4", "--quiet") as server:
        with server.streaming("ba ke lo", 3 * LONG, genkey="A") as running:
            next(running)
            assert server.generate("mi nu pa", 4)
            server.client.post("/api/extra/abort", json={"genkey": "A"})
            assert len([next(running) for _ in range(10)]) == 10
            assert not server.is_idle()
        wait_until(server.is_idle, within_s=3)
