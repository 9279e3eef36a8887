"""A short run of scripts/soak-endpoint: nothing is lost while engines die, and nonsense does no harm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak-endpoint"
LIMIT_S = 240


@pytest.mark.timeout(LIMIT_S + 10)
@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None or sys.platform != "linux",
    reason="systemd-socket-activate is not installed",
)
def test_no_request_is_lost_to_kills_and_restarts_and_nonsense_ends_nothing():
    words = ["--requests", "36", "--kills", "4", "--restarts", "2", "--fuzz", "600", "--json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.stdout, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    first, second = figures["kills_and_restarts"], figures["nonsense"]
    assert (first["requests"], first["engine_kills"], first["emberd_restarts"]) == (36, 4, 2)
    assert first["failures"] == []
    assert (second["serves_afterwards"], second["same_engine"]) == (True, True)
    assert (second["exceptions"], second["failures"]) == ([], [])
    assert second["open_files_growth"] < 8
