"""What the environment asks of the stand-in: speed, version and misbehaviour.

=============================  ======================================================================
`STANDIN_VERSION`              personality: `1.76`, `1.104` (default), or `1.115.1`: as 1.104, but for its
                               counts in the log, `--parallelrequests`, `KCPP_PASSWORD`, and
                               `/v1/messages` and `/v1/responses`
`STANDIN_LOAD_SECONDS`         extra seconds of loading, default 0
`STANDIN_PROMPT_BASE_MS`       milliseconds before any prompt, default 5
`STANDIN_PROMPT_MS_PER_TOKEN`  milliseconds per prompt token that is not in the cache, default 1
`STANDIN_TOKEN_MS`             milliseconds per generated token, default 10
`STANDIN_REPLY_TOKENS`         natural length of a reply (end-of-text token), 0 = never ends by itself
`STANDIN_HANG`                 `requests`: every connection is accepted and never answered;
                               `generation`: generations never get on, everything else answers
`STANDIN_HANG_AFTER`           generations that still work before the hang, default 0
`STANDIN_HANG_CPU`             1: a hang burns a processor instead of sleeping
`STANDIN_CRASH_AT_START`       exit code or signal name, after the arguments were printed
`STANDIN_CRASH_AFTER_TOKENS`   crash in the middle of a generation, after this many tokens
`STANDIN_CRASH_WITH`           exit code or signal name of that crash, default SIGSEGV
`STANDIN_ONCE_FILE`            path: hang and crash switches work only in the process that creates it
`STANDIN_FINISHED_FILE`        path: gets a line, the digest of the prompt, for each reply that was sent to its end
`STANDIN_IGNORE_SIGTERM`       1: SIGTERM does nothing
`STANDIN_IGNORE_SIGINT`        1: SIGINT does nothing
`STANDIN_MLOCK_FAILS`          1: mlock is refused as if the limit were too low
`STANDIN_FROZEN`               1: needs a file in `$TMPDIR/_MEI......`, as the single-file binary does;
                               generations answer 500 when it has vanished (1.104 only)
`STANDIN_LIFETIME_SECONDS`     the process ends itself after this time, default 900, exit code 75
=============================  ======================================================================
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

OLD, NEW, BATCHING = "1.76", "1.104", "1.115.1"
"""The last can work on several requests at once, and then keeps no prompt (`--parallelrequests`)."""


@dataclass(frozen=True, slots=True)
class Switches:
    """The variables of the module docstring, parsed; times are in seconds."""

    version: str = NEW
    load_s: float = 0.0
    prompt_base_s: float = 0.005
    prompt_token_s: float = 0.001
    token_s: float = 0.01
    reply_tokens: int = 0
    hang: str = ""
    hang_after: int = 0
    hang_burns_cpu: bool = False
    crash_at_start: str = ""
    crash_after_tokens: int = 0
    crash_with: str = "SIGSEGV"
    once_file: Path | None = None
    finished_file: Path | None = None
    ignores_sigterm: bool = False
    ignores_sigint: bool = False
    mlock_fails: bool = False
    is_frozen: bool = False
    lifetime_s: float = 900.0

    @property
    def is_old(self) -> bool:
        """Whether this is the older personality."""
        return self.version == OLD

    @property
    def is_batching(self) -> bool:
        """Whether this is the newest personality."""
        return self.version == BATCHING

    def settled(self) -> Switches:
        """Return the switches for this run: without misbehaviour if another process has had its turn."""
        if self.once_file is None:
            return self
        try:
            self.once_file.touch(exist_ok=False)
        except FileExistsError:
            return replace(self, hang="", crash_at_start="", crash_after_tokens=0)
        return self


def read_switches(environment: Mapping[str, str]) -> Switches:
    """Parse the environment; a value that cannot be parsed is an error of the test and raises."""

    def text(name: str, default: str = "") -> str:
        return environment.get("STANDIN_" + name) or default

    def seconds(name: str, default_ms: str) -> float:
        return float(text(name, default_ms)) / 1000

    version = text("VERSION", NEW)
    if version not in {OLD, NEW, BATCHING}:
        raise SystemExit(f"STANDIN_VERSION must be {OLD}, {NEW} or {BATCHING}, not {version}")
    once_file, finished_file = text("ONCE_FILE"), text("FINISHED_FILE")
    return Switches(
        version=version,
        load_s=float(text("LOAD_SECONDS", "0")),
        prompt_base_s=seconds("PROMPT_BASE_MS", "5"),
        prompt_token_s=seconds("PROMPT_MS_PER_TOKEN", "1"),
        token_s=seconds("TOKEN_MS", "10"),
        reply_tokens=int(text("REPLY_TOKENS", "0")),
        hang=text("HANG"),
        hang_after=int(text("HANG_AFTER", "0")),
        hang_burns_cpu=text("HANG_CPU") == "1",
        crash_at_start=text("CRASH_AT_START"),
        crash_after_tokens=int(text("CRASH_AFTER_TOKENS", "0")),
        crash_with=text("CRASH_WITH", "SIGSEGV"),
        once_file=Path(once_file) if once_file else None,
        finished_file=Path(finished_file) if finished_file else None,
        ignores_sigterm=text("IGNORE_SIGTERM") == "1",
        ignores_sigint=text("IGNORE_SIGINT") == "1",
        mlock_fails=text("MLOCK_FAILS") == "1",
        is_frozen=text("FROZEN") == "1" and version == NEW,
        lifetime_s=float(text("LIFETIME_SECONDS", "900")),
    )


def die(how: str) -> None:
    """End the process at once: by a signal name such as `SIGSEGV`, or by an exit code."""
    if how.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[how])
        signal.pause()
    os._exit(int(how))
