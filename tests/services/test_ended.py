"""What is known of a generation that has ended: its turn, and the engine's counts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from emberd.core.generation import recognise
from emberd.core.settings import Settings
from emberd.core.streamed import StreamedReply
from emberd.core.turn import UNTOLD, PromptCounts
from emberd.engine.http import EngineHttp
from emberd.engine.koboldcpp import KoboldCpp
from emberd.engine.llama_server import ExternalServer
from emberd.host import ThisHost
from emberd.services.turns import Ended

unused: Any = None
LLAMA = ExternalServer(Settings(), ThisHost(), EngineHttp(), unused, unused)
KOBOLD = KoboldCpp(Settings(), ThisHost(), EngineHttp(), unused, unused, unused)
TIMINGS = {"cache_n": 700, "prompt_n": 9, "predicted_n": 4, "prompt_ms": 12.5}
TOLD = PromptCounts(700, 9, 4)
IN_LOG = PromptCounts(30, 2, 1)


def generation(path: str, **body: Any) -> Any:
    return recognise("POST", path, json.dumps(body).encode())


def whole(path: str, content: dict[str, Any], engine: Any = LLAMA) -> Ended:
    return Ended(generation(path, prompt="Once"), None, json.dumps(content).encode(), engine, IN_LOG)


@pytest.mark.parametrize(
    ("content", "counts"),
    [
        ({"content": " upon", "timings": TIMINGS}, TOLD),
        ({"content": " upon", "timings": {"prompt_n": 9}, "tokens_evaluated": 709}, PromptCounts(700, 9, None)),
        (
            {
                "content": " upon",
                "usage": {
                    "prompt_tokens": 709,
                    "completion_tokens": 4,
                    "prompt_tokens_details": {"cached_tokens": 700},
                },
            },
            TOLD,
        ),
        ({"content": " upon", "timings": {"prompt_n": "many", "cache_n": True}}, IN_LOG),
        ({"content": " upon"}, IN_LOG),
    ],
)
def test_a_whole_reply_tells_its_counts_or_the_log_does(content: dict[str, Any], counts: PromptCounts):
    turn = whole("/completion", content).turn()
    assert turn is not None
    assert (turn.reply, turn.counts) == (" upon", counts)


@pytest.mark.parametrize("content", [b"", b"no JSON", b"[1]", b"[" * 100_000])
def test_a_reply_that_is_not_understood_leaves_the_log_s_counts(content: bytes):
    turn = Ended(generation("/completion", prompt="Once"), None, content, LLAMA, IN_LOG).turn()
    assert turn is not None
    assert (turn.reply, turn.counts) == ("", IN_LOG)


def test_koboldcpp_s_replies_invent_what_they_do_not_know():
    content = {"content": "", "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 0}}}
    turn = whole("/v1/completions", content, KOBOLD).turn()
    assert turn is not None
    assert turn.counts == IN_LOG


@pytest.mark.parametrize(
    ("path", "first", "last"),
    [
        (
            "/completion",
            {"content": " upon"},
            {"content": "", "stop": True, "timings": TIMINGS, "prompt": "secret"},
        ),
        (
            "/v1/chat/completions",
            {"choices": [{"delta": {"content": " upon"}}]},
            {"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": TIMINGS},
        ),
    ],
)
def test_a_stream_tells_them_at_its_end_and_nothing_else_of_that_is_kept(
    path: str, first: dict[str, Any], last: dict[str, Any]
):
    asked = generation(path, stream=True, prompt="Once", messages=[{"role": "user", "content": "Once"}])
    stream = StreamedReply(asked, 1000)
    for event in (first, last):
        stream.take(f"data: {json.dumps(event)}\n\n".encode())
    turn = Ended(asked, stream, b"", LLAMA, UNTOLD).turn()
    assert turn is not None
    assert (turn.reply, turn.counts) == (" upon", TOLD)
    assert stream.told == {"timings": TIMINGS}


def test_of_what_is_not_known_there_is_no_turn():
    assert Ended(None, None, b"{}", LLAMA, IN_LOG).turn() is None
