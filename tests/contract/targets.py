"""The programs that the contract is tested on, and what tests do with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from engine_process import EngineProcess, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

REAL_BUILDS_VARIABLE = "EMBERD_TEST_KOBOLDCPP"
"""Paths of real builds (a `koboldcpp.py`, a checkout, or a binary), separated as in PATH."""
STANDIN = Path(__file__).parent.parent / "koboldcpp_standin" / "koboldcpp.py"
LIFETIME_S = "150"
SPEED = {"STANDIN_TOKEN_MS": "4", "STANDIN_PROMPT_MS_PER_TOKEN": "0.2"}
"""Fast, and yet a long prompt takes many times as long as a token."""
START_S = 90.0
NO_REUSE = httpx.Limits(max_keepalive_connections=0)
"""A server may close an idle connection just when a slow test asks again."""
LONG_PROMPT = " ".join(["ba ke lo mi"] * 300)
"""About 1200 tokens, for the synthetic model and for the stand-in."""


@dataclass(frozen=True)
class Target:
    """One program under test.

    Attributes:
        name: shown in test names.
        command: how to run it.
        version: leading numbers of its version.
        environment: variables for every start.
    """

    name: str
    command: tuple[str, ...]
    version: tuple[int, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    is_standin: bool = False

    @property
    def is_old(self) -> bool:
        """Whether this version knows no admin mode, maps by default and has no `--version`."""
        return self.version < (1, 100)

    @property
    def is_batching(self) -> bool:
        """Whether this version can work on several requests at once, and has what came with that."""
        return self.version >= (1, 113)

    def start(self, *arguments: str | Path, **environment: str) -> EngineProcess:
        """Start the program with just these arguments."""
        return EngineProcess([*self.command, *arguments], environment={**self.environment, **environment})

    @contextmanager
    def serving(self, model: Path, *arguments: str, **environment: str) -> Iterator[Server]:
        """Start the program as a server, wait for its first answer, and end it with all its children."""
        port = free_port()
        words: list[str | Path] = [
            "--model",
            model,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--contextsize",
            "2048",
        ]
        words += [] if "--gpulayers" in arguments else ["--gpulayers", "0"]
        with self.start(*words, *arguments, **environment) as process:
            url = f"http://127.0.0.1:{port}"
            process.wait_for_answer(url + "/api/v1/model", within_s=START_S)
            with httpx.Client(base_url=url, timeout=60.0, trust_env=False, limits=NO_REUSE) as client:
                yield Server(self, process, client, port)


@dataclass(frozen=True)
class Server:
    """A target that serves."""

    target: Target
    process: EngineProcess
    client: httpx.Client
    port: int

    def perf(self) -> dict[str, Any]:
        """Ask for the counters."""
        answer: dict[str, Any] = self.client.get("/api/extra/perf").json()
        return answer

    def generate(self, prompt: str, length: int, **more: Any) -> str:
        """Generate without streaming; greedy, and never ended by the model itself."""
        response = self.client.post("/api/v1/generate", json=request(prompt, length, **more))
        assert response.status_code == 200, response.text
        text: str = response.json()["results"][0]["text"]
        return text

    @contextmanager
    def streaming(self, prompt: str, length: int, **more: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Generate with streaming; yields the events as they come."""
        body = request(prompt, length, **more)
        with self.client.stream("POST", "/api/extra/generate/stream", json=body) as response:
            assert response.status_code == 200
            yield events(response)

    def is_idle(self) -> bool:
        """Whether nothing runs."""
        return bool(self.perf()["idle"] == 1)

    def processed_tokens(self) -> int:
        """Return how many prompt tokens the last generation had to process, from the log."""
        counts = re.findall(r"Processing Prompt \S*?\s?\(\d+ / (\d+) tokens\)", self.process.output)
        return int(counts[-1])


def request(prompt: str, length: int, **more: Any) -> dict[str, Any]:
    """Return the body of a greedy generation of exactly `length` tokens."""
    fixed = {"temperature": 0.01, "top_k": 1, "rep_pen": 1.0, "sampler_seed": 1, "ban_eos_token": True}
    return {"prompt": prompt, "max_length": length, **fixed, **more}


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the JSON of every `data:` line that holds JSON."""
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def standin(version: str) -> Target:
    """Return the stand-in in one of its personalities."""
    return Target(
        f"standin-{version}",
        (sys.executable, str(STANDIN)),
        _numbers(version),
        {"STANDIN_VERSION": version, "STANDIN_LIFETIME_SECONDS": LIFETIME_S, **SPEED},
        is_standin=True,
    )


def real_builds() -> list[Target]:
    """Return the real builds that the environment names."""
    paths = [Path(text) for text in os.environ.get(REAL_BUILDS_VARIABLE, "").split(os.pathsep) if text]
    return [_real_build(path / "koboldcpp.py" if path.is_dir() else path) for path in paths]


def _real_build(path: Path) -> Target:
    command = (sys.executable, str(path)) if path.suffix == ".py" else (str(path),)
    described = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120, check=True)
    (version,) = re.findall(r"Version (\d+(?:\.\d+)+)", described.stdout)[-1:]
    return Target(f"koboldcpp-{version}", command, _numbers(version))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def without_lock_permission(command: tuple[str, ...], limit_bytes: int) -> tuple[str, ...] | None:
    """Return the command wrapped so that little memory can be locked, None if this system lacks the tools."""
    if shutil.which("prlimit") is None:
        return None
    limited = ("prlimit", f"--memlock={limit_bytes}", *command)
    if os.geteuid() != 0:
        return limited
    if shutil.which("setpriv") is None:
        return None
    return ("setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock", *limited)
