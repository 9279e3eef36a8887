"""The examples in the documentation do what the page says; `documented_example.py` tells how they are run."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from documented_example import REASONS, SETUPS, SHELLS, Block, Computer, blocks, commands, complaint, is_as_shown
from emberd.core.settings import read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in BLOCKS if block.language in SHELLS and block.reason is None]
PROGRAMS = ("nc",)
"""Programs of examples that a computer may lack; without them those are skipped."""


def name(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


@pytest.fixture(scope="module")
def kept(standin: Path) -> Iterator[Callable[[str], Computer]]:
    """A computer with a setup on which emberd runs: one for all examples."""
    made: dict[str, Computer] = {}

    def prepare(setup: str) -> Computer:
        if setup not in made:
            made[setup] = Computer(standin, setup)
        made[setup].be_ready()
        return made[setup]

    yield prepare
    for computer in made.values():
        computer.close()


@pytest.fixture
def prepared(kept: Callable[[str], Computer], standin: Path) -> Iterator[Callable[[str], Computer]]:
    """A computer with a setup."""
    made: list[Computer] = []

    def prepare(setup: str) -> Computer:
        if setup in {"running", "service"}:
            return kept(setup)
        made.append(Computer(standin, setup))
        return made[-1]

    yield prepare
    for computer in made:
        computer.close()


@pytest.mark.parametrize("block", BLOCKS, ids=name)
def test_each_block_is_run_or_says_why_not(block: Block):
    assert complaint(block) is None


@pytest.mark.parametrize("block", RUN, ids=name)
def test_an_example_does_what_the_page_says(block: Block, prepared: Callable[[str], Computer]):
    if block.setup == "service" and sys.platform != "linux":
        pytest.skip("the stand-in launchctl is for Linux, and the real one is not for tests")
    missing = [program for program in PROGRAMS if f"{program} -" in block.text and shutil.which(program) is None]
    if missing:
        pytest.skip(f"this computer has no {missing[0]}")
    assert prepared(block.setup).mistakes(block) == []


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in {"toml", "json"}], ids=name)
def test_an_example_of_a_file_can_be_read(block: Block):
    if block.language == "json":
        json.loads(block.text)
    else:
        read(tomllib.loads(block.text), name(block))


def test_most_examples_are_run_and_every_excuse_is_used():
    assert len(RUN) >= 12
    assert {block.setup for block in RUN} == set(SETUPS)
    assert {block.reason for block in BLOCKS if block.reason} == REASONS


# --- of the checker itself ----------------------------------------------------------------------------------


def block(text: str, language: str = "console", mark: str = "") -> Block:
    return Block(Path("page.md"), 1, language, mark, text)


@pytest.mark.parametrize(
    "wrong",
    [
        block("ls", ""),
        block("ls", "bash"),
        block("ls", "sh", "not executed: because"),
        block("ls", "sh", "example: elsewhere"),
        block("a", "text", "not executed: needs macOS"),
    ],
)
def test_a_block_that_nobody_runs_and_nothing_excuses_is_noticed(wrong: Block):
    assert complaint(wrong) is not None


def test_blocks_are_found_with_their_marks(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n<!-- not executed: needs macOS -->\n```sh\nls\n```\n\n```toml\na = 1\n```\n"
        "<!-- example: new -->\n\n```console\n$ true\n```\n"
    )
    found = list(blocks(page))
    assert [(each.line, each.language, each.reason) for each in found] == [
        (4, "sh", "needs macOS"),
        (8, "toml", None),
        (13, "console", None),
    ]
    assert [each.setup for each in found[1:]] == ["running", "new"]


def test_commands_and_what_they_show_are_told_apart():
    assert commands(block("$ a\nb\nc\n$ d\n")) == [("a", "b\nc\n"), ("d", "")]
    assert commands(block("a\n\nb\n", "sh")) == [("a", "..."), ("b", "...")]


@pytest.mark.parametrize(
    ("shown", "printed", "is_same"),
    [
        ("lock  HELD, 235 of 235 MiB", "lock HELD, 24 of 24 MiB\n", True),
        ("lock HELD, 235 of 235 MiB", "lock PARTIAL, 24 of 24 MiB", False),
        ("a\nb", "a b", True),
        ("...\nlock HELD", "engine READY\nlock HELD\n", True),
        ("lock HELD\n...\n", "lock HELD\nengine READY\n", True),
        ("lock HELD\n", "lock HELD\nengine READY\n", False),
        ('{"pid": 4242, ...}', '{"pid": 7, "state": "READY"}', True),
        ("78", "78\n", True),
        ("78", "66\n", False),
        ("", "", True),
        ("", "something", False),
        ("...", "", True),
    ],
)
def test_what_is_printed_is_compared_with_what_is_shown(shown: str, printed: str, is_same: bool):
    assert is_as_shown(shown, printed) is is_same


def test_a_wrong_page_is_noticed(kept: Callable[[str], Computer]):
    running = kept("running")
    assert running.mistakes(block("$ emberd status\nnothing\n"))
    assert running.mistakes(block("emberd statsu\n", "sh"))
    assert running.mistakes(block("exit 0\ntrue\n", "sh"))
    assert running.mistakes(block("$ (exit 3)\n$ echo $?\n4\n"))
    assert running.mistakes(block("$ (exit 3)\n$ echo $?\n3\n")) == []
