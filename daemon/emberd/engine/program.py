"""Finds an engine's program, and asks it about itself."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import stat
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emberd.core.errors import EngineNotUsable, StateUnusable
from emberd.engine.process import KILL_WAIT_S, inherited_environment
from emberd.host.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emberd.core.ports import Host

ASK_TIMEOUT_S = 120.0
"""KoboldCPP's single-file binary unpacks itself before it answers --help: 26 to 72 s are reported (issue 1406)."""
_MOST_BYTES = 4 * 1024 * 1024
"""Of each pipe. KoboldCPP's help has some 30 KiB."""
_CHUNK_BYTES = 64 * 1024
_CACHE_ENTRIES = 16
_LAST_WORDS = 4
_ANSWERED = frozenset({0, 2})
"""The codes of help and of argparse's refusal; other failures may have passed next time (a missing module, a full
disk)."""


@dataclass(frozen=True, slots=True)
class Said:
    """A program's answer about itself."""

    exit_code: int
    out: str
    err: str


def find_program(setting: str, usual_names: Sequence[str], kind: str) -> Path:
    """Return the program that the settings name, or the first usual name on PATH.

    Raises:
        EngineNotUsable: there is none.
    """
    if setting:
        path = Path(setting).expanduser()
        if path.exists():
            return path.absolute()
        on_path = shutil.which(setting)
        if on_path and os.sep not in setting:
            return Path(on_path)
        raise EngineNotUsable(f"engine not found: {path}", f"Set engine.path to {kind}.")
    for name in usual_names:
        on_path = shutil.which(name)
        if on_path:
            return Path(on_path)
    raise EngineNotUsable(
        f"{kind} was not found on PATH (looked for {', '.join(usual_names)})",
        f'Set engine.path to {kind}, or engine.kind = "embedded" for the engine that comes with emberd[demo].',
    )


def check_ran(program: Path, said: Said) -> None:
    """Refuse a program that ended otherwise than by answering.

    Raises:
        EngineNotUsable: with its own last words: a shared library is missing, a module, memory.
    """
    if said.exit_code in _ANSWERED:
        return
    how = f"ended by signal {-said.exit_code}" if said.exit_code < 0 else f"exit code {said.exit_code}"
    lines = [line.strip() for line in (said.err.strip() or said.out.strip()).splitlines() if line.strip()]
    words = "".join(f"\n  | {line}" for line in lines[-_LAST_WORDS:])
    raise EngineNotUsable(f"{program} cannot run ({how}){words}", "Run it by hand with --help: it lacks something.")


def check_executable(path: Path, host: Host) -> None:
    """Refuse a program that the system would not start.

    Raises:
        EngineNotUsable: a folder, not executable, or quarantined.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise EngineNotUsable(f"the engine is a folder: {path}", "Set engine.path to the program in it.")
    if not mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH) or not os.access(path, os.X_OK):
        raise EngineNotUsable(f"not executable: {path}", f"Run: chmod +x {path}")
    if host.quarantine(path):
        # Under launchd there is no window to approve it in: it would silently die by SIGKILL.
        raise EngineNotUsable(
            f"quarantined by macOS: {path}",
            f"If you trust it, run: xattr -d com.apple.quarantine {path}",
        )


class Asker:
    """Asks programs about themselves and remembers the answers in a JSON file, by path, size and mtime."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._remembered: dict[str, Said] | None = None

    async def ask(
        self, command: Sequence[str], arguments: Sequence[str], program: Path, environment: Mapping[str, str]
    ) -> Said:
        """Run `command` with `arguments` and return what it said, from memory where `program` is unchanged.

        Raises:
            EngineNotUsable: it cannot be started, has not answered within ASK_TIMEOUT_S, or prints without end.
        """
        facts = program.stat()
        key = hashlib.sha256(
            "\0".join((*command, *arguments, str(facts.st_size), str(facts.st_mtime_ns))).encode()
        ).hexdigest()
        if self._remembered is None:
            self._remembered = self._read()
        remembered = self._remembered
        if key in remembered:
            return remembered[key]
        said = await _run((*command, *arguments), {**inherited_environment(), **environment})
        if said.exit_code not in _ANSWERED:
            return said
        remembered[key] = said
        newest = dict(list(remembered.items())[-_CACHE_ENTRIES:])
        self._remembered = newest
        with contextlib.suppress(StateUnusable):  # asking again is slow, but not wrong
            write_atomically(self._cache, json.dumps({key: asdict(said) for key, said in newest.items()}))
        return said

    def _read(self) -> dict[str, Said]:
        try:
            return {key: Said(**said) for key, said in json.loads(self._cache.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


async def _run(command: Sequence[str], environment: Mapping[str, str]) -> Said:
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=environment, start_new_session=True
        )
    )
    try:
        # asyncio would wait for all that the program has started by then, and end the program alone.
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            await _end(await starting)
        raise
    except OSError as error:
        raise EngineNotUsable(
            f"cannot start {command[0]}: {error.strerror}",
            "Is it a program for this system and processor? Set engine.path in the settings.",
        ) from error
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            out, err = await asyncio.gather(_read(process.stdout, process.pid), _read(process.stderr, process.pid))
            await process.wait()
    except TimeoutError as error:
        raise EngineNotUsable(
            f"{command[0]} did not answer {command[-1]} within {ASK_TIMEOUT_S:g} s",
            "Run it by hand and see what it waits for.",
        ) from error
    finally:
        await _end(process)
    if max(len(out), len(err)) > _MOST_BYTES:
        raise EngineNotUsable(
            f"{command[0]} printed more than {_MOST_BYTES >> 20} MiB in answer to {command[-1]}",
            "Run it by hand and see what it prints. Is it the engine's program?",
        )
    return Said(process.returncode or 0, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


async def _read(pipe: asyncio.StreamReader | None, group: int) -> bytes:
    """Return what comes through a pipe until its end; end the group that writes too much."""
    said = bytearray()
    while pipe is not None and (more := await pipe.read(_CHUNK_BYTES)):
        if len(said) <= _MOST_BYTES:
            said += more
        else:
            _kill(group)
    return bytes(said)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a program and what it started, also what it left behind; return when it is gone, or after KILL_WAIT_S."""
    _kill(process.pid)
    with contextlib.suppress(TimeoutError):
        # A pipe is closed when it was read to its end.
        await asyncio.wait_for(process.communicate(), KILL_WAIT_S)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
