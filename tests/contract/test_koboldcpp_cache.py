from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from contract.targets import LONG_PROMPT
from emberd.core.generation import recognise
from emberd.core.replay import make_replays
from emberd.core.turn import UNTOLD, messages_of
from emberd.engine.http import EngineHttp
from emberd.engine.koboldcpp import KoboldCpp
from emberd.engine.koboldcpp_log import read_counts
from emberd.services.turns import Ended
from engine_process import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from contract.targets import Server, Target
    from emberd.core.turn import PromptCounts, Turn

ADAPTER: Any = KoboldCpp(None, None, EngineHttp(), None, None, None)  # type: ignore[arg-type]  # only its words


def timed_s(server: Server, prompt: str, length: int = 1) -> float:
    """Return the seconds of one generation on an idle server."""
    wait_until(server.is_idle)
    began = time.monotonic()
    server.generate(prompt, length)
    return time.monotonic() - began


def test_a_replay_keeps_the_cache_and_a_foreign_prompt_destroys_it(server: Server) -> None:
    timed_s(server, "xu")
    cold_s = timed_s(server, LONG_PROMPT)
    replay_s = timed_s(server, LONG_PROMPT)
    timed_s(server, "xu")
    after_foreign_s = timed_s(server, LONG_PROMPT)
    assert min(cold_s, after_foreign_s) > 3 * replay_s, (cold_s, replay_s, after_foreign_s)


def test_prompt_and_reply_replayed_leave_only_the_new_turn_to_process(server: Server) -> None:
    prompt = "na " + LONG_PROMPT
    reply = server.generate(prompt, 30)
    server.generate(prompt + reply, 1)
    assert server.processed_tokens() <= 3
    server.generate(prompt + reply + " ba ke lo", 1)
    assert server.processed_tokens() <= 8


def test_a_replay_of_the_prompt_alone_loses_the_reply(server: Server) -> None:
    prompt = "ma " + LONG_PROMPT
    reply = server.generate(prompt, 30)
    server.generate(prompt, 1)
    server.generate(prompt + reply + " ba", 1)
    assert 25 <= server.processed_tokens() <= 40


def test_a_prompt_cut_for_its_reply_is_processed_again_by_a_replay_with_another_length(server: Server) -> None:
    server.generate("xu", 1)  # or its context shifting finds the end of another test's prompt
    prompt = "ra " + LONG_PROMPT
    reply = server.generate(prompt, 1000, stop_sequence=list("aeiou"))
    assert server.processed_tokens() > 1000
    server.generate(prompt + reply, 1)
    assert server.processed_tokens() > 1000, "it begins at another word"


def test_a_shorter_prefix_truncates_the_cache(server: Server) -> None:
    prompt = "ta " + LONG_PROMPT
    server.generate(prompt, 1)
    server.generate(prompt[:60], 1)
    server.generate(prompt, 1)
    assert server.processed_tokens() > 1000


def test_a_generation_of_no_length_with_another_prompt_destroys_the_cache(server: Server) -> None:
    prompt = "sa " + LONG_PROMPT
    server.generate(prompt, 1)
    server.generate("xu xu xu xu xu xu", 0)
    server.generate(prompt, 1)
    assert server.processed_tokens() > 1000


def test_any_token_that_is_not_the_users_costs_a_state_its_whole_past_unless_a_copy_is_kept(
    new_target: Target, model_with_state: Path
) -> None:
    with new_target.serving(model_with_state) as server:
        prompt = "ma " + LONG_PROMPT
        so_far = prompt + server.generate(prompt, 30) + " ba"
        so_far += server.generate(so_far, 30)
        assert server.processed_tokens() <= 4
        server.generate(so_far + " ke", 1)
        assert server.processed_tokens() <= 4
        server.generate(so_far + " ke lo", 1)
        assert (server.processed_tokens() > 1000) is not new_target.is_batching


def test_the_perf_counter_tells_tokens_of_the_whole_prompt(server: Server) -> None:
    server.generate(LONG_PROMPT, 1)
    server.generate(LONG_PROMPT, 1)
    wait_until(server.is_idle)
    assert server.processed_tokens() <= 3
    if not server.target.is_old:
        assert server.perf()["last_input_count"] > 1000


TOOL = {
    "name": "read_file",
    "description": "Read a file of the project",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
}
TALK = {"messages": [{"role": "user", "content": LONG_PROMPT}], "max_tokens": 30}
SHORT_TALK = {"messages": [{"role": "user", "content": LONG_PROMPT[: len(LONG_PROMPT) // 4]}], "max_tokens": 30}
"""KoboldCPP's question for a tool repeats the user's words, and must fit into the context, too."""
TOOLS = {"tools": [{"type": "function", "function": TOOL}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", TALK),
        ("/v1/chat/completions", SHORT_TALK | TOOLS),
        ("/api/chat", TALK | {"stream": False}),
        ("/api/chat", SHORT_TALK | TOOLS | {"stream": False}),
        ("/api/generate", {"prompt": LONG_PROMPT, "options": {"num_predict": 30}, "stream": False}),
        ("/v1/messages", TALK | {"system": "ba ke"}),
        ("/v1/messages", SHORT_TALK | {"tools": [{**TOOL, "input_schema": TOOL["parameters"]}]}),
        ("/v1/responses", {"input": LONG_PROMPT, "max_output_tokens": 30}),
    ],
)
def test_the_replay_of_a_talk_costs_one_token_and_leaves_only_the_new_words_to_process(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    if server.target.is_old and path.startswith("/api"):
        pytest.skip("not in this version")
    if path in {"/v1/messages", "/v1/responses"} and (server.target.version < (1, 113) or server.target.is_standin):
        pytest.skip("not in this version")
    server.generate("xu", 1)
    asked = recognise("POST", path, json.dumps(body).encode())
    assert asked is not None
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    turn = Ended(asked, None, answer.content, ADAPTER, UNTOLD).turn()
    assert turn is not None
    (replay,) = make_replays(turn, "koboldcpp")
    for _ in range(2):
        assert server.client.post(replay.path, json=replay.body).status_code == 200
    wait_until(server.is_idle)
    assert server.processed_tokens() <= 3
    before = len(processed(server))
    # To choose a tool, KoboldCPP would first ask itself a long question.
    following = {**continued_talk(turn, "ba ke lo"), **({"tool_choice": "none"} if body.get("tools") else {})}
    assert server.client.post(path, json=following).status_code == 200
    wait_until(server.is_idle)
    assert sum(processed(server)[before:]) < 60


def continued_talk(turn: Turn, words: str) -> dict[str, Any]:
    """Return what the client sends next."""
    if "prompt" in turn.body:
        return {**turn.body, **turn.said[0], "prompt": words}
    place = "input" if "input" in turn.body else "messages"
    return {**turn.body, place: [*messages_of(turn.body), *turn.said, {"role": "user", "content": words}]}


def processed(server: Server) -> list[int]:
    """Return how many prompt tokens each generation so far had to process."""
    told = [read_counts(line.strip()) for line in re.split(r"[\r\n]", server.process.output)]
    return [each.processed or 0 for each in told if each is not None]


def counts(server: Server) -> PromptCounts:
    """Return what the log tells of the last generation; its line need not be ended."""
    wait_until(server.is_idle)
    told = [read_counts(line.strip()) for line in re.split(r"[\r\n]", server.process.output)]
    return [each for each in told if each is not None][-1]


def test_without_it_the_same_version_keeps_one(batching_target: Target, model: Path) -> None:
    with batching_target.serving(model, "--quiet") as server:
        server.generate(LONG_PROMPT, 1)
        server.generate(LONG_PROMPT, 1)
        told = counts(server)
        assert told.processed is not None
        assert told.processed <= 3
        assert told.reused is not None
        assert told.reused > 1000


def test_the_log_tells_what_was_reused_and_processed(server: Server) -> None:
    server.generate("xu", 1)
    prompt = "pa " + LONG_PROMPT
    reply = server.generate(prompt, 12)
    first = counts(server)
    whole = server.processed_tokens()
    assert first.processed == pytest.approx(whole, rel=0.02)
    assert first.reused == pytest.approx(0, abs=0.02 * whole)
    assert first.generated == 12
    server.generate(prompt + reply, 1)
    again = counts(server)
    assert again.processed is not None
    assert again.processed <= 3
    assert again.reused == pytest.approx(whole + 12, abs=4)


def test_continuous_batching_keeps_no_prompt_and_the_log_says_so(batching_target: Target, model: Path) -> None:
    with batching_target.serving(model, "--parallelrequests", "4", "--quiet") as server:
        for _ in range(2):
            server.generate(LONG_PROMPT, 1)
            told = counts(server)
            assert told.reused == 0
            assert told.processed is not None
            assert told.processed > 1000
