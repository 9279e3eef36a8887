"""The toucher: a real process on real files, its counts beside vmtouch's, its deaths provoked."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from emberd.core.residency import SAMPLED_PAGES, Source, from_pages
from emberd.host import ThisHost, toucher_process
from emberd.host.toucher import Toucher, ToucherLost, ToucherRefused
from page_cache import MIB, evict, on_linux, read, vmtouch_pages, with_vmtouch, write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

PAGE_BYTES = toucher_process.PAGE_BYTES
PAGING = ThisHost.paging
NOBODY = 65534
CACHESTAT = 451

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
async def toucher() -> AsyncIterator[Toucher]:
    """A toucher without files."""
    made = Toucher(PAGING)
    yield made
    await made.close()


@on_linux
@with_vmtouch
async def test_an_exact_count_is_vmtouch_s_count(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", 40 * MIB + 12_345)
    evict(path)
    read(path, 7 * MIB, 10 * MIB)
    toucher.use([path])
    source, page_bytes, ((resident, total),) = await toucher.count()
    theirs, their_total = vmtouch_pages(path)
    _, _, ((resident_later, _),) = await toucher.count()
    assert resident >= theirs >= resident_later, "the kernel may reclaim meanwhile"
    assert total == their_total
    assert source is Source.MINCORE
    assert page_bytes == PAGE_BYTES
    assert 9 * MIB // PAGE_BYTES <= resident < total


@on_linux
async def test_stretches_are_counted_by_the_pages_that_they_lie_in(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", 8 * MIB)
    evict(path)
    read(path, 2 * MIB, MIB)
    toucher.use([path])
    spans = [
        (0, 0, 8 * MIB),
        (0, 2 * MIB, MIB),
        (0, 2 * MIB + 1, 10),
        (0, 2 * MIB - 1, 2),
        (0, 7 * MIB, MIB),
        (0, 7 * MIB, 99 * MIB),
        (0, 99 * MIB, MIB),
        (0, 3, 0),
    ]
    _, _, counts = await toucher.count(spans)
    pages = MIB // PAGE_BYTES
    assert counts == [
        (pages, 8 * pages),
        (pages, pages),
        (1, 1),
        (1, 2),
        (0, pages),
        (0, pages),
        (0, 0),
        (0, 0),
    ]


@on_linux
async def test_all_parts_of_a_split_model_are_counted_and_touched(toucher: Toucher, tmp_path: Path):
    paths = [write(tmp_path / name, 3 * MIB) for name in ("one", "two", "three")]
    for path in paths:
        evict(path)
    read(paths[1], 0, 3 * MIB)
    toucher.use(paths)
    pages = 3 * MIB // PAGE_BYTES
    _, _, counts = await toucher.count()
    assert counts == [(0, pages), (pages, pages), (0, pages)]
    touched = await toucher.touch()
    assert touched.is_complete
    assert touched.cold_bytes == 6 * MIB
    _, _, counts = await toucher.count()
    assert counts == [(pages, pages)] * 3


@on_linux
async def test_a_sample_s_bounds_hold_the_exact_share(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", 32 * MIB)
    evict(path)
    read(path, 0, 24 * MIB)
    toucher.use([path])
    sample = await toucher.sample(SAMPLED_PAGES)
    assert sample.looked_at == SAMPLED_PAGES
    assert sample.total == 32 * MIB // PAGE_BYTES
    seen = from_pages(sample)
    assert seen.at_least is not None
    assert seen.at_most is not None
    # One page in each of 192 equal stretches, 144 of them resident: only the stretch on the edge can vary.
    assert seen.at_least <= 0.75 <= seen.at_most
    assert abs(sample.resident - SAMPLED_PAGES * 3 // 4) <= 1


async def test_a_sample_of_a_small_file_looks_at_every_page(toucher: Toucher, tmp_path: Path):
    toucher.use([write(tmp_path / "file", 5 * PAGE_BYTES)])
    sample = await toucher.sample(SAMPLED_PAGES)
    assert sample.is_exact
    assert sample.looked_at == 5


@on_linux
async def test_touching_brings_cold_pages_in_and_says_how_many(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", 48 * MIB)
    evict(path)
    read(path, 20 * MIB, 8 * MIB)
    toucher.use([path])
    seen: list[tuple[int, int]] = []
    touched = await toucher.touch(lambda done, total: seen.append((done, total)))
    assert touched.is_complete
    assert touched.cold_bytes == 40 * MIB
    assert touched.done_bytes == touched.total_bytes == 48 * MIB
    assert seen == sorted(seen)
    _, _, counts = await toucher.count()
    assert counts[0][0] == counts[0][1]
    assert (await toucher.touch()).cold_bytes == 0


@on_linux
async def test_only_the_named_stretches_are_touched(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", 64 * MIB)
    evict(path)
    toucher.use([path])
    touched = await toucher.touch(spans=[(0, 40 * MIB, 4 * MIB)])
    assert touched.total_bytes == touched.cold_bytes == 4 * MIB
    _, _, counts = await toucher.count([(0, 40 * MIB, 4 * MIB), (0, 0, 30 * MIB)])
    assert counts[0][0] == counts[0][1]
    assert counts[1][0] == 0


@on_linux
@with_vmtouch
async def test_touched_pages_stay_when_the_cache_is_dropped_for_they_are_mapped(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", 8 * MIB)
    toucher.use([path])
    await toucher.touch()
    evict(path)
    assert vmtouch_pages(path)[0] == 8 * MIB // PAGE_BYTES
    await toucher.close()
    evict(path)
    assert vmtouch_pages(path)[0] == 0


def sparse(path: Path, size: int) -> Path:
    """Make a file of holes, which takes no disk."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


async def test_a_touch_that_is_stopped_says_how_far_it_came(toucher: Toucher, tmp_path: Path):
    toucher.use([sparse(tmp_path / "file", 64 << 30)])
    touched = await toucher.touch(lambda *_: toucher.stop())
    assert not touched.is_complete
    assert 0 < touched.done_bytes < touched.total_bytes
    assert (await toucher.sample(8)).looked_at == 8


async def test_a_touch_that_is_cancelled_leaves_the_toucher_usable(toucher: Toucher, tmp_path: Path):
    toucher.use([sparse(tmp_path / "file", 64 << 30)])
    began = asyncio.Event()
    touching = asyncio.create_task(toucher.touch(lambda *_: began.set()))
    await began.wait()
    touching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await touching
    pid = toucher.pid
    assert (await toucher.sample(8)).looked_at == 8
    assert toucher.pid == pid


async def test_a_stop_with_nothing_to_stop_is_nothing(toucher: Toucher, tmp_path: Path):
    toucher.stop()
    toucher.use([write(tmp_path / "file", MIB)])
    assert (await toucher.touch()).is_complete
    toucher.stop()
    assert (await toucher.touch()).is_complete


async def test_a_command_that_comes_during_a_touch_waits_for_it(toucher: Toucher, tmp_path: Path):
    toucher.use([write(tmp_path / "file", 64 * MIB)])
    touching = asyncio.create_task(toucher.touch())
    sample = await toucher.sample(16)
    assert (await touching).is_complete
    assert sample.resident == 16


async def test_a_file_shortened_while_it_is_touched_costs_only_the_toucher(toucher: Toucher, tmp_path: Path):
    path = sparse(tmp_path / "file", 64 << 30)
    toucher.use([path])
    with pytest.raises(ToucherLost, match="SIGBUS"):
        await toucher.touch(lambda *_: os.truncate(path, MIB))
    touched = await toucher.touch()  # another process, on the file as it is now
    assert touched.is_complete
    assert touched.total_bytes == MIB


async def test_a_killed_toucher_is_started_again(toucher: Toucher, tmp_path: Path):
    toucher.use([write(tmp_path / "file", MIB)])
    await toucher.count()
    first = toucher.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    with contextlib.suppress(ToucherLost):  # its death may be seen before it is asked
        await toucher.count()
    assert (await toucher.count())[2] == [(MIB // PAGE_BYTES, MIB // PAGE_BYTES)]
    assert toucher.pid not in {None, first}


async def test_a_toucher_that_is_killed_at_work_is_lost_by_name(toucher: Toucher, tmp_path: Path):
    toucher.use([sparse(tmp_path / "file", 64 << 30)])
    with pytest.raises(ToucherLost, match="SIGKILL"):
        await toucher.touch(lambda *_: os.kill(toucher.pid or 0, signal.SIGKILL))


@on_linux
async def test_a_replaced_file_is_mapped_again(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", 4 * MIB)
    toucher.use([path])
    assert (await toucher.touch()).total_bytes == 4 * MIB
    other = write(tmp_path / "other", 6 * MIB)
    evict(other)
    other.replace(path)
    _, _, counts = await toucher.count()
    assert counts == [(0, 6 * MIB // PAGE_BYTES)]


async def test_a_grown_file_is_mapped_again(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", 4 * MIB)
    toucher.use([path])
    await toucher.touch()
    with path.open("ab") as file:
        file.write(bytes(MIB))
    assert (await toucher.touch()).total_bytes == 5 * MIB


async def test_other_files_replace_the_mapping(toucher: Toucher, tmp_path: Path):
    toucher.use([write(tmp_path / "one", MIB)])
    await toucher.count()
    toucher.use([write(tmp_path / "two", 2 * MIB)])
    assert (await toucher.count())[2][0][1] == 2 * MIB // PAGE_BYTES


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [lambda _: None, Path.mkdir, make_fifo], ids=["missing", "folder", "fifo"])
async def test_what_is_no_file_is_refused_by_name(toucher: Toucher, tmp_path: Path, make: Callable[[Path], Any]):
    path = tmp_path / "thing"
    make(path)
    toucher.use([path])
    for _ in range(2):
        with pytest.raises(ToucherRefused, match="thing") as refused:
            await toucher.count()
        assert refused.value.kind == "unreadable"
    pid = toucher.pid
    toucher.use([write(tmp_path / "file", MIB)])
    assert (await toucher.touch()).is_complete
    assert toucher.pid == pid


async def test_an_empty_file_has_no_pages(toucher: Toucher, tmp_path: Path):
    path = tmp_path / "empty"
    path.touch()
    toucher.use([path])
    assert (await toucher.count())[2] == [(0, 0)]
    assert (await toucher.sample(SAMPLED_PAGES)).looked_at == 0
    assert (await toucher.touch()).is_complete


async def test_a_file_that_disappears_is_refused_and_found_again(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", MIB)
    toucher.use([path])
    await toucher.touch()
    path.unlink()
    with pytest.raises(ToucherRefused):
        await toucher.touch()
    write(path, MIB)
    assert (await toucher.touch()).is_complete


BECOME = """
import __future__, ctypes, fcntl, json, mmap, os, resource, select, stat, struct, sys, time
source = open(sys.argv.pop(1)).read()
if user := int(sys.argv.pop(1)):
    os.setgroups([]), os.setgid(user), os.setuid(user)
exec(compile(source, "toucher_process.py", "exec"))
"""
"""Imports first: another user need not be able to read this Python."""


def serve(paging: dict[str, Any], *commands: dict[str, Any], user: int = 0) -> list[dict[str, Any]]:
    """Run the process by itself, as another user if one is named; return the last line about each command."""
    words = [sys.executable, "-I", "-S", "-c", BECOME, toucher_process.__file__, str(user), json.dumps(paging)]
    answers: dict[int, dict[str, Any]] = {}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number, each in enumerate(commands):
            process.stdin.write(json.dumps({"id": number, **each}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answers[number] = json.loads(line)
                if "progress" not in answers[number]:
                    break
        process.stdin.close()
        assert process.wait(20) == 0
    return [answers[number] for number in range(len(commands))]


@pytest.fixture
def strangers_file() -> Any:
    """A file of root's that everybody may read and nobody else write, cold."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = write(Path(folder) / "model", 4 * MIB)
        path.chmod(0o644)
        evict(path)
        yield path


@as_root
@on_linux
def test_a_file_of_another_user_is_unknown_and_never_full(strangers_file: Path):
    _, count, sample = serve(
        {**dataclasses.asdict(PAGING), "cachestat": None},
        {"do": "map", "paths": [str(strangers_file)]},
        {"do": "count"},
        {"do": "sample", "pages": 16},
        user=NOBODY,
    )
    assert count["error"] == sample["error"] == "not_owner"
    assert str(strangers_file) in count["message"]


@as_root
@on_linux
def test_cachestat_is_asked_where_mincore_would_lie(strangers_file: Path):
    _, count = serve(
        {**dataclasses.asdict(PAGING), "cachestat": CACHESTAT},
        {"do": "map", "paths": [str(strangers_file)]},
        {"do": "count"},
        user=NOBODY,
    )
    if "error" in count:  # newer kernels have the same rule for cachestat, older ones have no cachestat
        assert count["error"] == "not_owner"
    else:
        assert count["source"] == "cachestat"
        assert count["counts"] == [[0, 4 * MIB // PAGE_BYTES]]


@as_root
@on_linux
def test_a_stranger_s_file_can_be_touched_although_it_is_not_told_what_was_cold(strangers_file: Path):
    lines = serve(
        {**dataclasses.asdict(PAGING), "cachestat": None},
        {"do": "map", "paths": [str(strangers_file)]},
        {"do": "touch"},
        user=NOBODY,
    )
    assert lines[-1]["is_complete"]
    assert lines[-1]["cold_bytes"] is None
    _, count = serve(dataclasses.asdict(PAGING), {"do": "map", "paths": [str(strangers_file)]}, {"do": "count"})
    assert count["counts"] == [[4 * MIB // PAGE_BYTES] * 2]


def in_this_process(path: Path, **paging: Any) -> toucher_process.Toucher:
    made = toucher_process.Toucher({**dataclasses.asdict(PAGING), **paging})
    made.map([str(path)])
    return made


@on_linux
def test_cachestat_counts_what_mincore_counts(tmp_path: Path):
    path = write(tmp_path / "file", 6 * MIB)
    evict(path)
    read(path, MIB, 2 * MIB)
    toucher = in_this_process(path, cachestat=CACHESTAT)
    spans = [(0, 0, 6 * MIB), (0, MIB, MIB), (0, 4 * MIB, MIB)]
    by_mincore = toucher.obey({"id": 1, "do": "count", "spans": spans})
    toucher.mappings[0].is_told = False  # as if the file were a stranger's
    try:
        by_cachestat = toucher.obey({"id": 2, "do": "count", "spans": spans})
        sampled = toucher.obey({"id": 3, "do": "sample", "pages": 6})
    except toucher_process.Refused as refused:
        pytest.skip(f"this kernel has no cachestat: {refused}")
    finally:
        toucher.release()
    assert by_cachestat["source"] == "cachestat"
    assert by_cachestat["counts"] == by_mincore["counts"]
    assert sampled["resident"] == 2


def test_only_the_first_bit_of_a_page_is_residency():
    """macOS sets others as well: a page that is referenced, modified or paged out need not be in core."""
    told = bytes([0x00, 0x01, 0x02, 0x20, 0x23, 0x06])
    assert told.translate(toucher_process._RESIDENT_BIT) == bytes([0, 1, 0, 0, 1, 0])


def test_without_posix_fadvise_the_disk_is_asked_as_macos_wants_it(monkeypatch: pytest.MonkeyPatch):
    """struct radvisory: a 64-bit offset, a 32-bit count, 4 bytes of padding; the command is 44."""
    asked: list[tuple[int, int, bytes]] = []
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *words: asked.append(words))
    toucher_process.ask_disk(7, 5 << 32, MIB)
    assert asked == [(7, 44, struct.pack("<qi", 5 << 32, MIB) + bytes(4))]


def test_advice_that_is_refused_is_no_error(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise OSError(22, "no")

    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    toucher_process.ask_disk(7, 0, MIB)


@on_linux
def test_pages_come_in_without_populate_too(tmp_path: Path):
    """Kernels before 5.14 and macOS fault the pages in one by one; macOS then needs a second pass."""
    path = write(tmp_path / "file", 24 * MIB)
    evict(path)
    lines = serve(
        {**dataclasses.asdict(PAGING), "populate": None, "touches_twice": True},
        {"do": "map", "paths": [str(path)]},
        {"do": "touch"},
        {"do": "count"},
    )
    assert lines[1]["is_complete"]
    assert lines[1]["cold_bytes"] == 24 * MIB
    assert lines[-1]["counts"] == [[24 * MIB // PAGE_BYTES] * 2]


def test_the_process_ends_with_its_input(tmp_path: Path):
    """An emberd that is killed leaves no toucher behind, not even one at work."""
    path = sparse(tmp_path / "file", 64 << 30)
    with subprocess.Popen(
        [sys.executable, "-I", "-S", toucher_process.__file__, json.dumps(dataclasses.asdict(PAGING))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"id": 1, "do": "map", "paths": [str(path)]}) + "\n")
        process.stdin.write(json.dumps({"id": 2, "do": "touch"}) + "\n")
        process.stdin.flush()
        assert "files" in process.stdout.readline()
        assert "progress" in process.stdout.readline()
        process.stdin.close()
        assert process.wait(20) == 0


def test_the_process_imports_next_to_nothing():
    """Every module is private memory beside a model that wants all of it."""
    tree = ast.parse(Path(toucher_process.__file__).read_text())
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert names == {
        "ctypes",
        "fcntl",
        "json",
        "mmap",
        "os",
        "resource",
        "select",
        "stat",
        "struct",
        "sys",
        "time",
    }
    from_imports = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert from_imports == ["__future__"]


@on_linux
async def test_a_file_of_64_gib_costs_no_more_memory_than_a_small_one(toucher: Toucher, tmp_path: Path):
    toucher.use([sparse(tmp_path / "file", 64 << 30)])
    _, _, counts = await toucher.count()
    assert counts == [(0, (64 << 30) // PAGE_BYTES)]
    await toucher.sample(SAMPLED_PAGES)
    rollup = Path(f"/proc/{toucher.pid}/smaps_rollup").read_text()
    anonymous = next(line for line in rollup.splitlines() if line.startswith("Pss_Anon:"))
    assert int(anonymous.split()[1]) < 8 * 1024


def test_the_module_can_be_imported_anywhere():
    assert importlib.reload(toucher_process)


def locked_bytes(toucher: Toucher) -> int:
    seen = ThisHost().engine_memory([toucher.pid or 0]).locked_bytes
    assert seen is not None
    return seen


@on_linux
@as_root
async def test_a_lock_brings_all_parts_in_and_holds_until_it_is_let_go(toucher: Toucher, tmp_path: Path):
    paths = [write(tmp_path / name, 100 * MIB + 5) for name in ("one", "two")]
    for path in paths:
        evict(path)
    toucher.use(paths)
    seen = await toucher.lock()
    assert (seen.is_complete, seen.error) == (True, None)
    assert seen.locked_bytes == seen.total_bytes - 2 * (PAGE_BYTES - 5) == 200 * MIB + 10
    assert locked_bytes(toucher) == seen.total_bytes
    evict(paths[0])
    assert (await toucher.count())[2][0][0] == 100 * MIB // PAGE_BYTES + 1
    assert (await toucher.lock()).is_complete, "again is no error"
    assert locked_bytes(toucher) == seen.total_bytes
    await toucher.unlock()
    assert locked_bytes(toucher) == 0


@on_linux
@as_root
async def test_a_limit_is_named_and_what_was_locked_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "file", 9 * MIB)
    wrapper = tmp_path / "limited.py"
    # As root the limit counts only without CAP_IPC_LOCK: the process becomes nobody, who may read the file.
    for folder in [tmp_path, *tmp_path.parents][:4]:  # pytest-xdist has one more
        folder.chmod(folder.stat().st_mode | 0o055)
    path.chmod(0o666)
    wrapper.write_text(
        # All before it becomes somebody who may not read this Python's folder.
        "import __future__, ctypes, fcntl, json, mmap, os, pathlib, resource, select, stat, struct, sys, time\n"
        f"source = pathlib.Path({toucher_process.__file__!r}).read_text()\n"
        f"resource.setrlimit(resource.RLIMIT_MEMLOCK, ({4 * MIB}, {4 * MIB}))\n"
        f"os.setuid({NOBODY})\n"
        "source = source.replace('LOCK_STEP_BYTES = 64 * MIB', 'LOCK_STEP_BYTES = MIB')\n"
        "exec(compile(source, 'toucher', 'exec'), {'__name__': '__main__'})\n"
    )
    monkeypatch.setattr("emberd.host.toucher._PROCESS", wrapper)
    toucher = Toucher(PAGING)
    toucher.use([path])
    seen = await toucher.lock()
    assert (seen.is_complete, seen.locked_bytes) == (False, 4 * MIB)
    assert seen.error == "Cannot allocate memory"
    assert locked_bytes(toucher) == 4 * MIB
    await toucher.close()


@on_linux
@as_root
async def test_a_replaced_file_takes_its_lock_along_and_is_locked_anew(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", 8 * MIB)
    toucher.use([path])
    assert (await toucher.lock()).is_complete
    write(tmp_path / "new", 4 * MIB).replace(path)
    await toucher.count()
    assert locked_bytes(toucher) == 0
    assert (await toucher.lock()).locked_bytes == 4 * MIB


async def test_nothing_is_started_to_unlock_nothing(toucher: Toucher, tmp_path: Path):
    toucher.use([write(tmp_path / "file", MIB)])
    await toucher.unlock()
    assert toucher.pid is None


def permissions(pid: int | None, path: Path) -> str:
    """Return how a process has mapped a file (proc_pid_maps(5))."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    (words,) = [line.split() for line in lines if line.endswith(str(path))]
    return words[1]


@on_linux
async def test_pages_are_mapped_executable_where_the_kernel_spares_those(toucher: Toucher, tmp_path: Path):
    path = write(tmp_path / "file", MIB)
    toucher.use([path])
    assert (await toucher.touch()).is_complete
    assert permissions(toucher.pid, path) == "r-xs"


@pytest.fixture
def without_programs(tmp_path: Path) -> Iterator[Path]:
    """A volume that is mounted noexec."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("mount is not installed")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "noexec", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield tmp_path
    subprocess.run([umount, "--lazy", tmp_path], check=True)


@on_linux
@as_root
async def test_on_a_volume_without_programs_pages_are_mapped_all_the_same(toucher: Toucher, without_programs: Path):
    path = write(without_programs / "file", MIB)
    toucher.use([path])
    assert (await toucher.touch()).is_complete
    assert permissions(toucher.pid, path) == "r--s"
