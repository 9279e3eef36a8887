"""The greatest reply of KoboldCPP where none is asked for: what the owner set, in either place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from emberd.core.settings import read
from emberd.engine.http import EngineHttp
from emberd.engine.koboldcpp import KoboldCpp
from emberd.host import ThisHost

if TYPE_CHECKING:
    from pathlib import Path


def default_length(engine: dict[str, Any]) -> int:
    unused: Any = None
    return KoboldCpp(
        read({"engine": engine}, "a test"), ThisHost(), EngineHttp(), unused, unused, unused
    )._default_length()


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ([], 1024),
        (["--defaultgenamt", "4000"], 4000),
        (["--defaultgenamt=4000", "--quiet"], 4000),
        (["--defaultgenamt", "64"], 1024),
        (["--defaultgenamt"], 1024),
        (["--defaultgenamt", "many"], 1024),
    ],
)
def test_the_default_length_is_read_from_the_arguments(arguments: list[str], tokens: int):
    assert default_length({"extra_args": arguments}) == tokens


@pytest.mark.parametrize(
    ("content", "tokens"), [(json.dumps({"defaultgenamt": 2000}), 2000), ("{}", 1024), ("broken", 1024)]
)
def test_the_default_length_is_read_from_the_owners_file(tmp_path: Path, content: str, tokens: int):
    file = tmp_path / "mine.kcpps"
    file.write_text(content)
    assert default_length({"kcpps": str(file)}) == tokens
