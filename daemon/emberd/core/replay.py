"""The cheapest request that leaves the same KV cache: the last request and its reply, with one token. Pure.

A conversation is sent as its client will send it next, with the smallest possible next message. So the engine
writes the history as it will then, whatever its template does with thoughts, tool calls or an assistant's open turn
(each replay processes 1 token, and the next turn only its own words: llama.cpp 11434, KoboldCPP 1.104 and 1.115.1).

The cache keeps the common prefix of its contents and the new prompt, and drops the rest. So the prompt alone
would cost the reply (63 tokens in place of 3 for the next turn, KoboldCPP 1.104), and no generation (`max_length`
0) cuts the cache without using it. Sampling does not matter: the next turn's prompt replaces the one token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from emberd.core.generation import LINES, Dialect, as_count, dialect_of
from emberd.core.reply import THOUGHTS
from emberd.core.turn import media_in, messages_of

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
        "n_cmpl",
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
_LLAMA = ("/completion", "/completions")
_UNLIKE = frozenset({"tools", "functions", "images", "echo", "suffix", "input_prefix", "input_suffix"})
"""With these fields the engine builds another prompt than the text in the request, or makes several
generations."""
_TAIL_BYTES = 12
"""Some three tokens, never more than 15, since a token has at least a byte. Several tokens use other parts of the
buffers than one; ten take longer: 0.38 s against 0.22 for one, on a CPU (KoboldCPP, 2 GiB, two cores)."""
_MESSAGE_TOKENS = 32
"""More tokens than a template puts around a message."""
_MEDIA_TOKENS = 4096
"""More tokens than a projector makes of most images."""
_NEXT_WORDS, _MORE_NEXT_WORDS = ".", "And one word more, if you please."
"""The smallest next message, and one that takes several tokens to process."""
_TALKS = frozenset({Dialect.CHAT, Dialect.MESSAGES, Dialect.RESPONSES, Dialect.OLLAMA_CHAT, Dialect.OLLAMA})
_TELLING = frozenset({"stream", "stream_options", "logprobs", "top_logprobs", "n_probs", "n", "best_of", "n_cmpl"})
"""Fields that change how a reply is told, and how many replies there are."""
_LENGTHS = frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict", "max_length"})
GENKEY = "emberd-replay"
"""A replay's own key begins so: it can be aborted without touching a user's generation (never an empty one)."""


def make_replays(turn: Turn, engine: str, *, is_thorough: bool = False) -> list[Replay]:
    """Return the requests that keep the cache of a turn, in order; none if no request surely does.

    Args:
        turn: the last turn of a user.
        engine: the adapter's name: koboldcpp, llama-server or embedded.
        is_thorough: send one more before, so that several tokens are processed, which use other parts of the
            buffers.
    """
    dialect, path = dialect_of(turn.path), turn.path.rstrip("/")
    if dialect in _TALKS:
        words = (_MORE_NEXT_WORDS, _NEXT_WORDS) if is_thorough else (_NEXT_WORDS,)
        made = [_next_turn(turn, dialect, each, engine) for each in words]
        return [each for each in made if each is not None]
    kept = {name: value for name, value in turn.body.items() if name not in _SAMPLING}
    if dialect is Dialect.INFILL:
        # The next one does not begin with this reply: its words come before the suffix then.
        is_spoken = engine != "koboldcpp"
        return [Replay(turn.path, {**kept, "n_predict": 1, **_of_engine(engine)})] if is_spoken else []
    if any(turn.body.get(name) for name in _UNLIKE):
        return []
    turns = [shortened(turn), turn] if is_thorough and turn.reply else [turn]
    if not isinstance(kept.get("prompt"), str):
        return []
    made = [_text(path, dict(kept), each.reply, engine) for each in turns]
    return [each for each in made if each is not None]


def _next_turn(turn: Turn, dialect: Dialect, words: str, engine: str) -> Replay | None:
    """Return what the client will send next, with a budget of one token: request, reply, and the next words.

    Without a readable reply it is the client's own request: the cache then lacks the reply's tokens.
    """
    left_out = _TELLING | _LENGTHS
    body = {name: value for name, value in turn.body.items() if name not in left_out}
    body |= {"max_tokens": 1} if dialect is not Dialect.RESPONSES or engine == "koboldcpp" else {}
    body |= {"max_output_tokens": 1} if dialect is Dialect.RESPONSES else {}
    body |= {"stream": False} if dialect in LINES else {}
    if engine == "koboldcpp":
        # It takes one name for all APIs. To choose a tool would take it a generation of its own, and it puts the
        # tools before the prompt whatever the choice (1.104, 1.115).
        body |= {"genkey": GENKEY, **({"tool_choice": "none"} if body.get("tools") else {})}
    else:
        body["cache_prompt"] = True
    if dialect is Dialect.OLLAMA:
        return _next_prompt(turn, body, words)
    history = messages_of(turn.body)
    if not history or not all(isinstance(each, dict) for each in history):
        return None
    said = _as_client_sends(history, turn.said)
    if turn.reply and not said and dialect is not Dialect.RESPONSES:
        said = ({"role": "assistant", "content": turn.reply},)
    if said:
        history = [*_with_reply(history, said), *_next_messages(said, words)]
    return Replay(turn.path, {**body, "input" if dialect is Dialect.RESPONSES else "messages": history})


def _next_prompt(turn: Turn, body: dict[str, Any], words: str) -> Replay | None:
    """Return the next request to Ollama's `/api/generate`, with the conversation's tokens, which the reply told."""
    options = body.get("options")
    if not isinstance(body.get("prompt"), str) or body.get("images"):
        return None
    body["options"] = {**(options if isinstance(options, dict) else {}), "num_predict": 1}
    return Replay(turn.path, {**body, **turn.said[0], "prompt": words} if turn.said else body)


def _as_client_sends(
    history: list[Mapping[str, Any]], said: tuple[Mapping[str, Any], ...]
) -> tuple[Mapping[str, Any], ...]:
    """Return the reply without a chat's thoughts if its client does not send them back.

    What the client has sent shows that. Templates keep thoughts before the answers of tools (Qwen 3, DeepSeek), so
    of a reply that calls some only the messages behind the user's last one count. With none there the thoughts
    stay: nothing of the cache is lost then, while without them a client that sends them back would lose the reply.
    """
    calls_tools = any(each.get("tool_calls") for each in said)
    if calls_tools:
        last = max((number for number, each in enumerate(history) if each.get("role") == "user"), default=-1)
        history = history[last + 1 :]
    earlier = [each for each in history if each.get("role") == "assistant"]
    if any(each.get(THOUGHTS) for each in earlier) or (calls_tools and not earlier):
        return said
    return tuple({name: value for name, value in each.items() if name != THOUGHTS} for each in said)


def _with_reply(history: list[Any], said: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Append a reply; if the history ends with the assistant's words, the reply continues them."""
    last, reply = history[-1], said[0]
    if last.get("role") != "assistant" or reply.get("role") != "assistant":
        return [*history, *said]
    begun, rest = last.get("content"), reply.get("content")
    if isinstance(begun, str) and isinstance(rest, str):
        return [*history[:-1], {**reply, "content": begun + rest}, *said[1:]]
    blocks, more = _as_blocks(begun), _as_blocks(rest)
    if blocks and more and isinstance(blocks[-1].get("text"), str) and isinstance(more[0].get("text"), str):
        more = [{**more[0], "text": blocks.pop()["text"] + more[0]["text"]}, *more[1:]]
    return [*history[:-1], {**reply, "content": [*blocks, *more]}, *said[1:]]


def _as_blocks(content: Any) -> list[dict[str, Any]]:
    """Return a message's content as blocks; a text is one."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []


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
    return bool(make_replays(turn, engine))


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
    body, dialect = turn.body, dialect_of(turn.path)
    options = body.get("options") if dialect is Dialect.OLLAMA else None
    options = options if isinstance(options, dict) else {}
    own_limit = as_count(body.get("max_context_length") or options.get("num_ctx"))
    limit_tokens = min(own_limit, context_tokens) if own_limit else context_tokens
    names = ("max_length",) if turn.path.rstrip("/").endswith(_KOBOLD) else ("max_tokens", "max_completion_tokens")
    asked = next((body[name] for name in names if body.get(name) is not None), options.get("num_predict"))
    wanted_tokens = as_count(asked) or min(default_tokens, context_tokens // 2)
    if dialect in _TALKS:  # 1.115 reads both names
        wanted_tokens = max(wanted_tokens, as_count(body.get("max_length")) or 0)
    if keeps_a_fifth:
        wanted_tokens = min(wanted_tokens, limit_tokens - limit_tokens // 5)
    parts = len(messages_of(body)) if dialect is not Dialect.OLLAMA else 1
    context = body.get("context")
    added_tokens = _MESSAGE_TOKENS * (1 + parts) + (len(context) if isinstance(context, list) else 0)
    return prompt_tokens + added_tokens + _MEDIA_TOKENS * media_in(turn) + wanted_tokens <= limit_tokens


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


def _of_engine(engine: str) -> dict[str, Any]:
    return {"genkey": GENKEY} if engine == "koboldcpp" else {"cache_prompt": True}


def tiny(engine: str, serves: str = "") -> Replay:
    """Return the smallest use of the model with emberd's own words, for a cache with no user's prompt to lose.

    Args:
        engine: the adapter's name.
        serves: what a server for one kind of request serves: embeddings or rerank; empty for text.
    """
    if serves == "rerank":
        return Replay("/v1/rerank", {"query": "Hello", "documents": ["Hello"]})
    if serves == "embeddings":
        return Replay("/embedding", {"content": "Hello"})  # the one path that works with every kind of pooling
    if engine == "koboldcpp":
        return Replay("/api/v1/generate", {"prompt": "Hello", "max_length": 1, "genkey": GENKEY})
    return Replay("/completion", {"prompt": "Hello", "n_predict": 1, "cache_prompt": True})
