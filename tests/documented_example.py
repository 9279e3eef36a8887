"""The examples in the documentation: found, run as a person would, and compared with what the page shows.

A block of shell commands is fenced as `sh` (commands only; each must succeed) or `console` (commands behind `$`,
and below each what it prints). The line above its fence may be a comment:

- ``<!-- example: SETUP -->``: the computer it is run on, one of `SETUPS`; without it `running`.
- ``<!-- not executed: REASON -->``: one of `REASONS`. Nothing else excuses a block.

A command that follows a log (`-f`) is interrupted after a second, as a person does.

What a page shows stands for what is printed so: spaces and line breaks count as one space, each number for any
number (a line that is only a number for itself), and ``...`` for anything. The home is /home/me and the port 5001.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine_process import free_port
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_S = 90
MODEL_BYTES = 4 << 20
"""More pages than a sample looks at, and less than everybody may lock (8 MiB)."""
SHOWN_HOME = "/home/me"
LAUNCHCTL = Path(__file__).parent / "launchctl_standin" / "launchctl"
SETUPS = {
    "running": "emberd runs, and its engine is ready",
    "new": "emberd, a model and an engine are there, and no settings; `emberd run` runs until the block ends",
    "service": "emberd is installed, on the stand-in for launchd, and small.toml is there for a second one",
    "wrong settings": "the settings file has three mistakes",
}
REASONS = {
    "needs macOS",
    "needs the journal",
    "needs a user manager of systemd",
    "needs an administrator",
    "installs software",
    "belongs to the folk recipe",
}
SHELLS = {"sh", "console"}
SILENT = {"text", "toml", "json", "ini", "xml", "mermaid", "python"}
"""Languages of blocks that are no commands; `test_examples.py` parses those that can be."""
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>(?:example|not executed): [^\n]*?) -->\n+)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_END_OF_OUTPUT = "end-of-output-of-command"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_WRONG_SETTINGS = "[engin]\n[lifecycle]\ncrash_limt = 3\nhang_after_s = 0\n"


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block.

    Attributes:
        line: where its fence begins, from 1.
        mark: what the comment above it says, or an empty string.
    """

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run, None if it is."""
        return self.mark.removeprefix("not executed: ") if self.mark.startswith("not executed: ") else None

    @property
    def setup(self) -> str:
        """What it is run on."""
        return self.mark.removeprefix("example: ") or "running"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page, line, found["language"].strip(), found["mark"] or "", found["text"])


def complaint(block: Block) -> str | None:
    """Say why a block is neither run nor excused, None if all is well."""
    if block.language not in SHELLS | SILENT:
        return f"unknown language {block.language!r}"
    if block.language in SILENT:
        return None if not block.mark else "only shell blocks are marked"
    if block.reason is not None:
        return None if block.reason in REASONS else f"unknown reason {block.reason!r}"
    return None if block.setup in SETUPS else f"unknown setup {block.setup!r}"


def commands(block: Block) -> list[tuple[str, str]]:
    """Return the commands of a block, each with the output that the page shows for it."""
    if block.language == "sh":
        return [(line, "...") for line in block.text.splitlines() if line.strip()]
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not parts[0].strip(), "a console block begins with a command"
    pairs = [part.partition("\n") for part in parts[1:]]
    return [(command, shown) for command, _, shown in pairs]


def is_as_shown(shown: str, printed: str) -> bool:
    """Return True if what was printed is what the page shows, by the rules above."""
    if shown.strip().isdecimal():
        return shown.strip() == printed.strip()
    pattern = ".*".join(_number_pattern(" ".join(part.split())) for part in shown.split("..."))
    return re.fullmatch(pattern, " ".join(printed.split()), re.DOTALL) is not None


def _number_pattern(text: str) -> str:
    pieces = [re.escape(piece) for piece in _NUMBER.split(text)]
    joined = r"\d+(?:\.\d+)?".join(pieces)
    # Spaces beside a wildcard belong to it.
    return joined.removeprefix(r"\ ").removesuffix(r"\ ") if text.strip() else ""


class Computer:
    """A home with emberd, a model and the stand-in for KoboldCPP; `close` it."""

    def __init__(self, standin: Path, setup: str) -> None:
        # Short, so that the control socket is where the pages say.
        self.home = Path(tempfile.mkdtemp(prefix="emberd-docs-"))
        self.port = free_port()
        self._begin = "emberd install" if setup == "service" else "emberd run"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "EMBERD_"))},
            "HOME": str(self.home),
            "PATH": f"{self.home}/bin:{os.environ['PATH']}",
            "COLUMNS": "160",
            "STANDIN_PROMPT_MS_PER_TOKEN": "1",
            "LAUNCHCTL_STANDIN_STATE": str(self.home / "launchd"),
        }
        (self.home / "launchd").mkdir()
        # launchd's waiting between two starts is not what the pages are about.
        (self.home / "launchd" / "switches.json").write_text('{"speed": 50, "bootout_lingers_s": 0}')
        (self.home / "Models").mkdir()
        write_gguf(self.home / "Models" / "model.gguf", target_bytes=MODEL_BYTES)
        (self.home / "koboldcpp").symlink_to(standin)
        (self.home / "bin").mkdir()
        (self.home / "bin" / "python3").symlink_to(sys.executable)
        (self.home / "bin" / "koboldcpp").symlink_to(standin / "koboldcpp.py")
        (self.home / "bin" / "launchctl").symlink_to(LAUNCHCTL)
        real = f"\"{sys.executable}\" -c 'from emberd.cli.main import main; main()'"
        self._write_program(real)
        self.config = Path(self.run("emberd config path").strip().replace(SHOWN_HOME, str(self.home)))
        self._write_program(real, self.config)
        if setup == "wrong settings":
            self.config.parent.mkdir(parents=True)
            self.config.write_text(_WRONG_SETTINGS, encoding="utf-8")
        if setup in {"running", "service"}:
            self.run("emberd config init --model ~/Models/model.gguf --engine ~/koboldcpp/koboldcpp.py")
        if setup == "service":
            text = self.config.read_text(encoding="utf-8").replace(f"port = {self.port}", f"port = {free_port()}")
            text = text.replace('directory = ""', f'directory = "{self.home}/small"')
            self.config.with_name("small.toml").write_text(text, encoding="utf-8")

    def _write_program(self, real: str, config: Path | None = None) -> None:
        """Put `emberd` on PATH and where the README installs it: on the port of this computer, `run` behind it."""
        command = f"s/^port = 5001$/port = {self.port}/"
        tame = "" if config is None else f"[ ! -f '{config}' ] || sed -i.sed '{command}' '{config}'"
        text = f"""#!/bin/sh
if [ "$1" = run ]; then
    {real} "$@" >"$HOME/run.log" 2>&1 &
    until curl -fso "$HOME/readyz" http://127.0.0.1:{self.port}/emberd/readyz; do
        kill -0 $! || {{ cat "$HOME/run.log"; exit 1; }}
        sleep 0.05
    done
    exit
fi
case " $* " in
    *" install "* | *" uninstall "* | *" start "* | *" stop "* | *" upgrade "*) set -- "$@" --manager launchd ;;
esac
case " $* " in
    *" -f "*) timeout --signal=INT 1 {real} "$@"; code=$?; [ $code != 124 ] || code=0 ;;
    *) {real} "$@"; code=$? ;;
esac
{tame}
exit $code
"""
        for folder in (self.home / "bin", self.home / ".emberd" / "bin", self.home / ".local/share/emberd/bin"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "emberd").write_text(text, encoding="utf-8")
            (folder / "emberd").chmod(0o755)

    def be_ready(self) -> None:
        """Have emberd run, and everything measured once."""
        deadline_s = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline_s:
            status = self._status()
            if status is None:
                self.run(self._begin, is_checked=True)
            elif status["state"] == "READY" and status["lock"] and status["residency"]:
                return
            time.sleep(0.05)
        raise AssertionError(f"emberd did not become ready: {self.run('emberd status; emberd logs')[-3000:]}")

    def _status(self) -> dict[str, object] | None:
        asked = self.run("emberd status --json")
        return json.loads(asked) if asked.startswith("{") else None

    def run(self, script: str, *, is_checked: bool = False) -> str:
        """Run a script in this home and return what it prints, errors included."""
        ran = subprocess.run(
            ["/bin/sh", "-c", script.replace("5001", str(self.port))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env=self.environment,
            cwd=self.home,
        )
        assert not is_checked or ran.returncode == 0, ran.stdout
        return ran.stdout.replace(str(self.port), "5001").replace(str(self.home), SHOWN_HOME)

    def mistakes(self, block: Block) -> list[str]:
        """Run a block; return what is not as the page says."""
        pairs = commands(block)
        # The status of a command is still $? for the next one.
        end = f'code=$?; echo; echo "{_END_OF_OUTPUT} $code"; (exit $code)'
        printed = self.run("\n".join(f"{command}\n{end}" for command, _ in pairs))
        outputs = re.split(rf"\n{_END_OF_OUTPUT} (\d+)\n", printed)
        found = []
        for (command, shown), output, code in zip(pairs, outputs[::2], outputs[1::2], strict=False):
            if block.language == "sh" and code != "0":
                found.append(f"`{command}` ended with {code}:\n{output}")
            elif not is_as_shown(shown, output):
                found.append(f"`{command}` printed:\n{output}\nnot, as the page shows:\n{shown}")
        if len(outputs[1::2]) != len(pairs):
            found.append(f"not all commands ran:\n{printed}")
        return found

    def close(self) -> None:
        """Stop emberd and its engine, end the stand-in for launchd, and remove the home."""
        self.run("emberd stop; launchctl standin-end -k")
        for record in self.home.rglob("engine.json"):
            try:
                os.killpg(json.loads(record.read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
            except ProcessLookupError:
                continue
        shutil.rmtree(self.home)
