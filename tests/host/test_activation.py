"""Listening sockets that somebody else made: as systemd gives them, as launchd does, and what is none."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from emberd.core.errors import ConfigError
from emberd.host.activation import from_launchd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from darwin_standin import DarwinStandin

TELL = """
import os, socket, sys
os.environ["LISTEN_PID"] = sys.argv[1] or str(os.getpid())
from emberd.core.errors import ConfigError
from emberd.host import ThisHost
try:
    found = ThisHost().given_sockets()
except ConfigError as error:
    print("refused:", error.message)
else:
    again = ThisHost().given_sockets()
    print([each.getsockname()[1] for each in found], again, [each.get_inheritable() for each in found],
          "LISTEN_FDS" in os.environ)
"""


def told(*given: socket.socket | int, count: str | None = None, pid: str = "") -> str:
    """Run a process that is given descriptors from 3 on, and return what it says of them."""
    descriptors = [each if isinstance(each, int) else each.fileno() for each in given]

    def place() -> None:
        copies = [os.dup(each) for each in descriptors]
        copies = [os.dup2(each, 50 + number) for number, each in enumerate(copies)]
        for number, each in enumerate(copies):
            os.dup2(each, 3 + number)

    return subprocess.run(
        [sys.executable, "-c", TELL, pid],
        env={**os.environ, "LISTEN_FDS": str(len(given)) if count is None else count, "LISTEN_FDNAMES": "x"},
        preexec_fn=place,  # descriptors have to be in their places before the program runs
        close_fds=False,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()


@pytest.fixture
def listeners() -> Iterator[list[socket.socket]]:
    made = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    yield made
    for each in made:
        each.close()


def test_sockets_of_the_service_manager_are_taken_once_and_not_passed_on(listeners: list[socket.socket]):
    ports = [each.getsockname()[1] for each in listeners]
    assert told(*listeners) == f"{ports} [] [False, False] False"


def test_sockets_for_another_process_are_nobodys(listeners: list[socket.socket]):
    assert told(*listeners, pid="1") == "[] [] [] False"


@pytest.mark.parametrize("count", ["", "two", "-1"])
def test_a_count_that_is_none_gives_nothing(listeners: list[socket.socket], count: str):
    assert told(*listeners, count=count) == "[] [] [] False"


def test_what_is_no_listening_tcp_socket_is_refused_by_its_number(listeners: list[socket.socket]):
    with socket.socket() as idle, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        for other in (idle, datagrams):
            assert (
                told(listeners[0], other)
                == "refused: descriptor 4, given for listening, is no listening TCP socket"
            )
    reader, writer = os.pipe()
    assert told(reader).startswith("refused: descriptor 3, given for listening, is no socket")
    os.close(reader)
    os.close(writer)


def test_launchd_gives_its_sockets_by_name(macos: DarwinStandin, listeners: list[socket.socket]):
    copies = [os.dup(each.fileno()) for each in listeners]
    macos.launchd(*copies)
    found = from_launchd(macos.library)
    assert [each.getsockname() for each in found] == [each.getsockname() for each in listeners]
    with pytest.raises(ConfigError, match="already in progress"):
        from_launchd(macos.library)
    for each in found:
        each.close()


@pytest.mark.parametrize("error", [errno.ENOENT, errno.ESRCH])
def test_without_launchd_or_without_such_a_name_there_are_none(macos: DarwinStandin, error: int):
    macos.launchd(error=error)
    assert from_launchd(macos.library) == []
