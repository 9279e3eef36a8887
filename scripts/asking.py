"""Clients of every dialect, which know what a reply must be (the engine is the stand-in of the tests)."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "koboldcpp_standin")]

import httpx  # noqa: E402  # after the path
from generation import next_token  # noqa: E402

LENGTH = 24
LINES = ("ollama", "ollama-chat")
"""Dialects whose streams are lines of JSON."""
HTTP_OK = 200
TOLD = "told"
"""How it is called when a stream that no engine can continue ended with its dialect's own error."""
WAYS = (
    ("/api/v1/generate", "kobold", False),
    ("/api/extra/generate/stream", "kobold", True),
    ("/v1/completions", "completions", False),
    ("/v1/completions", "completions", True),
    ("/v1/chat/completions", "chat", False),
    ("/v1/chat/completions", "chat", True),
    ("/v1/messages", "messages", False),
    ("/v1/messages", "messages", True),
    ("/v1/responses", "responses", False),
    ("/v1/responses", "responses", True),
    ("/api/generate", "ollama", False),
    ("/api/generate", "ollama", True),
    ("/api/chat", "ollama-chat", False),
    ("/api/chat", "ollama-chat", True),
)
"""Path, dialect, and whether the reply is streamed."""


@dataclass
class Reply:
    """What of a reply has come.

    Attributes:
        ends: how many events said that this is the end.
        error: the dialect's own error, if it came.
    """

    text: str = ""
    ends: int = 0
    error: str = ""
    number: int = -1

    def take(self, dialect: str, named: str, event: dict[str, Any]) -> None:
        """Take an event of a stream, with the name that stood above it.

        Raises:
            KeyError: it is not as this dialect has them.
            ValueError: its name or its number is wrong.
        """
        kind = event.get("type", "")
        if dialect in {"messages", "responses"} and kind != named:
            raise ValueError(f"{kind} is called {named}")
        if kind in {"error", "response.failed"}:
            error = event["error"] if dialect == "messages" else event["response"]["error"]
            is_known = error["type"] if dialect == "messages" else event["response"]["status"] == "failed"
            self.error = error["message"] if is_known else ""
        elif dialect == "responses":
            if event["sequence_number"] <= self.number:
                raise ValueError(f"event {event['sequence_number']} behind event {self.number}")
            self.number = event["sequence_number"]
        elif dialect in LINES and "error" in event:
            self.error = event["error"]
            return
        self.text += piece_of(event)
        choice = event.get("choices", [{}])[0]
        is_end = kind in {"message_stop", "response.completed"} or event.get("finish_reason") or event.get("done")
        self.ends += bool(is_end or choice.get("finish_reason"))


def body_of(dialect: str, prompt: str, *, is_streamed: bool) -> dict[str, Any]:
    """Return a request's body."""
    if dialect == "kobold":
        return {"prompt": prompt, "max_length": LENGTH}
    if dialect == "ollama":
        return {"prompt": prompt, "stream": is_streamed, "options": {"num_predict": LENGTH}}
    if dialect == "responses":
        return {"input": prompt, "max_output_tokens": LENGTH, "stream": is_streamed}
    asked: dict[str, Any] = {"prompt": prompt}
    if dialect in {"chat", "messages", "ollama-chat"}:
        asked = {"messages": [{"role": "user", "content": prompt}]}
    return {**asked, "max_tokens": LENGTH, "stream": is_streamed}


def expected_text(dialect: str, prompt: str) -> str:
    """Return what the engine says to a prompt when nothing goes wrong."""
    text = f"\n### Instruction:\n{prompt}\n### Response:\n"
    if dialect in {"kobold", "completions"}:
        text = prompt
    elif dialect == "ollama":
        text = f"\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    said = ""
    for _ in range(LENGTH):
        said += next_token(text + said)
    return said


def piece_of(event: dict[str, Any]) -> str:
    """Return the text in a reply or in an event of one.

    Raises:
        KeyError: it is none of any dialect.
    """
    if "results" in event:
        return str(event["results"][0]["text"])
    if "token" in event:
        return str(event["token"])
    if "response" in event and isinstance(event["response"], str):
        return event["response"]
    if isinstance(event.get("message"), dict) and "done" in event:
        return str(event["message"]["content"])
    if "choices" not in event:
        return _piece_of_blocks(event)
    choice = event["choices"][0]
    said = choice.get("message") or choice.get("delta") or {}
    return str(choice.get("text") or said.get("content") or "")


def _piece_of_blocks(event: dict[str, Any]) -> str:
    kind = event.get("type")
    if kind == "response.output_text.delta":
        return str(event["delta"])
    if kind == "content_block_delta":
        return str(event["delta"]["text"])
    if event.get("object") == "response":
        return str(event["output"][0]["content"][0]["text"])
    if kind == "message":
        return str(event["content"][0]["text"])
    if not kind:
        raise KeyError("type")
    return ""


def is_repeated(said: str, expected: str) -> bool:
    """Return whether a part of the text stands twice behind each other, or all of it."""
    more = len(said) - len(expected)
    return more > 0 and any(
        said[:cut] == expected[:cut] and said[cut:] == expected[cut - more :]
        for cut in range(more, len(expected) + 1)
    )


def judge(reply: Reply, expected: str, *, is_streamed: bool, is_cut: bool) -> str:
    """Return what is wrong with a reply: a kind, a colon and more; empty for nothing.

    Args:
        reply: what came.
        expected: what should have been said.
        is_streamed: there must be one event that says the end.
        is_cut: the connection broke.
    """
    if reply.error:
        is_true = is_cut and not reply.ends and "cannot be continued" in reply.error
        if is_true and expected.startswith(reply.text):
            return f"{TOLD}: {reply.error}"
        return f"error: {reply.error!r} behind {reply.text!r}, ends {reply.ends}, cut {is_cut}"
    if is_cut:
        return f"lost: cut behind {reply.text!r}"
    if reply.ends > 1 or is_repeated(reply.text, expected) or (reply.text != expected and expected in reply.text):
        return f"duplicated: {reply.text!r} instead of {expected!r}, ends {reply.ends}"
    if reply.text != expected:
        return f"text: {reply.text!r} instead of {expected!r}"
    return "lost: no end" if is_streamed and not reply.ends else ""


async def ask_once(client: httpx.AsyncClient, way: tuple[str, str, bool], prompt: str) -> str:
    """Ask; return what is wrong with the reply, empty for nothing, beginning with TOLD for an honest end."""
    path, dialect, is_streamed = way
    body = body_of(dialect, prompt, is_streamed=is_streamed)
    reply, is_cut = Reply(), False
    try:
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != HTTP_OK:
                return f"status {answer.status_code}: {(await answer.aread()).decode()[:200]}"
            if is_streamed:
                is_cut = await _read_stream(answer, dialect, reply)
            else:
                reply.text = piece_of(json.loads(await answer.aread()))
    except httpx.ConnectError as error:
        return f"refused: {error!r}"
    except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
        return f"lost: {error!r}"
    return judge(reply, expected_text(dialect, prompt), is_streamed=is_streamed, is_cut=is_cut)


async def _read_stream(answer: httpx.Response, dialect: str, reply: Reply) -> bool:
    """Read the events into the reply; return whether the connection broke."""
    named, done = "", 0
    try:
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                named = line.removeprefix("event: ")
            elif line.startswith("{" if dialect in LINES else "data: {"):
                reply.take(dialect, named, json.loads(line.removeprefix("data: ")))
                named = ""
            done += line == "data: [DONE]"
    except httpx.RemoteProtocolError:
        return True
    if dialect in {"chat", "completions"} and done != 1:
        raise ValueError(f"{done} times [DONE]")
    return False
