"""The catalogue of all conditions, and the one judgement of all facts. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core import health_engine, health_files, health_lock, health_memory, health_model, health_service
from emberd.core.health import Condition, Kind, Severity, rank, visible

if TYPE_CHECKING:
    from emberd.core.health_facts import Facts

_CAUSES = {**health_files.KINDS, **health_model.KINDS, **health_engine.KINDS}
_AFTER_ALL: dict[str, Kind] = {
    # Whatever keeps emberd from starting is the cause.
    "WAITS": Kind(
        Severity.ERROR,
        "emberd waits, because it could not start",
        tuple(code for code, kind in _CAUSES.items() if kind.severity is Severity.ERROR),
    ),
}
CATALOGUE: dict[str, Kind] = {
    **health_files.KINDS,
    **health_service.KINDS,
    **_AFTER_ALL,
    **health_model.KINDS,
    **health_engine.KINDS,
    **health_memory.KINDS,
    **health_lock.KINDS,
}


def diagnose(facts: Facts) -> list[Condition]:
    """Return all conditions, the worst first; none is hidden."""
    every = [
        *health_files.of_files(facts),
        *health_service.of_service(facts),
        *health_model.of_model(facts),
        *health_engine.of_engine(facts),
        *health_memory.of_memory(facts),
        *health_lock.of_lock(facts),
    ]
    return sorted(every, key=lambda each: rank(each.code, CATALOGUE))


def causes(facts: Facts) -> list[Condition]:
    """Return what to show: symptoms are left out beside their cause."""
    return visible(diagnose(facts), CATALOGUE)
