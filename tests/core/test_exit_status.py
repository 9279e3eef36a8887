"""What the end of an engine means, in words."""

from __future__ import annotations

import signal

import pytest

from emberd.core.exit_status import EngineExit, explain


def ended(status: int | None, **changes: object) -> EngineExit:
    facts = {"lived_s": 100.0, "asked_to_stop": False, "said_anything": True, "is_macos": False, **changes}
    return EngineExit(status=status, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exit_", "words"),
    [
        (ended(-signal.SIGKILL), "perhaps out of memory"),
        (ended(-signal.SIGKILL, is_macos=True, lived_s=0.01, said_anything=False), "quarantined"),
        (ended(-signal.SIGKILL, is_macos=True, lived_s=50.0, said_anything=False), "perhaps out of memory"),
        (ended(2), "refused an argument"),
        (ended(0), "did not ask it to stop"),
        (ended(-signal.SIGSEGV), "broken or truncated model"),
        (ended(-signal.SIGABRT), "gave up on a failed check"),
        (ended(-signal.SIGABRT, asked_to_stop=True, is_macos=True), "normal on macOS"),
        (ended(-signal.SIGTERM, asked_to_stop=True), "stopped as asked"),
        (ended(0, asked_to_stop=True), "stopped as asked"),
        (ended(None), "adopted"),
        (ended(77), "exit code 77"),
        (ended(-63), "signal 63"),
    ],
)
def test_an_exit_status_is_explained(exit_: EngineExit, words: str):
    assert words in explain(exit_)
