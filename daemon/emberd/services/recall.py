"""What an engine last said of itself, for those who ask while none is ready: they need no engine to wait for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emberd.core import lifecycle
from emberd.core.errors import EmberdError
from emberd.core.lifecycle import State
from emberd.host.files import write_atomically
from emberd.services.gate import RETRY_AFTER_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emberd.engine.http import EngineHttp
    from emberd.services.gate import Gate

_ASK_S = 5.0
_LASTING = frozenset({200, 404})
"""Answers that the next engine of this kind gives again; a 404 is of a server that does not know the path."""
_MOST_BYTES = 256 * 1024
"""A longer answer is not kept: the longest has a chat template."""
MARK = b"emberd-answer"
"""Header of an answer that did not come from the engine now."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer without the engine: what `http.response.start` and its body have."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Recall:
    """Asks each engine once it is ready, keeps the answers on disk, and gives them while none is ready.

    Args:
        gate: tells whether the engine is ready.
        http: asks it.
        path: the file that keeps the answers.
        identity: returns text that differs between two engines, models or settings of them.
        password: returns what a client without a key of its own would be known by at the engine.
    """

    def __init__(
        self, gate: Gate, http: EngineHttp, path: Path, identity: Callable[[], str], password: Callable[[], str]
    ) -> None:
        self._gate = gate
        self._http = http
        self._path = path
        self._identity = identity
        self._password = password
        self._kept: dict[str, Any] | None = None

    async def run(self) -> None:
        """Ask whenever an engine has become ready; does not return."""
        while True:
            await self._gate.wait_for(State.READY)
            await self._ask()
            await self._gate.wait_for(*(state for state in State if state is not State.READY))

    def answer(self, method: str, path: str, *, wakes: bool) -> Said | None:
        """Return the answer to a question, None if the engine is to be asked, awaited or started (`wakes`)."""
        gate, questions = self._gate, self._gate.engine.questions
        is_cool = gate.state is State.COOL
        is_at_rest = gate.state in lifecycle.AT_REST and gate.now.has_begun and not is_cool
        if gate.port is not None or is_at_rest or gate.now.is_closing or (is_cool and wakes):
            return None  # an engine at rest does not come back by itself: the reason is the better answer
        if questions.is_health(method, path) and not is_cool:
            headers = [(b"retry-after", str(RETRY_AFTER_S).encode())]
            return _said(503, "application/json; charset=utf-8", questions.loading, headers)
        if not questions.is_told(method, path):
            return None
        found = self._answers().get(path.rstrip("/"))
        if found is None:
            return None
        status, kind, text = found
        headers = [(MARK, b"remembered; state=" + gate.state.value.encode()), (b"cache-control", b"no-store")]
        return _said(status, kind, text.encode(), headers)

    async def _ask(self) -> None:
        port, questions = self._gate.port, self._gate.engine.questions
        answers, asked = {}, (self._identity(), self._gate.engine_key)
        for path in questions.told:
            if port is None:
                return
            told = await self._http.get(port, path, _ASK_S, self._password())
            if told.status in _LASTING and len(told.raw) <= _MOST_BYTES:
                answers[path] = (told.status, told.kind, told.raw.decode(errors="replace"))
            port = self._gate.port
        if (self._identity(), self._gate.engine_key) == asked:  # else it is another engine by now
            self._keep({"identity": _digest(asked[0]), "answers": answers})

    def _keep(self, kept: dict[str, Any]) -> None:
        self._kept = kept
        try:
            write_atomically(self._path, json.dumps(kept))
        except EmberdError:
            return  # a full disk: the doctor tells of it

    def _answers(self) -> dict[str, Any]:
        """Return the answers of this engine with these settings, the file's after a start of emberd."""
        if self._kept is None:
            try:
                self._kept = dict(json.loads(self._path.read_text()))
            except (OSError, ValueError, TypeError):
                self._kept = {}
        is_of_this = self._kept.get("identity") == _digest(self._identity())
        answers = self._kept.get("answers") if is_of_this else None
        return answers if isinstance(answers, dict) else {}


def _said(status: int, kind: str, body: bytes, headers: list[tuple[bytes, bytes]]) -> Said:
    return Said(
        status, [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *headers], body
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
