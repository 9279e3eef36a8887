"""Lines that llama.cpp prints while it loads, alike in KoboldCPP, llama-server and the embedded engine."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from emberd.core.load_facts import LoadFacts, MlockWarning, Place, WeightsBuffer
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
"""The most informative first."""


def find_cause(lines: Sequence[str]) -> str | None:
    """Return the cause of a failure that the engine itself names, None if it names none.

    Exit statuses say little (a broken model is SIGSEGV); one line of the log says why.
    """
    for pattern in _CAUSES:
        for line in reversed(lines):
            found = pattern.search(line)
            if found:
                return found["cause"].strip()
    return None


_MIB = 1024**2
_MLOCK = re.compile(
    r"failed to mlock (?P<asked>\d+)-byte buffer \(after previously locking (?P<locked>\d+) bytes\): (?P<text>.*\S)"
)
_NO_MLOCK = re.compile(r"warning: (?P<text>mlock not supported on this system)")
_MODEL = re.compile(r"loaded meta data with .* tensors from (?P<path>.+) \(version ")
_MAPPED = re.compile(r"loading model tensors.*\(mmap = (?P<is_mapped>true|false)")
_BUFFER = re.compile(r"load_tensors:\s+(?P<name>\S+) (?:model )?buffer size\s*=\s*(?P<mib>[\d.]+) MiB")
"""Until 2024, as in KoboldCPP 1.76, the word model is missing and the function is called llm_load_tensors."""
_KEEP_ALIVE = re.compile(r"creating a residency set collection \(keep_alive = (?P<seconds>\d+) s\)")
_RESIDENCY_SETS = re.compile(r"use residency sets\s*=\s*(?P<is_used>true|false)")
_WORKING_SET = re.compile(r"recommendedMaxWorkingSetSize\s*=\s*(?P<mb>[\d.]+) MB")
_KV_BUFFER = re.compile(r"llama_kv_cache\w*:\s+\S+ KV buffer size\s*=\s*(?P<mib>[\d.]+) MiB")
"""One line for each device and part (with and without a sliding window); since 2023, as in KoboldCPP 1.76."""
_CONTEXT = re.compile(r"llama_(?:context|new_context_with_model|init_from_model): n_ctx\s+= (?P<cells>\d+)")
_CACHE = re.compile(r"n_slots = \d+, .*kv_unified = '(?P<is_shared>true|false)'")
"""tools/server/server-context.cpp, load_model; seen in builds 11434 and 11549."""
_REPACKED_NAMES = ("REPACK", "AARCH64", "AMX", "KLEIDIAI", "RISCV64")
"""Layouts of ggml-cpu that are copies; CPU_AARCH64 was the name of CPU_REPACK until 2025."""


def read_mlock_warning(line: str) -> MlockWarning | None:
    """Recognise a lock that failed, None for any other line.

    The words are those of src/llama-mmap.cpp (src/llama.cpp before 2025), unchanged since 2023. The suggestion
    that may follow on the next line is not read, because it is missing where it would matter, on macOS.
    """
    found = _MLOCK.search(line)
    if found:
        return MlockWarning(int(found["asked"]), int(found["locked"]), found["text"])
    found = _NO_MLOCK.search(line)
    return MlockWarning(0, 0, found["text"], is_supported=False) if found else None


def read_weights_buffer(line: str) -> WeightsBuffer | None:
    """Recognise the line that tells where a part of the weights lies and how large it is."""
    found = _BUFFER.search(line)
    if not found:
        return None
    return WeightsBuffer(found["name"], round(float(found["mib"]) * _MIB), _place(found["name"]))


def _place(name: str) -> Place:
    if name.endswith("_Mapped"):
        return Place.MAPPED
    if any(layout in name for layout in _REPACKED_NAMES):
        return Place.REPACKED
    if name.startswith(("CPU", "BLAS")) or name.endswith("_Host"):
        return Place.HOST
    return Place.METAL if name.startswith(("Metal", "MTL")) else Place.DEVICE


def reads_model(line: str) -> str | None:
    """Return the file that llama.cpp begins to read, None for any other line."""
    found = _MODEL.search(line)
    return found["path"] if found else None


def note(facts: LoadFacts, line: str) -> LoadFacts:
    """Return the load facts after one more line; the same object if the line tells nothing.

    A model that is read again (KoboldCPP's reload, a first pass that only measures) starts anew; another model (a
    draft model, a projector) adds to the facts.
    """
    warning = read_mlock_warning(line)
    if warning is not None:
        return replace(facts, warnings=(*facts.warnings, warning))
    buffer = read_weights_buffer(line)
    if buffer is not None:
        return replace(facts, buffers=(*facts.buffers, buffer))
    found = _MODEL.search(line)
    if found:
        if found["path"] != facts.model:
            return replace(facts, model=facts.model or found["path"])
        return replace(facts, is_mapped=None, warnings=(), buffers=(), context_tokens=None, kv_bytes=None)
    found = _MAPPED.search(line)
    if found:
        is_mapped = found["is_mapped"] == "true"
        # One copied part is enough: weights can then be swapped.
        return replace(facts, is_mapped=is_mapped and facts.is_mapped is not False)
    return _note_metal(_note_cache(facts, line), line)


def _note_cache(facts: LoadFacts, line: str) -> LoadFacts:
    found = _KV_BUFFER.search(line)
    if found:
        return replace(facts, kv_bytes=(facts.kv_bytes or 0) + round(float(found["mib"]) * _MIB))
    found = _CONTEXT.search(line)
    if found and facts.context_tokens is None:  # a draft model has one too
        return replace(facts, context_tokens=int(found["cells"]))
    found = _CACHE.search(line)
    return replace(facts, is_cache_shared=found["is_shared"] == "true") if found else facts


def _note_metal(facts: LoadFacts, line: str) -> LoadFacts:
    found = _KEEP_ALIVE.search(line)
    if found:
        return replace(facts, keep_alive_s=int(found["seconds"]))
    found = _RESIDENCY_SETS.search(line)
    if found:
        return replace(facts, uses_residency_sets=found["is_used"] == "true")
    found = _WORKING_SET.search(line)
    # ggml divides by 1e6 (ggml_metal_device_init in ggml/src/ggml-metal/ggml-metal-device.m).
    return replace(facts, working_set_bytes=round(float(found["mb"]) * 1_000_000)) if found else facts
