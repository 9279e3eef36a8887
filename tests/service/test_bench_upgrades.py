"""A short run of scripts/bench-upgrades: nobody is refused, nothing is lost, no model is loaded again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench-upgrades"
LIMIT_S = 100


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in hands its sockets over as systemd does")
def test_upgrades_and_crashes_under_load_refuse_nobody_and_reload_nothing():
    words = ["--upgrades", "2", "--kills", "2", "--clients", "3", "--speed", "10", "--undisturbed-s", "1", "--json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.stdout, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert figures["wrong"] == []
    upgrades, crashes = figures["upgrades"], figures["crashes"]
    assert (upgrades["refused"], upgrades["lost"], upgrades["reloads"], upgrades["engine_adopted"]) == (0, 0, 0, 2)
    assert (crashes["refused"], crashes["reloads"], crashes["engine_adopted"]) == (0, 0, 2)
    assert upgrades["requests"] > 3
    assert figures["undisturbed"]["failures"] == []
