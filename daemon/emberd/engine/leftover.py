"""The engine of an emberd that was killed: it waits for the next emberd to adopt it, and nobody may be to come."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from emberd.core.errors import AlreadyRunning
from emberd.engine import record as records
from emberd.engine.process import STOP_SIGNALS, ProcessTree
from emberd.host.files import hold_lock

if TYPE_CHECKING:
    from emberd.core.ports import Host
    from emberd.host.paths import StatePaths


async def end_leftover(paths: StatePaths, host: Host, timeout_s: float) -> int | None:
    """End the engine that no emberd supervises, and forget it.

    Args:
        paths: of the state directory.
        host: this computer.
        timeout_s: until what has not ended by itself is killed.

    Returns:
        Its pid; None if there is none, or an emberd runs, or the process is a stranger's that got the same pid.

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
        record = records.load(paths.record)
        if record is None:
            return None
        tree = ProcessTree(record.pid, host)
        is_ours = records.claim(record, host) is not records.Claim.STRANGER and bool(tree.members())
        if is_ours:
            await tree.terminate(STOP_SIGNALS, timeout_s)
        paths.record.unlink(missing_ok=True)
        return record.pid if is_ours else None
    finally:
        os.close(lock)
