"""The owner's .kcpps file, without what is decided elsewhere.

KoboldCPP lets a key of the file win over the command line unless the exact word `--key` stands there (tested
with 1.76 and 1.104): `--contextsize=1024`, `-c 1024` and `--mlock` lose to it. A key that is not in the file
cannot win, so emberd takes out every key that its settings or the owner's arguments decide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.errors import ConfigError
from emberd.core.types import Notice
from emberd.engine.koboldcpp_rules import (
    ARGUMENTS,
    FILE,
    OWNERS_BUSINESS,
    RIVALS,
    RULES,
    SECRETS,
    Act,
    is_same,
    is_wish,
    say,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emberd.engine.koboldcpp_help import Build, Given

    Decided = Mapping[str, tuple[str, object]]
    """Destination -> name of the setting that decides it, value."""


def model_of_file(file: Mapping[str, object]) -> str | None:
    """Return the model that KoboldCPP would load from this file; the order is its own."""
    for key in ("model_param", "model"):
        value = file.get(key)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, str) and first:
            return first
    return None


def merge(
    build: Build, file: Mapping[str, object], kept: Sequence[Given], decided: Decided
) -> tuple[dict[str, object], list[Notice]]:
    """Return the owner's file without the keys that are decided elsewhere, and what to say about them.

    Raises:
        ConfigError: a key is refused.
    """
    merged: dict[str, object] = {}
    notices: list[Notice] = []
    for key, value in file.items():
        dest = build.destination_of_key(key)
        is_meant = is_wish(dest, value)
        winner = _winner(dest, kept, decided)
        if winner:
            who, chosen = winner
            if is_meant and not is_same(value, chosen):
                notices.append(conflict(key, value, who))
            continue
        rule = RULES.get(dest, OWNERS_BUSINESS)
        if is_meant and rule.concerns(value):
            if rule.in_file is Act.REFUSE:
                raise ConfigError(f'"{key}" in {FILE} is not possible. {rule.text}', rule.remedy)
            notices += say(f'"{key}" in {FILE}', rule.in_file, rule.code, rule.text)
        if rule.in_file not in {Act.DROP, Act.REPLACE}:
            merged[key] = value
    return merged, notices


def _winner(dest: str, kept: Sequence[Given], decided: Decided) -> tuple[str, object] | None:
    """Return who decides an option over the file, and on which value; None if nobody does."""
    if dest in decided:
        setting, chosen = decided[dest]
        return f"{setting} ({shown(chosen)})", chosen
    rivals = next((group for group in RIVALS if dest in group), frozenset({dest}))
    given = next((given for given in reversed(kept) if given.dest in rivals), None)
    if given is None:
        return None
    value = given.value if given.dest == dest else None
    what = f" ({shown(value)})" if given.values and dest not in SECRETS else ""
    return f"{given.spelling}{what} in {ARGUMENTS}", value


def conflict(key: str, value: object, winner: str) -> Notice:
    """Name a key of the file that loses; a password's value stays unnamed."""
    was = "" if key in SECRETS else f" is {shown(value)}"
    return Notice("kcpps_conflict", f'"{key}"{was} in {FILE}, but {winner} decides.')
