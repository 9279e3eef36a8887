"""The engine's output as it comes: in small steps, with its rest, and with a word when some of it is lost."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from structlog.testing import capture_logs

from emberd.core.settings import LogSettings, Settings
from emberd.engine.http import EngineHttp
from emberd.engine.koboldcpp import KoboldCpp
from emberd.host import ThisHost
from emberd.services.engine_output import EngineOutput

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Printing:
    """An engine that prints, and emberd that reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.noted: list[str] = []
        self.output = self.follow_anew()
        self.descriptor = self.output.open_for_engine()

    def follow_anew(self) -> EngineOutput:
        """Return what another emberd would follow it with."""
        unused: Any = None
        engine = KoboldCpp(Settings(), ThisHost(), EngineHttp(), unused, unused, unused)
        return EngineOutput(
            self.path,
            LogSettings(),
            engine,
            ThisHost(),
            structlog.get_logger(),
            self.noted.append,
            self.noted.append,
        )

    def say(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def start_again(self) -> None:
        """Start another engine."""
        os.close(self.descriptor)
        self.output.skip_to_end()
        self.descriptor = self.output.open_for_engine()


@pytest.fixture
def printing(tmp_path: Path) -> Iterator[Printing]:
    made = Printing(tmp_path / "engine.log")
    yield made
    os.close(made.descriptor)


@pytest.fixture
def lost() -> Iterator[list[str]]:
    """What was said of lost output."""
    said: list[str] = []
    with capture_logs([lambda _log, _method, event: _keep(said, event)]):
        yield said


def _keep(said: list[str], event: Any) -> Any:
    if event["event"] == "output_lost":
        said.append(event["error"])
    raise structlog.DropEvent


async def test_all_that_was_printed_at_once_is_read_without_another_word_from_the_engine(printing: Printing):
    printing.say("line\n" * 5_000)
    following = asyncio.create_task(printing.output.follow())
    async with asyncio.timeout(20):
        while len(printing.noted) < 5_000:
            await asyncio.sleep(0.01)
    following.cancel()


async def test_the_rest_that_an_engine_leaves_is_read(printing: Printing, lost: list[str]):
    printing.say("line\n" * 5_000 + "its cause\n")
    await printing.output.read_rest()
    assert len(printing.noted) == 5_001
    assert printing.output.said.endswith("its cause")
    assert not lost


async def test_the_rest_is_bounded_and_nothing_of_it_stays_unread(printing: Printing, lost: list[str]):
    printing.say("y\n" * 500_000 + "password='sesame'\n")
    await printing.output.read_rest()
    assert lost == ["the engine prints faster than emberd can read"]
    assert "sesame" not in printing.path.read_text()


async def test_output_that_is_given_up_is_said_once_for_an_engine(printing: Printing, lost: list[str]):
    for _ in range(2):
        for _ in range(3):
            printing.say("line\n" * 1_000_000)
            printing.output.read()
        assert lost.pop() == "the engine prints faster than emberd can read"
        assert not lost
        printing.start_again()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_is_removed_is_said_once_until_the_next_engine(
    printing: Printing, lost: list[str], is_replaced: bool
):
    printing.path.unlink()
    if is_replaced:
        printing.path.write_text("somebody else's\n")
    for _ in range(3):
        printing.say("line\n")
        printing.output.read()
    assert lost == [f"{printing.path} was removed"]
    printing.start_again()
    printing.say("kept again\n")
    printing.output.read()
    assert printing.noted == ["kept again"]
    assert len(lost) == 1


def test_a_file_that_went_while_no_emberd_ran_is_not_made_again_for_an_engine_that_does_not_write_to_it(
    printing: Printing, lost: list[str]
):
    printing.path.unlink()
    following = printing.follow_anew()
    following.adopt()
    following.read()
    assert lost == [f"{printing.path} was removed"]
    assert not printing.path.exists()


def test_an_engine_without_a_file_lacks_it_for_one_reason_only(tmp_path: Path, lost: list[str]):
    printing = Printing(tmp_path / "nowhere" / "engine.log")
    printing.output.read()
    assert lost == [f"no room or no permission at {printing.path}"]
    os.close(printing.descriptor)
