"""Requests for text and their streamed replies: recognised, followed, and taken up again where they were cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.generation import (
    Dialect,
    Generation,
    changes_cache,
    continued,
    continued_as_text,
    dialect_of,
    is_ollama,
    recognise,
    templated,
    uses_model,
)
from emberd.core.reply import text_of
from emberd.core.streamed import StreamedReply

MANY = 1 << 20


def asked(dialect: Dialect, **body: Any) -> Generation:
    body = (
        {"messages": [{"role": "user", "content": "Hi"}]} | body
        if dialect is Dialect.CHAT
        else {"prompt": "Hi"} | body
    )
    return Generation(dialect, "/some/path", is_streamed=True, body=body)


def event(**content: Any) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


def chunk(text: str | None, reason: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return event(id="first", created=1, model="m", choices=[choice], **more)


# --- requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/api/v1/generate", Dialect.KOBOLD),
        ("/api/latest/generate/", Dialect.KOBOLD),
        ("/api/extra/generate/stream", Dialect.KOBOLD),
        ("/v1/completions", Dialect.COMPLETIONS),
        ("/v1/chat/completions", Dialect.CHAT),
        ("/chat/completions", Dialect.CHAT),
        ("/v1/completion", Dialect.COMPLETIONS),
        ("/completion", Dialect.LLAMA),
        ("/api/generate", Dialect.OLLAMA),
        ("/api/chat", Dialect.OLLAMA_CHAT),
        ("/messages", Dialect.MESSAGES),
        ("/responses", Dialect.RESPONSES),
        ("/v1/messages/count_tokens", None),
        ("/api/extra/generate/check", None),
        ("/api/v1/model", None),
        ("/", None),
    ],
)
def test_a_path_tells_the_dialect(path: str, dialect: Dialect | None):
    assert dialect_of(path) is dialect
    assert changes_cache("POST", path) is (dialect is not None)
    assert changes_cache("GET", path) is False


@pytest.mark.parametrize("path", ["/api/admin/load_state", "/api/admin/clear_state/", "/slots/0", "/slots/12"])
def test_a_state_that_is_brought_back_takes_the_place_of_the_last_turn(path: str):
    assert changes_cache("POST", path)
    assert not changes_cache("GET", path)
    assert not changes_cache("POST", "/api/admin/check_state")
    assert dialect_of(path) is None


def test_other_ways_to_make_text_cost_the_cache_too():
    assert changes_cache("GET", "/noscript")
    assert changes_cache("POST", "/v1/responses")
    assert changes_cache("POST", "/request")
    for path in ("/v1/audio/transcriptions", "/audio/transcriptions", "/v1/systemone/"):  # llama.cpp's server
        assert changes_cache("POST", path)
        assert uses_model("POST", path)
        assert not changes_cache("GET", path)
        assert dialect_of(path) is None
    assert is_ollama("/api/tags")
    assert not is_ollama("/api/v1/generate")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/embeddings",
        "/embedding",
        "/v1/rerank",
        "/reranking/",
        "/api/embed",
        "/api/extra/fs/semantic_search",
        "/api/extra/transcribe",
        "/api/extra/tts",
        "/v1/audio/speech",
        "/audio/speech",
        "/xtts/tts_to_audio",
        "/v1/images/generations",
        "/sdapi/v1/txt2img",
        "/sdapi/v1/img2img",
        "/sdapi/v1/upscale",
        "/prompt",
        "/api/extra/music/prepare",
        "/api/extra/music/generate",
    ],
)
def test_vectors_orders_speech_images_and_music_are_uses_that_leave_the_cache_alone(path: str):
    assert uses_model("POST", path)
    assert not uses_model("GET", path)
    assert not changes_cache("POST", path)
    assert uses_model("POST", "/infill")
    assert changes_cache("POST", "/infill")
    assert not uses_model("POST", "/v1/messages/count_tokens"), "it only knocks"


@pytest.mark.parametrize(
    ("path", "body", "is_streamed"),
    [
        ("/api/extra/generate/stream", b'{"prompt": "x"}', True),
        ("/api/v1/generate", b'{"prompt": "x", "stream": true}', False),
        ("/v1/completions", b'{"prompt": "x", "stream": true}', True),
        ("/completion", b'{"prompt": "x"}', False),
        ("/api/chat", b'{"messages": []}', True),
        ("/api/generate", b'{"prompt": "x", "stream": false}', False),
    ],
)
def test_a_streamed_request_is_told_from_others(path: str, body: bytes, is_streamed: bool):
    found = recognise("POST", path, body)
    assert found is not None
    assert found.is_streamed is is_streamed


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_what_is_no_request_for_text_is_none(content: bytes):
    assert recognise("POST", "/v1/completions", content) is None
    assert recognise("GET", "/v1/completions", b'{"prompt": "x"}') is None


@pytest.mark.parametrize(
    ("dialect", "body", "obstacle"),
    [
        (Dialect.KOBOLD, {}, ""),
        (Dialect.KOBOLD, {"grammar": "root ::= x"}, "a grammar"),
        (Dialect.KOBOLD, {"prompt": 3}, "a prompt that is not one text"),
        (Dialect.COMPLETIONS, {"n": 1}, ""),
        (Dialect.COMPLETIONS, {"n": 2}, "several replies at once"),
        (Dialect.COMPLETIONS, {"best_of": 3}, "several replies at once"),
        (Dialect.COMPLETIONS, {"logprobs": 5}, "token probabilities"),
        (Dialect.COMPLETIONS, {"prompt": ["a", "b"]}, "a prompt that is not one text"),
        (Dialect.COMPLETIONS, {"response_format": {"type": "json_object"}}, "a grammar"),
        (Dialect.CHAT, {"response_format": {"type": "text"}, "logprobs": False, "tools": []}, ""),
        (Dialect.CHAT, {"tools": [{}]}, "tools"),
        (Dialect.CHAT, {"messages": []}, "messages that are not text"),
        (Dialect.CHAT, {"messages": [{"role": "assistant", "content": [{}]}]}, "messages that are not text"),
    ],
)
def test_what_cannot_be_continued_honestly_has_a_reason(dialect: Dialect, body: dict[str, Any], obstacle: str):
    assert asked(dialect, **body).obstacle() == obstacle


@pytest.mark.parametrize(
    ("dialect", "body", "expected"),
    [
        (Dialect.KOBOLD, {"max_length": 100}, {"prompt": "Hi you", "max_length": 93}),
        (Dialect.KOBOLD, {}, {"prompt": "Hi you"}),
        (Dialect.KOBOLD, {"max_length": 3}, {"prompt": "Hi you", "max_length": 1}),
        (Dialect.COMPLETIONS, {"max_tokens": 10, "stop": "x"}, {"prompt": "Hi you", "max_tokens": 3, "stop": "x"}),
        (Dialect.LLAMA, {"n_predict": -1}, {"prompt": "Hi you", "n_predict": -1}),
    ],
)
def test_the_rest_is_asked_behind_the_text_with_the_rest_of_the_budget(
    dialect: Dialect, body: dict[str, Any], expected: dict[str, Any]
):
    assert continued(asked(dialect, **body), " you", 7).body == expected


def test_the_rest_of_a_chat_is_asked_as_the_assistants_open_turn():
    user = {"role": "user", "content": "Hi"}
    request = asked(Dialect.CHAT, max_completion_tokens=20, max_tokens=9)
    assert continued(request, " you", 7).body == {
        "messages": [user, {"role": "assistant", "content": " you"}],
        "continue_assistant_turn": True,
        "max_completion_tokens": 13,
        "max_tokens": 2,
    }
    begun = asked(Dialect.CHAT, messages=[user, {"role": "assistant", "content": "Well"}])
    assert continued(begun, ", yes", 2).body["messages"][1:] == [{"role": "assistant", "content": "Well, yes"}]
    assert request.body["messages"] == [user], "the client's own request stays"


GOES_ON = "emberd-goes-on-here"


@pytest.mark.parametrize(
    ("asked_prompt", "past", "prompt"),
    [
        ("<u>Hi</u><a>", f"<u>Hi</u><a>{GOES_ON}</a><u>.</u><a>", "<u>Hi</u><a> you"),
        ("<u>Hi</u>\n<a>\n", f"<u>Hi</u>\n<a>{GOES_ON}</a><u>.</u><a>", "<u>Hi</u>\n<a>\n you"),
        ("<u>Hi</u><a><think>\n", f"<u>Hi</u><a>{GOES_ON}</a><u>.</u><a><think>\n", "<u>Hi</u><a> you"),
        ("<u>Hi</u><a>", f"<u>Hi</u><a><final>{GOES_ON}</a><u>.</u><a>", "<u>Hi</u><a><final> you"),
        ("<u>Rules Hi</u><a>", f"<u>Hi</u><a>{GOES_ON}</a><u>Rules .</u><a>", "<u>Rules Hi</u><a> you"),
        ("<u>Rules Hi</u><a><think>", f"<u>Hi</u><a>{GOES_ON}</a><u>Rules .</u><a><think>", None),
        ("<u>Hi</u><a>", "<u>Hi</u><a></a><u>.</u><a>", None),
        ("<u>hi</u><a>", f"<u>hi</u><a>{GOES_ON}</a><u>.</u><a>", None),
    ],
)
def test_the_rest_of_a_chat_is_asked_as_a_prompt_that_ends_with_the_reply(
    asked_prompt: str, past: str, prompt: str | None
):
    request = asked(Dialect.CHAT, max_tokens=20, temperature=0, stream=True, stop="x", stream_options={})
    rest = continued_as_text(request, " you", 7, asked_prompt, past)
    if prompt is None:
        assert rest is None
        return
    assert rest is not None
    assert (rest.path, rest.dialect) == ("/completion", Dialect.LLAMA)
    fixed = {"stop": ["x"], "stream": True, "cache_prompt": True}
    assert rest.body == {"temperature": 0, "n_predict": 13, "prompt": prompt, **fixed}


def test_a_template_is_asked_for_the_chat_and_for_one_with_a_reply_in_the_past():
    user = {"role": "user", "content": "Hi"}
    chats = templated(asked(Dialect.CHAT, messages=[user, {"role": "assistant", "content": "Well"}], stream=True))
    assert chats is not None
    assert chats[0] == {"messages": [user, {"role": "assistant", "content": "Well"}]}
    replied = {"role": "assistant", "content": f"Well{GOES_ON}"}
    assert chats[1] == {"messages": [user, replied, {"role": "user", "content": "."}]}
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    assert templated(asked(Dialect.CHAT, messages=[{"role": "user", "content": [image]}])) is None
    assert templated(asked(Dialect.CHAT, messages=[{"role": "assistant", "content": None}, user])) is None


def test_no_body_is_in_a_repr():
    request = asked(Dialect.KOBOLD, prompt="secret")
    reply = StreamedReply(request, MANY)
    reply.take(b'data: {"token": "secret"}\n\ndata: secret')
    reply.read()
    assert "secret" not in repr(request) + repr(reply)


# --- replies ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.text(max_size=5), max_size=8),
    st.randoms(use_true_random=False),
    st.sampled_from(["\n\n", "\r\n\r\n"]),
)
def test_bytes_pass_unchanged_and_in_whole_events_wherever_they_are_cut(texts: list[str], chance: Any, end: str):
    whole = "".join(
        f"event: message{end[: -len(end) // 2]}data: {json.dumps({'token': text})}{end}" for text in texts
    )
    data = whole.encode()
    reply = StreamedReply(asked(Dialect.KOBOLD), MANY)
    sent, position = b"", 0
    while position < len(data):
        step = chance.randint(1, 20)
        part = reply.take(data[position : position + step])
        assert not part or part.endswith(end.encode())
        sent += part
        position += step
    assert sent + reply.rest() == data
    reply.read()
    assert reply.text == "".join(texts)
    assert not reply.is_finished


@pytest.mark.parametrize(
    ("dialect", "events"),
    [
        (Dialect.KOBOLD, [event(token="a", finish_reason=None), event(token="b", finish_reason="length")]),
        (
            Dialect.COMPLETIONS,
            [event(choices=[{"text": "a"}]), event(choices=[{"text": "b", "finish_reason": "stop"}])],
        ),
        (
            Dialect.CHAT,
            [event(choices=[{"delta": {"role": "assistant"}}]), chunk("a"), chunk("b"), chunk(None, "stop")],
        ),
        (
            Dialect.LLAMA,
            [event(content="a", stop=False), event(content="b", stop=False), event(content="", stop=True)],
        ),
        (
            Dialect.INFILL,
            [event(content="a", stop=False), event(content="b", stop=False), event(content="", stop=True)],
        ),
    ],
)
def test_text_and_end_are_read_in_each_dialect(dialect: Dialect, events: list[bytes]):
    reply = StreamedReply(asked(dialect), MANY)
    for each in events[:-1]:
        reply.take(each)
    reply.read()
    assert not reply.is_finished
    reply.take(events[-1])
    reply.read()
    reply.obstacle = reply.obstacle.replace("events of this API", "")  # that is known before the first event
    assert (reply.text, reply.is_finished, reply.obstacle) == ("ab", True, "")


@pytest.mark.parametrize(
    ("dialect", "whole", "text"),
    [
        (Dialect.KOBOLD, {"results": [{"text": "a"}]}, "a"),
        (Dialect.COMPLETIONS, {"choices": [{"text": "a"}]}, "a"),
        (Dialect.CHAT, {"choices": [{"message": {"content": "a"}}]}, "a"),
        (Dialect.CHAT, {"choices": [{"message": {"content": None}}]}, None),
        (Dialect.LLAMA, {"content": "a"}, "a"),
        (Dialect.LLAMA, [], None),
        (Dialect.KOBOLD, {"results": []}, None),
    ],
)
def test_the_text_of_a_whole_reply_is_found(dialect: Dialect, whole: Any, text: str | None):
    assert text_of(dialect, whole) == text


def test_thoughts_and_calls_of_tools_are_not_continued():
    for delta, obstacle in (({"reasoning_content": "hm"}, "thoughts"), ({"tool_calls": [{}]}, "tools")):
        reply = StreamedReply(asked(Dialect.CHAT), MANY)
        reply.take(event(choices=[{"delta": delta}]))
        reply.read()
        assert reply.obstacle == obstacle


def test_a_reply_too_long_to_be_remembered_passes_and_is_not_continued():
    reply = StreamedReply(asked(Dialect.KOBOLD), 10)
    data = event(token="x" * 11)
    assert reply.take(data) == data
    reply.read()
    assert reply.obstacle == "its length"


def test_what_never_ends_an_event_passes_as_it_is():
    reply = StreamedReply(asked(Dialect.KOBOLD), MANY)
    sent = b"".join(reply.take(b"x" * 100_000) for _ in range(20)) + reply.rest()
    assert sent == b"x" * 2_000_000
    assert reply.obstacle


@pytest.mark.parametrize(("told", "number"), [([0, 1, 6], 7), ([None, None, None], 3)])
def test_a_response_that_fails_is_whole_and_counts_on(told: list[int | None], number: int):
    """llama.cpp's server numbers no event: they are counted then."""
    reply = StreamedReply(asked(Dialect.RESPONSES, model="m"), MANY, began_at=7.9)
    item = {"type": "message", "id": "msg_1", "content": []}
    sent: list[dict[str, Any]] = [
        {"type": "response.created", "response": {"id": "resp_1", "object": "response", "status": "in_progress"}},
        {"type": "response.output_item.done", "item": item},
        {"type": "response.output_text.delta", "delta": "a"},
    ]
    for each, at in zip(sent, told, strict=True):
        reply.take(event(**each, **({} if at is None else {"sequence_number": at})))
    reply.read()
    name, _, data = reply.end_by_error("gone").partition(b"\ndata: ")
    said = json.loads(data)
    assert (name, said["type"], said["sequence_number"]) == (b"event: response.failed", "response.failed", number)
    error = said["response"].pop("error")
    assert error["message"] == "gone"
    whole = {"id": "resp_1", "object": "response", "created_at": 7, "model": "m", "status": "failed"}
    assert said["response"] == {**whole, "output": [item]}


def test_a_response_that_fails_keeps_the_time_that_the_engine_told():
    reply = StreamedReply(asked(Dialect.RESPONSES), MANY, began_at=7.9)
    told = {"id": "r", "created_at": 5, "model": "k"}
    reply.take(event(type="response.created", sequence_number=0, response=told))
    reply.read()
    response = json.loads(reply.end_by_error("gone").partition(b"data: ")[2])["response"]
    assert (response["created_at"], response["model"], response["output"]) == (5, "k", [])


def test_the_second_stream_reads_as_the_first():
    reply = StreamedReply(asked(Dialect.CHAT), MANY)
    reply.take(event(id="first", created=1, model="m", choices=[{"delta": {"role": "assistant", "content": ""}}]))
    reply.take(chunk("a") + b'data: {"choices": [{"del')
    reply.begin_again(1, Dialect.CHAT)
    role = event(id="second", created=9, model="m", choices=[{"delta": {"role": "assistant", "content": ""}}])
    assert reply.take(role) == b""
    seen = reply.take(
        event(id="second", created=9, model="m", choices=[{"delta": {"role": "assistant", "content": "b"}}])
    )
    assert json.loads(seen[6:]) == {
        "id": "first",
        "created": 1,
        "model": "m",
        "choices": [{"delta": {"content": "b"}}],
    }
    usage = event(id="second", choices=[], usage={"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15})
    counted = json.loads(reply.take(usage)[6:])["usage"]
    assert counted == {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    assert reply.take(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"
    assert (reply.text, reply.is_finished) == ("ab", True)


def test_the_rest_of_a_chat_in_llama_cpps_own_words_reads_as_a_chat():
    reply = StreamedReply(asked(Dialect.CHAT, stream_options={"include_usage": True}), MANY)
    reply.take(chunk("a"))
    reply.begin_again(1, Dialect.LLAMA)
    seen = json.loads(reply.take(event(content="b", stop=False))[6:])
    choice = {"index": 0, "finish_reason": None, "delta": {"content": "b"}}
    assert seen == {"id": "first", "created": 1, "model": "m", "choices": [choice]}
    error = event(error={"message": "no"})
    assert reply.take(error) == error
    last = event(content="", stop=True, stop_type="limit", tokens_evaluated=11, tokens_predicted=4)
    *ends, done = reply.take(last).split(b"\n\n")[:-1]
    finish, usage = (json.loads(each[6:]) for each in ends)
    assert finish["choices"] == [{"index": 0, "finish_reason": "length", "delta": {}}]
    assert usage["usage"] == {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    assert done == b"data: [DONE]"
    assert (reply.text, reply.is_finished) == ("ab", True)


@pytest.mark.parametrize("dialect", [Dialect.OLLAMA, Dialect.OLLAMA_CHAT])
def test_ollamas_lines_pass_whole_and_a_cut_stream_ends_with_one_that_says_why(dialect: Dialect):
    reply = StreamedReply(asked(dialect), MANY)
    said = {"response": "Hi"} if dialect is Dialect.OLLAMA else {"message": {"content": "Hi"}}
    line = json.dumps({**said, "done": False}).encode() + b"\n"
    assert reply.take(line[:9]) == b""
    assert reply.take(line[9:] + b'{"resp') == line
    reply.read()
    assert (reply.text, reply.is_finished) == ("Hi", False)
    assert reply.obstacle
    assert json.loads(reply.end_by_error("it died")) == {"error": "it died"}
    done = StreamedReply(asked(dialect), MANY)
    done.take(line + b'{"done": true}\n')
    done.read()
    assert done.is_finished


def test_openais_events_at_ollamas_path_are_read_as_such():
    reply = StreamedReply(asked(Dialect.OLLAMA_CHAT), MANY)
    assert reply.take(chunk("a")) == chunk("a")
    reply.read()
    assert reply.text == "a"
    assert reply.end_by_error("it died").startswith(b'\ndata: {"error"')


def test_a_stop_sequence_that_spans_the_cut_ends_the_reply():
    reply = StreamedReply(asked(Dialect.KOBOLD, stop_sequence=["\nUser:"]), MANY)
    reply.take(event(token="Bye\nUs", finish_reason=None))
    reply.begin_again(3, Dialect.KOBOLD)
    ended = reply.take(event(token="er: hello", finish_reason=None))
    assert reply.is_finished
    assert reply.is_over
    assert json.loads(ended.split(b"data: ")[1]) == {"token": "", "finish_reason": "stop"}
    assert reply.take(event(token=" and more", finish_reason=None)) == b"", "nothing comes behind the end"
    assert reply.text == "Bye\nUser:"


def test_a_stop_sequence_that_only_seemed_to_begin_changes_nothing():
    reply = StreamedReply(asked(Dialect.KOBOLD, stop_sequence=["\nUser:"]), MANY)
    reply.take(event(token="Bye\nU", finish_reason=None))
    reply.begin_again(3, Dialect.KOBOLD)
    for text in ("s", "ual"):
        assert reply.take(event(token=text, finish_reason=None)) == event(token=text, finish_reason=None)
    assert reply.text == "Bye\nUsual"
    assert not reply.is_finished


@pytest.mark.parametrize("dialect", [Dialect.KOBOLD, Dialect.COMPLETIONS, Dialect.CHAT, Dialect.LLAMA])
def test_a_reply_without_a_rest_is_ended_in_its_dialect(dialect: Dialect):
    reply = StreamedReply(asked(dialect), MANY)
    reply.take(chunk("a"))
    reply.begin_again(1, Dialect.CHAT)
    ended = reply.end_by_length()
    follower = StreamedReply(asked(dialect), MANY)
    assert follower.take(ended) == ended
    follower.read()
    assert follower.is_finished
    assert b"engine_died" in reply.end_by_error("why")


def test_a_reply_cut_behind_its_last_word_only_needs_its_farewell():
    reply = StreamedReply(asked(Dialect.CHAT), MANY)
    reply.take(chunk("a") + chunk(None, "stop"))
    reply.read()
    assert reply.is_finished
    assert reply.farewell() == b"data: [DONE]\n\n"
    kobold = StreamedReply(asked(Dialect.KOBOLD), MANY)
    assert kobold.farewell() == b""
