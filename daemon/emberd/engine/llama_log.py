"""Lines that llama.cpp prints while it loads, alike in KoboldCPP, llama-server and the embedded engine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from emberd.core.types import LoadProgress

if TYPE_CHECKING:
    from collections.abc import Sequence

_PHASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"(?:Loading (?:Text )?[Mm]odel: |loading model '|llama_model_loader: loaded meta)"),
        "reading the model",
    ),
    (re.compile(r"load_tensors:.*buffer size\s*=\s*(?P<detail>[\d.]+ MiB)"), "loading weights"),
    (re.compile(r"load_tensors: loading model tensors"), "loading weights"),
    (re.compile(r"llama_kv_cache.*size\s*=\s*(?P<detail>[\d.]+ MiB)"), "allocating the context"),
    (re.compile(r"KV self size\s*=\s*(?P<detail>[\d.]+ MiB)"), "allocating the context"),
    (re.compile(r"compute buffer size\s*=\s*(?P<detail>[\d.]+ MiB)"), "allocating compute buffers"),
    (re.compile(r"(?:Starting model warm up|warming up the model)"), "warming up"),
    (re.compile(r"(?:Load Text Model OK: True|model loaded)"), "model loaded"),
    (
        re.compile(r"(?:Please connect to custom endpoint|server is listening|listening on http)"),
        "opening the port",
    ),
)


def read_progress(line: str) -> LoadProgress | None:
    """Recognise a step of loading, None for any other line."""
    for pattern, phase in _PHASES:
        found = pattern.search(line)
        if found:
            return LoadProgress(phase, found.groupdict().get("detail") or "")
    return None


_CAUSES = (
    re.compile(r"error loading model: (?:error loading model: )?(?P<cause>.+)"),
    re.compile(r"(?P<cause>failed to allocate buffer for kv cache.*)"),
    re.compile(r"(?P<cause>(?:Cannot find|Could not load) text model.*)"),
    re.compile(r"(?P<cause>GGML_ASSERT.*)"),
    re.compile(r"^(?:\S+: )?error: (?P<cause>.+)"),
)
"""In the order of how much they tell."""


def find_cause(lines: Sequence[str]) -> str | None:
    """Return what the engine itself gives as the cause of a failure, None if it names none.

    Exit statuses say little (a broken model is SIGSEGV); one line of the log says why.
    """
    for pattern in _CAUSES:
        for line in reversed(lines):
            found = pattern.search(line)
            if found:
                return found["cause"].strip()
    return None
