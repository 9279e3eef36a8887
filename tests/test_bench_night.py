"""A short run of scripts/bench-night: a night is decided, kept and told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench-night"


def test_a_night_that_is_kept_warm_is_told_by_the_history_and_so_is_one_that_is_not():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--days", "1", "--views", "0", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    warm, cold = figures["night_kept_warm"], figures["night_not_kept_warm"]
    assert (warm["minutes"], cold["minutes"]) == (480, 480)
    assert (warm["passes"] > 0, cold["passes"]) == (True, 0)
    assert warm["warm_share"] > cold["warm_share"]
    assert warm["lost_gib"] < cold["lost_gib"]
