"""Where the log goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emberd.core.settings import LogSink


@dataclass(frozen=True, slots=True)
class Situation:
    """What a choice of places needs to know.

    Attributes:
        system: name of the host, `darwin` or `linux`.
        stderr_is_terminal: a person looks at it.
        stderr_is_journal: systemd has connected it to the journal ($JOURNAL_STREAM, systemd.exec(5)).
        stderr_is_launchds: launchd writes it to StandardErrorPath, which nobody rotates.
        has_system_log: there is one that takes lines.
    """

    system: str
    stderr_is_terminal: bool = False
    stderr_is_journal: bool = False
    stderr_is_launchds: bool = False
    has_system_log: bool = True


@dataclass(frozen=True, slots=True)
class Sinks:
    """The places; at least one is True."""

    stderr: bool = False
    system: bool = False
    file: bool = False

    def names(self) -> list[str]:
        """Return them as words, for people."""
        return [name for name in ("stderr", "system", "file") if getattr(self, name)]


def choose_sinks(asked: LogSink, now: Situation) -> Sinks:
    """Return where the log goes. A terminal always gets it: whoever starts emberd there wants to see it."""
    if asked == "stderr":
        return Sinks(stderr=True)
    if asked == "file":
        return Sinks(stderr=now.stderr_is_terminal, file=True)
    if asked == "system":
        return Sinks(now.stderr_is_terminal, system=now.has_system_log, file=not now.has_system_log)
    if now.system == "darwin":
        # A file, or a pipe, that launchd does not own was somebody's wish: `emberd run 2> log`.
        return Sinks(stderr=not now.stderr_is_launchds, system=now.has_system_log, file=True)
    if now.stderr_is_journal and now.has_system_log:
        return Sinks(system=True)  # standard error would be a second copy in the same journal
    return Sinks(stderr=True, file=not now.stderr_is_journal)
