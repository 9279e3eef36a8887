"""Stands in for llama.cpp's `llama-server` program: its command line over the same server, that of xllamacpp.

What it answers is the original's code. Its defaults are the original's too where the cache is concerned: four slots
that share the cells of one KV cache (common/arg.cpp, build 11434: `--parallel -1` is four, and unified).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

REAL_VARIABLE = "EMBERD_TEST_LLAMA_SERVER"
"""Path of a real llama-server."""
_MODES = {"none": "NONE", "mmap": "MMAP", "mlock": "MLOCK", "mmap+mlock": "MMAP_MLOCK"}
_HELP = """usage: llama-server [options]

-m,    --model FNAME                    model
-c,    --ctx-size N                     context
-t,    --threads N                      threads
-np,   --parallel N                     slots (default: -1, auto)
-kvu,  --kv-unified                     slots share one KV cache
       --no-kv-unified                  each slot has cells of its own
-lm,   --load-mode MODE                 how to load
--threads-http N                        HTTP threads
--slots                                 tell of the slots
--no-prefill-assistant                  an assistant's last message is a whole one
--chat-template TEMPLATE                Jinja
--chat-template-file FILE               Jinja
--mmproj FILE                           projector
--embeddings                            only embeddings
--api-prefix PREFIX                     path
--api-key KEY                           keys, separated by commas
--api-key-file FNAME                    keys, one a line
--ssl-key-file FNAME                    private key
--ssl-cert-file FNAME                   certificate
--host HOST                             address
--port PORT                             port
"""


def write_program(folder: Path) -> Path:
    """Write an executable `llama-server` that is this file run by this Python; return its path."""
    path = folder / "llama-server"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} "$@"\n')
    path.chmod(0o755)
    return path


def real_program() -> Path | None:
    """Return the real one that the environment names."""
    named = os.environ.get(REAL_VARIABLE)
    return Path(named).resolve() if named else None


def main(arguments: list[str]) -> int:
    """Serve until a signal ends the process."""
    if "--help" in arguments:
        sys.stdout.write(_HELP)
        return 0
    import xllamacpp  # noqa: PLC0415  # 105 MB, and not needed for --help

    parser = argparse.ArgumentParser(prog="llama-server", add_help=False)
    parser.add_argument("--model", "-m", required=True)
    parser.add_argument("--ctx-size", "-c", type=int, default=0)
    parser.add_argument("--threads", "-t", type=int)
    parser.add_argument("--parallel", "-np", type=int, default=-1)
    parser.add_argument("--kv-unified", "-kvu", action=argparse.BooleanOptionalAction)
    parser.add_argument("--load-mode", "-lm", choices=sorted(_MODES), default="mmap")
    parser.add_argument("--threads-http", type=int, default=-1)
    parser.add_argument("--slots", action="store_true")
    parser.add_argument("--no-prefill-assistant", action="store_true")
    parser.add_argument("--chat-template", default="")
    parser.add_argument("--mmproj", default="")
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--api-key", default=os.environ.get("LLAMA_API_KEY", ""))
    parser.add_argument("--api-key-file", type=Path, default=os.environ.get("LLAMA_ARG_API_KEY_FILE"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args(arguments)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = options.model
    parameters.hostnames = [options.host]
    parameters.port = options.port
    parameters.n_ctx = options.ctx_size
    if options.threads is not None:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options.threads
    parameters.n_parallel = 4 if options.parallel < 0 else options.parallel
    parameters.kv_unified = options.parallel < 0 if options.kv_unified is None else options.kv_unified
    parameters.n_threads_http = options.threads_http
    lines = options.api_key_file.read_bytes().decode().split("\n") if options.api_key_file else []
    keys = [*options.api_key.split(","), *(line for line in lines if not line.startswith("#"))]
    parameters.api_keys = [key for key in keys if key]
    parameters.load_mode = getattr(xllamacpp.llama_load_mode, f"LLAMA_LOAD_MODE_{_MODES[options.load_mode]}")
    parameters.prefill_assistant = not options.no_prefill_assistant
    parameters.chat_template = options.chat_template
    parameters.mmproj.path = options.mmproj
    parameters.embedding = options.embeddings
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    server = xllamacpp.Server(parameters)
    sys.stdout.write(f"listening on {server.listening_address}\n")
    sys.stdout.flush()
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
