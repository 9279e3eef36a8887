"""Lines of llama.cpp's log that tell of loading, and of the cause of a failure."""

from __future__ import annotations

import pytest

from emberd.core.load_facts import LoadFacts, MlockWarning, Place
from emberd.engine import llama_log
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


def facts_of(*lines: str) -> LoadFacts:
    facts = LoadFacts()
    for line in lines:
        facts = llama_log.note(facts, line)
    return facts


@pytest.mark.parametrize(
    "text", ["Cannot allocate memory", "Resource temporarily unavailable", "Operation not permitted"]
)
@pytest.mark.parametrize("prefix", ["warning: ", "0.01.123.456 W warning: "])
def test_a_lock_that_failed_is_read_with_what_was_locked_before(prefix: str, text: str):
    line = f"{prefix}failed to mlock 1073741824-byte buffer (after previously locking 65536 bytes): {text}"
    assert llama_log.read_mlock_warning(line) == MlockWarning(1_073_741_824, 65_536, text)


def test_a_build_that_cannot_lock_says_so():
    warning = llama_log.read_mlock_warning("warning: mlock not supported on this system")
    assert warning is not None
    assert not warning.is_supported


@pytest.mark.parametrize(
    "line",
    [
        "Try increasing RLIMIT_MLOCK ('ulimit -l' as root).",
        "Try increasing RLIMIT_MEMLOCK ('ulimit -l' as root).",
        "warning: failed to munlock buffer: Invalid argument",
        "",
    ],
)
def test_other_lines_about_locks_are_no_failed_lock(line: str):
    assert llama_log.read_mlock_warning(line) is None
    assert llama_log.note(LoadFacts(), line) == LoadFacts()


@pytest.mark.parametrize(
    ("line", "place", "mib"),
    [
        ("load_tensors:   CPU_Mapped model buffer size =   235.16 MiB", Place.MAPPED, 235.16),
        ("load_tensors:  MTL0_Mapped model buffer size =  4685.30 MiB", Place.MAPPED, 4685.30),
        ("load_tensors:   CPU_REPACK model buffer size =    12.66 MiB", Place.REPACKED, 12.66),
        ("load_tensors:  CPU_AARCH64 model buffer size =    12.66 MiB", Place.REPACKED, 12.66),
        ("load_tensors:          CPU model buffer size =    23.71 MiB", Place.HOST, 23.71),
        ("load_tensors:    CUDA_Host model buffer size =   107.10 MiB", Place.HOST, 107.10),
        ("load_tensors:        Metal model buffer size =  4685.30 MiB", Place.METAL, 4685.30),
        ("load_tensors:        CUDA0 model buffer size =  6378.40 MiB", Place.DEVICE, 6378.40),
        ("load_tensors:      Vulkan0 model buffer size =  5980.00 MiB", Place.DEVICE, 5980.00),
        ("llm_load_tensors:        CPU buffer size =  1918.35 MiB", Place.HOST, 1918.35),
    ],
)
def test_where_the_weights_lie_is_read_from_the_list_of_buffers(line: str, place: Place, mib: float):
    buffer = llama_log.read_weights_buffer(line)
    assert buffer is not None
    assert buffer.place is place
    assert buffer.size_bytes == round(mib * 1024**2)


@pytest.mark.parametrize(
    "line",
    [
        "llama_kv_cache:        CPU KV buffer size =    33.75 MiB",
        "llama_context:        CPU  output buffer size =     1.00 MiB",
        "llama_context:        CPU compute buffer size =   513.25 MiB",
    ],
)
def test_other_buffers_hold_no_weights(line: str):
    assert llama_log.read_weights_buffer(line) is None


LOADED = (
    (
        "llama_model_loader: loaded meta data with 33 key-value pairs and 236 tensors from /m/a b.gguf "
        "(version GGUF V3 (latest))"
    ),
    "load_tensors: loading model tensors, this can take a while... (mmap = true)",
    "load_tensors:   CPU_Mapped model buffer size =   235.16 MiB",
    "load_tensors:   CPU_REPACK model buffer size =    12.66 MiB",
)


def test_the_log_of_a_load_tells_mapping_and_places():
    facts = facts_of(*LOADED)
    assert facts.model == "/m/a b.gguf"
    assert facts.is_mapped is True
    assert facts.bytes_in(Place.REPACKED) == round(12.66 * 1024**2)


def test_the_log_of_a_load_tells_the_size_of_the_context():
    """KoboldCPP 1.115.1 with gemma-3, which has layers with and without a sliding window."""
    told = (
        "llama_context: n_ctx         = 16640",
        "llama_kv_cache:        CPU KV buffer size =    48.75 MiB",
        "llama_kv_cache: size =   48.75 MiB ( 16640 cells,   3 layers,  1/1 seqs), K (f16):   24.38 MiB",
        "llama_kv_cache:        CPU KV buffer size =    16.88 MiB",
    )
    draft = "llama_context: n_ctx         = 4096"
    facts = facts_of(*LOADED, *told, draft)
    assert facts.context_tokens == 16640
    assert facts.kv_bytes == round(48.75 * 1024**2) + round(16.88 * 1024**2)
    assert facts_of(*LOADED, *told, *LOADED).kv_bytes is None, "it is read again"
    old = "llama_kv_cache_init:        CPU KV buffer size =    12.00 MiB"
    older = "llama_new_context_with_model: n_ctx      = 4096"
    assert facts_of(old, older).kv_bytes == 12 * 1024**2
    assert facts_of(old, older).context_tokens == 4096


def test_a_model_that_is_read_twice_counts_once():
    """llama-server reads a model first to measure it; KoboldCPP reads it again on an admin reload."""
    assert facts_of(*LOADED, *LOADED) == facts_of(*LOADED)


def test_a_second_model_adds_to_the_first():
    draft = tuple(line.replace("a b.gguf", "draft.gguf").replace("true", "false") for line in LOADED)
    facts = facts_of(*LOADED, *draft)
    assert len(facts.buffers) == 4
    assert facts.is_mapped is False
    assert facts.model == "/m/a b.gguf"


def test_newer_builds_add_direct_io_to_the_line_about_mmap():
    line = "load_tensors: loading model tensors, this can take a while... (mmap = false, direct_io = true)"
    assert facts_of(line).is_mapped is False


def test_metals_heartbeat_is_read():
    facts = facts_of(
        "ggml_metal_rsets_init: creating a residency set collection (keep_alive = 2592000 s)",
        "ggml_metal_device_init: use residency sets    = true",
        "ggml_metal_device_init: recommendedMaxWorkingSetSize  = 11453.25 MB",
    )
    assert facts.keep_alive_s == 2_592_000
    assert facts.uses_residency_sets is True
    assert facts.working_set_bytes == 11_453_250_000


def test_a_line_that_tells_nothing_leaves_the_facts_as_they_are():
    facts = facts_of(*LOADED)
    assert llama_log.note(facts, "print_info: n_layer          = 18") is facts
