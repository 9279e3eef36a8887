"""The process tree of `--admin`: a parent that supervises, an idle manager, and the worker with the model."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    Reload = Callable[[str], None]
    StartWorker = Callable[[argparse.Namespace, Reload], NoReturn]

POLL_S = 0.1
STOP_S = 3.0
MANAGER_LIFETIME_S = 900.0
RECOVERY_S = 1.0
"""Before the new worker says a word; the original's first words take as long."""


def supervise(
    options: argparse.Namespace,
    *,
    start_worker: StartWorker,
    read_options: Callable[[str], argparse.Namespace],
) -> int:
    """Run workers until one ends by itself or an interrupt comes; the exit code is always 0.

    There is no handler for SIGTERM: the parent dies of it and the worker lives on, as in the original.
    """
    wanted, write_end = os.pipe()
    manager = _fork(_idle)

    def start(current: argparse.Namespace) -> int:
        return _fork(lambda: start_worker(current, lambda name: _ask(write_end, name)))

    worker, is_reloaded = start(options), False
    try:
        while True:
            readable, _, _ = select.select([wanted], [], [], POLL_S)
            if readable:
                name = os.read(wanted, 4096).decode().strip()
                _say(f"Reloading new model/config: {name}\nTerminating old process...")
                _stop(worker)
                _say("Restarting KoboldCpp...")
                worker, is_reloaded = start(read_options(name)), True
            elif _has_ended(worker):
                if not is_reloaded:
                    break
                # A reload that failed falls back to the original arguments, once.
                _say("Attempting to recover to safe mode, launching known-good config...")
                time.sleep(RECOVERY_S)
                worker, is_reloaded = start(options), False
    except KeyboardInterrupt:
        _stop(worker)
    _stop(manager)
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _fork(run: Callable[[], NoReturn]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except SystemExit as leaving:
            sys.stdout.flush()
            os._exit(leaving.code if isinstance(leaving.code, int) else 1)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    return pid


def _idle() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Event().wait(MANAGER_LIFETIME_S)
    os._exit(0)


def _ask(pipe: int, name: str) -> None:
    os.write(pipe, name.encode() + b"\n")


def _has_ended(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True


def _stop(pid: int) -> None:
    end = time.monotonic() + STOP_S
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while not _has_ended(pid):
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S / 2)
