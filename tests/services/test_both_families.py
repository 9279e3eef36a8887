"""Loopback means IPv4 and IPv6: a client that is told localhost tries ::1 first on many computers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from daemon_process import WAIT_S
from emberd.core.errors import PortTaken
from emberd.host.instance import Instance
from emberd.host.listener import bind, has_ipv6_loopback
from engine_process import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

NEEDS_IPV6 = pytest.mark.skipif(not has_ipv6_loopback(), reason="this computer has no ::1")
ACTIVATE = shutil.which("systemd-socket-activate") or ""


def health(host: str, port: int) -> int:
    return httpx.get(f"http://{host}:{port}/emberd/healthz", timeout=WAIT_S, trust_env=False).status_code


@NEEDS_IPV6
def test_the_endpoint_is_reached_by_both_families_and_by_name(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    status = daemon.wait_ready()
    assert status["endpoints"] == [f"http://127.0.0.1:{daemon.port}", f"http://[::1]:{daemon.port}"]
    assert (status["endpoint"], status["endpoint_lacks"]) == (status["endpoints"][0], "")
    assert [health(host, daemon.port) for host in ("127.0.0.1", "[::1]", "localhost")] == [200, 200, 200]
    assert f"http://[::1]:{daemon.port}" in daemon.verb("status").stdout
    said = daemon.verb("restart", "--daemon")
    assert said.returncode == 0, said.stderr
    assert health("[::1]", daemon.port) == 200


@NEEDS_IPV6
def test_a_port_that_is_taken_for_ipv6_alone_is_told_and_does_not_stop_emberd(make_daemon: MakeDaemon):
    daemon = make_daemon()
    with bind("::1", daemon.port):
        daemon.start()
        status = daemon.wait_ready()
        assert status["endpoints"] == [f"http://127.0.0.1:{daemon.port}"]
        assert f"port {daemon.port} on ::1 is taken" in status["endpoint_lacks"]
        assert daemon.wait_event("endpoint_incomplete")["reason"] == status["endpoint_lacks"]
        assert "on ::1 is taken" in daemon.verb("status").stdout
        assert "ONE_FAMILY_TAKEN" in daemon.verb("doctor", "--json").stdout
        assert health("127.0.0.1", daemon.port) == 200


def test_a_port_that_is_taken_for_ipv4_is_taken():
    with bind("127.0.0.1", 0) as other, pytest.raises(PortTaken, match=r"on 127\.0\.0\.1 is taken"):
        Instance().listen("localhost", other.getsockname()[1])


@NEEDS_IPV6
def test_an_emberd_that_takes_over_one_socket_keeps_it_and_adds_the_other():
    """Clients may wait in the queue of the one that is there."""
    port = free_port()
    instance = Instance()
    instance.listen("127.0.0.1", port)
    instance.listeners.pop().close()  # as an older version has left it
    [old] = instance.listeners
    with socket.create_connection(("127.0.0.1", port), WAIT_S):
        instance.listen("127.0.0.1", port)
        assert instance.listeners[0] is old
        assert [each.family for each in instance.listeners] == [socket.AF_INET, socket.AF_INET6]
        old.settimeout(WAIT_S)
        old.accept()[0].close()
    instance.stop_listening()


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"),
    reason="needs a network namespace of its own",
)
def test_a_computer_without_ipv6_is_no_error():
    code = (
        "from emberd.host.instance import Instance; i = Instance(); i.listen('127.0.0.1', 15001);"
        "print(i.urls, repr(i.lacks))"
    )
    without = 'ip link set lo up && echo 1 >/proc/sys/net/ipv6/conf/lo/disable_ipv6 && exec "$@"'
    done = subprocess.run(
        [shutil.which("unshare") or "", "--net", "sh", "-c", without, "sh", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    if "unshare" in done.stderr or "sh:" in done.stderr:
        pytest.skip(f"no namespace without IPv6 can be made: {done.stderr.strip()}")
    assert done.stdout == "('http://127.0.0.1:15001',) ''\n", done.stderr


@NEEDS_IPV6
@pytest.mark.skipif(not ACTIVATE, reason="systemd-socket-activate is not installed")
def test_both_sockets_of_a_service_manager_are_served(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.write_settings()
    sockets = ["-l", f"[::1]:{daemon.port}", "-l", f"127.0.0.1:{daemon.port}"]
    with daemon.log.open("ab") as log:
        daemon.child = subprocess.Popen(
            [ACTIVATE, *sockets, "--setenv=PYTHONPATH", *daemon.command("run")],
            stdout=log,
            stderr=log,
            env={**os.environ, **daemon.environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    while b"Listening on" not in daemon.log.read_bytes():
        assert daemon.child.poll() is None
    assert health("[::1]", daemon.port) == 200
    status = daemon.wait_ready()
    assert status["endpoints"] == [f"http://127.0.0.1:{daemon.port}", f"http://[::1]:{daemon.port}"]
    assert health("127.0.0.1", daemon.port) == 200
