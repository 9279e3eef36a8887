"""Who started emberd: the variables that launchd and systemd set, and the places where others inherit them."""

from __future__ import annotations

import pytest

from emberd.core.managed import Manager, find_manager


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"XPC_SERVICE_NAME": "io.github.emberd"}, Manager.LAUNCHD),
        ({"XPC_SERVICE_NAME": "0"}, None),
        ({"XPC_SERVICE_NAME": "application.com.apple.Terminal.1152921500311879701"}, None),
        ({"INVOCATION_ID": "4a1d"}, Manager.SYSTEMD),
        ({"INVOCATION_ID": "4a1d", "SYSTEMD_EXEC_PID": "77"}, Manager.SYSTEMD),
        ({"INVOCATION_ID": "4a1d", "SYSTEMD_EXEC_PID": "76"}, None),
        ({"NOTIFY_SOCKET": "/run/user/1000/systemd/notify"}, Manager.SYSTEMD),
    ],
)
def test_the_environment_tells_who_started_emberd(environment: dict[str, str], expected: Manager | None):
    assert find_manager(environment, 77, has_terminal=False) is expected


def test_what_has_a_terminal_was_started_by_a_person():
    assert find_manager({"XPC_SERVICE_NAME": "io.github.emberd"}, 77, has_terminal=True) is None
