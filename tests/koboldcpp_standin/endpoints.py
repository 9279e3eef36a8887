"""What each path answers, apart from sockets."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import newer_apis
import options as command_line
from generation import Job, tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from generation import Model

SHUTDOWN_DELAY_S = 1.0
LENGTH_OF_1_76 = 180
_NO_PAGE = "Error: KoboldCpp HTTP Server is running, but this endpoint does not exist."
_GENERATING = (
    "/api/v1/generate",
    "/api/latest/generate",
    "/api/extra/generate/stream",
    "/v1/chat/completions",
    "/v1/completions",
)
_OLLAMA = ("/api/generate", "/api/chat")
"""Newer version only; always one JSON object, whatever `stream` says."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, body and content type of a response."""

    status: int
    body: bytes
    kind: str = "application/json"


@dataclass(frozen=True, slots=True)
class Shape:
    """How a generation is told to its client.

    Attributes:
        whole: turns a finished job into the response object.
        event: turns a piece of text and the reason of the end, if it is the end, into bytes of a stream.
        farewell: the last bytes of a stream.
        lines: turns the response object into the lines of Ollama's stream, all sent at the end; None otherwise.
    """

    is_stream: bool
    whole: Callable[[Job], dict[str, Any]]
    event: Callable[[str, str | None], bytes]
    farewell: bytes = b""
    lines: Callable[[dict[str, Any]], tuple[bytes, ...]] | None = None


def reply(body: bytes) -> Answer:
    """Return a good JSON answer."""
    return Answer(200, body)


def failure(status: int, message: str, kind: str) -> Answer:
    """Return an error in the original's wrapping."""
    detail: dict[str, str] = {"msg": message, "type": kind}
    if kind == "unauthorized":
        detail = {"error": "Unauthorized", **detail}
    return Answer(status, json.dumps({"detail": detail}).encode())


_UNAUTHORIZED = failure(401, "Authentication key is missing or invalid.", "unauthorized")
_UNREADABLE = failure(500, "Error parsing input.", "bad_input")


class Site:
    """All endpoints of one server.

    Args:
        model: the model behind them.
        version: what `/api/extra/version` tells.
        reload: restarts the worker with a settings file, None without `--admin`.
    """

    def __init__(self, model: Model, version: str, reload: Callable[[str], None] | None) -> None:
        self.model = model
        self.options = model.options
        self.version = version
        self.reload = reload
        stem = Path(self.options.model_param).stem if self.options.model_param else ""
        self.name = "koboldcpp/" + re.sub(r"[^\w.-]", "", stem, flags=re.ASCII) if stem else "inactive"

    def get(self, path: str, key: str) -> Answer:
        """Answer a GET."""
        if path.endswith("/api/extra/generate/check"):
            if not self._is_allowed(key):
                return _UNAUTHORIZED
            return _json({"results": [{"text": self.model.text_so_far("")}]})
        value = self._facts(path, key)
        if value is None and not self.model.switches.is_old:
            value = self._newer_facts(path)
        if value is not None:
            return _json(value)
        if path.endswith("/slots") and not self.model.switches.is_old:
            error = {"code": 501, "message": "There are no slots.", "type": "not_supported_error"}
            return Answer(501, json.dumps({"error": error}).encode())
        if path in {"/", "/api"}:
            return Answer(200, b"<html>stand-in</html>", "text/html")
        return Answer(404, _NO_PAGE.encode(), "text/html")

    def _facts(self, path: str, key: str) -> Any:
        """Return what both versions tell, None for a path that they do not know."""
        is_old = self.model.switches.is_old
        name = self.name if self._is_allowed(key) else "koboldcpp/protected-model"
        context = self.options.contextsize
        facts: dict[str | tuple[str, ...], Callable[[], Any]] = {
            ("/api/v1/model", "/api/latest/model"): lambda: {"result": name},
            ("/max_context_length", "/true_max_context_length"): lambda: {"value": context},
            "/api/v1/config/max_length": lambda: {"value": min(400 if is_old else 1024, context)},
            "/api/v1/info/version": lambda: {"result": "1.2.5"},
            "/api/extra/version": self._version,
            "/api/extra/perf": self.model.perf,
            "/v1/models" if is_old else "/models": self._cards,
            "/api/tags": lambda: {"models": [{"name": "koboldcpp", "model": self.name, "size": 1}]},
            "/api/extra/preloadstory": dict,
        }
        return next((tell() for ending, tell in facts.items() if path.endswith(ending)), None)

    def _cards(self) -> dict[str, Any]:
        card = {"id": self.name, "object": "model", "created": int(time.time()), "owned_by": "koboldcpp"}
        return {"object": "list", "data": [card | {"permission": [], "root": "koboldcpp"}]}

    def _newer_facts(self, path: str) -> Any:
        if path.endswith("/ping"):
            return {"status": "healthy"}
        if path.endswith("/api/version"):
            return {"version": "0.7.0"}
        if path.endswith("/props"):
            return {"model_path": self.name, "n_ctx": self.options.contextsize, "total_slots": 1}
        if path.endswith("/api/admin/list_options"):
            if self.reload is None or self.options.adminpassword:
                return []
            return sorted(file.name for file in Path(self.options.admindir).glob("*.kcpps"))
        return None

    def _version(self) -> dict[str, Any]:
        has_password = bool(self.options.password)
        answer: dict[str, Any] = {"result": "KoboldCpp", "version": self.version, "protected": has_password}
        absent = ["txt2img", "vision", "transcribe"]
        if not self.model.switches.is_old:
            absent += [
                "audio",
                "multiplayer",
                "websearch",
                "tts",
                "embeddings",
                "savedata",
                "guidance",
            ]
            answer["jinja"] = bool(self.options.jinja)
            answer["llm"] = self.name != "inactive"
            answer["admin"] = 0 if self.reload is None else 2 if self.options.adminpassword else 1
        return answer | dict.fromkeys(absent, False)

    def post_light(self, path: str, body: bytes, key: str, client: str) -> Answer | None:
        """Answer the POSTs that do not wait for the model; None for all others."""
        if path.endswith("/api/extra/shutdown") and not self.model.switches.is_old:
            return self._shut_down(client)
        if path.endswith("/api/admin/reload_config") and not self.model.switches.is_old:
            return self._reload(body, key)
        if self.model.switches.is_batching and (said := newer_apis.light(path)) is not None:
            return Answer(said[0], json.dumps(said[1]).encode())
        actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "/api/extra/abort": lambda asked: self.model.abort(str(asked.get("genkey", ""))),
            "/api/extra/generate/check": lambda asked: {
                "results": [{"text": self.model.text_so_far(str(asked.get("genkey", "")))}]
            },
            "/api/extra/tokencount": _count,
            "/api/extra/tokenize": _count,
            "/api/extra/last_logprobs": lambda _: {"logprobs": None},
        }
        action = next((act for suffix, act in actions.items() if path.endswith(suffix)), None)
        if action is None:
            return None
        if not self._is_allowed(key):
            return _UNAUTHORIZED
        # Here, unlike in a generation, an unreadable body counts as an empty one.
        return _json(action(_parse(body) or {}))

    def prepare(self, path: str, body: bytes, key: str) -> Answer | tuple[Job, Shape]:
        """Turn a request that has the model's turn into a job, or into the answer that it gets instead."""
        is_ollama = path.endswith(_OLLAMA) and not self.model.switches.is_old
        is_newest = path.endswith(newer_apis.PATHS) and self.model.switches.is_batching
        if not path.endswith(_GENERATING) and not is_ollama and not is_newest:
            return Answer(404, b"", "text/html")
        self.model.mark_start()
        if not self._is_allowed(key):
            return _UNAUTHORIZED
        asked = _parse(body)
        if asked is None:
            sys.stdout.write(f"Body Err: {body!r}\n")
            sys.stdout.flush()
            return _UNREADABLE
        if not self.model.is_intact():
            return failure(500, "A file of the program has vanished.", "server_error")
        self.model.announce(asked)
        if is_newest or is_ollama or path.endswith("/completions"):
            make = self._newest_job if is_newest else self._ollama_job if is_ollama else self._openai_job
            return make(asked, path)
        job = self._job(asked, str(asked.get("memory", "")) + str(asked.get("prompt", "")), asked.get("max_length"))
        return job, Shape(path.endswith("/stream"), self._kobold_whole, _kobold_event)

    def _job(self, asked: dict[str, Any], prompt: str, length: Any) -> Job:
        if length is None:
            length = LENGTH_OF_1_76 if self.model.switches.is_old else self.options.defaultgenamt
        stop = asked.get("stop_sequence") or asked.get("stop") or ()
        return Job(
            prompt,
            int(length),
            key=str(asked.get("genkey", "")),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            ignores_end=bool(asked.get("ban_eos_token") or asked.get("bypass_eos")),
        )

    def _newest_job(self, asked: dict[str, Any], path: str) -> tuple[Job, Shape]:
        chat = newer_apis.as_chat(path, asked)
        job = self._job(chat, self._chat_prompt(chat), chat["max_tokens"])
        whole, event = newer_apis.shape_of(path, self.name)
        return job, Shape(bool(asked.get("stream")), whole, event)

    def _openai_job(self, asked: dict[str, Any], path: str) -> tuple[Job, Shape]:
        is_chat = "/chat" in path
        length = asked.get("max_tokens", asked.get("max_completion_tokens"))
        if not length and not self.model.switches.is_old:
            length = None  # zero means the default, as in the original
        prompt = self._chat_prompt(asked) if is_chat else str(asked.get("prompt", ""))
        job = self._job(asked, prompt, length)
        kind = "chat.completion" if is_chat else "text_completion"
        chunk_kind = "chat.completion.chunk" if is_chat else kind

        def choice(text: str, reason: str | None, field: str) -> dict[str, Any]:
            said = {field: {"role": "assistant", "content": text}} if is_chat else {"text": text}
            return {"index": 0, "finish_reason": reason, **said}

        identifier = "chatcmpl-A1" if is_chat else "cmpl-A1"

        def head(name: str, kind: str) -> dict[str, Any]:
            return {"id": name, "object": kind, "created": int(time.time()), "model": self.name}

        def whole(job: Job) -> dict[str, Any]:
            usage = self._usage(job)
            answer = head(identifier, kind)
            return answer | {"usage": usage, "choices": [choice(job.text, job.finish_reason, "message")]}

        def event(text: str, reason: str | None) -> bytes:
            chunk = head(identifier if self.model.switches.is_batching else "koboldcpp", chunk_kind) | {
                "choices": [choice(text, reason, "delta")]
            }
            return f"data: {json.dumps(chunk)}\n\n".encode()

        return job, Shape(bool(asked.get("stream")), whole, event, b"data: [DONE]\n\n")

    def _ollama_job(self, asked: dict[str, Any], path: str) -> tuple[Job, Shape]:
        is_chat = "/chat" in path
        options = asked.get("options") or {}
        said = "".join(map(chr, asked.get("context") or ()))
        said += f"\n\n### Instruction:\n{asked.get('prompt', '')}\n\n### Response:\n"
        prompt = self._chat_prompt(asked) if is_chat else str(asked.get("system", "")) + said
        length = asked.get("max_tokens") if is_chat else options.get("num_predict")
        job = self._job({**options, **asked}, prompt, length)

        def whole(job: Job) -> dict[str, Any]:
            counts = {"prompt_eval_count": job.prompt_tokens, "eval_count": job.produced}
            names = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
            reply: dict[str, Any] = {"response": job.text, "context": [ord(each) for each in said + job.text]}
            if is_chat:
                reply = {"message": {"role": "assistant", "content": job.text}}
            head = {"model": self.name, "created_at": "2024-07-19T15:26:55+00:00", **reply}
            return head | {"done": True, "done_reason": job.finish_reason} | counts | dict.fromkeys(names, 1)

        def lines(made: dict[str, Any]) -> tuple[bytes, ...]:
            name, nothing = ("message", {"role": "assistant", "content": ""}) if is_chat else ("response", "")
            head = {"model": self.name, "created_at": made["created_at"], name: made[name], "done": False}
            return tuple(json.dumps(each).encode() + b"\n" for each in (head, {**made, name: nothing}))

        is_in_lines = self.model.switches.is_batching and asked.get("stream", True)
        return job, Shape(is_stream=False, whole=whole, event=_kobold_event, lines=lines if is_in_lines else None)

    def _chat_prompt(self, asked: dict[str, Any]) -> str:
        """Lay the messages out in the Alpaca manner, behind the tools.

        The original asks itself first, in a generation of its own, whether a tool is needed.
        """
        leaves_open = bool(asked.get("continue_assistant_turn")) and not self.model.switches.is_old
        messages = asked.get("messages") or []
        marks = {"user": "\n### Instruction:\n", "assistant": "\n### Response:\n"}
        text = f"### Available Tools:\n{json.dumps(asked['tools'])}\n" if asked.get("tools") else ""
        text += "".join(
            marks.get(message.get("role", ""), "\n") + str(message.get("content", "")) for message in messages
        )
        if leaves_open and messages and messages[-1].get("role") == "assistant" and not self.options.jinja:
            return text
        return text + marks["assistant"]

    def _usage(self, job: Job) -> dict[str, int]:
        prompt, produced = (100, 100) if self.model.switches.is_old else (job.prompt_tokens, job.produced)
        return {"prompt_tokens": prompt, "completion_tokens": produced, "total_tokens": prompt + produced}

    def _kobold_whole(self, job: Job) -> dict[str, Any]:
        result: dict[str, Any] = {"text": job.text, "finish_reason": job.finish_reason}
        if not self.model.switches.is_old:
            result |= {"tool_calls": [], "logprobs": None}
            result |= {"prompt_tokens": job.prompt_tokens, "completion_tokens": job.produced}
        return {"results": [result]}

    def _is_allowed(self, key: str) -> bool:
        return not self.options.password or key == self.options.password

    def _shut_down(self, client: str) -> Answer:
        is_allowed = self.options.singleinstance and client in {"127.0.0.1", "::1"}
        if is_allowed:
            timer = threading.Timer(SHUTDOWN_DELAY_S, os._exit, args=(0,))
            timer.daemon = True
            timer.start()
        return _json({"success": bool(is_allowed)})

    def _reload(self, body: bytes, key: str) -> Answer:
        name = str((_parse(body) or {}).get("filename", ""))
        is_allowed = self.reload is not None and (
            not self.options.adminpassword or key == self.options.adminpassword
        )
        is_there = name == command_line.UNLOAD or (Path(self.options.admindir) / name).is_file()
        if self.reload is None or not is_allowed or not is_there:
            return _json({"success": False})
        timer = threading.Timer(0.5, self.reload, args=(name,))
        timer.daemon = True
        timer.start()
        return _json({"success": True})


def _json(value: Any) -> Answer:
    return reply(json.dumps(value).encode())


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _count(asked: dict[str, Any]) -> dict[str, Any]:
    if not asked:
        return {"value": -1}
    tokens = tokens_of(str(asked.get("prompt", "")))
    return {"value": len(tokens), "ids": [sum(token.encode()) for token in tokens]}


def _kobold_event(text: str, reason: str | None) -> bytes:
    data = json.dumps({"token": text, "finish_reason": reason})
    return f"event: message\ndata: {data}\n\n".encode()
