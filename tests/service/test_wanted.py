"""Labels, the limit of a stop, and what counts as stale."""

from __future__ import annotations

import pytest

from emberd.core.errors import ConfigError
from emberd.core.settings import LifecycleSettings
from emberd.service.unit import unit_name
from emberd.service.wanted import ServiceStatus, full_label, last_error, stop_limit_s


@pytest.mark.parametrize(
    ("name", "label", "unit"),
    [
        ("io.github.emberd", "io.github.emberd", "emberd"),
        ("small", "io.github.emberd.small", "emberd-small"),
        ("org.example.llm", "org.example.llm", "org.example.llm"),
    ],
)
def test_a_name_without_a_dot_is_an_instance(name: str, label: str, unit: str):
    assert full_label(name) == label
    assert unit_name(label) == unit


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", ".hidden", "x" * 200, "a\n", "%h"])
def test_a_name_that_could_not_name_a_file_is_refused(name: str):
    with pytest.raises(ConfigError):
        full_label(name)


def test_the_stop_limit_is_above_the_drain_and_the_engines_end():
    timing = LifecycleSettings()
    assert stop_limit_s(timing) == 65
    assert stop_limit_s(timing) > timing.drain_timeout_s + timing.stop_timeout_s


def test_the_last_error_for_a_person_is_found_among_the_logs_lines():
    assert last_error('{"event": "x"}\nemberd: one\nTry.\nemberd: two\nTry.\n') == "two"
    assert last_error('{"event": "emberd: no"}\n') == ""


def test_a_service_is_stale_only_if_it_is_installed():
    facts = {"files": (), "is_loaded": False, "is_running": False}
    assert ServiceStatus(**facts, is_installed=True, stale=("Label",)).is_stale
    assert ServiceStatus(**facts, is_installed=True, problems=("mode",)).is_stale
    assert not ServiceStatus(**facts, is_installed=False, stale=("Label",)).is_stale
    assert not ServiceStatus(**facts, is_installed=True).is_stale
