"""A streamed reply as it passes: complete events go on at once, and their content is remembered. Pure.

Server-sent events (HTML Living Standard, 9.2) end with an empty line, Ollama's with a line. Only whole events pass,
so that a cut reply can be continued after the last one. Engines write an event at once, so nothing has to wait.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from emberd.core.generation import LINES, Dialect
from emberd.core.reply import StreamedParts, counts_of, said

if TYPE_CHECKING:
    from emberd.core.generation import Generation

_UNREAD_BYTES = 64 * 1024
"""Events are parsed when this many bytes have come, or when their content is needed."""
_LONGEST_EVENT_BYTES = 1024 * 1024
"""Longer than any event of text; a longer one is no stream of events."""
_DONE = "[DONE]"


@dataclass(slots=True)
class StreamedReply:
    """What a client has been sent of one streamed reply. Never printed.

    Attributes:
        generation: the request.
        most_bytes: greatest length of the remembered text.
        text: the reply so far.
        events: events with text in them.
        is_finished: the engine said that the reply is over.
        obstacle: why it could not be continued, empty if it can.
        is_over: it ended at a stop sequence that the engine did not see; the rest is dropped.
        told: the engine's last counts, in its own words.
        parts: its parts besides text.
        began_at: when it began, in seconds of the wall clock.
    """

    generation: Generation = field(repr=False)
    most_bytes: int
    text: str = field(default="", repr=False)
    events: int = 0
    is_finished: bool = False
    obstacle: str = ""
    is_over: bool = False
    told: dict[str, Any] = field(default_factory=dict)
    parts: StreamedParts = field(default_factory=StreamedParts, repr=False)
    began_at: float = 0.0
    _next_number: int = 0
    _envelope: dict[str, Any] = field(default_factory=dict, repr=False)
    _unread: list[bytes] = field(default_factory=list, repr=False)
    _unread_bytes: int = 0
    _partial: bytes = field(default=b"", repr=False)
    _used_before: int = 0
    _second: Dialect | None = None
    _has_fields: bool = False
    _is_done: bool = False
    _awaited: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        self.obstacle = self.generation.obstacle()

    def take(self, chunk: bytes) -> bytes:
        """Take bytes of the engine; return what to send now: whole events, unchanged until the reply is cut."""
        data = self._partial + chunk
        end = len(data) if data.endswith((b"\n\n", b"\r\n\r\n")) else self._end_of_events(data)
        if end == 0 and len(data) > _LONGEST_EVENT_BYTES:
            self.obstacle = self.obstacle or "a reply that is no stream of events"
            end = len(data)
        whole, self._partial = data[:end], data[end:]
        if self._second is not None:
            return b"".join(self._rewritten(event) for event in _split(whole))
        if whole:
            self._unread.append(whole)
            self._unread_bytes += len(whole)
            if self._unread_bytes > _UNREAD_BYTES:
                self.read()
        return whole

    def _end_of_events(self, data: bytes) -> int:
        """Return the length of the whole events at the beginning."""
        if self.generation.dialect in LINES:
            return data.rfind(b"\n") + 1
        newline, other = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
        return max(newline + 2 if newline >= 0 else 0, other + 4 if other >= 0 else 0)

    def read(self) -> None:
        """Parse what has come since the last time."""
        unread, self._unread, self._unread_bytes = b"".join(self._unread), [], 0
        if self.generation.dialect in LINES:
            for line in unread.decode("utf-8", "replace").split("\n"):
                self._has_fields = self._has_fields or line.startswith("data:")
                self._note(line.removeprefix("data:").strip())
            return
        for event in _split(unread):
            self._note(_data_of(event))

    def begin_again(self, used_tokens: int, dialect: Dialect) -> None:
        """Another stream continues this one where it was cut; an unfinished event is forgotten.

        Args:
            used_tokens: tokens of the text so far, which are added to the counts of the second stream.
            dialect: the second stream's: this one's, or llama.cpp's for a chat.
        """
        self.read()
        self._partial = b""
        self._second = dialect
        self._used_before = used_tokens
        self._awaited = _begun_stop(self.text, self.generation.stops)

    def rest(self) -> bytes:
        """Return the rest at the end of an uncut reply; it is no whole event, and passes unchanged."""
        left, self._partial = self._partial, b""
        return left

    def farewell(self) -> bytes:
        """Return the missing end of a reply that was cut after its last word."""
        is_openai = self.generation.dialect in {Dialect.CHAT, Dialect.COMPLETIONS}
        return b"data: [DONE]\n\n" if is_openai and not self._is_done else b""

    def end_by_length(self) -> bytes:
        """Return the events that end a reply whose budget was used up at the cut."""
        return self._ending("length")

    def end_by_error(self, message: str) -> bytes:
        """Return the event that says why the reply ends here."""
        error = {"message": message, "type": "engine_died", "code": "engine_died"}
        dialect = self.generation.dialect
        if dialect is Dialect.KOBOLD:
            return b"event: error\n" + _event({"token": "", "finish_reason": "error", "error": error})
        if dialect is Dialect.MESSAGES:
            return b"event: error\n" + _event({"type": "error", "error": {**error, "type": "api_error"}})
        if dialect is Dialect.RESPONSES:
            return b"event: response.failed\n" + _event(self._failed(error))
        if dialect in LINES and not self._has_fields:
            return json.dumps({"error": message}).encode() + b"\n"
        return (b"\n" if self._has_fields else b"") + _event({"error": error})

    def _failed(self, error: dict[str, Any]) -> dict[str, Any]:
        """Return the last event of a response that fails (OpenAI's reference, `response.failed`)."""
        known = {"object": "response", "created_at": int(self.began_at), "model": self.generation.body.get("model")}
        output = list(self.parts.items)
        response = {**known, **self._envelope, "status": "failed", "error": error, "output": output}
        return {"type": "response.failed", "sequence_number": self._next_number, "response": response}

    def _ending(self, reason: str) -> bytes:
        dialect = self.generation.dialect
        if dialect is Dialect.KOBOLD:
            return b"event: message\n" + _event({"token": "", "finish_reason": reason})
        if dialect is Dialect.LLAMA:
            return _event({"content": "", "stop": True, "stop_type": "limit" if reason == "length" else "word"})
        said: dict[str, Any] = {"delta": {}} if dialect is Dialect.CHAT else {"text": ""}
        choice = {"index": 0, "finish_reason": reason, **said}
        return _event({**self._envelope, "choices": [choice]}) + f"data: {_DONE}\n\n".encode()

    def _note(self, data: str) -> dict[str, Any] | None:
        """Remember an event's content; return its object."""
        if not data:
            return None
        if data == _DONE:
            self.is_finished = self._is_done = True
            return None
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            self.obstacle = self.obstacle or "an event that is not understood"
            return None
        event = said(self._second or self.generation.dialect, content)
        self.parts.take(self.generation.dialect, content)
        self.obstacle = self.obstacle or event.obstacle
        self.is_finished = self.is_finished or (event.is_last and not self.generation.is_several)
        number = content.get("sequence_number")  # llama.cpp's server (11434) sends none: its events are counted
        self._next_number = (number if isinstance(number, int) else self._next_number) + 1
        if not self._envelope:
            names = ("id", "object", "created", "created_at", "model", "system_fingerprint")
            response = content.get("response")
            source = response if isinstance(response, dict) else content
            self._envelope = {name: source[name] for name in names if name in source}
        self.told = counts_of(content, self.told)
        if event.text:
            self.events += 1
            self.text += event.text
            if len(self.text) > self.most_bytes:
                self.obstacle = self.obstacle or "its length"
        return content

    def _rewritten(self, event: bytes) -> bytes:
        """Return an event of a second stream as of the first one, empty if it must not be sent."""
        if self.is_over:
            return b""
        before = len(self.text)
        content = self._note(_data_of(event))
        if content is None:
            return event
        if self._ends_stop(before):
            return self._ending("stop")
        if self.generation.dialect is Dialect.KOBOLD:
            return event
        if self.generation.dialect is Dialect.LLAMA:
            return _with_count(event, content, "tokens_predicted", self._used_before)
        return self._of_chat(content) if self._second is Dialect.LLAMA else self._as_openai(content)

    def _of_chat(self, content: dict[str, Any]) -> bytes:
        """Return an event of llama.cpp's own as a chat's; the last one says why, and what it took."""
        if "content" not in content:
            return _event(content)  # an error
        text = said(Dialect.LLAMA, content).text
        made = self._chunk({"content": text}) if text else b""
        if content.get("stop") is not True:
            return made
        made += self._chunk({}, "length" if content.get("stop_type") == "limit" else "stop")
        options = self.generation.body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            told = [content.get(name) for name in ("tokens_evaluated", "tokens_predicted")]
            asked, predicted = (each if isinstance(each, int) else 0 for each in told)
            counts = {
                "prompt_tokens": max(asked - self._used_before, 0),
                "completion_tokens": predicted + self._used_before,
                "total_tokens": asked + predicted,
            }
            made += _event({**self._envelope, "choices": [], "usage": counts})
        return made + f"data: {_DONE}\n\n".encode()

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        return _event({**self._envelope, "choices": [{"index": 0, "finish_reason": reason, "delta": delta}]})

    def _ends_stop(self, before: int) -> bool:
        """Return True if a stop sequence begins before the cut and ends after it, which no engine can see.

        Args:
            before: length of the text without the last event's.
        """
        text = self.text[before:]
        if not self._awaited or not text:
            return False
        if text.startswith(self._awaited):
            self.is_finished = self.is_over = True
            self.text = self.text[: before + len(self._awaited)]
            return True
        self._awaited = self._awaited[len(text) :] if self._awaited.startswith(text) else ""
        return False

    def _as_openai(self, content: dict[str, Any]) -> bytes:
        """Return an event as if the first stream went on, with one role, its names and its counts."""
        choices = content.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        if choice is not None and isinstance(choice.get("delta"), dict) and choice["delta"].pop("role", None):
            is_empty = not choice["delta"].get("content") and not choice.get("finish_reason")
            if is_empty:
                return b""
        usage = content.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            usage["completion_tokens"] += self._used_before
            if isinstance(usage.get("prompt_tokens"), int):
                usage["prompt_tokens"] = max(usage["prompt_tokens"] - self._used_before, 0)
        return _event({**content, **self._envelope})


def _begun_stop(text: str, stops: tuple[str, ...]) -> str:
    """Return the rest of the longest stop sequence whose beginning ends the text, empty if none does."""
    rests = [
        stop[length:] for stop in stops for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])
    ]
    return min(rests, key=len, default="")


def _with_count(event: bytes, content: dict[str, Any], name: str, more: int) -> bytes:
    value = content.get(name)
    return _event({**content, name: value + more}) if isinstance(value, int) else event


def _split(whole: bytes) -> list[bytes]:
    if b"\r" in whole:
        whole = whole.replace(b"\r\n", b"\n")
    return [part + b"\n\n" for part in whole.split(b"\n\n") if part.strip(b"\n")]


def _data_of(event: bytes) -> str:
    lines = event.decode("utf-8", "replace").split("\n")
    return "\n".join(line[5:].removeprefix(" ") for line in lines if line.startswith("data:"))


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
