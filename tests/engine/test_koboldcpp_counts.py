"""The counts that KoboldCPP prints at the end of a generation, in the words of its versions."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from emberd.core.settings import EngineSettings, LogSettings, Settings
from emberd.core.turn import PromptCounts
from emberd.engine.http import EngineHttp
from emberd.engine.koboldcpp import KoboldCpp
from emberd.engine.koboldcpp_log import read_counts
from emberd.engine.output import OutputFollower, open_for_engine
from emberd.host import ThisHost
from emberd.services.engine_output import EngineOutput

if TYPE_CHECKING:
    from pathlib import Path

OLD = "CtxLimit:1319/2048, Amt:1/1, Init:0.00s, Process:6.13s (4.7ms/T = 215.01T/s)"
SHORT = "[18:10:47] CtxLimit:1326/2048, Amt:8/8, Init:0.00s, Process:0.03s (200.00T/s), Generate:0.12s (64.52T/s)"
NO_TIME = "[18:10:47] CtxLimit:1319/2048, Amt:1/1, Init:0.00s, Process:0.00s (infT/s), Generate:0.02s (50.00T/s)"
NEW = "[18:10:47] CtxLimit:1327/16384, Init:0.01s, Processed:7 in 0.05s (140.00T/s), Generated:4/4 in 0.10s"
BATCHED = "[18:10:47] BatchRequest:3, Prompt:1301, Generated:1/1 in 5.50s (0.18T/s), Stop:0"


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        (OLD, PromptCounts(0, 1318, 1)),
        (SHORT, PromptCounts(1312, 6, 8)),
        (NO_TIME, PromptCounts(None, None, 1)),
        (NEW, PromptCounts(1316, 7, 4)),
        (BATCHED, PromptCounts(0, 1301, 1)),
        ("Generating (8 / 8 tokens)", None),
        ("Output: CtxLimit:1/2, said the story", None),
        ("", None),
    ],
)
def test_each_version_s_words_are_read(line: str, counts: PromptCounts | None):
    assert read_counts(line) == counts


def test_a_body_that_is_printed_behind_counts_whose_line_is_not_ended_stays_private(tmp_path: Path):
    unused: Any = None
    engine = KoboldCpp(Settings(), ThisHost(), EngineHttp(), unused, unused, unused)
    path = tmp_path / "engine.log"
    reader = OutputFollower(path, engine.is_private, 1 << 20, 1)
    descriptor = open_for_engine(path)
    os.write(descriptor, b"\n" + SHORT.encode())
    assert reader.read_lines() == []
    assert read_counts(reader.unfinished) == PromptCounts(1312, 6, 8)
    os.write(descriptor, b"Body Err: b'SECRET")
    assert reader.read_lines() == []
    assert reader.unfinished == ""
    os.write(descriptor, b" STORY'\nafter\n")
    assert reader.read_lines() == ["after"]
    os.close(descriptor)
    assert b"SECRET" not in path.read_bytes()
    assert b"STORY" not in path.read_bytes()


def test_a_reply_of_several_lines_stays_private(tmp_path: Path):
    """A model that was switched in place prints replies: its file says nothing of --quiet."""
    unused: Any = None
    engine = KoboldCpp(Settings(), ThisHost(), EngineHttp(), unused, unused, unused)
    path = tmp_path / "engine.log"
    reader = OutputFollower(path, engine.is_private, 1 << 20, 1)
    descriptor = open_for_engine(path)
    os.write(descriptor, b"Input: {SECRET}\n\nOutput: SECRET one\n\nSECRET two\nSECRET three\n")
    assert reader.read_lines() == []
    own = [SHORT, "another line", "Reloading new model/config: other.kcpps"]
    os.write(descriptor, "\n".join([*own[:2], "Output: SECRET", "SECRET", own[2], ""]).encode())
    assert reader.read_lines() == own
    os.close(descriptor)
    assert b"SECRET" not in path.read_bytes()


def test_a_reply_stays_private_when_settings_are_read_again_in_its_middle(tmp_path: Path):
    unused: Any = None
    engine, new = (KoboldCpp(Settings(), ThisHost(), EngineHttp(), unused, unused, unused) for _ in range(2))
    path, noted = tmp_path / "engine.log", list[str]()
    output = EngineOutput(
        path, LogSettings(), engine, ThisHost(), structlog.get_logger(), noted.append, noted.append
    )
    descriptor = open_for_engine(path)
    os.write(descriptor, b"Output: SECRET one\n")
    output.read()
    output.use(new, LogSettings())
    os.write(descriptor, f"SECRET two\n{SHORT}\n".encode())
    output.read()
    os.close(descriptor)
    assert noted == [SHORT]
    assert b"SECRET" not in path.read_bytes()


@pytest.mark.parametrize(
    ("words", "file", "variable", "password"),
    [
        (("--password", "a"), {"password": "b"}, "c", "a"),
        (("--password=a,b",), None, "", "a,b"),
        ((), {"password": "b"}, "c", "b"),
        ((), {"password": ""}, " c ", "c"),
        ((), None, "", ""),
    ],
)
def test_the_password_of_an_engine_that_is_adopted_is_known_before_anything_is_planned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    file: dict[str, str] | None,
    variable: str,
    password: str,
):
    monkeypatch.setenv("KCPP_PASSWORD", variable)
    settings = EngineSettings(extra_args=words)
    if file is not None:
        (tmp_path / "own.kcpps").write_text(json.dumps(file))
        settings = replace(settings, kcpps=str(tmp_path / "own.kcpps"))
    unused: Any = None
    engine = KoboldCpp(Settings(engine=settings), ThisHost(), EngineHttp(), unused, unused, unused)
    assert engine.password == password
