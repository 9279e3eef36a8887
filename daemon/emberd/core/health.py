"""What is wrong, and what to do about it: from facts to coded conditions. Pure.

A condition has a code that does not change, so that a page and a script can name it. A symptom is not shown beside
its cause: `hidden_by` names the causes. A fact that is not known makes no condition.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Severity(Enum):
    """How much it matters."""

    ERROR = "error"
    """There is no model, or no endpoint."""
    WARNING = "warning"
    """The model is or will be cold, slow or unprotected."""
    NOTE = "note"
    """Worth knowing; nothing has to be done."""


_ORDER = tuple(Severity)
PAGE = "docs/doctor.md"


@dataclass(frozen=True, slots=True)
class Kind:
    """What does not change from case to case.

    Attributes:
        severity: how much it matters.
        title: what is wrong, in a few words.
        hidden_by: codes of causes beside which it is not shown.
    """

    severity: Severity
    title: str
    hidden_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that is wrong here and now.

    Attributes:
        code: its name in the catalogue.
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


def visible(found: Iterable[Condition], catalogue: dict[str, Kind]) -> list[Condition]:
    """Return the conditions whose cause is not among them, the worst first, then in the catalogue's order."""
    conditions = list(found)
    codes = {each.code for each in conditions}
    shown = [each for each in conditions if not codes.intersection(catalogue[each.code].hidden_by)]
    return sorted(shown, key=lambda each: rank(each.code, catalogue))


def rank(code: str, catalogue: dict[str, Kind]) -> tuple[int, int]:
    """Return what conditions are sorted by."""
    return _ORDER.index(catalogue[code].severity), list(catalogue).index(code)


def when(is_so: bool | None, code: str, evidence: str, remedy: str = "") -> Iterator[Condition]:  # noqa: FBT001  # reads as a sentence
    """Yield the condition if it is so; unknown is not."""
    if is_so:
        yield Condition(code, evidence, remedy)
