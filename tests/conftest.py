"""Fixtures that more than one room of the tests uses."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import psutil
import pytest

from daemon_process import Daemon
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# A loaded machine of two cores is slow, not wrong; and a red run must be the same run again.
hypothesis.settings.register_profile(
    "emberd", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("emberd")

# Background jobs of scripts ignore SIGINT and SIGQUIT, those of nohup SIGHUP; every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)

# Every process of a test run inherits this, so that the end of the run can tell whether one was left.
RUN = "TEST_RUN_OF_EMBERD"
LEFT_LIMIT_S = 20.0

STANDIN = Path(__file__).parent / "koboldcpp_standin"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[RUN] = str(os.getpid())


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that leaves a process behind; pytest's own workers are its children, and end with it."""
    if hasattr(session.config, "workerinput"):
        return
    _, left = psutil.wait_procs([one for one in psutil.process_iter() if _was_left(one)], timeout=LEFT_LIMIT_S)
    for process in left:
        with contextlib.suppress(psutil.Error):
            session.config.get_terminal_writer().line(f"\nleft behind by a test: {process.pid} {process.cmdline()}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _was_left(process: psutil.Process) -> bool:
    try:
        mine = process.environ().get(RUN) == str(os.getpid())
        return mine and process.ppid() != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture(scope="session")
def standin() -> Path:
    """Folder of the KoboldCPP stand-in, shaped like a checkout."""
    return STANDIN


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that llama.cpp really loads."""
    path = tmp_path_factory.mktemp("models") / "small-model.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def make_daemon(tmp_path: Path, standin: Path, model: Path) -> Iterator[Callable[..., Daemon]]:
    """Make daemons on the stand-in; settings as `table.key`, stand-in switches by their STANDIN_ names."""
    made: list[Daemon] = []

    def make(settings: Mapping[str, Any] | None = None, **switches: str) -> Daemon:
        folder = tmp_path / f"daemon{len(made)}"
        folder.mkdir()
        base = {"model.path": str(model), "engine.path": str(standin), "lifecycle.crash_limit": 4}
        daemon = Daemon(folder, {**base, **(settings or {})}, {"STANDIN_PROMPT_MS_PER_TOKEN": "1", **switches})
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.close()
