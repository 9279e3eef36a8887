"""The cheapest request that leaves the same KV cache: the last request and its reply, with one token. Pure.

A chat is sent to llama.cpp's server as its client will send it next, with the smallest possible next message. So
the template writes the history as it will then, whatever it does with thoughts, tool calls or an assistant's open
turn (build 11434: each replay processes 1 token, and the next turn only its own words).

The cache keeps the common prefix of its contents and the new prompt, and drops the rest. So the prompt alone
would cost the reply (63 tokens in place of 3 for the next turn, KoboldCPP 1.104), and no generation (`max_length`
0) cuts the cache without using it. Sampling does not matter: the next turn's prompt replaces the one token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from emberd.core.generation import Dialect, as_count, dialect_of
from emberd.core.turn import messages_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emberd.core.turn import Turn


@dataclass(frozen=True, slots=True)
class Replay:
    """A request to send.

    Attributes:
        path: where.
        body: the JSON object.
    """

    path: str
    body: dict[str, Any] = field(repr=False)


_SAMPLING = frozenset(
    {
        "stop",
        "stop_sequence",
        "stop_token",
        "grammar",
        "grammar_string",
        "json_schema",
        "response_format",
        "logprobs",
        "top_logprobs",
        "n_probs",
        "n",
        "best_of",
        "stream",
        "stream_options",
        "genkey",
        "max_tokens",
        "max_completion_tokens",
        "max_length",
        "n_predict",
        "max_context_length",
    }
)
"""Fields that change only what is generated or how it is told, not what is in the cache before."""
_KOBOLD = ("/api/v1/generate", "/api/latest/generate", "/api/extra/generate/stream")
_COMPLETIONS = ("/v1/completions", "/v1/completion")
_CHAT = ("/v1/chat/completions", "/chat/completions")
_LLAMA = ("/completion", "/completions")
_UNLIKE = frozenset({"tools", "functions", "images", "echo", "suffix", "input_prefix", "input_suffix"})
"""With these fields the engine builds another prompt than the text in the request, or makes several
generations."""
_TAIL_BYTES = 12
"""Some three tokens, never more than 15, since a token has at least a byte. Several tokens use other parts of the
buffers than one; ten take longer: 0.38 s against 0.22 for one, on a CPU (KoboldCPP, 2 GiB, two cores)."""
_MESSAGE_TOKENS = 32
"""More tokens than a template puts around a message."""
_NEXT_WORDS, _MORE_NEXT_WORDS = ".", "And one word more, if you please."
"""The smallest next message, and one that takes several tokens to process."""
_BUDGET_NAMES = {Dialect.CHAT: "max_tokens", Dialect.MESSAGES: "max_tokens", Dialect.RESPONSES: "max_output_tokens"}
_TELLING = frozenset({"stream", "stream_options", "logprobs", "top_logprobs", "n_probs", "n", "best_of", "n_cmpl"})
"""Fields that change how a reply is told, and how many replies there are."""
GENKEY = "emberd-replay"
"""A replay's own key begins so: it can be aborted without touching a user's generation (never an empty one)."""


def make_replays(turn: Turn, engine: str, *, continues_turn: bool, is_thorough: bool = False) -> list[Replay]:
    """Return the requests that keep the cache of a turn, in order; none if no request surely does.

    Args:
        turn: the last turn of a user.
        engine: the adapter's name: koboldcpp, llama-server or embedded.
        continues_turn: the engine leaves the assistant's last message open: KoboldCPP from 1.104 on with
            `continue_assistant_turn`.
        is_thorough: send one more before, so that several tokens are processed, which use other parts of the
            buffers.
    """
    dialect, path = dialect_of(turn.path), turn.path.rstrip("/")
    if dialect in _BUDGET_NAMES and engine != "koboldcpp":
        words = (_MORE_NEXT_WORDS, _NEXT_WORDS) if is_thorough else (_NEXT_WORDS,)
        return [_next_turn(turn, dialect, each) for each in words] if messages_of(turn.body) else []
    if any(turn.body.get(name) for name in _UNLIKE):
        return []
    turns = [shortened(turn), turn] if is_thorough and turn.reply else [turn]
    kept = {name: value for name, value in turn.body.items() if name not in _SAMPLING}
    if path.endswith(_CHAT):
        made = [_chat(dict(kept), each.reply, continues_turn=continues_turn) for each in turns]
    elif isinstance(kept.get("prompt"), str):
        made = [_text(path, dict(kept), each.reply, engine) for each in turns]
    else:
        return []
    return [each for each in made if each is not None]


def _next_turn(turn: Turn, dialect: Dialect, words: str) -> Replay:
    """Return what the client will send next, with a budget of one token: request, reply, and the next words.

    Without a readable reply it is the client's own request: the cache then lacks the reply's tokens.
    """
    body = {name: value for name, value in turn.body.items() if name not in _TELLING}
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"):
        body.pop(name, None)
    history, said = messages_of(turn.body), turn.said
    if turn.reply and not said and dialect is not Dialect.RESPONSES:
        said = ({"role": "assistant", "content": turn.reply},)
    if said:
        history = [*_with_reply(history, said), *_next_messages(said, words)]
    place = "input" if dialect is Dialect.RESPONSES else "messages"
    return Replay(turn.path, {**body, place: history, _BUDGET_NAMES[dialect]: 1, "cache_prompt": True})


def _with_reply(history: list[Any], said: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Append a reply; if the history ends with the assistant's words, the reply continues them."""
    last, reply = history[-1], said[0]
    if isinstance(last, dict) and last.get("role") == "assistant":
        if isinstance(last.get("content"), str) and isinstance(reply.get("content"), str):
            return [*history[:-1], {**reply, "content": last["content"] + reply["content"]}, *said[1:]]
        return history[:-1]  # blocks that cannot be joined: only what comes before them is kept
    return [*history, *said]


def _next_messages(said: Sequence[Mapping[str, Any]], words: str) -> list[dict[str, Any]]:
    """Return the smallest next message: answers to tool calls if there are any, since templates want them."""
    answers: list[dict[str, Any]] = []
    for each in said:
        if each.get("type") == "function_call":
            answers.append({"type": "function_call_output", "call_id": each.get("call_id"), "output": words})
        answers += [
            {"role": "tool", "tool_call_id": call.get("id"), "content": words}
            for call in each.get("tool_calls") or ()
        ]
        blocks = each.get("content")
        results = [
            {"type": "tool_result", "tool_use_id": block.get("id"), "content": words}
            for block in (blocks if isinstance(blocks, list) else ())
            if isinstance(block, dict) and block.get("type") == "tool_use"
        ]
        answers += [{"role": "user", "content": results}] if results else []
    return answers or [{"role": "user", "content": words}]


def is_replayable(turn: Turn, engine: str, *, keeps_state: bool) -> bool:
    """Return True if there is a request that keeps the cache of a turn.

    KoboldCPP counts the last generated token as a part of the cache, and for a model that keeps a state it begins
    anew if a prompt does not contain all of the cache (gpttype_adapter.cpp, 1.104): a replay's one token would
    cost the user the conversation. llama.cpp's server goes on from checkpoints of such a state.
    """
    if keeps_state and engine == "koboldcpp":
        return False
    return bool(make_replays(turn, engine, continues_turn=True))


def fits(turn: Turn, prompt_tokens: int, context_tokens: int, default_tokens: int, *, keeps_a_fifth: bool) -> bool:
    """Return True if KoboldCPP took a turn's prompt as a whole.

    It cuts the excess of prompt and greatest reply from the prompt's beginning (gpttype_adapter.cpp, 1.104:
    prompt + n_predict - n_ctx tokens). A replay, with another greatest reply, would begin at another word, and
    the whole prompt would be processed again.

    Args:
        turn: request and reply.
        prompt_tokens: tokens of `prompt_text`, or more.
        context_tokens: length of the engine's context.
        default_tokens: greatest reply where none is asked for (`--defaultgenamt`; at most half of the context).
        keeps_a_fifth: a fifth of the context is never given to the reply (koboldcpp.py: min_remain_hardlimit;
            1.104).
    """
    own_limit = as_count(turn.body.get("max_context_length"))
    limit_tokens = min(own_limit, context_tokens) if own_limit else context_tokens
    names = ("max_length",) if turn.path.rstrip("/").endswith(_KOBOLD) else ("max_tokens", "max_completion_tokens")
    asked = next((turn.body[name] for name in names if turn.body.get(name) is not None), None)
    wanted_tokens = as_count(asked) or min(default_tokens, context_tokens // 2)
    if keeps_a_fifth:
        wanted_tokens = min(wanted_tokens, limit_tokens - limit_tokens // 5)
    messages = turn.body.get("messages")
    added_tokens = _MESSAGE_TOKENS * (1 + (len(messages) if isinstance(messages, list) else 0))
    return prompt_tokens + added_tokens + wanted_tokens <= limit_tokens


def shortened(turn: Turn) -> Turn:
    """Return a turn whose reply lacks its last words.

    A replay that finds the whole cache in place processes one token, and uses only the buffers for one. After the
    shortened turn the whole turn has some tokens to process, like a user's next turn.
    """
    characters = size_bytes = 0
    while characters < len(turn.reply) and size_bytes < _TAIL_BYTES:
        characters += 1
        size_bytes += len(turn.reply[-characters].encode("utf-8", "surrogatepass"))
    return replace(turn, reply=turn.reply[: len(turn.reply) - characters])


def _text(path: str, kept: dict[str, Any], reply: str, engine: str) -> Replay | None:
    kept["prompt"] += reply
    if path.endswith(_KOBOLD):
        return Replay("/api/v1/generate", {**kept, "max_length": 1, "genkey": GENKEY})
    if path.endswith(_COMPLETIONS):
        return Replay("/v1/completions", {**kept, "max_tokens": 1, **_of_engine(engine)})
    if path.endswith(_LLAMA) and engine != "koboldcpp":
        return Replay("/completion", {**kept, "n_predict": 1, **_of_engine(engine)})
    return None


def _chat(kept: dict[str, Any], reply: str, *, continues_turn: bool) -> Replay | None:
    messages = kept.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        return None
    last = messages[-1]
    if reply and continues_turn:
        if last.get("role") == "assistant":
            if not isinstance(last.get("content"), str):
                return None
            messages = [*messages[:-1], {**last, "content": last["content"] + reply}]
        else:
            messages = [*messages, {"role": "assistant", "content": reply}]
        kept["continue_assistant_turn"] = True
    return Replay("/v1/chat/completions", {**kept, "messages": messages, "max_tokens": 1, "genkey": GENKEY})


def _of_engine(engine: str) -> dict[str, Any]:
    return {"genkey": GENKEY} if engine == "koboldcpp" else {"cache_prompt": True}


def tiny(engine: str) -> Replay:
    """Return a generation of one token with emberd's own prompt, for a cache with no user's prompt to lose."""
    if engine == "koboldcpp":
        return Replay("/api/v1/generate", {"prompt": "Hello", "max_length": 1, "genkey": GENKEY})
    return Replay("/completion", {"prompt": "Hello", "n_predict": 1, "cache_prompt": True})
