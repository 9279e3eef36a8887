#!/usr/bin/env python3
"""A stand-in for KoboldCPP: the same contract with the outside, and no language model.

Start it as the original, `python koboldcpp.py --model FILE.gguf --port 5001 ...`. It is one real process (three
with `--admin`) that maps or reads the model file, locks it when told so, touches all of it for every token, prints
what the original prints, listens only when it has loaded, and ends as the original ends. Two versions can be
played. Speed and misbehaviour are set by environment variables, see `switches.py`.

What it does not have: images, speech, built-in pages, save states, smart cache, Ollama's generation paths,
and the sleeps of the original before some of its exits.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import admin
import http_api
import options as command_line
import weights
from endpoints import Site
from generation import Model
from switches import die, read_switches

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from switches import Switches

BEGAN = time.monotonic()
ONREADY_DELAY_S = 1.0
DOTS = 50
LONGEST_STREAM_S = 600.0
EXIT_NO_MODEL, EXIT_NOT_LOADED, EXIT_LIFETIME = 2, 3, 75


def main(arguments: list[str]) -> int:
    """Run as the command line says; return the exit code."""
    switches = read_switches(os.environ)
    if arguments == ["--version"] and not switches.is_old:
        say(switches.version)
        return 0
    options = command_line.parse(arguments, switches.version)
    if getattr(options, "exportconfig", ""):
        Path(options.exportconfig).write_text(json.dumps(vars(options), indent=2), encoding="utf-8")
        return 0
    apply_signal_switches(switches)
    say(f"***\nWelcome to KoboldCpp - Version {switches.version}")
    if getattr(options, "admin", False) and not options.admindir:
        say("Warning: --admin without --admindir has no effect.")
        options.admin = False
    switches = switches.settled()
    if not getattr(options, "admin", False):
        run_worker(options, switches, None)
    return admin.supervise(
        options,
        start_worker=lambda current, reload: run_worker(current, switches, reload),
        read_options=lambda name: command_line.merged(options, Path(options.admindir) / name, switches.version),
    )


def run_worker(options: argparse.Namespace, switches: Switches, reload: Callable[[str], None] | None) -> NoReturn:
    """Load, serve and never return."""
    limit_lifetime(switches)
    model_weights = load(options, switches)
    model = Model(options, switches, model_weights, BEGAN)
    announce(options, switches)
    listeners = []
    never = threading.Event()
    try:
        listeners = http_api.serve(model, Site(model, switches.version, reload))
        if options.onready:
            run_later(options.onready)
        while not never.wait(60):
            pass
    except KeyboardInterrupt:
        say("Stopped by an interrupt.")
    for listener in listeners:
        listener.close()
    end_generation(model)
    model.remove_unpacked()
    sys.stdout.flush()
    os._exit(0)


def end_generation(model: Model) -> None:
    """Do what an interrupt does to a running generation: a stream is finished first, any other is torn."""
    job = model.job
    if job is None or job.finished.is_set():
        return
    if job.is_streamed:
        job.finished.wait(LONGEST_STREAM_S)
        # The last words are on their way to the client.
        threading.Event().wait(0.1)
    elif not model.switches.is_old:
        # The newer version frees the model under the feet of the thread that computes.
        sys.stdout.flush()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        die("SIGSEGV")


def load(options: argparse.Namespace, switches: Switches) -> weights.Weights | None:
    """Take the model into memory, with the original's words; end the process if that fails."""
    path = Path(options.model_param or "")
    is_missing = bool(options.model_param) and not path.is_file()
    if not switches.is_old:
        say(f"Loading Chat Completions Adapter: {options.chatcompletionsadapter}")
    elif is_missing:
        # The older version looks for the file before it prints its arguments.
        leave_without(path, options)
    say(f"Initializing dynamic library: koboldcpp_default.so\n==========\n{options}\n==========")
    if switches.crash_at_start:
        die(switches.crash_at_start)
    if not options.model_param and not options.nomodel:
        say("No model was given and there is no desktop to ask for one.")
        leave(EXIT_NO_MODEL)
    if is_missing:
        leave_without(path, options)
    if not options.model_param or is_missing:
        return None
    say(f"{'Loading model' if switches.is_old else 'Loading Text Model'}: {path}")
    try:
        model = weights.inspect(path)
        say("Identified as GGUF model.\nAttempting to Load...\n---\nSystem Info: stand-in = 1 |")
    except weights.NotAModelError:
        say(f"Load Text Model OK: False\nCould not load text model: {path}")
        leave(EXIT_NOT_LOADED)
    except weights.BrokenModelError as error:
        say("Identified as GGUF model.\nAttempting to Load...\n---")
        log(f"llama_model_load: error loading model: {error}")
        log("llama_model_load_from_file_impl: failed to load model")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        die("SIGSEGV")
    return load_weights(model, options, switches)


def leave_without(path: Path, options: argparse.Namespace) -> None:
    """Exit because there is no such model, unless the owner said not to mind."""
    say(f"Cannot find text model file: {path}")
    if not options.ignoremissing:
        leave(EXIT_NO_MODEL)


def load_weights(model: weights.ModelFile, options: argparse.Namespace, switches: Switches) -> weights.Weights:
    """Map or read the weights, lock them, and take as long as the switches say."""
    log(
        f"llama_model_loader: loaded meta data with 1 key-value pairs and 1 tensors from {model.path} "
        "(version GGUF V3 (latest))"
    )
    is_mapped = not options.nommap if switches.is_old else options.usemmap
    if switches.is_old:
        log(f"llm_load_tensors:        CPU buffer size = {model.size / 2**20:8.2f} MiB")
    else:
        mapped = str(bool(is_mapped)).lower() + (", direct_io = false" if switches.is_batching else "")
        log(f"load_tensors: loading model tensors, this can take a while... (mmap = {mapped})")
        log(f"load_tensors:          CPU model buffer size = {model.size / 2**20:8.2f} MiB")
    loaded = weights.Weights(model, options.contextsize, is_mapped=is_mapped)
    if options.usemlock:
        loaded.lock(is_refused=switches.mlock_fails)
    if getattr(options, "draftmodel", ""):
        loaded.draft = load_draft(Path(options.draftmodel), options, switches, is_mapped=is_mapped)
    clock = threading.Event()
    for _ in range(DOTS):
        clock.wait(switches.load_s / DOTS)
        sys.stderr.write(".")
        sys.stderr.flush()
    loaded.touch()
    size = f"{loaded.kv_bytes / 2**20:8.2f} MiB"
    name = "llama_new_context_with_model: KV self size  =" if switches.is_old else "llama_kv_cache: size ="
    cache = "llama_kv_cache_init" if switches.is_old else "llama_kv_cache"
    context = "llama_new_context_with_model: n_ctx     " if switches.is_old else "llama_context: n_ctx        "
    log(f"\n{context} = {options.contextsize + 256}\n{cache}:        CPU KV buffer size = {size}")
    log(f"{name}{size}\nllama_context:        CPU compute buffer size =     1.00 MiB")
    if not switches.is_old:
        say("Starting model warm up, please wait a moment...")
    say("Load Text Model OK: True")
    return loaded


def load_draft(path: Path, options: argparse.Namespace, switches: Switches, *, is_mapped: bool) -> weights.Weights:
    """Hold a draft model as the model is held; it is never asked anything."""
    log(f"llama_model_loader: loaded meta data with 1 key-value pairs and 1 tensors from {path} (version GGUF V3)")
    draft = weights.Weights(weights.inspect(path), 1, is_mapped=is_mapped)
    if options.usemlock:
        draft.lock(is_refused=switches.mlock_fails)
    return draft


def announce(options: argparse.Namespace, switches: Switches) -> None:
    """Print where the server will be, before it is there."""
    say("Embedded KoboldAI Lite loaded.")
    if not switches.is_old:
        say("======\nActive Modules: TextGeneration\nEnabled APIs: KoboldCppApi OpenAiApi OllamaApi")
    url = f"http://{options.host or 'localhost'}:{options.port}"
    say(f"Starting Kobold API on port {options.port} at {url}/api/")
    say(f"Starting OpenAI Compatible API on port {options.port} at {url}/v1/")
    say(f"======\nPlease connect to custom endpoint at {url}")
    sys.stdout.flush()


def run_later(command: str) -> None:
    """Run the owner's command a moment after loading, in a shell, as the original does."""
    timer = threading.Timer(
        ONREADY_DELAY_S, subprocess.run, args=(command,), kwargs={"shell": True, "check": False}
    )
    timer.daemon = True
    timer.start()


def apply_signal_switches(switches: Switches) -> None:
    """Ignore the signals that a stubborn process ignores."""
    if switches.ignores_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if switches.ignores_sigint:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def limit_lifetime(switches: Switches) -> None:
    """End this process some day, even if the test that started it cannot."""
    timer = threading.Timer(switches.lifetime_s, os._exit, args=(EXIT_LIFETIME,))
    timer.daemon = True
    timer.start()


def leave(code: int) -> NoReturn:
    """Exit with `code`."""
    sys.stdout.flush()
    sys.exit(code)


def say(text: str) -> None:
    """Print on stdout, which is flushed only where the original does."""
    sys.stdout.write(text + "\n")


def log(text: str) -> None:
    """Print on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(sys.argv[1:]))
