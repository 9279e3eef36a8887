"""Where the log goes."""

from __future__ import annotations

import pytest

from emberd.core.log_sinks import Sinks, Situation, choose_sinks


@pytest.mark.parametrize(
    ("asked", "now", "sinks"),
    [
        ("auto", Situation("linux", stderr_is_journal=True), Sinks(system=True)),
        ("auto", Situation("linux", stderr_is_terminal=True), Sinks(stderr=True, file=True)),
        ("auto", Situation("linux"), Sinks(stderr=True, file=True)),
        ("auto", Situation("linux", stderr_is_journal=True, has_system_log=False), Sinks(stderr=True)),
        ("auto", Situation("darwin", stderr_is_launchds=True), Sinks(system=True, file=True)),
        ("auto", Situation("darwin", stderr_is_terminal=True), Sinks(stderr=True, system=True, file=True)),
        ("auto", Situation("darwin", stderr_is_launchds=True, has_system_log=False), Sinks(file=True)),
        ("stderr", Situation("darwin", stderr_is_launchds=True), Sinks(stderr=True)),
        ("file", Situation("linux", stderr_is_journal=True), Sinks(file=True)),
        ("file", Situation("linux", stderr_is_terminal=True), Sinks(stderr=True, file=True)),
        ("system", Situation("linux"), Sinks(system=True)),
        ("system", Situation("linux", has_system_log=False), Sinks(file=True)),
    ],
)
def test_the_log_goes_where_it_can_be_found_and_not_twice(asked: str, now: Situation, sinks: Sinks):
    assert choose_sinks(asked, now) == sinks  # type: ignore[arg-type]
    assert sinks.names()
