"""The embedded engine: llama.cpp's own server, run through xllamacpp in a process of its own.

The daemon starts it as `python -m emberd.engine.embedded`; the model never lives in the daemon.
SIGTERM and SIGINT keep their default actions, because there is nothing to save.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

_LOAD_MODES = {
    "none": "LLAMA_LOAD_MODE_NONE",
    "mmap": "LLAMA_LOAD_MODE_MMAP",
    "mlock": "LLAMA_LOAD_MODE_MLOCK",
    "mmap+mlock": "LLAMA_LOAD_MODE_MMAP_MLOCK",
}
PROMPT_CACHE_MIB = 512
"""Copies of earlier prompts in ordinary memory; llama.cpp's default of 8 GiB would itself be swapped."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the child's command line; spellings are those of llama-server."""
    parser = argparse.ArgumentParser(prog="emberd.engine.embedded", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--load-mode", choices=sorted(_LOAD_MODES), default="mmap")
    parser.add_argument("--ctx-size", "--context-size", type=int, default=0, help="0: the model's own")
    parser.add_argument("--n-gpu-layers", "--gpu-layers", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--threads-http", type=int, default=-1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal ends the process; return only if the model cannot be loaded."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if not options.model.is_file():
        sys.stderr.write(f"error: no such model: {options.model}\n")
        return 2
    try:
        import xllamacpp  # noqa: PLC0415  # 105 MB of library, in this child only
    except ImportError as error:
        sys.stderr.write(f"error: the embedded engine needs the package xllamacpp: {error}\n")
        return 2
    # Python would turn SIGINT into an exception, and the server's teardown then waits for its clients.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(options.model)
    parameters.hostnames = [options.host]
    parameters.port = options.port
    parameters.n_ctx = options.ctx_size
    parameters.n_parallel = options.parallel
    parameters.n_threads_http = options.threads_http
    parameters.load_mode = getattr(xllamacpp.llama_load_mode, _LOAD_MODES[options.load_mode])
    parameters.cache_ram_mib = PROMPT_CACHE_MIB
    if options.n_gpu_layers is not None:
        parameters.n_gpu_layers = options.n_gpu_layers
    if options.threads is not None:
        parameters.cpuparams.n_threads = options.threads
        parameters.cpuparams_batch.n_threads = options.threads
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 3
    print(f"listening on {server.listening_address}", flush=True)  # noqa: T201  # the engine's own log
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
