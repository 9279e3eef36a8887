"""The rotating log file, its limits, and following it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emberd.host import ThisHost
from emberd.host.log_reader import LogFollower, read_lines
from emberd.host.log_sinks import RotatingFile

WAIT_S = 20.0


def test_lines_are_appended_for_the_owner_only(tmp_path: Path):
    path = tmp_path / "folder" / "emberd.log"
    file = RotatingFile(path, 1000, 2)
    assert file.append("one")
    assert file.append("zwei ü \ud800")
    file.close()
    assert path.read_text() == "one\nzwei ü \\ud800\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_an_existing_file_is_gone_on_with_and_made_private(tmp_path: Path):
    path = tmp_path / "emberd.log"
    path.write_text("before\n")
    path.chmod(0o644)
    RotatingFile(path, 1000, 2).append("after")
    assert path.read_text() == "before\nafter\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_files_never_take_more_than_was_said(tmp_path: Path):
    path = tmp_path / "emberd.log"
    file = RotatingFile(path, 100, 2)
    for number in range(100):
        assert file.append(f"line {number:03d} 89")
        assert path.stat().st_size <= 100
    assert sorted(each.name for each in tmp_path.iterdir()) == ["emberd.log", "emberd.log.1", "emberd.log.2"]
    lines = list(read_lines(path))
    assert lines == [f"line {number:03d} 89" for number in range(100 - len(lines), 100)]
    assert len(lines) >= 14


def test_without_kept_files_only_the_newest_lines_remain(tmp_path: Path):
    path = tmp_path / "emberd.log"
    file = RotatingFile(path, 50, 0)
    for number in range(20):
        file.append(f"line {number:03d}")
    assert [each.name for each in tmp_path.iterdir()] == ["emberd.log"]
    assert path.read_text().endswith("line 019\n")


@pytest.mark.parametrize("how", ["remove", "move", "truncate"])
def test_others_may_take_the_file_away(tmp_path: Path, how: str):
    path = tmp_path / "emberd.log"
    file = RotatingFile(path, 1000, 2)
    file.append("one")
    if how == "remove":
        path.unlink()
    elif how == "move":
        path.rename(tmp_path / "mine")
    else:
        os.truncate(path, 0)
    assert file.append("two")
    assert path.read_text() == "two\n"


def test_a_rotation_that_is_refused_does_not_let_the_file_grow(tmp_path: Path):
    path = tmp_path / "emberd.log"
    (tmp_path / "emberd.log.1").mkdir()  # a folder cannot be replaced by a file, not even by root
    file = RotatingFile(path, 100, 1)
    for number in range(50):
        file.append(f"line {number:03d}")
    assert path.stat().st_size <= 100
    assert path.read_text().endswith("line 049\n")


def test_lines_for_a_folder_that_cannot_be_made_wait_in_memory(tmp_path: Path):
    (tmp_path / "file").touch()
    file = RotatingFile(tmp_path / "file" / "emberd.log", 100, 1)
    assert not file.append("one")
    assert (file.lost, file.error) == (0, "File exists")
    (tmp_path / "file").unlink()
    assert file.append("two")
    assert (tmp_path / "file" / "emberd.log").read_text() == "one\ntwo\n"


def test_so_many_lines_wait_and_no_more_and_what_was_lost_is_counted(tmp_path: Path):
    (tmp_path / "file").touch()
    file = RotatingFile(tmp_path / "file" / "emberd.log", 1 << 20, 1)
    for number in range(600):
        file.append(f"line {number}")
    assert file.lost == 100
    file.append("x" * 200_000)
    (tmp_path / "file").unlink()
    file.append("after")
    assert (tmp_path / "file" / "emberd.log").read_text() == "after\n"
    assert file.lost == 601


def test_lines_wait_while_the_disk_is_full_and_are_whole_afterwards(tmp_path: Path):
    """RLIMIT_FSIZE in a process of its own: a partial write, then EFBIG; then there is room again."""
    path = tmp_path / "emberd.log"
    code = f"""
import resource, signal
from pathlib import Path
from emberd.host.log_sinks import RotatingFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
file = RotatingFile(Path({str(path)!r}), 1000, 1)
wrote = [file.append("line %d of ten" % number) for number in range(5)]
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print(wrote, file.lost, bool(file.error), file.append("after"))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "[True, True, False, False, False] 0 True True"
    assert path.read_text() == (
        "line 0 of ten\nline 1 of ten\nli\nline 2 of ten\nline 3 of ten\nline 4 of ten\nafter\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux'")
def test_a_device_that_is_full_is_neither_chmodded_nor_rotated():
    mode = Path("/dev/full").stat().st_mode
    file = RotatingFile(Path("/dev/full"), 10, 1)
    assert not file.append("x" * 100)
    assert file.error == "No space left on device"
    assert Path("/dev/full").stat().st_mode == mode


class TestFollowing:
    def test_a_follower_reads_across_several_rotations(self, tmp_path: Path):
        path = tmp_path / "emberd.log"
        file = RotatingFile(path, 100, 5)
        file.append("before")
        follower = LogFollower(path)
        for number in range(30):
            file.append(f"line {number:03d}")
        lines, has_changed = follower.read()
        assert lines == [f"line {number:03d}" for number in range(30)]
        assert has_changed
        file.append("last")
        assert follower.read() == (["last"], False)
        follower.close()

    def test_a_half_written_line_is_waited_for(self, tmp_path: Path):
        path = tmp_path / "emberd.log"
        path.write_text("whole\nha")
        follower = LogFollower(path, from_beginning=True)
        assert follower.read() == (["whole"], False)
        with path.open("a") as file:
            file.write("lf\n")
        assert follower.read()[0] == ["half"]
        os.truncate(path, 0)
        with path.open("a") as file:
            file.write("new\n")
        assert follower.read()[0] == ["new"]
        follower.close()

    async def test_lines_come_as_they_are_written_and_after_a_rotation(self, tmp_path: Path):
        path = tmp_path / "emberd.log"
        file = RotatingFile(path, 60, 3)
        follower = LogFollower(path)  # there is no file yet
        lines = follower.lines(ThisHost().watch_file)
        for number in range(20):
            waiting = asyncio.ensure_future(anext(lines))
            await asyncio.sleep(0)
            file.append(f"line {number:03d}")
            assert await asyncio.wait_for(waiting, WAIT_S) == f"line {number:03d}"
        await lines.aclose()  # type: ignore[attr-defined]  # a generator

    async def test_without_a_watch_it_looks_now_and_then(self, tmp_path: Path):
        path = tmp_path / "emberd.log"
        path.touch()

        def used_up(path: Path) -> None:
            raise OSError(24, "no inotify instances", str(path))

        lines = LogFollower(path).lines(used_up)  # type: ignore[arg-type]
        waiting = asyncio.ensure_future(anext(lines))
        await asyncio.sleep(0.05)
        RotatingFile(path, 60, 3).append("one")
        assert await asyncio.wait_for(waiting, WAIT_S) == "one"
        await lines.aclose()  # type: ignore[attr-defined]
