"""The datagrams of sd_notify(3), on real sockets."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from emberd.host.notify_socket import NotifySocket, in_usec

if TYPE_CHECKING:
    from pathlib import Path

SYSTEMD_NOTIFY = shutil.which("systemd-notify") or ""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract names")


def listening(address: str | bytes) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(address)
    listener.settimeout(5)
    return listener


def test_assignments_go_as_lines_of_one_datagram_to_a_path(tmp_path: Path):
    with listening(str(tmp_path / "notify")) as manager:
        notify = NotifySocket({"NOTIFY_SOCKET": str(tmp_path / "notify")}, 1)
        assert notify.is_there
        assert notify.tell("RELOADING=1", f"MONOTONIC_USEC={in_usec(1.5)}")
        assert manager.recv(1000) == b"RELOADING=1\nMONOTONIC_USEC=1500000"
        notify.close()
        assert notify.tell("READY=1"), "the next word opens it again"
        assert manager.recv(1000) == b"READY=1"
        notify.close()


@on_linux
def test_an_abstract_name_stands_behind_an_at_sign():
    name = f"emberd-test-{os.getpid()}"
    with listening(b"\0" + name.encode()) as manager:
        notify = NotifySocket({"NOTIFY_SOCKET": f"@{name}"}, 1)
        assert notify.tell("READY=1")
        assert manager.recv(1000) == b"READY=1"
        notify.close()


@pytest.mark.parametrize("name", ["", "@", "vsock:2:1234", "relative"])
def test_nothing_is_said_where_nobody_listens(name: str):
    notify = NotifySocket({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"}, 1)
    assert (notify.is_there, notify.watchdog_s, notify.tell("READY=1")) == (False, None, False)


def test_a_manager_that_went_away_is_no_error(tmp_path: Path):
    notify = NotifySocket({"NOTIFY_SOCKET": str(tmp_path / "gone")}, 1)
    assert notify.tell("READY=1") is False
    notify.close()


def test_a_manager_that_does_not_read_holds_nobody_up(tmp_path: Path):
    with listening(str(tmp_path / "notify")):
        notify = NotifySocket({"NOTIFY_SOCKET": str(tmp_path / "notify")}, 1)
        sent = 0
        while notify.tell("STATUS=" + "x" * 2000):
            sent += 1
            assert sent < 100_000
        notify.close()


@pytest.mark.parametrize(
    ("usec", "meant", "expected"),
    [
        ("30000000", "77", 30.0),
        ("30000000", "", 30.0),
        ("30000000", "78", None),
        ("0", "77", None),
        ("", "", None),
        ("soon", "77", None),
        ("-5", "77", None),
    ],
)
def test_the_watchdog_is_for_the_process_that_is_named(usec: str, meant: str, expected: float | None):
    environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": usec, "WATCHDOG_PID": meant}
    assert NotifySocket(environment, 77).watchdog_s == expected


@pytest.mark.skipif(not SYSTEMD_NOTIFY, reason="systemd-notify is not installed")
def test_it_says_what_systemd_notify_says(tmp_path: Path):
    with listening(str(tmp_path / "notify")) as manager:
        subprocess.run(
            [SYSTEMD_NOTIFY, "--no-block", "--ready", "--status=engine READY"],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            check=True,
            timeout=20,
        )
        theirs = manager.recv(1000).decode().splitlines()
        notify = NotifySocket({"NOTIFY_SOCKET": str(tmp_path / "notify")}, 1)
        notify.tell("READY=1", "STATUS=engine READY")
        ours = manager.recv(1000).decode().splitlines()
        notify.close()
    assert set(ours) <= set(theirs)
