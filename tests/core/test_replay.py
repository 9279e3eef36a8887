"""The request that keeps the KV cache: what is kept of the user's, and when there is none."""

from __future__ import annotations

import json
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
from emberd.core.turn import Turn, is_of_same_conversation, prompt_text


def replay_of(path: str, body: dict[str, Any], reply: str = " there", engine: str = "koboldcpp") -> Replay | None:
    made = make_replays(Turn(path, body, reply), engine)
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


def test_a_chat_is_replayed_with_the_smallest_next_message():
    user = {"role": "user", "content": "Hello"}
    asked = {"messages": [user], "stream": True, "max_tokens": 0, "max_length": 9, "model": "m", "n_cmpl": 3}
    made = replay_of("/v1/chat/completions", asked)
    assert made is not None
    assert made.path == "/v1/chat/completions"
    assert made.body == {
        "model": "m",
        "messages": [user, {"role": "assistant", "content": " there"}, {"role": "user", "content": "."}],
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
    made = make_replays(turn, "koboldcpp", is_thorough=True)
    short, whole = made[0].body["prompt"], made[-1].body["prompt"]
    assert shortened(turn).reply == short.removeprefix("Once")
    assert whole.startswith(short)
    assert whole.removeprefix(short) == tail
    assert short.startswith("Once"), "the user's own words stay whole"


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


INFILL = {"input_extra": [{"text": "x"}], "input_prefix": "one ", "input_suffix": " three", "prompt": ""}


def test_an_infill_is_replayed_without_its_reply_which_the_next_one_has_before_the_suffix():
    asked = {**INFILL, "n_predict": 50, "stream": True, "top_k": 40}
    made = replay_of("/infill", asked, reply="two", engine="llama-server")
    assert made is not None
    assert made.path == "/infill"
    assert made.body == {**INFILL, "top_k": 40, "n_predict": 1, "cache_prompt": True}
    assert replay_of("/infill", asked, engine="koboldcpp") is None, "it does not speak it"


def test_an_infill_continues_one_with_the_same_words_around_it_only():
    before = Turn("/infill", INFILL, "two")
    assert Turn("/infill", {**INFILL, "prompt": "t"}, "").continues(before)
    for name in ("input_extra", "input_prefix", "input_suffix"):
        assert not Turn("/infill", {**INFILL, name: "other"}, "").continues(before)


def test_an_infill_a_word_later_is_of_the_same_conversation():
    before = Turn("/infill", {**INFILL, "input_prefix": "one " * 50}, "")
    after = Turn("/infill", {**INFILL, "input_prefix": "one " * 51}, "")
    assert is_of_same_conversation(after, before)
    assert not is_of_same_conversation(
        Turn("/infill", {**INFILL, "input_extra": [], "input_prefix": "y" * 99}, ""), before
    )
    assert not is_of_same_conversation(Turn("/completion", {"prompt": "y"}, ""), before)


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_a_replay_is_one_reply_where_the_user_wanted_several(path: str):
    several = {"n": 2, "best_of": 2, "n_cmpl": 2}
    asked = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", **several}
    made = replay_of(path, asked, engine="llama-server")
    assert made is not None
    assert not several.keys() & made.body.keys()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["one", "two"]}),
        ("/v1/completions", {"prompt": [1, 2, 3]}),
        ("/v1/completions", {"prompt": "x", "echo": True}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": "x"}),
        ("/v1/chat/completions", {"messages": ["x"]}),
        ("/v1/responses", {"input": 7}),
        ("/api/v1/generate", {"prompt": "x", "images": ["aGk="]}),
        ("/api/v1/generate", {}),
        ("/completion", {"prompt": "x"}),
        ("/api/generate", {"prompt": 7}),
        ("/api/generate", {"prompt": "x", "images": ["aGk="]}),
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
        ("/v1/chat/completions", {"max_tokens": 7, "max_length": 100}, 4096, 100),
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


def test_what_ollama_calls_its_lengths_counts_and_so_do_the_tokens_before_the_prompt():
    body = {"prompt": "x", "context": [1] * 500, "options": {"num_ctx": 2048, "num_predict": 100}}
    assert fits(Turn("/api/generate", body, ""), 2048 - 100 - 64 - 500, 4096, 1024, keeps_a_fifth=False)
    assert not fits(Turn("/api/generate", body, ""), 2048 - 99 - 64 - 500, 4096, 1024, keeps_a_fifth=False)


def test_an_image_is_counted_by_itself_and_not_as_text():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "Ab3+" * 1000}}
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, image]}], "max_tokens": 9}
    turn = Turn("/v1/chat/completions", body, "")
    assert len(prompt_text(turn)) < 200
    assert fits(turn, 200, 8192, 1024, keeps_a_fifth=False)
    assert not fits(turn, 200, 4096, 1024, keeps_a_fifth=False)


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
    tools = Turn("/v1/messages", {"system": "s", "tools": [{"name": "t"}], "messages": [USER, CALLING]}, "")
    assert prompt_text(tools) == "\n".join(["s", '[{"name": "t"}]', "Read a.txt", json.dumps(CALLING)])


def test_neither_prompt_nor_reply_is_in_a_repr():
    turn = Turn("/api/v1/generate", {"prompt": "secret prompt"}, "secret reply")
    made = make_replays(turn, "koboldcpp")
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
    (made,) = make_replays(Turn(path, body, "", said=said), "llama-server")
    assert made.path == path
    assert made.body[place] == [USER, *added]
    assert [value for name, value in made.body.items() if "tokens" in name] == [1]
    assert not {"stream", "n"} & made.body.keys()
    kept = {name: value for name, value in body.items() if name in {"tools", "system", "instructions"}}
    assert kept.items() <= made.body.items()
    (made,) = make_replays(Turn(path, body, "", said=said), "koboldcpp")
    assert made.body[place] == [USER, *added]
    assert (made.body["max_tokens"], made.body["genkey"]) == (1, GENKEY)
    assert made.body.get("tool_choice") == ("none" if "tools" in body else None), "it would choose one first"


THOUGHT = {"reasoning_content": "hm"}
ANSWERED = {"role": "tool", "tool_call_id": "c1", "content": "text"}
REPLIED = {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize(
    ("history", "reply", "is_kept"),
    [
        ([USER], REPLIED, False),
        ([USER], CALLING, True),
        ([USER, REPLIED, USER], REPLIED, False),
        ([USER, {**REPLIED, **THOUGHT}, USER], REPLIED, True),
        ([USER, CALLING, ANSWERED], CALLING, False),
        ([USER, {**CALLING, **THOUGHT}, ANSWERED], CALLING, True),
        ([USER, {**CALLING, **THOUGHT}, ANSWERED], REPLIED, True),
        ([USER, CALLING, ANSWERED, REPLIED, USER], CALLING, True),
    ],
)
def test_thoughts_are_sent_back_as_the_client_does_and_before_the_answer_of_a_tool_unless_it_does_not(
    history: list[Any], reply: dict[str, Any], is_kept: bool
):
    """A client may leave out the thoughts of older turns, and still send those before the answer of a tool."""
    turn = Turn("/v1/chat/completions", {"messages": history}, "", said=({**reply, **THOUGHT},))
    (made,) = make_replays(turn, "llama-server")
    assert made.body["messages"][len(history)] == ({**reply, **THOUGHT} if is_kept else reply)


def test_a_thorough_replay_processes_several_tokens_and_ends_as_the_other():
    turn = Turn("/v1/chat/completions", {"messages": [USER]}, " there")
    first, second = make_replays(turn, "embedded", is_thorough=True)
    assert [second] == make_replays(turn, "embedded")
    assert len(first.body["messages"][-1]["content"].split()) > 5


def test_a_reply_that_went_on_with_the_assistants_words_is_sent_back_with_them():
    messages = [USER, {"role": "assistant", "content": "Once"}]
    (made,) = make_replays(Turn("/v1/chat/completions", {"messages": messages}, " upon"), "embedded")
    assert made.body["messages"][1] == {"role": "assistant", "content": "Once upon"}


@pytest.mark.parametrize("begun", ["Once", [{"type": "text", "text": "Once"}]])
def test_a_reply_in_blocks_is_joined_to_the_words_it_went_on_with(begun: Any):
    messages = [USER, {"role": "assistant", "content": begun}]
    said = ({"role": "assistant", "content": [{"type": "text", "text": " upon"}, USE]},)
    (made,) = make_replays(Turn("/v1/messages", {"messages": messages}, " upon", said=said), "llama-server")
    assert made.body["messages"][1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "Once upon"}, USE],
    }
    assert messages[1]["content"] == begun, "the user's own request stays"


def test_a_call_behind_the_assistants_words_is_an_item_of_its_own():
    items = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Well"}]
    (made,) = make_replays(Turn("/v1/responses", {"input": items}, "", said=(FUNCTION_CALL,)), "llama-server")
    assert made.body["input"][:3] == [*items, FUNCTION_CALL]


def test_ollamas_generate_goes_on_with_the_tokens_that_its_reply_told():
    asked = {"model": "m", "system": "s", "prompt": "Hello", "options": {"num_ctx": 900, "num_predict": 50}}
    turn = Turn("/api/generate", asked, "Hi", said=({"context": [1, 2]},))
    (made,) = make_replays(turn, "koboldcpp")
    assert made.path == "/api/generate"
    assert made.body == {
        "model": "m",
        "system": "s",
        "prompt": ".",
        "context": [1, 2],
        "options": {"num_ctx": 900, "num_predict": 1},
        "stream": False,
        "max_tokens": 1,
        "genkey": GENKEY,
    }
    (made,) = make_replays(Turn("/api/generate", asked, "Hi"), "koboldcpp")
    assert (made.body["prompt"], made.body["options"]["num_predict"]) == ("Hello", 1)


def test_ollamas_chat_is_not_streamed_again():
    (made,) = make_replays(Turn("/api/chat", {"messages": [USER]}, "Hi"), "koboldcpp")
    assert made.path == "/api/chat"
    assert made.body["stream"] is False
    assert made.body["messages"][1:] == [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "."}]


def test_a_server_for_one_kind_of_request_is_warmed_by_it():
    assert tiny("llama-server", "embeddings").path == "/embedding"
    assert tiny("llama-server", "rerank").path == "/v1/rerank"


def test_a_reply_that_cannot_be_read_leaves_the_clients_own_request():
    (made,) = make_replays(Turn("/v1/responses", {"input": "Hello"}, "Hi"), "llama-server")
    assert made.body == {
        "input": [{"role": "user", "content": "Hello"}],
        "max_output_tokens": 1,
        "cache_prompt": True,
    }
