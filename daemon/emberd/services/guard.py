"""Around a run of the daemon: counts the starts of a service manager, and waits instead of failing for ever."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

from emberd.core.burst import LIMIT, WINDOW_S, End
from emberd.core.errors import EmberdError
from emberd.core.managed import find_manager
from emberd.host import ThisHost, config_file
from emberd.host.claims import Claims
from emberd.host.paths import prepare, state_paths
from emberd.host.starts import Starts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emberd.core.settings import Settings
    from emberd.host.config_file import Loaded
    from emberd.services.standby import Examine

    Start = Callable[[Settings, Path, Claims, Starts], int]


def run(option: str | None, start: Start, examine: Examine) -> int:
    """Run the daemon and return its exit code; under a service manager a burst of failures ends in waiting.

    Args:
        option: the settings file as it was named.
        start: runs the daemon.
        examine: what `emberd doctor` sees while it waits.

    Raises:
        EmberdError: it cannot start, and it is not yet, or nobody's, time to wait.
    """
    claims = Claims()
    try:
        if find_manager(os.environ, os.getpid(), has_terminal=sys.stderr.isatty()) is None:
            settings, path = config_file.load(option)
            claims.take_given(ThisHost())
            return start(settings, path, claims, Starts(None, None))
        return _run_managed(option, start, examine, claims)
    finally:
        claims.close()


def _run_managed(option: str | None, start: Start, examine: Examine, claims: Claims) -> int:
    loaded = config_file.load_what_is_right(option)
    host = ThisHost()
    starts = _starts(loaded, host)
    wait_s = starts.wait_s() if starts.runs else None
    if wait_s is not None:
        error = EmberdError(
            f"emberd ended {LIMIT} times within {WINDOW_S / 60:.0f} minutes of its start, without saying why",
            "Look at its log and for crash reports; `emberd restart` tries at once.",
        )
        return _wait(error, wait_s, loaded, option, examine, claims, starts)
    starts.begin()
    try:
        claims.take_given(host)
        if loaded.error is not None:
            raise loaded.error  # noqa: TRY301  # counted like the others
        code = start(loaded.settings, loaded.path, claims, starts)
    except Exception as caught:
        if starts.runs and starts.runs[-1].end is End.READY:
            raise  # it has been of use
        error = caught if isinstance(caught, EmberdError) else _bug(caught)
        starts.failed(error.message)
        wait_s = starts.wait_s()
        if wait_s is None:
            raise
        return _wait(error, wait_s, loaded, option, examine, claims, starts)
    starts.ended()
    return code


def _starts(loaded: Loaded, host: ThisHost) -> Starts:
    """Return what is known of earlier starts; nothing where the state directory is not known, or is the problem."""
    paths = state_paths(loaded.settings)
    try:
        prepare(paths)
    except EmberdError:
        return Starts(None, None)
    return Starts(paths.starts if loaded.tells_place else None, host.start_token(1))


def _bug(caught: Exception) -> EmberdError:
    # The type alone: a message may hold anything.
    return EmberdError(f"emberd failed by a bug of its own ({type(caught).__name__})", "Its log has the traceback.")


def _wait(
    error: EmberdError,
    wait_s: float,
    loaded: Loaded,
    option: str | None,
    examine: Examine,
    claims: Claims,
    starts: Starts,
) -> int:
    """Wait in emberd's place; returns only if somebody stops it, and else becomes a new emberd.

    Raises:
        OSError: emberd's program is gone.
    """
    from emberd.services.standby import Outcome, Standby, Why  # noqa: PLC0415  # rarely needed

    starts.waits()
    failures = tuple(run.reason or "ended without a word" for run in starts.runs or ())
    standby = Standby(Why(error, wait_s, failures), loaded, option, examine, claims)
    outcome = asyncio.run(standby.run())
    if outcome is Outcome.STOPPED:
        starts.ended()
        return 0
    if outcome is Outcome.ASKED:
        starts.asked()
    claims.replace_process(standby.successor)
    return 1  # not reached
