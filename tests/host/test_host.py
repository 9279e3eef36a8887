"""This computer: the same promises on Linux, and on macOS through stand-ins."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import kqueue_standin
import pytest

from emberd.core.errors import ModelError, StateUnusable
from emberd.host import ThisHost, darwin
from emberd.host.darwin import DarwinHost
from emberd.host.files import make_private_folder, write_atomically
from emberd.host.linux import LinuxHost
from emberd.host.model_file import check_model
from emberd.host.paths import StatePaths

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_S = 20


@pytest.fixture(params=["linux", "darwin"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LinuxHost | DarwinHost:
    if request.param == "darwin":
        monkeypatch.setattr(darwin, "_kqueue", kqueue_standin)
        return DarwinHost()
    return LinuxHost()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        yield process
        process.kill()


async def test_the_end_of_a_process_wakes_the_watcher(
    host: LinuxHost | DarwinHost, sleeper: subprocess.Popen[bytes]
):
    watch = host.watch_exit(sleeper.pid)
    waiting = asyncio.create_task(watch.wait())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await asyncio.shield(waiting)
    sleeper.send_signal(signal.SIGKILL)
    async with asyncio.timeout(LIMIT_S):
        await waiting
    watch.close()
    watch.close()


def test_a_process_that_is_gone_cannot_be_watched(host: LinuxHost | DarwinHost, sleeper: subprocess.Popen[bytes]):
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(ProcessLookupError):
        host.watch_exit(sleeper.pid)
    assert host.start_token(sleeper.pid) is None


async def test_closing_a_watch_ends_its_waiter(host: LinuxHost | DarwinHost, sleeper: subprocess.Popen[bytes]):
    watch = host.watch_exit(sleeper.pid)
    waiting = asyncio.create_task(watch.wait())
    await asyncio.sleep(0)
    watch.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_each_write_to_a_file_wakes_the_watcher(host: LinuxHost | DarwinHost, tmp_path: Path):
    path = tmp_path / "log"
    path.touch()
    watch = host.watch_file(path)
    with path.open("a") as writer:
        for line in ("one\n", "two\n"):
            writer.write(line)
            writer.flush()
            async with asyncio.timeout(LIMIT_S):
                await watch.wait()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await watch.wait()
    watch.close()


def test_a_missing_file_cannot_be_watched_and_leaks_nothing(host: LinuxHost | DarwinHost, tmp_path: Path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        with pytest.raises(OSError, match="No such file"):
            host.watch_file(tmp_path / "missing")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_a_watch_for_stalls_wakes_after_the_longest_time_again_and_again():
    watch = LinuxHost().watch_stalls(1)
    if watch is None:
        pytest.skip("no pressure/memory to be asked here")
    async with asyncio.timeout(LIMIT_S):
        for _ in range(5):  # a stall that another test makes wakes it, too
            began_s = time.monotonic()
            await watch.wait()
            await watch.wait()
            if time.monotonic() - began_s > 1.5:
                break
        else:
            raise AssertionError("the first time must have been taken off the descriptor")
    watch.close()
    watch.close()


def test_a_kernel_that_tells_of_no_stalls_is_looked_at_instead_and_leaks_nothing(tmp_path: Path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        assert LinuxHost(proc=tmp_path).watch_stalls(1) is None
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_start_token_tells_processes_apart(host: LinuxHost | DarwinHost, sleeper: subprocess.Popen[bytes]):
    own, other = host.start_token(os.getpid()), host.start_token(sleeper.pid)
    assert own == host.start_token(os.getpid())
    assert own
    assert other
    assert own != other


def test_listening_ports_of_a_process_are_told(host: LinuxHost | DarwinHost):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ports = host.listeners([os.getpid()])
        assert ports is not None
        assert listener.getsockname()[1] in ports
    assert host.listeners([]) is None


def test_the_metal_keep_alive_goes_into_the_engines_environment_on_macos_only():
    assert DarwinHost().engine_environment(77) == {"GGML_METAL_RESIDENCY_KEEP_ALIVE_S": "77"}
    assert LinuxHost().engine_environment(77) == {}


def test_the_platform_branch_picks_this_system():
    assert ThisHost().name == sys.platform


# --- files --------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_private(tmp_path: Path):
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_a_full_disk_loses_nothing_and_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "state.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateUnusable, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_a_state_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StateUnusable, match="cannot use the state directory"):
        make_private_folder(tmp_path / "file" / "state")


def test_a_long_state_folder_keeps_its_socket_within_the_kernels_limit(tmp_path: Path):
    long = StatePaths(tmp_path / ("x" * 120))
    other = StatePaths(tmp_path / ("y" * 120))
    assert len(os.fsencode(long.control)) <= 100
    assert long.control != other.control
    assert long.control.parent.name == f"emberd-{os.geteuid()}"


def test_a_model_is_opened_and_not_only_looked_at(tmp_path: Path):
    short = tmp_path / "short.gguf"
    short.write_bytes(b"GGUF\x03")
    with pytest.raises(ModelError, match="truncated"):
        check_model(str(short))
    page = tmp_path / "page.gguf"
    page.write_bytes(b"<!DOCTYPE html><html><body>")
    with pytest.raises(ModelError, match="not a GGUF"):
        check_model(str(page))


@pytest.mark.parametrize(
    ("number", "system", "words"),
    [(1, "darwin", "Full Disk Access"), (13, "darwin", "chmod"), (1, "linux", "chmod")],
)
def test_a_refused_model_tells_privacy_from_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, system: str, words: str
):
    """macOS refuses protected folders with EPERM, file permissions give EACCES."""

    def refuse(*_: object) -> None:
        raise PermissionError(number, os.strerror(number))

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(ModelError) as refused:
        check_model(str(tmp_path / "model.gguf"))
    assert words in refused.value.remedy
