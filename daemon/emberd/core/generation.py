"""Requests for generated text: dialect, content, and whether a cut reply could be continued. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class Dialect(Enum):
    """How a request for text and its reply are written."""

    KOBOLD = "kobold"
    """KoboldCPP's own: `prompt`, `max_length`, `results[0].text`; streamed, `token` in each event."""
    COMPLETIONS = "completions"
    """OpenAI's text completions."""
    CHAT = "chat"
    """OpenAI's chat completions."""
    LLAMA = "llama"
    """llama.cpp's server: `prompt`, `n_predict`, `content`."""
    INFILL = "infill"
    """llama.cpp's server, between `input_prefix` and `input_suffix`; told as LLAMA."""
    MESSAGES = "messages"
    """Anthropic's Messages: `messages` beside `system`, blocks of content, named events."""
    RESPONSES = "responses"
    """OpenAI's Responses: `input` beside `instructions`, items of output, named events."""
    OLLAMA = "ollama"
    """Ollama's `/api/generate`: `prompt` and the `context` of the reply before; lines of JSON."""
    OLLAMA_CHAT = "ollama-chat"
    """Ollama's `/api/chat`: `messages`; lines of JSON, or OpenAI's events (older llama-servers)."""


_ENDINGS: tuple[tuple[str, Dialect], ...] = (
    ("/api/v1/generate", Dialect.KOBOLD),
    ("/api/latest/generate", Dialect.KOBOLD),
    ("/api/extra/generate/stream", Dialect.KOBOLD),
    ("/chat/completions", Dialect.CHAT),
    ("/messages", Dialect.MESSAGES),
    ("/responses", Dialect.RESPONSES),
    ("/v1/completions", Dialect.COMPLETIONS),
    ("/v1/completion", Dialect.COMPLETIONS),
    ("/completion", Dialect.LLAMA),
    ("/completions", Dialect.LLAMA),
    ("/infill", Dialect.INFILL),
    ("/api/generate", Dialect.OLLAMA),
    ("/api/chat", Dialect.OLLAMA_CHAT),
)
"""KoboldCPP matches paths by their ends (its docs; tested with 1.76 and 1.104); the first that fits counts."""
LINES = frozenset({Dialect.OLLAMA, Dialect.OLLAMA_CHAT})
"""Dialects whose streams are lines of JSON, and which stream unless told not to (Ollama's docs/api.md)."""
_OTHER_GENERATIONS = (
    "/noscript",
    "/request",
    "/sdapi/v1/interrogate",
    "/audio/transcriptions",
    "/v1/systemone",
)
"""llama.cpp's server (11434) hears and decides with the text model, in the slots of its cache. KoboldCPP has
another model for speech: there a transcription only counts as one that may have cost the cache."""
_OTHER_USES = (
    "/embeddings",
    "/embedding",
    "/rerank",
    "/reranking",
    "/api/embed",
    "/api/extra/fs/semantic_search",
    "/api/extra/fs/search_all_documents",
    "/api/extra/transcribe",
    "/api/extra/tts",
    "/audio/speech",
    "/tts_to_audio",
    "/images/generations",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/sdapi/v1/upscale",
    "/sdapi/v1/extra-single-image",
    "/prompt",
    "/api/extra/music/prepare",
    "/api/extra/music/generate",
)
"""Uses of a model that leave the prompt cache alone: llama.cpp's server makes either text or these, KoboldCPP has
other models for vectors, speech, images and music (`do_POST`, 1.115; `/prompt` is ComfyUI's)."""
_OTHER_CHANGES = re.compile(r"/api/admin/(load|clear)_state$|^/slots/\d+$")
"""Requests that restore or drop a state of the cache: KoboldCPP 1.104, llama.cpp's server (or only save it)."""
_LOOKS_AFTER_ENGINE = (
    "/health",
    "/metrics",
    "/slots",
    "/api/extra/perf",
    "/api/extra/abort",
    "/api/extra/generate/check",
    "/api/extra/multiplayer/status",
)
"""Questions of monitors and open pages, to llama.cpp's server and to KoboldCPP. Kobold Lite asks the last one every
second in multiplayer."""
_OLLAMA_PATHS = ("/api/generate", "/api/chat", "/api/tags", "/api/show", "/api/ps", "/api/embed", "/api/embeddings")
_BUDGETS = {
    Dialect.KOBOLD: ("max_length",),
    Dialect.COMPLETIONS: ("max_tokens", "n_predict"),
    Dialect.CHAT: ("max_completion_tokens", "max_tokens", "n_predict"),
    Dialect.MESSAGES: ("max_tokens",),
    Dialect.RESPONSES: ("max_output_tokens",),
    Dialect.LLAMA: ("n_predict", "max_tokens"),
    Dialect.INFILL: ("n_predict", "max_tokens"),
    Dialect.OLLAMA: ("num_predict",),
    Dialect.OLLAMA_CHAT: ("max_tokens",),
}
_SEVERAL = ("n", "best_of", "n_cmpl")
_STATEFUL = {
    "logprobs": "token probabilities",
    "top_logprobs": "token probabilities",
    "n_probs": "token probabilities",
    "tools": "tools",
    "functions": "tools",
    "grammar": "a grammar",
    "grammar_string": "a grammar",
    "json_schema": "a grammar",
    "echo": "the prompt in the reply",
}
"""Features that a second generation cannot continue in the middle, in words for the client."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A request for text. Never printed: the body is private.

    Attributes:
        dialect: the API it is written for.
        path: the request's path, without a query.
        is_streamed: the reply comes as events.
        body: the JSON object.
    """

    dialect: Dialect
    path: str
    is_streamed: bool
    body: Mapping[str, Any] = field(repr=False)

    @property
    def budget_name(self) -> str:
        """Name of the field that bounds the reply; the dialect's usual one if the request has none."""
        names = _BUDGETS[self.dialect]
        return next((name for name in names if self.body.get(name) is not None), names[0])

    @property
    def budget_tokens(self) -> int | None:
        """Greatest length of the reply in tokens, None if the engine's default applies."""
        return as_count(self.body.get(self.budget_name))

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which the reply ends."""
        for name in ("stop_sequence", "stop"):
            value = self.body.get(name)
            if isinstance(value, str) and value:
                return (value,)
            if isinstance(value, list):
                return tuple(each for each in value if isinstance(each, str) and each)
        return ()

    @property
    def key(self) -> str:
        """The request's `genkey`, by which KoboldCPP aborts it; empty if it has none."""
        value = self.body.get("genkey")
        return value if isinstance(value, str) else ""

    @property
    def is_several(self) -> bool:
        """Whether several replies are asked for at once."""
        return any((as_count(self.body.get(name)) or 1) > 1 for name in _SEVERAL)

    def obstacle(self) -> str:
        """Return why a cut reply cannot be continued honestly, empty if it can."""
        if self.is_several:
            return "several replies at once"
        for name, words in _STATEFUL.items():
            if self.body.get(name):
                return words
        wanted = self.body.get("response_format")
        if isinstance(wanted, dict) and wanted.get("type") not in {None, "text"}:
            return "a grammar"
        if self.dialect in {Dialect.INFILL, Dialect.MESSAGES, Dialect.RESPONSES, *LINES}:
            return "events of this API"
        if self.dialect is Dialect.CHAT:
            return "" if _are_messages(self.body.get("messages")) else "messages that are not text"
        return "" if isinstance(self.body.get("prompt"), str) else "a prompt that is not one text"


def recognise(method: str, path: str, content: bytes) -> Generation | None:
    """Return this request for text, None if it is none or has an unreadable body."""
    dialect = dialect_of(path)
    if method != "POST" or dialect is None:
        return None
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict):
        return None
    is_streamed = bool(body.get("stream", dialect in LINES))
    if dialect is Dialect.KOBOLD:
        is_streamed = path.rstrip("/").endswith("/stream")
    return Generation(dialect, path, is_streamed, body)


def dialect_of(path: str) -> Dialect | None:
    """Return the dialect of a path that generates text, None for other paths."""
    path = path.rstrip("/")
    return next((dialect for ending, dialect in _ENDINGS if path.endswith(ending)), None)


def changes_cache(method: str, path: str) -> bool:
    """Return True if a request replaces the engine's KV cache: it makes text, or restores a state."""
    path = path.rstrip("/")
    if path.endswith("/noscript"):
        return method in {"GET", "POST"}  # a GET there can generate
    is_generation = dialect_of(path) is not None or path.endswith(_OTHER_GENERATIONS)
    return method == "POST" and (is_generation or _OTHER_CHANGES.search(path) is not None)


def uses_model(method: str, path: str) -> bool:
    """Return True if a request is a user's work with a model: it makes text, vectors or an order of documents."""
    return changes_cache(method, path) or (method == "POST" and path.rstrip("/").endswith(_OTHER_USES))


def needs_engine(method: str, path: str, *, is_user_back: bool) -> bool:
    """Return True if an engine that was stopped to give its memory to other work is started for a request.

    Not for questions of monitors and open pages, nor for a GET amid others: an open page asks all the time.
    """
    if changes_cache(method, path):
        return True
    if path.rstrip("/").endswith(_LOOKS_AFTER_ENGINE) or method in {"HEAD", "OPTIONS"}:
        return False
    return method != "GET" or is_user_back


def is_ollama(path: str) -> bool:
    """Return True if a path is one of Ollama's, whose clients read errors as text."""
    return path.rstrip("/") in _OLLAMA_PATHS


def as_count(value: Any) -> int | None:
    """Return a number of tokens, even if a client writes `64.0` or `"64"`; None for everything else and zero."""
    try:
        count = None if isinstance(value, bool) else int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return count if count and count > 0 else None


def _are_messages(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        return False
    last = value[-1]
    return last.get("role") != "assistant" or isinstance(last.get("content"), str)


@dataclass(frozen=True, slots=True)
class Rest:
    """The request for the rest of a cut reply. Never printed.

    Attributes:
        path: where.
        body: the JSON object.
        dialect: how the rest is written.
    """

    path: str
    body: dict[str, Any] = field(repr=False)
    dialect: Dialect


def continued(generation: Generation, text: str, used_tokens: int) -> Rest:
    """Return the request for the rest of a reply.

    Args:
        generation: the request, without an obstacle.
        text: the text that the client was sent.
        used_tokens: tokens of this text.
    """
    body = dict(generation.body)
    if generation.dialect is Dialect.CHAT:
        # KoboldCPP's field (1.104)
        body |= {"messages": _with_text(body["messages"], text), "continue_assistant_turn": True}
    else:
        body["prompt"] += text
    # All of them, because some clients send two, and the engine chooses which one counts.
    for name in _BUDGETS[generation.dialect]:
        if asked := as_count(body.get(name)):
            body[name] = max(asked - used_tokens, 1)
    return Rest(generation.path, body, generation.dialect)


def _with_text(messages: list[Any], text: str) -> list[Any]:
    """Return the messages of a chat with the assistant's words behind them."""
    last = messages[-1]
    if last.get("role") == "assistant":
        return [*messages[:-1], {**last, "content": last["content"] + text}]
    return [*messages, {"role": "assistant", "content": text}]


_MARK = "emberd-goes-on-here"
_OF_A_CHAT = frozenset({"messages", "max_tokens", "max_completion_tokens", "stream_options", "n", "stop"})


def templated(generation: Generation) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return two chats whose prompts `continued_as_text` needs: the client's, and one with a reply in the past.

    Args:
        generation: a chat, without an obstacle.

    Returns:
        None if its messages are not text alone.
    """
    messages = generation.body["messages"]
    if any(not _is_text(each.get("content")) for each in messages):
        return None
    past = [*_with_text(messages, _MARK), {"role": "user", "content": "."}]
    body = {name: value for name, value in generation.body.items() if name not in {"stream", "stream_options"}}
    return body, {**body, "messages": past}


def continued_as_text(generation: Generation, text: str, used_tokens: int, asked: str, past: str) -> Rest | None:
    """Return llama.cpp's own request for the rest of a chat's reply: its prompt ends with the reply so far.

    So no flag and no template can make the engine begin anew. Where the template opens something before the reply
    (a thought, a channel) that the reply's text does not show, the turn is opened as the template writes past ones.

    Args:
        generation: a chat, without an obstacle.
        text: the reply so far.
        used_tokens: tokens of this text.
        asked: the prompt that the template makes of the client's messages.
        past: the prompt in which a mark stands for the reply, and a further message follows.

    Returns:
        None if it does not show where the reply belongs.
    """
    last = generation.body["messages"][-1]["content"]
    words = (last if isinstance(last, str) else last[-1]["text"]).strip()
    begun, mark, _ = past.rpartition(_MARK)
    if not words or not mark or words not in asked or words not in begun:
        return None
    (head, tail), (past_head, past_tail) = (each.rsplit(words, 1) for each in (asked, begun))
    if tail.strip() == past_tail.strip() or generation.body.get("reasoning_format") == "none":
        prompt = asked + text
    elif head == past_head:
        prompt = begun + text
    else:
        return None
    body = {name: value for name, value in generation.body.items() if name not in _OF_A_CHAT}
    length = generation.budget_tokens
    body |= {} if length is None else {"n_predict": max(length - used_tokens, 1)}
    body |= {"prompt": prompt, "stop": list(generation.stops), "stream": True, "cache_prompt": True}
    return Rest("/completion", body, Dialect.LLAMA)


def _is_text(content: Any) -> bool:
    parts = content if isinstance(content, list) and content else None
    return isinstance(content, str) or bool(
        parts and all(isinstance(each, dict) and isinstance(each.get("text"), str) for each in parts)
    )
