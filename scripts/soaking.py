"""What the soaks share: emberd on a service manager's socket, clients that know what a reply must be."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "koboldcpp_standin")]

import httpx  # noqa: E402  # after the path
from generation import next_token  # noqa: E402

from emberd.core.errors import EmberdError  # noqa: E402
from emberd.core.settings import (  # noqa: E402
    EndpointSettings,
    EngineSettings,
    LifecycleSettings,
    ModelSettings,
    Settings,
    StateSettings,
    WarmthSettings,
    to_toml,
)
from emberd.host.paths import StatePaths  # noqa: E402
from emberd.services.control import ask  # noqa: E402
from synthetic_gguf import write_gguf  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_S = 120.0
LENGTH = 24
PAUSE_MS = "4"
HTTP_OK = 200
WAYS = (
    ("/api/v1/generate", "kobold", False),
    ("/api/extra/generate/stream", "kobold", True),
    ("/v1/completions", "completions", False),
    ("/v1/completions", "completions", True),
    ("/v1/chat/completions", "chat", False),
    ("/v1/chat/completions", "chat", True),
)


# --- emberd on a socket of the service manager's -----------------------------------------------------------------


@dataclass
class Daemon:
    """A running emberd."""

    port: int
    control: Path
    command: list[str]
    pid: int
    log: Path

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://127.0.0.1:{self.port}"

    def status(self) -> dict[str, Any]:
        """Ask until it answers: while it replaces itself, nobody is there."""
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            try:
                return ask(self.control, "status")
            except EmberdError:
                if time.monotonic() > deadline_s:
                    sys.exit(f"emberd does not answer: {self.log.read_text()[-2000:]}")
                time.sleep(0.02)

    def wait_ready(self, other_than: int | None = None) -> dict[str, Any]:
        """Return the status of a ready engine."""
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            status = self.status()
            if status["state"] == "READY" and status["engine"]["pid"] != other_than:
                return status
            if time.monotonic() > deadline_s:
                sys.exit(f"no engine: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def replace(self) -> None:
        """Run `emberd restart --daemon`."""
        said = subprocess.run([*self.command, "restart", "--daemon"], capture_output=True, text=True, check=False)
        if said.returncode:
            sys.exit(f"restart --daemon: {said.stderr}")

    def pss_mib(self) -> float:
        """Return its proportional set size."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def open_files(self) -> int:
        """Return how many descriptors it has."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def tasks(self) -> int:
        """Return how many tasks its event loop has."""
        said = httpx.get(f"{self.url}/emberd/metrics", timeout=LIMIT_S, trust_env=False).text
        return int(float(said.partition("\nemberd_tasks ")[2].partition("\n")[0]))


@contextlib.contextmanager
def running(warmth: WarmthSettings | None = None) -> Iterator[Daemon]:
    """Start emberd under systemd-socket-activate, and end it and its engine; keep-warm is off by default."""
    with tempfile.TemporaryDirectory(prefix="emberd-soak-") as name:
        folder = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        model = write_gguf(folder / "model.gguf").path
        settings = Settings(
            model=ModelSettings(path=str(model)),
            engine=EngineSettings(kind="koboldcpp", path=str(TESTS / "koboldcpp_standin"), lock="never"),
            endpoint=EndpointSettings(port=port),
            lifecycle=LifecycleSettings(
                crash_limit=1000, backoff_initial_s=0, backoff_max_s=0, stable_after_s=0, probe_interval_s=0.2
            ),
            warmth=warmth or WarmthSettings(mode="off"),
            state=StateSettings(directory=str(folder / "state")),
        )
        config = folder / "config.toml"
        config.write_text(to_toml(settings, with_help=False))
        command = [sys.executable, "-c", "from emberd.cli.main import main; main()", "--config", str(config)]
        log = folder / "emberd.log"
        fast = {"STANDIN_TOKEN_MS": PAUSE_MS, "STANDIN_PROMPT_MS_PER_TOKEN": "0.2"}
        manager = str(shutil.which("systemd-socket-activate"))
        with log.open("wb") as output:
            # The manager starts emberd with the first connection, and becomes it.
            child = subprocess.Popen(
                [manager, f"--listen=127.0.0.1:{port}", *command, "run"],
                stdout=output,
                stderr=output,
                env={**os.environ, **fast},
                start_new_session=True,
            )
        daemon = Daemon(port, StatePaths(folder / "state").control, command, child.pid, log)
        try:
            first_answer(daemon.url)
            daemon.wait_ready()
            yield daemon
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(LIMIT_S)


def first_answer(url: str) -> None:
    """Wait until the manager listens and emberd answers."""
    deadline_s = time.monotonic() + LIMIT_S
    while True:
        with contextlib.suppress(httpx.ConnectError):
            httpx.get(f"{url}/api/v1/model", timeout=LIMIT_S, trust_env=False).raise_for_status()
            return
        if time.monotonic() > deadline_s:
            sys.exit("emberd does not answer")
        time.sleep(0.05)


def body_of(dialect: str, prompt: str, *, is_streamed: bool) -> dict[str, Any]:
    """Return a request's body."""
    if dialect == "kobold":
        return {"prompt": prompt, "max_length": LENGTH}
    asked: dict[str, Any] = {"prompt": prompt}
    if dialect == "chat":
        asked = {"messages": [{"role": "user", "content": prompt}]}
    return {**asked, "max_tokens": LENGTH, "stream": is_streamed}


def expected_text(dialect: str, prompt: str) -> str:
    """Return what the engine says to a prompt when nothing goes wrong."""
    text = f"\n### Instruction:\n{prompt}\n### Response:\n" if dialect == "chat" else prompt
    said = ""
    for _ in range(LENGTH):
        said += next_token(text + said)
    return said


def piece_of(event: dict[str, Any]) -> str:
    """Return the text in a reply or in an event of one."""
    if "results" in event:
        return str(event["results"][0]["text"])
    if "token" in event:
        return str(event["token"])
    choice = event["choices"][0]
    said = choice.get("message") or choice.get("delta") or {}
    return str(choice.get("text") or said.get("content") or "")


async def ask_once(client: httpx.AsyncClient, way: tuple[str, str, bool], prompt: str) -> str:
    """Ask; return what is wrong with the reply, empty for nothing."""
    path, dialect, is_streamed = way
    body = body_of(dialect, prompt, is_streamed=is_streamed)
    said = ""
    try:
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != HTTP_OK:
                return f"status {answer.status_code}: {(await answer.aread()).decode()[:200]}"
            if is_streamed:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        said += piece_of(json.loads(line.removeprefix("data: ")))
            else:
                said = piece_of(json.loads(await answer.aread()))
    except httpx.ConnectError as error:
        return f"refused: {error!r}"
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return f"lost: {error!r}"
    expected = expected_text(dialect, prompt)
    return "" if said == expected else f"text: {said!r} instead of {expected!r}"
