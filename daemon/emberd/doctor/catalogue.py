"""All conditions, and the one judgement of all facts. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emberd.doctor import rules_daemon, rules_engine, rules_memory
from emberd.doctor.condition import Condition, Severity

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emberd.doctor.facts import Facts

CATALOGUE = {**rules_daemon.KINDS, **rules_engine.KINDS, **rules_memory.KINDS}
_RANKS = {code: (list(Severity).index(kind.severity), n) for n, (code, kind) in enumerate(CATALOGUE.items())}


def diagnose(facts: Facts) -> list[Condition]:
    """Return all conditions, the worst first, then in the catalogue's order; none is hidden."""
    return _sorted(Condition(code, *seen) for code, kind in CATALOGUE.items() for seen in kind.rule(facts))


def visible(found: Iterable[Condition]) -> list[Condition]:
    """Return the conditions to show, the worst first, without symptoms beside their causes."""
    conditions = list(found)
    codes = {each.code for each in conditions}
    return _sorted(each for each in conditions if not codes.intersection(CATALOGUE[each.code].hidden_by))


def describe(condition: Condition) -> dict[str, Any]:
    """Return a condition with its title, severity and page, as plain values."""
    kind = CATALOGUE[condition.code]
    return {
        "code": condition.code,
        "severity": kind.severity.value,
        "title": kind.title,
        "evidence": condition.evidence,
        "remedy": condition.remedy,
        "page": condition.page,
    }


def _sorted(found: Iterable[Condition]) -> list[Condition]:
    return sorted(found, key=lambda each: _RANKS[each.code])
