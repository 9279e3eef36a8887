"""The cheapest request that leaves the same KV cache: the last request and its reply, with one token. Pure.

The cache keeps the common prefix of what it holds and of what it is asked, and drops the rest. So the prompt alone
would cost the reply (63 tokens in place of 3 for the next turn, KoboldCPP 1.104), and no generation (`max_length`
0) cuts the cache without using it. Sampling does not matter: with one token, whatever it is, the next turn's prompt
replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
"""Fields that change what is generated, or how it is told, and not what is in the cache before."""
_KOBOLD = ("/api/v1/generate", "/api/latest/generate", "/api/extra/generate/stream")
_COMPLETIONS = ("/v1/completions", "/v1/completion")
_CHAT = ("/v1/chat/completions", "/chat/completions")
_LLAMA = ("/completion", "/completions")
_UNLIKE = frozenset({"tools", "functions", "images", "echo", "suffix", "input_prefix", "input_suffix"})
"""With these the engine builds another prompt than the text that is seen here, or makes several generations."""
_TAIL_BYTES = 12
"""Some three tokens, and never more than 15: a token has a byte at least. Several use other parts of the buffers
than one does; ten take longer: 0.38 s, and one 0.22, on a CPU (KoboldCPP, 2 GiB, two cores)."""
_MESSAGE_TOKENS = 32
"""What a template puts around a message, and some to spare."""
GENKEY = "emberd-replay"
"""The replay's own key, so that it can be aborted without touching a user's generation (never an empty one)."""


def make_replay(turn: Turn, engine: str, *, continues_turn: bool) -> Replay | None:
    """Return the request that keeps the cache of a turn, None if there is none that surely does.

    Args:
        turn: the last turn of a user.
        engine: the adapter's name: koboldcpp, llama-server or embedded.
        continues_turn: the engine leaves the assistant's last message open: KoboldCPP from 1.104 on with
            `continue_assistant_turn`, llama.cpp's server by itself.
    """
    body, path = turn.body, turn.path.rstrip("/")
    if any(body.get(name) for name in _UNLIKE):
        return None
    kept = {name: value for name, value in body.items() if name not in _SAMPLING}
    if path.endswith(_CHAT):
        return _chat(kept, turn.reply, engine, continues_turn=continues_turn)
    return _text(path, kept, turn.reply, engine) if isinstance(kept.get("prompt"), str) else None


def is_replayable(turn: Turn, engine: str, *, keeps_state: bool) -> bool:
    """Tell whether there is a request that keeps the cache of a turn.

    KoboldCPP counts the last token that it has made as a part of the cache, and for a model that keeps a state it
    begins anew where a prompt does not contain all of that (gpttype_adapter.cpp, 1.104): a replay's one token would
    cost the user the conversation. llama.cpp's server goes on from its checkpoints of such a state.

    Args:
        turn: the last turn of a user.
        engine: the adapter's name.
        keeps_state: the model is a recurrent or hybrid one (`kv_cache.keeps_state`).
    """
    if keeps_state and engine == "koboldcpp":
        return False
    return make_replay(turn, engine, continues_turn=True) is not None


def fits(turn: Turn, prompt_tokens: int, context_tokens: int, default_tokens: int, *, keeps_a_fifth: bool) -> bool:
    """Tell whether KoboldCPP took a turn's prompt as a whole.

    It cuts from the beginning what prompt and greatest reply have too much (gpttype_adapter.cpp, 1.104: prompt +
    n_predict - n_ctx tokens). A replay, with another greatest reply, would begin at another word, and the whole
    prompt would be processed again.

    Args:
        turn: request and reply.
        prompt_tokens: `prompt_text` in tokens, or more than that.
        context_tokens: length of the engine's context.
        default_tokens: greatest reply where none is asked for (`--defaultgenamt`; at most half of the context).
        keeps_a_fifth: of the context is never given to the reply (koboldcpp.py: min_remain_hardlimit; 1.104).
    """
    own_limit = _as_count(turn.body.get("max_context_length"))
    limit_tokens = min(own_limit, context_tokens) if own_limit else context_tokens
    names = ("max_length",) if turn.path.rstrip("/").endswith(_KOBOLD) else ("max_tokens", "max_completion_tokens")
    asked = next((turn.body[name] for name in names if turn.body.get(name) is not None), None)
    wanted_tokens = _as_count(asked) or min(default_tokens, context_tokens // 2)
    if keeps_a_fifth:
        wanted_tokens = min(wanted_tokens, limit_tokens - limit_tokens // 5)
    messages = turn.body.get("messages")
    added_tokens = _MESSAGE_TOKENS * (1 + (len(messages) if isinstance(messages, list) else 0))
    return prompt_tokens + added_tokens + wanted_tokens <= limit_tokens


def _as_count(value: Any) -> int:
    """Read a number as KoboldCPP does, 0 if it is none."""
    try:
        return max(int(value), 0)
    except (TypeError, ValueError, OverflowError):
        return 0


def shortened(turn: Turn) -> Turn:
    """Return a turn whose reply lacks its last words.

    A replay that finds the whole cache in place processes one token, and uses the buffers for that alone. After
    this one the whole turn has some tokens to process, as a user's next turn will have.
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


def _chat(kept: dict[str, Any], reply: str, engine: str, *, continues_turn: bool) -> Replay | None:
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
        if engine == "koboldcpp":
            kept["continue_assistant_turn"] = True
    return Replay("/v1/chat/completions", {**kept, "messages": messages, "max_tokens": 1, **_of_engine(engine)})


def _of_engine(engine: str) -> dict[str, Any]:
    return {"genkey": GENKEY} if engine == "koboldcpp" else {"cache_prompt": True}


def tiny(engine: str) -> Replay:
    """Return a generation of one token with a prompt of our own; only where no user's prompt can be lost."""
    if engine == "koboldcpp":
        return Replay("/api/v1/generate", {"prompt": "Hello", "max_length": 1, "genkey": GENKEY})
    return Replay("/completion", {"prompt": "Hello", "n_predict": 1, "cache_prompt": True})
