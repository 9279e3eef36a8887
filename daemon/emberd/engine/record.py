"""The record of a running engine, so that the next emberd can adopt it or end it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING

import psutil

from emberd.core.errors import AlreadyRunning
from emberd.core.status import EngineStatus, from_plain
from emberd.core.types import Switch
from emberd.engine.process import STOP_SIGNALS, ProcessTree, is_alive
from emberd.host.files import write_atomically
from emberd.host.instance import hold_lock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from emberd.core.ports import Host
    from emberd.host.paths import StatePaths

_FORMAT = 1
"""Raised when a field changes its meaning; a file of another format is set aside, never guessed at."""


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One running engine.

    Attributes:
        pid: process id, which is also its process group (it leads a session of its own).
        start_token: text that tells it from a later process with the same pid (Host.start_token).
        command_digest: SHA-256 of the command line as the kernel shows it (it may hold a password), None until
            the engine is loaded. Before that the line may be a wrapper's that has yet to become the engine, or
            empty: Linux releases the caller of `execve` before the new arguments are in place (fs/exec.c,
            begin_new_exec; read at once on two busy cores, 89 % of 150,000 lines were empty).
        command: the command line for people, secrets masked.
        plan_digest: SHA-256 of its plan, to see whether settings have changed since.
        port: loopback TCP port it was told to listen on.
        engine: name of the adapter.
        will_lock: the engine was asked to lock the model.
        started_at: wall-clock time of the start, seconds since the epoch, for display only.
        is_mapped: the weights are pages of the file; None if its log did not tell.
        context_tokens: cells of its KV cache, kv_bytes: their size; None if its log did not tell.
        switch: what it was switched to, None if it serves the settings' model.
    """

    pid: int
    start_token: str
    command_digest: str | None
    command: tuple[str, ...]
    plan_digest: str
    port: int
    engine: str
    started_at: float
    will_lock: bool
    is_mapped: bool | None = None
    context_tokens: int | None = None
    kv_bytes: int | None = None
    switch: Switch | None = None

    def status(self, *, is_adopted: bool) -> EngineStatus:
        """Return what the status tells of it."""
        return EngineStatus(
            kind=self.engine,
            pid=self.pid,
            port=self.port,
            adopted=is_adopted,
            started_at=self.started_at,
            command=self.command,
        )


def digest(words: Sequence[str]) -> str:
    """Return the SHA-256 of a list of words, in hexadecimal."""
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()


def observed_command(pid: int) -> tuple[str, ...] | None:
    """Return the command line that the kernel shows for `pid`, None if it is gone or hidden."""
    try:
        return tuple(psutil.Process(pid).cmdline())
    except psutil.Error:
        return None


def save(path: Path, record: EngineRecord) -> None:
    """Write the state file.

    Raises:
        StateUnusable: the disk is full or the folder not writable.
    """
    write_atomically(path, json.dumps({"format": _FORMAT, **asdict(record)}, indent=1) + "\n", may_write_over=True)


def load(path: Path) -> EngineRecord | None:
    """Read the state file; return None if there is none that this version understands.

    A file that it does not understand is renamed to `*.unreadable`, so that nothing is lost.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(content["format"])  # noqa: TRY301  # set aside like any other
        return EngineRecord(
            pid=int(content["pid"]),
            start_token=str(content["start_token"]),
            command_digest=None if (known := content["command_digest"]) is None else str(known),
            command=tuple(str(word) for word in content["command"]),
            plan_digest=str(content["plan_digest"]),
            port=int(content["port"]),
            engine=str(content["engine"]),
            started_at=float(content["started_at"]),
            will_lock=bool(content.get("will_lock", True)),
            is_mapped=is_mapped if isinstance(is_mapped := content.get("is_mapped"), bool) else None,
            context_tokens=tokens if isinstance(tokens := content.get("context_tokens"), int) else None,
            kv_bytes=size if isinstance(size := content.get("kv_bytes"), int) else None,
            switch=from_plain(Switch, switch) if isinstance(switch := content.get("switch"), dict) else None,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        path.replace(path.with_suffix(".unreadable"))
        return None


class Claim(Enum):
    """The process behind a record."""

    OURS = "ours"
    """The recorded engine; it can be adopted."""
    CHANGED = "changed"
    """The recorded process with another command line; it can be ended, not adopted."""
    ENDED = "ended"
    """It has ended; what it started may live on in its process group."""
    STRANGER = "stranger"
    """Another process with the same pid; it must not be touched."""


def claim(record: EngineRecord, host: Host) -> Claim:
    """Compare the process behind `record` with it: start time, then command line if known."""
    token = host.start_token(record.pid)
    if token is None:
        return Claim.ENDED
    if token != record.start_token:
        return Claim.STRANGER
    if not is_alive(record.pid):
        return Claim.ENDED
    if record.command_digest is None:
        return Claim.OURS
    command = observed_command(record.pid)
    return Claim.OURS if command is not None and digest(command) == record.command_digest else Claim.CHANGED


async def end_leftover(paths: StatePaths, host: Host, timeout_s: float) -> int | None:
    """End the engine of an emberd that was killed, and forget it: maybe no next emberd adopts it.

    Processes that have not ended by themselves after `timeout_s` are killed.

    Returns:
        Its pid; None if there is none, an emberd runs, or the pid belongs to another process.

    Raises:
        StateUnusable: the state directory cannot be written.
    """
    if not paths.record.exists():
        return None
    try:
        lock = hold_lock(paths.lock)  # no emberd may adopt it meanwhile
    except AlreadyRunning:
        return None
    try:
        record = load(paths.record)
        if record is None:
            return None
        tree = ProcessTree(record.pid, host)
        is_ours = claim(record, host) is not Claim.STRANGER and bool(tree.members())
        if is_ours:
            await tree.terminate(STOP_SIGNALS, timeout_s)
        paths.record.unlink(missing_ok=True)
        return record.pid if is_ours else None
    finally:
        os.close(lock)
