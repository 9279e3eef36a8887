"""How the last starts under a service manager ended, kept across runs in the state directory."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from emberd.core.errors import StateUnusable
from emberd.core.start_limit import KEPT, End, Run, judge, waits_after
from emberd.host.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = 1


class StartHistory:
    """Remembers runs of one boot: clocks begin anew with the next, and so does patience.

    Args:
        path: the file; None to remember nothing.
        boot: text that tells one boot from another, None if unknown.
    """

    def __init__(self, path: Path | None = None, boot: str | None = None) -> None:
        self._path = path
        self._is_lost = path is None
        self._boot = boot
        self._runs = _read(path, boot)

    @property
    def runs(self) -> tuple[Run, ...] | None:
        """Every run, the oldest first; None if nothing can be remembered."""
        return None if self._is_lost else self._runs

    @property
    def failures(self) -> tuple[str, ...]:
        """What each run said of its end."""
        return tuple(run.reason or "ended without a word" for run in self.runs or ())

    @property
    def was_ready(self) -> bool:
        """Whether this run's engine has been ready."""
        return bool(self._runs) and self._runs[-1].end is End.READY

    def wait_s(self) -> float | None:
        """Return how long to stand by, None to go on: see `judge`."""
        return judge(self.runs, time.monotonic())

    def begin(self) -> None:
        """Note that a run begins."""
        self._save(*self._runs, Run(time.monotonic()))

    def ready(self) -> None:
        """Note that this run's engine was ready."""
        self._change_last(end=End.READY)

    def failed(self, reason: str) -> None:
        """Note that this run failed at its start, and why."""
        self._change_last(end=End.FAILED, reason=reason)

    def ended(self) -> None:
        """Note that this run ended as it was asked to: whatever was before is forgiven."""
        self._save()

    def waits(self) -> None:
        """Note that emberd stands by now, because of the last run."""
        self._change_last(waits=waits_after(self._runs))

    def asked(self) -> None:
        """Note that a person did something about it: the waits become short again."""
        self._change_last(waits=0)

    def _change_last(self, **changes: Any) -> None:
        if self._runs:
            self._save(*self._runs[:-1], replace(self._runs[-1], **changes))

    def _save(self, *runs: Run) -> None:
        self._runs = runs[-KEPT:]
        if self._path is None:
            return
        content = {"format": _FORMAT, "boot": self._boot, "runs": [asdict(run) for run in self._runs]}
        try:
            write_atomically(self._path, json.dumps(content), may_write_over=True)
            self._is_lost = False
        except StateUnusable:
            self._is_lost = True  # the run itself will say what is wrong there; the next change is tried again


def _read(path: Path | None, boot: str | None) -> tuple[Run, ...]:
    if path is None or boot is None:
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["boot"] != boot:
            return ()
        return tuple(
            Run(float(run["began_s"]), End(run["end"]), str(run["reason"]), run["waits"]) for run in content["runs"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ()
