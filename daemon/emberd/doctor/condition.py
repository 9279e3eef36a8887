"""Conditions. Each is written once: its row as a decorator, and below it the rule that finds it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emberd.doctor.facts import Facts

    Seen = Iterator[tuple[str, str]]
    """What was seen, with figures, and what to do: a command where there is one, empty if nothing can be done."""
    Rule = Callable[[Facts], Seen]

PAGE = "docs/doctor.md"


class Severity(Enum):
    """How much it matters."""

    ERROR = "error"
    """There is no model, or no endpoint."""
    WARNING = "warning"
    """The model is or will be cold, slow or unprotected."""
    NOTE = "note"
    """Worth knowing; nothing has to be done."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The fixed part of a condition.

    Attributes:
        severity: how much it matters.
        title: what is wrong, in a few words.
        hidden_by: codes of causes; beside these it is not shown.
        rule: yields nothing if the condition is not met, or if a fact that it needs is unknown.
    """

    severity: Severity
    title: str
    hidden_by: tuple[str, ...]
    rule: Rule


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that is wrong here and now.

    Attributes:
        code: its name in the catalogue; never changes, so that pages and scripts can use it.
        evidence: what was seen, with figures.
        remedy: what to do, a command where there is one; empty if nothing can be done.
    """

    code: str
    evidence: str
    remedy: str = ""

    @property
    def page(self) -> str:
        """Where the documentation explains it."""
        return f"{PAGE}#{self.code.lower()}"


class Kinds(dict[str, Kind]):
    """Conditions of one subject by code, in the order in which they are shown; `error` and so on declare one."""

    def __init__(self) -> None:
        super().__init__()
        self.error, self.warning, self.note = (partial(self._declare, severity) for severity in Severity)

    @property
    def errors(self) -> tuple[str, ...]:
        """Codes of the errors declared so far."""
        return tuple(code for code, kind in self.items() if kind.severity is Severity.ERROR)

    def _declare(
        self, severity: Severity, code: str, title: str, hidden_by: tuple[str, ...] = ()
    ) -> Callable[[Rule], Rule]:
        def declare(rule: Rule) -> Rule:
            self[code] = Kind(severity, title, hidden_by, rule)
            return rule

        return declare
