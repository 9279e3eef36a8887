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

from emberd.core.engine_files import NamedFile, Role
from emberd.core.errors import ConfigError, ModelError, StateUnusable
from emberd.host import ThisHost, darwin
from emberd.host.darwin import DarwinHost
from emberd.host.files import make_private_folder, write_atomically
from emberd.host.linux import LinuxHost
from emberd.host.model_file import check_files, check_model, look_up
from emberd.host.paths import StatePaths
from synthetic_gguf import write_gguf

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


def test_a_split_model_is_named_by_its_first_part_and_is_whole(tmp_path: Path):
    parts = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts[:2]:
        write_gguf(part)
    with pytest.raises(ModelError, match=r"part 2 of 3") as later:
        check_model(str(parts[1]))
    assert "m-00001-of-00003.gguf" in later.value.remedy
    with pytest.raises(ModelError, match=r"3 parts, and 1 are missing in .*: m-00003-of-00003"):
        check_model(str(parts[0]))
    parts[2].symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(ModelError) as broken:
        check_model(str(parts[0]))
    assert "link" in broken.value.remedy


def test_the_linked_parts_of_a_download_cache_are_a_model(tmp_path: Path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    for number in (1, 2):
        write_gguf(blobs / f"4a{number}")
        (snapshot / f"m-0000{number}-of-00002.gguf").symlink_to(blobs / f"4a{number}")
    first = snapshot / "m-00001-of-00002.gguf"
    assert check_model(str(first)) == first
    seen = look_up([NamedFile(str(first), Role.MODEL)])
    assert [each.real_path for each in seen] == [str(blobs / "4a1"), str(blobs / "4a2")]


@pytest.mark.parametrize(
    ("kind", "architecture", "words"),
    [
        ("adapter", "llama", "an adapter"),
        ("mmproj", "clip", "a projector"),
        ("model", "clip", "a projector"),
        ("imatrix", "llama", "an importance matrix"),
    ],
)
def test_what_goes_with_a_model_is_not_taken_for_one(tmp_path: Path, kind: str, architecture: str, words: str):
    path = write_gguf(tmp_path / "companion.gguf", kind=kind, architecture=architecture).path
    with pytest.raises(ModelError, match=f"not a model, but {words}"):
        check_model(str(path))
    assert check_model(str(write_gguf(tmp_path / "model.gguf").path))


def test_every_missing_file_of_an_option_is_named_at_once(tmp_path: Path):
    there = tmp_path / "there.gguf"
    there.write_text("x")
    files = [
        NamedFile(str(there), Role.PROJECTOR, "--mmproj"),
        NamedFile(str(tmp_path / "gone.gguf"), Role.DRAFT, "--draftmodel"),
        NamedFile(str(tmp_path), Role.ADAPTER, "--lora"),
        NamedFile(str(tmp_path), Role.IMAGE, "--sdlora"),
        NamedFile("https://example.org/w.bin", Role.SPEECH, "--whispermodel"),
        NamedFile(str(tmp_path), Role.FOLDER, "--media-path"),
        NamedFile(str(there), Role.FOLDER, "--slot-save-path"),
        NamedFile(str(tmp_path / "none"), Role.FOLDER, "--path"),
        NamedFile(str(tmp_path / "g"), Role.TEXT, "--grammar-file"),
    ]
    with pytest.raises(ConfigError) as refused:
        check_files(files, "engine.extra_args")
    assert refused.value.message == (
        f"--draftmodel {tmp_path / 'gone.gguf'}: not found; --lora {tmp_path}: Is a directory; "
        f"--slot-save-path {there}: Not a directory; --path {tmp_path / 'none'}: not found; "
        f"--grammar-file {tmp_path / 'g'}: not found"
    )
    check_files(files[:1], "engine.extra_args")


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
