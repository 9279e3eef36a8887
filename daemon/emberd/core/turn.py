"""A user's turn: the last request of a conversation, its reply, and the engine's counts. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from emberd.core.generation import dialect_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_SIMILARITY = 0.1
_MEDIA = re.compile(r"[A-Za-z0-9+/=_-]{1000,}")
"""An image or a sound in a body: text has no such words."""
_INFILLED = ("input_extra", "input_prefix", "input_suffix")
"""Fields of llama.cpp's `/infill`, in the order in which it puts them before the prompt (build 11434)."""
_BEFORE_THE_PROMPT = (
    "memory",
    "system",
    "instructions",
    "tools",
    "functions",
    "images",
    "chat_template_kwargs",
    *_INFILLED,
)
"""Fields that come before the prompt, or shape it from its beginning."""


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """An engine's counts of one generation, in tokens. Unknown is None.

    Attributes:
        reused: of the prompt, found in the cache.
        processed: of the prompt, computed.
        generated: of the reply.
    """

    reused: int | None = None
    processed: int | None = None
    generated: int | None = None

    @property
    def prompt(self) -> int | None:
        """Length of the whole prompt."""
        return None if self.reused is None or self.processed is None else self.reused + self.processed

    @property
    def held(self) -> int | None:
        """How much of the cache the conversation takes afterwards."""
        return None if self.prompt is None else self.prompt + (self.generated or 0)

    def after(self, first: PromptCounts) -> PromptCounts:
        """Return the counts of a request that took several generations, of which these are the last.

        KoboldCPP asks itself first whether a tool is needed (`determine_tool_json_to_use`, 1.104); what was in the
        cache when the request came, only the first generation tells.
        """
        if first.reused is None or self.prompt is None:
            return self
        reused = min(first.reused, self.prompt)
        return PromptCounts(reused, self.prompt - reused, self.generated)


UNTOLD = PromptCounts()


@dataclass(frozen=True, slots=True)
class Turn:
    """The last request for a generation and its reply. Never printed: both are private.

    Attributes:
        path: the request's path, without a query.
        body: its JSON object.
        reply: the text that the client was sent.
        said: the reply as its client can send it back: a chat's message with its thoughts and tool calls, content
            blocks of Messages, items of Responses; empty if it is only text, or unknown.
        counts: the engine's.
        was_cut: its generation did not come to its end, so how much of the prompt the cache holds is unknown.
    """

    path: str
    body: Mapping[str, Any] = field(repr=False)
    reply: str = field(repr=False)
    said: tuple[Mapping[str, Any], ...] = field(default=(), repr=False, kw_only=True)
    counts: PromptCounts = UNTOLD
    was_cut: bool = False

    @property
    def kind(self) -> str:
        """The kind, for which replays work alike: dialect, and whether there are tools."""
        dialect = dialect_of(self.path)
        return (dialect.value if dialect else "") + ("+tools" if self.body.get("tools") else "")

    def continues(self, before: Turn) -> bool:
        """Return True if its prompt surely begins with the whole prompt of another turn."""
        mine, other = self.body, before.body
        if any(mine.get(name) != other.get(name) for name in _BEFORE_THE_PROMPT):
            return False
        if isinstance(mine.get("prompt"), str) and isinstance(other.get("prompt"), str):
            return bool(mine["prompt"].startswith(other["prompt"]))
        messages, earlier = messages_of(mine), messages_of(other)
        return bool(earlier) and messages[: len(earlier)] == earlier


def messages_of(body: Mapping[str, Any]) -> list[Any]:
    """Return the messages of a chat, or the items of Responses' `input` (a text is one item); else nothing."""
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, str) and "messages" not in body:
        return [{"role": "user", "content": messages}]
    return messages if isinstance(messages, list) else []


def prompt_text(turn: Turn) -> str:
    """Return the text of a turn's prompt, without media and what a template adds."""
    body = turn.body
    before = [body[name] for name in ("instructions", "system", "tools", "functions") if body.get(name)]
    if messages := messages_of(body):
        # A message of Responses, or a call of a tool, may have no content.
        contents = [each.get("content") or each for each in messages if isinstance(each, dict)]
    else:
        contents = [f"{body.get('memory') or ''}{body.get('prompt') or ''}"]
    parts = [each if isinstance(each, str) else json.dumps(each) for each in (*before, *contents)]
    return _MEDIA.sub("", "\n".join(parts))


def media_in(turn: Turn) -> int:
    """Return how many images and sounds a turn's body has."""
    return len(_MEDIA.findall(json.dumps([messages_of(turn.body), turn.body.get("images")])))


def is_of_same_conversation(new: Turn, old: Turn) -> bool:
    """Return True if an engine with several slots gives a request the slot of an earlier one.

    llama.cpp's server takes the slot whose contents begin like the prompt, if that is more than a tenth of it
    (tools/server, `--slot-prompt-similarity`), otherwise the least recently used one.
    """
    new_text, old_text = _prompt_of(new), _prompt_of(old)
    return _common_length(new_text, old_text) > _SIMILARITY * len(new_text)


def _prompt_of(turn: Turn) -> str:
    body, prompt = turn.body, turn.body.get("prompt")
    if any(body.get(name) for name in _INFILLED):
        return "\n".join(json.dumps(body.get(name)) for name in (*_INFILLED, "prompt"))
    if isinstance(prompt, str):
        return prompt + turn.reply
    return json.dumps(messages_of(turn.body) or prompt) + turn.reply


def _common_length(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts; by halving, since they may be megabytes."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
