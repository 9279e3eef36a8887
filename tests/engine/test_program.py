"""Finding an engine's program, and asking it about itself."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from daemon_process import group_members
from emberd.core.errors import EngineNotUsable
from emberd.engine import program
from emberd.engine.koboldcpp import model_name
from emberd.engine.program import Asker, check_executable, check_ran, find_program
from emberd.host import ThisHost

if TYPE_CHECKING:
    from pathlib import Path


class QuarantiningHost(ThisHost):
    """macOS after a browser's download."""

    def quarantine(self, path: Path) -> str | None:
        return f"0081;65f0;Safari;{path.name}"


def write_program(path: Path, script: str) -> Path:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


def test_a_program_is_found_by_path_by_name_and_by_usual_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = write_program(tmp_path / "koboldcpp", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program(str(made), (), "the engine") == made
    assert find_program("koboldcpp", (), "the engine") == made
    assert find_program("", ("other", "koboldcpp"), "the engine") == made


def test_a_missing_program_names_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EngineNotUsable, match="looked for koboldcpp") as missing:
        find_program("", ("koboldcpp",), "KoboldCPP's binary")
    assert "embedded" in missing.value.remedy
    with pytest.raises(EngineNotUsable, match="engine not found: /nowhere/x"):
        find_program("/nowhere/x", (), "the engine")


def test_a_quarantined_program_is_refused_before_it_dies_without_a_word(tmp_path: Path):
    made = write_program(tmp_path / "koboldcpp", "exit 0")
    with pytest.raises(EngineNotUsable, match="quarantined by macOS") as refused:
        check_executable(made, QuarantiningHost())
    assert f"xattr -d com.apple.quarantine {made}" in refused.value.remedy
    check_executable(made, ThisHost())


def test_a_program_without_permission_and_a_folder_are_refused(tmp_path: Path):
    plain = tmp_path / "koboldcpp"
    plain.touch()
    with pytest.raises(EngineNotUsable, match="not executable") as refused:
        check_executable(plain, ThisHost())
    assert refused.value.remedy == f"Run: chmod +x {plain}"
    with pytest.raises(EngineNotUsable, match="is a folder"):
        check_executable(tmp_path, ThisHost())


@pytest.mark.parametrize(
    ("script", "how", "words"),
    [
        (
            "echo 'llama-server: error while loading shared libraries: libllama.so' >&2; exit 127",
            "exit code 127",
            "libllama.so",
        ),
        ("echo half a help; echo 'No module named x'; exit 1", "exit code 1", "No module named x"),
        ("kill -ABRT $$", "ended by signal 6", ""),
    ],
)
async def test_a_program_that_cannot_run_is_reported_with_its_own_last_words(
    tmp_path: Path, script: str, how: str, words: str
):
    made = write_program(tmp_path / "llama-server", script)
    said = await Asker(tmp_path / "answers.json").ask((str(made),), ("--help",), made, {})
    with pytest.raises(EngineNotUsable) as failed:
        check_ran(made, said)
    assert failed.value.message.startswith(f"{made} cannot run ({how})")
    assert words in failed.value.message


async def test_an_unchanged_program_is_asked_once(tmp_path: Path):
    count = tmp_path / "count"
    made = write_program(tmp_path / "engine", f"echo x >> {count}; echo help; exit 0")
    for _ in range(2):  # also after a restart of emberd
        asker = Asker(tmp_path / "answers.json")
        for _ in range(2):
            assert (await asker.ask((str(made),), ("--help",), made, {})).out == "help\n"
    assert count.read_text() == "x\n"
    os.utime(made, (1, 1))
    await Asker(tmp_path / "answers.json").ask((str(made),), ("--help",), made, {})
    assert count.read_text() == "x\nx\n"
    assert (tmp_path / "answers.json").stat().st_mode & 0o777 == 0o600


async def test_a_broken_memory_of_answers_is_no_error(tmp_path: Path):
    (tmp_path / "answers.json").write_text('{"x": 5}')
    made = write_program(tmp_path / "engine", "echo help")
    assert (await Asker(tmp_path / "answers.json").ask((str(made),), ("--help",), made, {})).out == "help\n"


async def test_a_program_that_never_answers_is_given_up_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program, "ASK_TIMEOUT_S", 0.2)
    pid = tmp_path / "pid"
    made = write_program(tmp_path / "engine", f"echo $$ > {pid}; exec sleep 100")
    began_s = time.monotonic()
    with pytest.raises(EngineNotUsable, match="did not answer --help within"):
        await Asker(tmp_path / "answers.json").ask((str(made),), ("--help",), made, {})
    assert time.monotonic() - began_s < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("pipe", ["1", "2"])
async def test_a_program_that_floods_its_help_is_given_up_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: str
):
    monkeypatch.setattr(program, "_MOST_BYTES", 100_000)
    monkeypatch.setattr(program, "ASK_TIMEOUT_S", 20.0)
    made = write_program(tmp_path / "engine", f"echo $$ > {tmp_path}/pid; yes help >&{pipe}")
    with pytest.raises(EngineNotUsable, match="printed more than 0 MiB in answer to --help"):
        await Asker(tmp_path / "answers.json").ask((str(made),), ("--help",), made, {})
    await all_end(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_what_a_program_started_for_its_answer_ends_with_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
):
    monkeypatch.setattr(program, "ASK_TIMEOUT_S", 20.0 if is_cancelled else 0.5)
    made = with_a_child(tmp_path)
    asking = asyncio.create_task(Asker(tmp_path / "answers.json").ask((str(made),), ("--help",), made, {}))
    if is_cancelled:
        async with asyncio.timeout(10):
            while not (tmp_path / "pid").exists():
                await asyncio.sleep(0.01)
        asking.cancel()
    with pytest.raises(asyncio.CancelledError if is_cancelled else EngineNotUsable):
        async with asyncio.timeout(20):
            await asking
    await all_end(int((tmp_path / "pid").read_text()))


async def test_a_question_that_is_cancelled_as_it_begins_ends_what_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = with_a_child(tmp_path)
    start = asyncio.create_subprocess_exec

    async def start_slowly(*words: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*words, **options)
        while not (tmp_path / "pid").exists():
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.sleep(0)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_slowly)
    asking = asyncio.create_task(Asker(tmp_path / "answers.json").ask((str(made),), ("--help",), made, {}))
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(20):
            await asking
    await all_end(int((tmp_path / "pid").read_text()))


async def test_what_a_program_leaves_behind_after_its_answer_is_ended(tmp_path: Path):
    made = write_program(tmp_path / "engine", f"sleep 100 >&- 2>&- & echo $$ > {tmp_path}/pid; echo help")
    assert (await Asker(tmp_path / "answers.json").ask((str(made),), ("--help",), made, {})).out == "help\n"
    await all_end(int((tmp_path / "pid").read_text()))


def with_a_child(folder: Path) -> Path:
    """Return a program that starts another one, writes its own pid, and never answers."""
    script = f"sleep 40 & echo $$ > {folder}/new; mv {folder}/new {folder}/pid; wait"
    return write_program(folder / "engine", script)


async def all_end(group: int) -> None:
    """Return when no process of the group lives, which takes the kernel a moment."""
    async with asyncio.timeout(10):
        while group_members(group):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/Gemma-3 (270M).Q4_K_M.gguf", "koboldcpp/Gemma-3270M.Q4_K_M"),
        ("/models/m.gguf", "koboldcpp/m"),
        ("/models/a-00001-of-00002.gguf", "koboldcpp/a-00001-of-00002"),
    ],
)
def test_the_name_under_which_koboldcpp_serves_a_model(path: str, name: str):
    assert model_name(path) == name
