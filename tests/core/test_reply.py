"""What replies say in each dialect, and what clients send back of them."""

from __future__ import annotations

from typing import Any

import pytest

from emberd.core.generation import Dialect
from emberd.core.reply import StreamedParts, counts_of, sent_back, text_of

CALL = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}
USE = {"type": "tool_use", "id": "u1", "name": "read", "input": {"path": "a"}}


@pytest.mark.parametrize(
    ("dialect", "content", "said"),
    [
        (
            Dialect.CHAT,
            {"choices": [{"message": {"content": None, "reasoning_content": "hm", "tool_calls": [CALL, 7]}}]},
            ({"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},),
        ),
        (Dialect.CHAT, {"choices": [{"message": {"content": "Hi"}}]}, ({"role": "assistant", "content": "Hi"},)),
        (Dialect.MESSAGES, {"content": [USE]}, ({"role": "assistant", "content": [USE]},)),
        (Dialect.RESPONSES, {"output": [{"type": "message"}, "odd"]}, ({"type": "message"},)),
        (Dialect.CHAT, {"choices": []}, ()),
        (Dialect.MESSAGES, {"content": "odd"}, ()),
        (Dialect.RESPONSES, {"output": None}, ()),
        (Dialect.KOBOLD, {"results": [{"text": "Hi"}]}, ()),
        (Dialect.OLLAMA, {"response": "Hi", "context": [1, 2]}, ({"context": [1, 2]},)),
        (Dialect.OLLAMA, {"response": "Hi", "context": None}, ()),
        (
            Dialect.OLLAMA_CHAT,
            {"message": {"content": "Hi", "thinking": "hm"}},
            ({"role": "assistant", "content": "Hi"},),
        ),
        (
            Dialect.OLLAMA_CHAT,
            {"choices": [{"message": {"content": "Hi"}}]},
            ({"role": "assistant", "content": "Hi"},),
        ),
    ],
)
def test_what_a_client_sends_back_of_a_whole_reply(
    dialect: Dialect, content: dict[str, Any], said: tuple[Any, ...]
):
    assert sent_back(dialect, content) == said


def streamed(dialect: Dialect, *events: dict[str, Any], text: str = "") -> tuple[Any, ...]:
    parts = StreamedParts()
    for event in events:
        parts.take(dialect, event)
    return parts.sent_back(dialect, text)


def test_a_streamed_call_of_a_tool_is_put_together():
    def delta(**part: Any) -> dict[str, Any]:
        return {"choices": [{"delta": {"tool_calls": [{"index": 0, **part}]}}]}

    said = streamed(
        Dialect.CHAT,
        delta(id="c1", function={"name": "read", "arguments": '{"path"'}),
        delta(function={"arguments": ': "a"}'}),
    )
    assert said == ({"role": "assistant", "content": "", "tool_calls": [CALL]},)


def test_streamed_thoughts_are_put_together():
    deltas: list[Any] = [{"reasoning_content": "h"}, {"reasoning_content": "m"}, {"reasoning_content": None}, 7]
    said = streamed(Dialect.CHAT, *({"choices": [{"delta": each}]} for each in deltas), text="Hi")
    assert said == ({"role": "assistant", "content": "Hi", "reasoning_content": "hm"},)


def test_streamed_blocks_are_put_together_and_the_input_of_a_tool_is_an_object():
    begun = {"type": "tool_use", "id": "u1", "name": "read", "input": {}}
    said = streamed(
        Dialect.MESSAGES,
        {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Let me "}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "see."}},
        {
            "type": "content_block_start",
            "content_block": begun,
        },
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": '{"path"'}},
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": ': "a"}'}},
    )
    assert said == ({"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, USE]},)


def test_what_ollama_sends_back_is_in_its_last_line_or_in_any():
    call = {"function": {"name": "read", "arguments": {"path": "a"}}}
    said = streamed(Dialect.OLLAMA, {"response": "Hi"}, {"response": "", "done": True, "context": [1, 2]})
    assert said == ({"context": [1, 2]},)
    said = streamed(Dialect.OLLAMA_CHAT, {"message": {"content": "", "tool_calls": [call, 7]}}, {"done": True})
    assert said == ({"role": "assistant", "content": "", "tool_calls": [call]},)


def test_what_is_no_list_of_calls_is_no_call():
    assert streamed(Dialect.CHAT, {"choices": [{"delta": {"tool_calls": 7}}]}, text="Hi") == (
        {"role": "assistant", "content": "Hi"},
    )


def test_the_items_of_a_streamed_response_are_those_that_are_done():
    done = {"type": "response.output_item.done", "item": {"type": "function_call", "call_id": "f1"}}
    assert streamed(Dialect.RESPONSES, {"type": "response.created"}, done) == (done["item"],)


def test_counts_of_several_events_are_kept_together():
    told = counts_of({"message": {"usage": {"input_tokens": 5, "cache_read_input_tokens": 90}}}, {})
    assert counts_of({"usage": {"output_tokens": 4}}, told) == {
        "usage": {"input_tokens": 5, "cache_read_input_tokens": 90, "output_tokens": 4}
    }


@pytest.mark.parametrize(
    ("dialect", "content", "text"),
    [
        (Dialect.MESSAGES, {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        (Dialect.RESPONSES, {"output": [{"content": [{"type": "output_text", "text": "a"}]}]}, "a"),
        (Dialect.MESSAGES, {"content": 7}, None),
        (Dialect.OLLAMA, {"response": "a"}, "a"),
        (Dialect.OLLAMA_CHAT, {"message": {"content": "a"}}, "a"),
        (Dialect.OLLAMA_CHAT, {"choices": [{"message": {"content": "a"}}]}, "a"),
    ],
)
def test_the_text_of_a_reply_in_blocks(dialect: Dialect, content: dict[str, Any], text: str | None):
    assert text_of(dialect, content) == text
