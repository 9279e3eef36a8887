"""Real process trees: started, watched, taken over, ended."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from emberd.core.errors import EngineNotUsable, StateUnusable
from emberd.core.types import LaunchPlan
from emberd.engine.process import EngineProcess, launch, written
from emberd.host import ThisHost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emberd.core.ports import EventWatch

SIGNALS = (signal.SIGINT, signal.SIGTERM)
HOST = ThisHost()

PATIENT = "import signal; signal.pause()"
STUBBORN = """
import signal
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
print('ready', flush=True)
while True: signal.pause()
"""
FAMILY = """
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])
runaway = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], start_new_session=True)
print('ready', child.pid, runaway.pid, flush=True)
child.wait()
"""
ORPHANER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])
print('ready', child.pid, flush=True)
"""


class Launcher:
    """Starts Python programs as engines and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output"
        self.groups: list[int] = []

    def start(self, code: str) -> EngineProcess:
        return self.start_plan(LaunchPlan((sys.executable, "-c", code), {"MARK": "1"}, 20000))

    def start_plan(self, plan: LaunchPlan, descriptors: tuple[int, ...] = ()) -> EngineProcess:
        descriptor = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = launch(plan, descriptor, HOST, descriptors)
        finally:
            os.close(descriptor)
        self.groups.append(process.pid)
        return process

    async def said(self) -> list[str]:
        """Wait until the program has said something, and return its words."""
        async with asyncio.timeout(20):
            while not self.output.exists() or not self.output.read_text().endswith("\n"):
                await asyncio.sleep(0.01)
        return self.output.read_text().split()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    started = Launcher(tmp_path)
    yield started
    for group in started.groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


async def test_an_exit_is_noticed_at_once_with_its_status(launcher: Launcher):
    process = launcher.start(PATIENT)
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    began_s = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        await waiting
    assert process.status == -signal.SIGKILL
    assert time.monotonic() - began_s < 0.5
    process.close()


async def test_an_adopted_process_is_watched_without_being_its_parent(launcher: Launcher):
    """The grandchild stands for an engine whose emberd was killed: its parent is somebody else."""
    parent = launcher.start(ORPHANER)
    child_pid = int((await launcher.said())[1])
    adopted = EngineProcess(child_pid, HOST)
    waiting = asyncio.create_task(adopted.wait())
    os.kill(child_pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        await waiting
    assert adopted.status is None
    adopted.close()
    await parent.terminate(SIGNALS, 10)
    parent.close()


async def test_a_process_that_is_gone_cannot_be_watched(launcher: Launcher):
    process = launcher.start("pass")
    await process.wait()
    process.close()
    with pytest.raises(ProcessLookupError):
        EngineProcess(process.pid, HOST)


async def test_a_willing_process_ends_by_its_first_signal(launcher: Launcher):
    process = launcher.start(PATIENT)
    assert await process.terminate((signal.SIGTERM,), 10) == ()
    await process.wait()
    assert process.status == -signal.SIGTERM
    process.close()


async def test_a_stubborn_process_is_killed_at_the_deadline(launcher: Launcher):
    process = launcher.start(STUBBORN)
    await launcher.said()
    began_s = time.monotonic()
    assert await process.terminate(SIGNALS, 0.4) == (process.pid,)
    assert 0.3 < time.monotonic() - began_s < 3
    assert process.members() == []
    process.close()


async def test_the_whole_tree_ends_runaways_included(launcher: Launcher):
    process = launcher.start(FAMILY)
    child, runaway = map(int, (await launcher.said())[1:])
    assert set(process.members()) == {process.pid, child, runaway}
    assert await process.terminate(SIGNALS, 10) == ()
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in (child, runaway))
    process.close()


async def test_an_orphaned_worker_is_found_by_its_group_and_ended(launcher: Launcher):
    process = launcher.start(ORPHANER)
    worker = int((await launcher.said())[1])
    async with asyncio.timeout(10):
        await process.wait()
    assert process.has_group()
    assert process.members() == [worker]
    await process.terminate(SIGNALS, 10)
    assert process.members() == []
    process.close()


async def test_the_engine_gets_default_signals_even_under_nohup(launcher: Launcher):
    """A shell's background job ignores SIGINT; KoboldCPP would inherit that and never stop cleanly."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # as the daemon does
    try:
        process = launcher.start(
            "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True); signal.pause()"
        )
        assert await launcher.said() == ["False"]
        await process.terminate(SIGNALS, 10)
        process.close()
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def test_cpu_time_of_the_tree_is_told(launcher: Launcher):
    process = launcher.start("print('ready', flush=True)\nwhile True: pass")
    await launcher.said()
    first = process.cpu_seconds()
    async with asyncio.timeout(10):
        while (process.cpu_seconds() or 0) <= (first or 0):
            await asyncio.sleep(0.01)
    await process.terminate((signal.SIGKILL,), 10)
    process.close()


@pytest.mark.parametrize(
    ("program", "words"),
    [("/nonexistent/engine", "engine not found"), ("/etc/passwd", "not executable")],
)
def test_a_program_that_cannot_start_is_one_clear_error(launcher: Launcher, program: str, words: str):
    with pytest.raises(EngineNotUsable, match=words):
        launcher.start_plan(LaunchPlan((program,), {}, 20000))


async def test_settings_that_cannot_be_written_come_through_a_pipe(launcher: Launcher, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    reads = "import os, sys; assert os.path.exists(sys.argv[2]); print(sys.argv[1], open(sys.argv[2]).read())"
    said: list[str] = []
    for folder in (tmp_path, tmp_path / "file"):
        name = str(folder / "merged.kcpps")
        plan = LaunchPlan((sys.executable, "-c", reads, "--config", name), {}, 20000, files={name: "sesame"})
        with written(plan, lambda error: said.append(error.message)) as (started, descriptors):
            process = launcher.start_plan(started, descriptors)
        await process.wait()
        assert await launcher.said() == ["--config", "sesame"]
        assert (started.arguments == plan.arguments) == (not descriptors) == (folder == tmp_path)
        launcher.output.unlink()
    assert said == [f"cannot write {tmp_path}/file/merged.kcpps: Not a directory"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


def test_settings_that_neither_can_be_written_nor_fit_into_a_pipe_are_one_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    name = str(tmp_path / "file" / "merged.kcpps")
    before = len(list(Path("/dev/fd").iterdir()))
    plan = LaunchPlan(("engine", name), {}, 20000, files={name: "x" * (1 << 21)})
    with pytest.raises(StateUnusable, match="cannot write"), written(plan, lambda _: None):
        pass
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_program_for_another_machine_is_one_clear_error(launcher: Launcher, tmp_path: Path):
    foreign = tmp_path / "engine"
    foreign.write_bytes(b"\xcf\xfa\xed\xfe not for this system")
    foreign.chmod(0o755)
    with pytest.raises(EngineNotUsable, match="cannot start"):
        launcher.start_plan(LaunchPlan((str(foreign),), {}, 20000))


def test_an_engine_that_cannot_be_watched_is_ended_at_once(tmp_path: Path):
    """It would be in nobody's hands, and the next start would load a second model beside it."""

    class Exhausted(ThisHost):
        def watch_exit(self, pid: int) -> EventWatch:
            pids.append(pid)
            raise OSError(errno.EMFILE, "Too many open files")

    pids: list[int] = []
    with (tmp_path / "output").open("ab") as output, pytest.raises(OSError, match="Too many open files"):
        launch(LaunchPlan((sys.executable, "-c", PATIENT), {}, 20000), output.fileno(), Exhausted())
    assert not psutil.pid_exists(pids[0])
