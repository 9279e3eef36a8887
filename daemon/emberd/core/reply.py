"""What replies say in each dialect: text, end, counts, and what a client can send back of them. Pure.

Layouts: the public API references of OpenAI, Anthropic and Ollama; llama.cpp (tools/server/README.md, build 11434).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from emberd.core.generation import LINES, Dialect

if TYPE_CHECKING:
    from collections.abc import Mapping

COUNTS = ("timings", "usage", "tokens_evaluated")
"""Fields of a reply that hold token counts and nothing private (llama.cpp, tools/server/README.md)."""
THOUGHTS = "reasoning_content"
"""Field of a chat's message with the model's thoughts."""
_LAST_EVENTS = frozenset({"message_stop", "response.completed", "response.incomplete", "response.failed"})
_BLOCK_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}


@dataclass(frozen=True, slots=True)
class Said:
    """What one event says.

    Attributes:
        text: what it adds to the reply.
        is_last: no more text comes.
        obstacle: why a reply with this event cannot be continued, empty if it can.
    """

    text: str = ""
    is_last: bool = False
    obstacle: str = ""


def said(dialect: Dialect, content: dict[str, Any]) -> Said:
    """Return what an event of a stream says."""
    if dialect is Dialect.KOBOLD:
        return Said(_as_text(content.get("token")), bool(content.get("finish_reason")))
    if dialect in {Dialect.LLAMA, Dialect.INFILL}:
        # KoboldCPP answers /completions in OpenAI's form, so its events are not understood then.
        obstacle = "" if "content" in content else "an event that is not understood"
        return Said(_as_text(content.get("content")), content.get("stop") is True, obstacle)
    if dialect in {Dialect.MESSAGES, Dialect.RESPONSES}:
        kind, delta = content.get("type"), content.get("delta")
        text = _as_text(delta) if kind == "response.output_text.delta" else _as_text(_get(delta, "text"))
        return Said(text, kind in _LAST_EVENTS)
    if dialect in LINES and "choices" not in content:
        return Said(text_of(dialect, content) or "", content.get("done") is True)
    choice = _get(content, "choices", 0) or {}
    is_last = bool(_get(choice, "finish_reason"))
    if dialect is Dialect.COMPLETIONS:
        return Said(_as_text(_get(choice, "text")), is_last)
    delta = _get(choice, "delta")
    obstacle = "thoughts" if _get(delta, THOUGHTS) else "tools" if _get(delta, "tool_calls") else ""
    return Said(_as_text(_get(delta, "content")), is_last, obstacle)


def text_of(dialect: Dialect, content: Any) -> str | None:
    """Return the text of a reply that was not streamed, None if it is missing."""
    if dialect is Dialect.KOBOLD:
        text = _get(content, "results", 0, "text")
    elif dialect in {Dialect.LLAMA, Dialect.INFILL}:
        text = _get(content, "content")
    elif dialect is Dialect.COMPLETIONS:
        text = _get(content, "choices", 0, "text")
    elif dialect is Dialect.CHAT or (dialect in LINES and "choices" in content):
        text = _get(content, "choices", 0, "message", "content")
    elif dialect in LINES:
        text = _get(content, "response") if dialect is Dialect.OLLAMA else _get(content, "message", "content")
    else:
        blocks = _get(content, "content") or _get(content, "output", -1, "content")
        texts = [_get(each, "text") for each in blocks] if isinstance(blocks, list) else []
        text = "".join(filter(None, map(_as_text, texts))) or None
    return text if isinstance(text, str) else None


def counts_of(content: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts in a reply or an event, together with those of the events before it."""
    told = dict(before)
    for holder in (content, content.get("message"), content.get("response")):
        for name in COUNTS:
            if isinstance(holder, dict) and name in holder:
                new, old = holder[name], told.get(name)
                told[name] = {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new
    return told


def sent_back(dialect: Dialect, content: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return what a client can send back of a whole reply with its next request; nothing if that is text."""
    if dialect is Dialect.OLLAMA:
        return _as_context(content)
    if dialect in {Dialect.CHAT, Dialect.OLLAMA_CHAT}:
        message = _get(content, "choices", 0, "message") or content.get("message")
        if not isinstance(message, dict):
            return ()
        return _as_chat(message.get("content"), message.get("tool_calls"), message.get(THOUGHTS))
    if dialect is Dialect.MESSAGES and isinstance(content.get("content"), list):
        return ({"role": "assistant", "content": content["content"]},)
    output = content.get("output") if dialect is Dialect.RESPONSES else None
    return tuple(each for each in output if isinstance(each, dict)) if isinstance(output, list) else ()


@dataclass(slots=True)
class StreamedParts:
    """The parts of a streamed reply besides its text, as they come. Never printed."""

    thoughts: str = field(default="", repr=False)
    calls: list[dict[str, Any]] = field(default_factory=list, repr=False)
    blocks: list[dict[str, Any]] = field(default_factory=list, repr=False)
    items: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def take(self, dialect: Dialect, content: dict[str, Any]) -> None:
        """Take an event."""
        kind = content.get("type")
        if dialect is Dialect.OLLAMA:
            self.items += _as_context(content)
        elif dialect in {Dialect.CHAT, Dialect.OLLAMA_CHAT}:
            delta = _get(content, "choices", 0, "delta")
            self.thoughts += _as_text(_get(delta, THOUGHTS))
            for each in _as_list(_get(delta, "tool_calls")):
                self._add_call(each)
            self.calls += [
                each for each in _as_list(_get(content, "message", "tool_calls")) if isinstance(each, dict)
            ]
        elif dialect is Dialect.MESSAGES and kind == "content_block_start":
            block = content.get("content_block")
            self.blocks.append(dict(block) if isinstance(block, dict) else {})
        elif dialect is Dialect.MESSAGES and kind == "content_block_delta" and self.blocks:
            self._add_to_block(content.get("delta"))
        elif dialect is Dialect.RESPONSES and kind == "response.output_item.done":
            item = content.get("item")
            self.items += [item] if isinstance(item, dict) else []

    def sent_back(self, dialect: Dialect, text: str) -> tuple[dict[str, Any], ...]:
        """Return what a client can send back of this reply with its next request."""
        if dialect in {Dialect.CHAT, Dialect.OLLAMA_CHAT}:
            return _as_chat(text, self.calls, self.thoughts)
        if dialect is Dialect.MESSAGES and self.blocks:
            return ({"role": "assistant", "content": [_with_input(each) for each in self.blocks]},)
        return tuple(self.items)

    def _add_call(self, part: Any) -> None:
        number = _get(part, "index")
        number = number if isinstance(number, int) and 0 <= number < len(self.calls) else len(self.calls)
        if number == len(self.calls):
            self.calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        call, function = self.calls[number], _get(part, "function")
        if identifier := _get(part, "id"):
            call["id"] = identifier
        for name in ("name", "arguments"):
            call["function"][name] += _as_text(_get(function, name))

    def _add_to_block(self, delta: Any) -> None:
        block, kind = self.blocks[-1], _get(delta, "type")
        if kind == "input_json_delta":
            block["_input"] = block.get("_input", "") + _as_text(_get(delta, "partial_json"))
        elif name := _BLOCK_DELTAS.get(kind):
            block[name] = _as_text(block.get(name)) + _as_text(_get(delta, name))


def _as_chat(text: Any, calls: Any, thoughts: Any) -> tuple[dict[str, Any], ...]:
    """Return the assistant's message; not every client sends its thoughts back."""
    message: dict[str, Any] = {"role": "assistant", "content": _as_text(text)}
    if _as_text(thoughts):
        message[THOUGHTS] = thoughts
    known = [each for each in _as_list(calls) if isinstance(each, dict)]
    return ({**message, "tool_calls": known} if known else message,)


def _as_context(content: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the conversation's tokens, which clients of Ollama's `/api/generate` send back."""
    context = content.get("context")
    return ({"context": context},) if isinstance(context, list) else ()


def _with_input(block: dict[str, Any]) -> dict[str, Any]:
    """Return a block of a stream as a client sends it back: the input of a tool is an object."""
    whole = {name: value for name, value in block.items() if name != "_input"}
    try:
        return {**whole, "input": json.loads(block["_input"])} if "_input" in block else whole
    except ValueError:
        return whole


def _get(content: Any, *path: str | int) -> Any:
    """Follow keys and numbers; None where a step does not exist."""
    for step in path:
        try:
            content = content[step]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else ""
