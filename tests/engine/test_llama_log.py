"""Lines of llama.cpp's log that tell of loading, and of the cause of a failure."""

from __future__ import annotations

import pytest

from emberd.engine.llama_log import find_cause, read_progress


@pytest.mark.parametrize(
    ("line", "phase", "detail"),
    [
        ("Loading Text Model: /models/a.gguf", "reading the model", ""),
        ("load_tensors: loading model tensors, this can take a while... (mmap = true)", "loading weights", ""),
        ("load_tensors:   CPU_Mapped model buffer size =  2008.11 MiB", "loading weights", "2008.11 MiB"),
        ("llama_kv_cache:        CPU KV buffer size =   603.00 MiB", "allocating the context", "603.00 MiB"),
        (
            "llama_context:        CPU compute buffer size =   513.01 MiB",
            "allocating compute buffers",
            "513.01 MiB",
        ),
        ("Starting model warm up, please wait a moment...", "warming up", ""),
        ("Load Text Model OK: True", "model loaded", ""),
        ("Please connect to custom endpoint at http://127.0.0.1:5001", "opening the port", ""),
    ],
)
def test_a_step_of_loading_is_recognised(line: str, phase: str, detail: str):
    progress = read_progress(line)
    assert progress is not None
    assert (progress.phase, progress.detail) == (phase, detail)


def test_other_lines_are_no_progress():
    assert read_progress("[12:00:00] CtxLimit:10/2048, Amt:4/4") is None


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            [
                "Attempting to Load...",
                "llama_model_load: error loading model: tensor data is not within file bounds",
            ],
            "tensor data is not within file bounds",
        ),
        (["llama_model_load: error loading model: error loading model: unknown architecture 'x'", "y"], "unknown"),
        (["usage: ...", "koboldcpp.py: error: unrecognized arguments: --x"], "unrecognized arguments: --x"),
        (["Cannot find text model file: /x"], "Cannot find text model file: /x"),
        (["all is well"], None),
        ([], None),
    ],
)
def test_the_cause_of_a_failure_is_found(lines: list[str], cause: str | None):
    found = find_cause(lines)
    assert found == cause or (cause is not None and found is not None and found.startswith(cause))
