"""The file of starts: kept across processes of one boot, and no trouble when it cannot be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emberd.core.start_limit import End
from emberd.host.start_history import StartHistory

if TYPE_CHECKING:
    from pathlib import Path


def fail(path: Path, boot: str = "a") -> StartHistory:
    starts = StartHistory(path, boot)
    starts.begin()
    starts.failed("no model")
    return starts


def test_the_third_process_knows_of_the_first_two(tmp_path: Path):
    path = tmp_path / "starts.json"
    assert fail(path).wait_s() is None
    assert fail(path).wait_s() is None
    third = fail(path)
    assert third.wait_s() == 60
    third.waits()
    assert StartHistory(path, "a").wait_s() is None, "the next try is due"
    assert fail(path).wait_s() == 120
    assert path.stat().st_mode & 0o777 == 0o600


def test_another_boot_begins_anew(tmp_path: Path):
    for _ in range(2):
        fail(tmp_path / "starts.json", "a")
    assert fail(tmp_path / "starts.json", "b").wait_s() is None


def test_an_end_in_order_forgives_and_a_run_of_use_is_kept(tmp_path: Path):
    path = tmp_path / "starts.json"
    for _ in range(2):
        fail(path)
    starts = StartHistory(path, "a")
    starts.begin()
    starts.ready()
    assert [run.end for run in StartHistory(path, "a").runs or ()] == [End.FAILED, End.FAILED, End.READY]
    starts.ended()
    assert StartHistory(path, "a").runs == ()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 1, "boot": "a", "runs": [{"began_s": "x"}]}'])
def test_a_file_that_cannot_be_understood_is_begun_anew(tmp_path: Path, text: str):
    (tmp_path / "starts.json").write_text(text)
    assert fail(tmp_path / "starts.json").wait_s() is None


def test_without_a_place_to_remember_the_first_failure_waits(tmp_path: Path):
    assert fail(tmp_path / "missing" / "starts.json").wait_s() == 60
    nowhere = StartHistory(None, None)
    nowhere.begin()
    nowhere.ready()
    nowhere.ended()
    assert nowhere.runs is None


def test_only_the_last_runs_are_kept(tmp_path: Path):
    for _ in range(30):
        fail(tmp_path / "starts.json")
    assert len(StartHistory(tmp_path / "starts.json", "a").runs or ()) == 20
