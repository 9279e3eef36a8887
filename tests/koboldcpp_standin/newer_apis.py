"""`/v1/messages` and `/v1/responses` as KoboldCPP has them since 1.113: Anthropic's and OpenAI's named events.

The layout is that of its `koboldcpp.py`. Both are a chat behind the names of their fields.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from generation import Job

PATHS = ("/v1/messages", "/v1/responses")


def light(path: str) -> tuple[int, dict[str, Any]] | None:
    """Return status and content for a POST that does not wait for the model, None for all others."""
    if path == "/mcp":
        return 200, {"jsonrpc": "2.0", "id": 1, "result": {"tools": []}}
    if path == "/set_tts_settings":
        return 200, {"message": "Settings successfully applied"}
    if path.startswith("/api/data/"):
        return 200, {"success": False, "error": "Data API disabled"}
    if path.startswith("/api/extra/fs/"):
        return 503, {"success": False, "error": "Filesystem is disabled. Set --fsmaxsize > 0 to enable it."}
    return None


def as_chat(path: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the request as one for `/v1/chat/completions`."""
    if path.endswith("/v1/messages"):
        first, messages, length = asked.get("system"), asked.get("messages") or [], asked.get("max_tokens")
    else:
        said = asked.get("input") or []
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        first, length = asked.get("instructions"), asked.get("max_output_tokens")
    system = [{"role": "system", "content": first}] if first else []
    return {**asked, "messages": [*system, *messages], "max_tokens": length}


class Messages:
    """Anthropic's reply, whole or as events."""

    def __init__(self, model: str) -> None:
        self._head = {"id": "msg_A1", "type": "message", "role": "assistant", "model": model}
        self._has_begun = False

    def whole(self, job: Job) -> dict[str, Any]:
        """Return the response object."""
        usage = {"input_tokens": job.prompt_tokens, "output_tokens": job.produced}
        said = {"content": [{"type": "text", "text": job.text}], **_stop(job.finish_reason)}
        return {**self._head, **said, "usage": usage}

    def event(self, text: str, reason: str | None) -> bytes:
        """Return the events for a piece of text, and those of the end."""
        made = b""
        if not self._has_begun:
            self._has_begun = True
            usage = {"input_tokens": 0, "output_tokens": 0}
            made += _event("message_start", message={**self._head, "usage": usage})
            made += _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        if text:
            made += _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
        if reason:
            made += _event("content_block_stop", index=0)
            made += _event("message_delta", delta=_stop(reason), usage={"output_tokens": 0})
            made += _event("message_stop")
        return made


class Responses:
    """OpenAI's response, whole or as events."""

    def __init__(self, model: str) -> None:
        self._head = {"id": "resp-A1", "object": "response", "created_at": int(time.time()), "model": model}
        self._text, self._number = "", 0

    def whole(self, job: Job) -> dict[str, Any]:
        """Return the response object."""
        total = job.prompt_tokens + job.produced
        usage = {"input_tokens": job.prompt_tokens, "output_tokens": job.produced, "total_tokens": total}
        return {**self._done(job.text), "usage": usage}

    def event(self, text: str, reason: str | None) -> bytes:
        """Return the events for a piece of text, and those of the end."""
        made, where = b"", {"item_id": "msg_01", "output_index": 0, "content_index": 0}
        if not self._number:
            made += self._numbered("created", response={**self._head, "status": "in_progress", "output": []})
            item = {**_item(""), "status": "in_progress", "content": []}
            made += self._numbered("output_item.added", output_index=0, item=item)
            part = {"type": "output_text", "text": "", "annotations": []}
            made += self._numbered("content_part.added", **where, part=part)
        if text:
            self._text += text
            made += self._numbered("output_text.delta", **where, delta=text, logprobs=[])
        if reason:
            made += self._numbered("output_text.done", **where, text=self._text)
            made += self._numbered("output_item.done", output_index=0, item=_item(self._text))
            made += self._numbered("completed", response=self._done(self._text))
        return made

    def _done(self, text: str) -> dict[str, Any]:
        return {**self._head, "status": "completed", "output": [_item(text)]}

    def _numbered(self, name: str, **fields: Any) -> bytes:
        self._number += 1
        return _event(f"response.{name}", **fields, sequence_number=self._number - 1)


def shape_of(path: str, model: str) -> tuple[Callable[[Job], dict[str, Any]], Callable[[str, str | None], bytes]]:
    """Return what tells a generation to its client: the whole of it, and a piece."""
    made = Messages(model) if path.endswith("/v1/messages") else Responses(model)
    return made.whole, made.event


def _item(text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"type": "message", "id": "msg_01", "status": "completed", "role": "assistant", "content": content}


def _stop(reason: str) -> dict[str, Any]:
    return {"stop_reason": "max_tokens" if reason == "length" else "end_turn", "stop_sequence": None}


def _event(name: str, **fields: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()
