"""The engine's output file: followed, scrubbed, rotated."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberd.engine import output
from emberd.engine.output import OutputFollower, open_for_engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = "SECRET"


class Engine:
    """Writes like an engine: in append mode, through its own descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = open_for_engine(path)

    def say(self, text: str | bytes) -> None:
        os.write(self.descriptor, text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    speaker = Engine(tmp_path / "engine.log")
    yield speaker
    os.close(speaker.descriptor)


def follower(engine: Engine, rotate_bytes: int = 1 << 20, kept_files: int = 2) -> OutputFollower:
    return OutputFollower(engine.path, lambda line: SECRET in line, rotate_bytes, kept_files)


def read_all(reader: OutputFollower) -> list[str]:
    """Read until nothing is left, as emberd does by and by."""
    lines = reader.read_lines()
    while reader.has_more:
        lines += reader.read_lines()
    return lines


def test_lines_arrive_once_and_in_order(engine: Engine):
    reader = follower(engine)
    engine.say("one\ntwo\n")
    assert reader.read_lines() == ["one", "two"]
    engine.say("three\n")
    assert reader.read_lines() == ["three"]
    assert list(reader.tail) == ["one", "two", "three"]


def test_a_line_in_pieces_is_one_line(engine: Engine):
    reader = follower(engine)
    engine.say("hal")
    assert reader.read_lines() == []
    engine.say("f\n")
    assert reader.read_lines() == ["half"]


def test_progress_with_carriage_returns_is_split(engine: Engine):
    engine.say("Processing (1 / 3)\rProcessing (3 / 3)\r\ndone\n")
    assert follower(engine).read_lines() == ["Processing (1 / 3)", "Processing (3 / 3)", "done"]


def test_a_private_line_is_neither_passed_on_nor_left_on_disk(engine: Engine):
    reader = follower(engine)
    engine.say(f"before\nNamespace(password='{SECRET}')\nafter\n")
    assert reader.read_lines() == ["before", "after"]
    assert engine.path.read_text() == f"before\n{'*' * 28}\nafter\n"


def test_a_private_line_in_pieces_is_scrubbed_whole(engine: Engine):
    reader = follower(engine)
    engine.say("Body Err: SEC")
    reader.read_lines()
    engine.say("RET and more")
    reader.read_lines()
    engine.say(" of it\nafter\n")
    assert reader.read_lines() == ["after"]
    assert set(engine.path.read_text().splitlines()[0]) == {"*"}


def test_a_private_line_longer_than_any_buffer_is_scrubbed_whole(engine: Engine):
    reader = follower(engine)
    engine.say("Body Err: " + SECRET + "x" * 300_000 + "tail-of-prompt\nafter\n")
    assert read_all(reader) == ["after"]
    assert b"x" not in engine.path.read_bytes()
    assert b"tail-of-prompt" not in engine.path.read_bytes()


def test_a_very_long_line_is_cut_not_kept(engine: Engine):
    reader = follower(engine)
    engine.say("y" * 100_000 + "\nnext\n")
    lines = read_all(reader)
    assert [len(line) for line in lines] == [8192, 4]


def test_writing_goes_on_while_private_lines_are_scrubbed(engine: Engine):
    reader = follower(engine)
    engine.say(f"{SECRET}\n")
    reader.read_lines()
    engine.say("later\n")
    assert reader.read_lines() == ["later"]
    assert engine.path.read_text() == "******\nlater\n"


def test_a_large_file_is_rotated_and_the_writer_goes_on(engine: Engine):
    reader = follower(engine, rotate_bytes=1000, kept_files=2)
    seen = []
    for number in range(100):
        engine.say(f"line {number:03} {'.' * 40}\n")
        seen += reader.read_lines()
    assert [line.split()[1] for line in seen] == [f"{number:03}" for number in range(100)]
    assert engine.path.stat().st_size < 1100
    assert sorted(path.name for path in engine.path.parent.iterdir()) == [
        "engine.log",
        "engine.log.1",
        "engine.log.2",
    ]
    assert {path.stat().st_mode & 0o777 for path in engine.path.parent.iterdir()} == {0o600}


def test_a_file_whose_lines_end_only_with_the_next_one_is_rotated_too(engine: Engine):
    reader = follower(engine, rotate_bytes=1000)
    seen = []
    for number in range(100):
        engine.say(f"\nline {number:03} {'.' * 40}")
        seen += reader.read_lines()
    assert [line.split()[1] for line in seen] == [f"{number:03}" for number in range(99)]
    assert reader.unfinished.startswith("line 099")
    assert engine.path.stat().st_size < 1100
    assert engine.path.with_name("engine.log.1").exists()


def test_a_private_line_that_goes_on_over_a_rotation_is_in_no_file(engine: Engine):
    reader = follower(engine, rotate_bytes=10)
    engine.say(f"before\ncounts, Body Err: {SECRET[:3]}")
    assert reader.read_lines() == ["before"]
    engine.say(f"{SECRET[3:]} begins")
    assert reader.read_lines() == []
    engine.say(" goes on")
    assert reader.read_lines() == []
    engine.say(" and ends\nafter\n")
    assert reader.read_lines() == ["after"]
    texts = [path.read_text() for path in engine.path.parent.iterdir()]
    assert len(texts) == 3
    assert set("".join(texts)) <= set("before\n*after")


def test_without_kept_files_rotation_empties_the_file(engine: Engine):
    reader = follower(engine, rotate_bytes=10, kept_files=0)
    engine.say("0123456789\n")
    assert reader.read_lines() == ["0123456789"]
    assert engine.path.read_bytes() == b""
    assert [path.name for path in engine.path.parent.iterdir()] == ["engine.log"]


def test_what_an_earlier_engine_left_is_scrubbed_and_not_reported(engine: Engine):
    engine.say(f"old\n{SECRET}\n")
    reader = follower(engine)
    reader.skip_to_end()
    engine.say("new\n")
    assert reader.read_lines() == ["new"]
    assert SECRET not in engine.path.read_text()


def test_last_words_without_a_line_end_are_found(engine: Engine):
    reader = follower(engine)
    engine.say("loading\nSegmentation fau")
    reader.read_lines()
    assert reader.last_words(5) == ["loading", "Segmentation fau"]


def test_a_file_that_somebody_emptied_is_read_from_its_start(engine: Engine):
    reader = follower(engine)
    engine.say("a long first line\n")
    reader.read_lines()
    os.truncate(engine.path, 0)
    engine.say("new\n")
    assert reader.read_lines() == ["new"]


@pytest.mark.parametrize("line", ["decode: failed to find a memory slot for batch of size 1\n", "y\n"])
def test_an_engine_that_prints_much_is_read_in_small_steps(engine: Engine, line: str):
    reader = follower(engine)
    engine.say(line * (500_000 // len(line)))
    assert 0 < len(reader.read_lines()) <= 1200
    assert reader.has_more
    left = read_all(reader)
    assert set(left) == {line.strip()}
    assert not reader.has_given_up
    assert reader.read_lines() == []


def test_what_an_engine_prints_too_fast_is_given_up_and_does_not_stay_on_disk(engine: Engine):
    reader = follower(engine)
    engine.say("first\n")
    reader.read_lines()
    engine.say(f"{SECRET} {'x' * 100}\n" * 30_000)
    reader.read_lines()
    assert reader.has_given_up
    assert not reader.has_more
    assert engine.path.stat().st_size < 200_000
    assert SECRET not in engine.path.read_text()
    assert engine.path.read_text().startswith("first\n")
    engine.say("cut\nlater\n")
    assert reader.read_lines() == ["later"]


def test_the_end_of_a_line_whose_beginning_was_given_up_is_private(engine: Engine):
    reader = follower(engine)
    engine.say("y\n" * 1_000_000 + f"Body Err: {SECRET}")
    assert reader.read_lines()
    engine.say(" tail-of-prompt")
    assert reader.read_lines() == []
    assert reader.unfinished == ""
    engine.say(" of it\nafter\n")
    assert reader.read_lines() == ["after"]
    assert b"tail-of-prompt" not in engine.path.read_bytes()
    assert b"of it" not in engine.path.read_bytes()


def test_a_file_with_something_unread_is_not_rotated(engine: Engine):
    reader = follower(engine, rotate_bytes=10_000)
    said = [f"line {number}" for number in range(20_000)]
    engine.say("".join(f"{line}\n" for line in said))
    assert read_all(reader) == said
    assert engine.path.stat().st_size == 0
    assert engine.path.with_name("engine.log.1").read_text().split("\n")[:-1] == said


def test_what_an_engine_printed_while_no_emberd_read_is_skipped_in_bounded_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(output, "_LONGEST_SKIP_S", 0.05)
    engine.say(f"{SECRET}\n" * 2_000_000)
    reader = follower(engine)
    began_s = time.monotonic()
    reader.skip_to_end()
    assert time.monotonic() - began_s < 2
    assert reader.has_given_up
    assert SECRET not in engine.path.read_text()


def test_a_file_that_is_not_the_engine_s_is_not_read(engine: Engine):
    reader = follower(engine)
    assert reader.make_room()
    engine.say("one\n")
    assert reader.read_lines() == ["one"]
    engine.path.rename(engine.path.with_name("away"))
    with pytest.raises(FileNotFoundError):
        reader.read_lines()
    engine.path.write_text("a line of somebody else's\n")
    with pytest.raises(FileNotFoundError):
        reader.read_lines()
    assert engine.path.read_text() == "a line of somebody else's\n"


def test_the_next_engine_s_file_is_read_from_its_start(engine: Engine):
    reader = follower(engine)
    assert reader.make_room()
    engine.say("a long first line\nhal")
    reader.read_lines()
    engine.path.unlink()
    assert reader.make_room()
    following = Engine(engine.path)
    following.say("a line that is longer than all of before\n")
    assert reader.read_lines() == ["a line that is longer than all of before"]
    os.close(following.descriptor)


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.text(st.sampled_from("abcé "), max_size=30).map(str.strip)),
    private=st.sets(st.integers(0, 20)),
    cuts=st.lists(st.integers(1, 40), max_size=30),
    rotate_bytes=st.sampled_from([20, 1 << 20]),
)
def test_however_output_is_cut_no_private_byte_stays(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    private: set[int],
    cuts: list[int],
    rotate_bytes: int,
):
    path = tmp_path_factory.mktemp("follow") / "engine.log"
    said = [f"{SECRET}{line}§" if number in private else line for number, line in enumerate(lines)]
    data = "".join(f"{line}\n" for line in said).encode()
    writer = Engine(path)
    try:
        reader, got = follower(writer, rotate_bytes), []
        for cut in [*cuts, len(data) or 1]:
            writer.say(data[:cut])
            data = data[cut:]
            got += reader.read_lines()
    finally:
        os.close(writer.descriptor)
    assert got == [line for number, line in enumerate(said) if number not in private and line]
    for each in path.parent.iterdir():
        assert SECRET not in each.read_text(errors="replace")
        assert "§" not in each.read_text(errors="replace")
