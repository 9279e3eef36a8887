"""Fixtures of the host's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from darwin_standin import SOURCE, DarwinStandin, build


@pytest.fixture(scope="session")
def libsystem(tmp_path_factory: pytest.TempPathFactory) -> DarwinStandin:
    """The stand-in of macOS' calls, as the last test left it."""
    library = build(Path(__file__).with_name(SOURCE), tmp_path_factory.mktemp("libsystem"))
    if library is None:
        pytest.skip("no C compiler (cc) to build the stand-in of macOS' calls with")
    return DarwinStandin(library)


@pytest.fixture
def macos(libsystem: DarwinStandin) -> DarwinStandin:
    """The stand-in of macOS' calls, knowing nothing yet."""
    libsystem.reset()
    return libsystem
