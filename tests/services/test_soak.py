"""A short run of scripts/soak-endpoint: nothing is lost while engines die, and nonsense does no harm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))
from asking import Reply, judge  # noqa: E402  # after the path

SCRIPT = SCRIPTS / "soak-endpoint"
LIMIT_S = 240


@pytest.mark.timeout(LIMIT_S + 10)
@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None or sys.platform != "linux",
    reason="systemd-socket-activate is not installed",
)
def test_no_request_is_lost_to_kills_and_restarts_and_nonsense_ends_nothing():
    words = ["--requests", "36", "--kills", "4", "--restarts", "2", "--faults", "2", "--fuzz", "600", "--json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.stdout, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    first, second = figures["kills_and_restarts"], figures["nonsense"]
    assert (first["requests"], first["engine_kills"]) == (36, 4)
    assert (first["emberd_restarts"], first["emberd_upgrades"]) == (1, 1)
    assert sum(first["faults"].values()) == 2
    assert first["failures"] == []
    assert first["told"] <= 4
    assert (second["serves_afterwards"], second["same_engine"]) == (True, True)
    assert (second["exceptions"], second["failures"]) == ([], [])
    assert second["open_files_growth"] < 8


@pytest.mark.parametrize(
    ("text", "ends", "error", "is_cut", "kind"),
    [
        (" ba ke lo", 1, "", False, ""),
        (" ba ke ke lo", 1, "", False, "duplicated"),
        (" ba ke lo ba ke lo", 1, "", False, "duplicated"),
        (" ba ke lo", 2, "", False, "duplicated"),
        (" ba ke", 1, "", False, "text"),
        (" ba ke", 0, "", True, "lost"),
        (" ba ke lo", 0, "", False, "lost"),
        (" ba ke", 0, "it cannot be continued", True, "told"),
        (" ba ba", 0, "it cannot be continued", True, "error"),
        (" ba ke", 0, "it cannot be continued", False, "error"),
        (" ba ke lo", 1, "it cannot be continued", True, "error"),
    ],
)
def test_the_soak_knows_a_lost_a_wrong_and_a_repeated_reply(
    text: str, ends: int, error: str, is_cut: bool, kind: str
):
    said = judge(Reply(text, ends, error), " ba ke lo", is_streamed=True, is_cut=is_cut)
    assert said.partition(":")[0] == kind
