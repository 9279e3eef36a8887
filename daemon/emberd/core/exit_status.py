"""What the end of an engine process means.

Exit codes of KoboldCPP say little: a broken GGUF is SIGSEGV, a crashed worker under `--admin` ends in 0
(docs/engines.md). So a status is judged together with what emberd asked for and saw.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

_USAGE_EXIT_CODE = 2
"""argparse's exit code for a usage error (Python documentation, argparse)."""
_AT_ONCE_S = 1.0
"""A process that a system policy kills dies within milliseconds of its start, without a word."""


@dataclass(frozen=True, slots=True)
class EngineExit:
    """How an engine process ended.

    Attributes:
        status: exit code, or the negative signal number; None when emberd was not its parent (adopted).
        lived_s: seconds from start to end.
        asked_to_stop: emberd had signalled the process.
        said_anything: it had printed at least one line.
        is_macos: it ran on macOS.
    """

    status: int | None
    lived_s: float
    asked_to_stop: bool
    said_anything: bool
    is_macos: bool


def explain(ended: EngineExit) -> str:
    """Return one sentence for a person: what the status is and what it usually means.

    After emberd's signal any status is a normal end: KoboldCPP ends with -15, 0, -2 or -11, and on macOS Metal's
    teardown aborts (SIGABRT) while buffers are alive (llama.cpp issues 19206, 22593).
    """
    status = ended.status
    if status is None:
        return "the engine ended (emberd had adopted it, so its exit status is not known)"
    if status < 0:
        return _explain_signal(ended, -status)
    if ended.asked_to_stop:
        return f"the engine stopped as asked (exit code {status})"
    if status == _USAGE_EXIT_CODE:
        return "exit code 2: the engine refused an argument, or did not find a file it was told to load"
    if status == 0:
        return "exit code 0, but emberd did not ask it to stop: a worker crash ends like this under --admin"
    return f"exit code {status}"


def _explain_signal(ended: EngineExit, number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if ended.asked_to_stop:
        note = " while freeing the GPU's memory, which is normal on macOS" if _is_metal_abort(ended, number) else ""
        return f"the engine stopped as asked ({name}{note})"
    if number == signal.SIGKILL:
        if ended.is_macos and ended.lived_s < _AT_ONCE_S and not ended.said_anything:
            return (
                f"{name} at once and without a word: macOS refused to run it, perhaps because the file is "
                "quarantined or not signed"
            )
        return f"{name}: perhaps out of memory, or killed by hand"
    meanings = {
        signal.SIGSEGV: "crashed; a broken or truncated model, or weights that do not fit, end like this",
        signal.SIGABRT: "gave up on a failed check (an unsupported operation of the GPU backend, or out of memory)",
        signal.SIGILL: "the program uses instructions that this processor lacks",
        signal.SIGBUS: "the model file was truncated or its volume went away while it was mapped",
        signal.SIGTERM: "somebody else asked it to stop",
        signal.SIGINT: "somebody else interrupted it",
        signal.SIGHUP: "its terminal went away",
    }
    meaning = meanings.get(number)  # type: ignore[call-overload]
    return f"{name}: {meaning}" if meaning else name


def _is_metal_abort(ended: EngineExit, number: int) -> bool:
    return ended.is_macos and number == signal.SIGABRT
