"""What llama-server does about paths in its options that are not there: emberd names them before the start."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from emberd.core.engine_files import PATHS, Role
from llama_server_standin import REAL_VARIABLE, real_program

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(real_program() is None, reason=f"{REAL_VARIABLE} names no llama-server")

READS_AT_ONCE = (
    "--chat-template-file",
    "--grammar-file",
    "--json-schema-file",
    "--media-path",
    "--slot-save-path",
    "--ui-config-file",
)


@pytest.mark.parametrize("option", READS_AT_ONCE)
def test_it_ends_for_a_path_that_is_not_there_and_emberd_looks_at_the_same(tmp_path: Path, option: str):
    words = [str(real_program()), option, str(tmp_path / "none"), "--model", str(tmp_path / "none.gguf")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert str(tmp_path / "none") in ended.stdout + ended.stderr
    assert "none.gguf" not in ended.stdout + ended.stderr, "it ended for the model"
    assert PATHS[option] is not Role.MADE
