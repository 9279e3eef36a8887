"""The request that keeps the KV cache: what is kept of the user's, and when there is none."""

from __future__ import annotations

from typing import Any

import pytest

from emberd.core.replay import (
    GENKEY,
    Replay,
    fits,
    is_replayable,
    make_replays,
    shortened,
    tiny,
)
from emberd.core.turn import Turn, prompt_text


def replay_of(path: str, body: dict[str, Any], reply: str = " there", engine: str = "koboldcpp") -> Replay | None:
    made = make_replays(Turn(path, body, reply), engine, continues_turn=True)
    assert len(made) < 2
    return made[0] if made else None


@pytest.mark.parametrize("path", ["/api/v1/generate", "/api/latest/generate/", "/api/extra/generate/stream"])
def test_text_generation_is_replayed_with_its_reply_and_one_token(path: str):
    asked = {
        "prompt": "Hello",
        "memory": "A story.",
        "max_length": 300,
        "max_context_length": 4096,
        "stop_sequence": ["\n"],
        "temperature": 0.7,
        "genkey": "KCPP1234",
    }
    made = replay_of(path, asked)
    assert made is not None
    assert made.path == "/api/v1/generate"
    assert made.body == {
        "prompt": "Hello there",
        "memory": "A story.",
        "temperature": 0.7,
        "max_length": 1,
        "genkey": GENKEY,
    }


def test_chat_leaves_the_assistants_turn_open():
    user = {"role": "user", "content": "Hello"}
    made = replay_of("/v1/chat/completions", {"messages": [user], "stream": True, "max_tokens": 0, "model": "m"})
    assert made is not None
    assert made.body == {
        "model": "m",
        "messages": [user, {"role": "assistant", "content": " there"}],
        "continue_assistant_turn": True,
        "max_tokens": 1,
        "genkey": GENKEY,
    }


@pytest.mark.parametrize(
    ("reply", "tail"),
    [
        ("", ""),
        ("short", "short"),
        ("a reply of more than twelve bytes", "twelve bytes"),
        ("\u0e01\u0e02\u0e03\u0e04\u0e05\u0e06", "\u0e03\u0e04\u0e05\u0e06"),
        ("ends with \U0001f600\U0001f600\U0001f600", "\U0001f600" * 3),
    ],
)
def test_a_shortened_turn_is_the_beginning_of_the_whole_one(reply: str, tail: str):
    turn = Turn("/v1/completions", {"prompt": "Once"}, reply)
    made = make_replays(turn, "koboldcpp", continues_turn=True, is_thorough=True)
    short, whole = made[0].body["prompt"], made[-1].body["prompt"]
    assert shortened(turn).reply == short.removeprefix("Once")
    assert whole.startswith(short)
    assert whole.removeprefix(short) == tail
    assert short.startswith("Once"), "the user's own words stay whole"


def test_a_turn_that_continued_the_assistants_words_is_replayed_with_all_of_them():
    begun = {"role": "assistant", "content": "Well,"}
    made = replay_of("/v1/chat/completions", {"messages": [begun], "continue_assistant_turn": True})
    assert made is not None
    assert made.body["messages"] == [{"role": "assistant", "content": "Well, there"}]


def test_an_engine_that_cannot_continue_gets_the_chat_unchanged():
    user = {"role": "user", "content": "Hello"}
    turn = Turn("/v1/chat/completions", {"messages": [user]}, "there")
    (made,) = make_replays(turn, "koboldcpp", continues_turn=False)
    assert made.body == {"messages": [user], "max_tokens": 1, "genkey": GENKEY}


def test_llama_cpps_server_is_asked_in_its_own_words():
    made = replay_of("/completion", {"prompt": "Hello", "n_predict": 50, "id_slot": 1}, engine="llama-server")
    assert made is not None
    assert made.path == "/completion"
    assert made.body == {"prompt": "Hello there", "id_slot": 1, "n_predict": 1, "cache_prompt": True}
    made = replay_of("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, engine="embedded")
    assert made is not None
    assert "continue_assistant_turn" not in made.body
    assert made.body["messages"] == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": " there"},
        {"role": "user", "content": "."},
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["one", "two"]}),
        ("/v1/completions", {"prompt": [1, 2, 3]}),
        ("/v1/completions", {"prompt": "x", "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}),
        ("/api/v1/generate", {"prompt": "x", "images": ["aGk="]}),
        ("/api/v1/generate", {}),
        ("/completion", {"prompt": "x"}),
        ("/api/generate", {"prompt": "x"}),
        ("/sdapi/v1/txt2img", {"prompt": "x"}),
    ],
)
def test_what_cannot_be_replayed_surely_is_not(path: str, body: dict[str, Any]):
    assert replay_of(path, body) is None


@pytest.mark.parametrize("engine", ["koboldcpp", "llama-server", "embedded"])
def test_nothing_ever_asks_for_a_default_length_or_has_an_empty_key(engine: str):
    bodies = [
        ("/api/v1/generate", {"prompt": "x", "max_length": 0, "genkey": ""}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}),
    ]
    made = [each for path, body in bodies if (each := replay_of(path, body, engine=engine))]
    assert len(made) == 3
    for each in (*made, tiny(engine)):
        lengths = [each.body[name] for name in ("max_length", "max_tokens", "n_predict") if name in each.body]
        assert lengths == [1]
        assert each.body.get("genkey", GENKEY) == GENKEY


@pytest.mark.parametrize(
    ("engine", "keeps_state", "expected"),
    [("koboldcpp", True, False), ("koboldcpp", False, True), ("llama-server", True, True)],
)
def test_koboldcpp_is_sent_no_replay_where_the_model_keeps_a_state(
    engine: str,
    keeps_state: bool,
    expected: bool,
):
    turn = Turn("/v1/completions", {"prompt": "Hello"}, " there")
    assert is_replayable(turn, engine, keeps_state=keeps_state) is expected


CHAT = {"messages": [{"role": "user", "content": "Hello"}, {"role": "user", "content": [{"text": "you"}]}]}


@pytest.mark.parametrize(
    ("path", "body", "limit_tokens", "wanted_tokens"),
    [
        ("/api/v1/generate", {"max_length": 100}, 4096, 100),
        ("/api/v1/generate", {"max_length": "100"}, 4096, 100),
        ("/api/v1/generate", {"max_length": 100, "max_context_length": 2048}, 2048, 100),
        ("/api/v1/generate", {"max_length": 100, "max_context_length": 99999}, 4096, 100),
        ("/api/v1/generate", {"max_length": 0, "max_tokens": 7}, 4096, 1024),
        ("/api/v1/generate", {"max_length": "many"}, 4096, 1024),
        ("/v1/completions", {"max_tokens": 100, "max_completion_tokens": 7}, 4096, 100),
        ("/v1/completions", {"n_predict": 7}, 4096, 1024),
        ("/v1/chat/completions", {"max_completion_tokens": 100}, 4096, 100),
    ],
)
def test_a_prompt_was_taken_whole_if_it_and_the_longest_reply_had_room(
    path: str, body: dict[str, Any], limit_tokens: int, wanted_tokens: int
):
    most = limit_tokens - wanted_tokens - 32
    turn = Turn(path, body, "")
    assert fits(turn, most, 4096, 1024, keeps_a_fifth=False)
    assert not fits(turn, most + 1, 4096, 1024, keeps_a_fifth=False)


def test_each_message_of_a_chat_takes_some_room_of_its_own():
    turn = Turn("/v1/chat/completions", CHAT | {"max_tokens": 100}, "")
    assert fits(turn, 4096 - 100 - 96, 4096, 1024, keeps_a_fifth=False)
    assert not fits(turn, 4096 - 100 - 95, 4096, 1024, keeps_a_fifth=False)


def test_half_of_a_small_context_is_the_longest_reply_where_none_is_asked_for():
    assert fits(Turn("/api/v1/generate", {}, ""), 512 - 32, 1024, 1024, keeps_a_fifth=False)
    assert not fits(Turn("/api/v1/generate", {}, ""), 512 - 31, 1024, 1024, keeps_a_fifth=False)


def test_new_versions_leave_a_fifth_of_the_context_to_the_prompt_whatever_is_asked_for():
    turn = Turn("/api/v1/generate", {"max_length": 8192}, "")
    assert fits(turn, 819 - 32, 4096, 1024, keeps_a_fifth=True)
    assert not fits(turn, 820 - 32, 4096, 1024, keeps_a_fifth=True)
    assert not fits(turn, 1, 4096, 1024, keeps_a_fifth=False)


def test_a_prompt_is_counted_with_its_memory_and_all_messages():
    assert prompt_text(Turn("/api/v1/generate", {"prompt": "b", "memory": "a"}, "c")) == "ab"
    assert prompt_text(Turn("/v1/chat/completions", CHAT, "")) == 'Hello\n[{"text": "you"}]'


def test_neither_prompt_nor_reply_is_in_a_repr():
    turn = Turn("/api/v1/generate", {"prompt": "secret prompt"}, "secret reply")
    made = make_replays(turn, "koboldcpp", continues_turn=True)
    assert made
    assert "secret" not in repr(turn) + repr(made) + f"{turn} {made}"


# --- the next turn, as llama.cpp's server is asked for it ---------------------------------------------------------

USER = {"role": "user", "content": "Read a.txt"}
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
USE = {"type": "tool_use", "id": "u1", "name": "read", "input": {}}
FUNCTION_CALL = {"type": "function_call", "call_id": "f1", "name": "read", "arguments": "{}"}


@pytest.mark.parametrize(
    ("path", "body", "said", "place", "added"),
    [
        (
            "/v1/chat/completions",
            {"messages": [USER], "tools": TOOLS, "max_completion_tokens": 90, "stream": True, "n": 1},
            (CALLING,),
            "messages",
            [CALLING, {"role": "tool", "tool_call_id": "c1", "content": "."}],
        ),
        (
            "/v1/messages",
            {"system": "s", "messages": [USER], "max_tokens": 90, "stream": True},
            ({"role": "assistant", "content": [USE]},),
            "messages",
            [
                {"role": "assistant", "content": [USE]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "u1", "content": "."}]},
            ],
        ),
        (
            "/v1/responses",
            {"instructions": "i", "input": "Read a.txt", "max_output_tokens": 90, "stream": True},
            (FUNCTION_CALL,),
            "input",
            [FUNCTION_CALL, {"type": "function_call_output", "call_id": "f1", "output": "."}],
        ),
    ],
)
def test_calls_of_tools_are_answered_in_the_smallest_way(
    path: str, body: dict[str, Any], said: tuple[Any, ...], place: str, added: list[Any]
):
    (made,) = make_replays(Turn(path, body, "", said=said), "llama-server", continues_turn=True)
    assert made.path == path
    assert made.body[place] == [USER, *added]
    assert [value for name, value in made.body.items() if "tokens" in name] == [1]
    assert not {"stream", "n"} & made.body.keys()
    kept = {name: value for name, value in body.items() if name in {"tools", "system", "instructions"}}
    assert kept.items() <= made.body.items()
    assert make_replays(Turn(path, body, "", said=said), "koboldcpp", continues_turn=True) == []


def test_a_thorough_replay_processes_several_tokens_and_ends_as_the_other():
    turn = Turn("/v1/chat/completions", {"messages": [USER]}, " there")
    first, second = make_replays(turn, "embedded", continues_turn=True, is_thorough=True)
    assert [second] == make_replays(turn, "embedded", continues_turn=True)
    assert len(first.body["messages"][-1]["content"].split()) > 5


def test_a_reply_that_went_on_with_the_assistants_words_is_sent_back_with_them():
    messages = [USER, {"role": "assistant", "content": "Once"}]
    (made,) = make_replays(
        Turn("/v1/chat/completions", {"messages": messages}, " upon"), "embedded", continues_turn=True
    )
    assert made.body["messages"][1] == {"role": "assistant", "content": "Once upon"}


def test_a_reply_that_cannot_be_read_leaves_the_clients_own_request():
    (made,) = make_replays(Turn("/v1/responses", {"input": "Hello"}, "Hi"), "llama-server", continues_turn=True)
    assert made.body == {
        "input": [{"role": "user", "content": "Hello"}],
        "max_output_tokens": 1,
        "cache_prompt": True,
    }
