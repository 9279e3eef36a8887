"""`emberd residency` and `emberd touch`, as a person uses them."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from emberd.cli.talk import residency_words
from emberd.core.status import ResidencyStatus
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from pathlib import Path

MAIN = "from emberd.cli.main import main; main()"
LIMIT_S = 60
MIB = 1 << 20


def emberd(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "EMBERD_"))}
    return subprocess.run(
        [sys.executable, "-c", MAIN, *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**clean, "HOME": str(home)},
    )


def as_json(*words: str, home: Path) -> dict[str, Any]:
    said = emberd(*words, "--json", home=home)
    assert said.returncode == 0, said.stderr
    content: dict[str, Any] = json.loads(said.stdout)
    return content


def test_a_touched_model_is_resident_in_every_layer(tmp_path: Path):
    path = tmp_path / "model.gguf"
    summary = write_gguf(path, layers=3)
    assert as_json("touch", str(path), home=tmp_path)["is_complete"]
    seen = as_json("residency", str(path), "--layers", home=tmp_path)
    assert seen["share"] == seen["at_least"] == 1
    assert seen["source"] == "mincore"
    assert [part["name"] for part in seen["layers"]] == [
        "token_embd",
        "blk.0",
        "blk.1",
        "blk.2",
        "output_norm",
        "output",
    ]
    assert all(part["share"] == 1 for part in seen["layers"])
    assert sum(part["total_bytes"] for part in seen["layers"]) == summary.tensor_bytes
    assert "tensors" not in seen


@pytest.mark.skipif(sys.platform != "linux", reason="evicts with posix_fadvise")
def test_a_cold_model_is_told_from_a_warm_one_layer_by_layer(tmp_path: Path):
    path = tmp_path / "model.gguf"
    summary = write_gguf(path, target_bytes=24 * MIB, layers=4)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    seen = as_json("residency", str(path), "--tensors", home=tmp_path)
    assert seen["share"] < 0.5  # the header was read
    last = [part for part in seen["tensors"] if part["name"].startswith(f"blk.{summary.layers - 1}.ffn")]
    assert last
    assert all(part["share"] < 0.1 for part in last)
    touched = as_json("touch", str(path), home=tmp_path)
    assert touched["cold_bytes"] > 12 * MIB
    assert touched["bytes_per_s"] > 0
    # Nobody maps the file any more: a kernel that reclaims early may have begun to.
    assert as_json("residency", str(path), home=tmp_path)["share"] > 0.8


def test_layers_are_bars_and_sizes_for_a_person(tmp_path: Path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    emberd("touch", str(path), home=tmp_path)
    said = emberd("residency", str(path), "--layers", home=tmp_path).stdout
    assert "resident: 100.0%" in said
    line = next(line for line in said.splitlines() if line.startswith("blk.0"))
    assert "100.0%" in line
    assert "MiB" in line


def test_any_file_has_a_residency_but_only_a_gguf_has_layers(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text("not a model\n" * 1000)
    assert as_json("residency", str(path), home=tmp_path)["share"] == 1
    refused = emberd("residency", str(path), "--layers", home=tmp_path)
    assert refused.returncode == 66
    assert "not a GGUF" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_all_parts_of_a_split_model_are_measured(tmp_path: Path):
    names = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for name in names:
        write_gguf(tmp_path / name)
    seen = as_json("residency", str(tmp_path / names[0]), "--layers", home=tmp_path)
    assert seen["files"] == [str(tmp_path / name) for name in names]
    assert seen["total_bytes"] >= 2 * (tmp_path / names[0]).stat().st_size
    (tmp_path / names[1]).unlink()
    missing = emberd("residency", str(tmp_path / names[0]), home=tmp_path)
    assert missing.returncode == 66
    assert names[1] in missing.stderr


def test_a_sample_has_bounds(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * MIB))
    seen = as_json("residency", str(path), "--sample", home=tmp_path)
    assert seen["is_exact"] is False
    assert 0.98 < seen["at_least"] < seen["at_most"] == 1
    assert "between" in emberd("residency", str(path), "--sample", home=tmp_path).stdout


@pytest.mark.parametrize("verb", ["residency", "touch"])
def test_a_mistake_is_one_message_and_an_exit_code(tmp_path: Path, verb: str):
    for words, code, message in (
        ((verb, str(tmp_path / "nothing")), 66, "no such file"),
        ((verb, str(tmp_path)), 66, "not a file"),
        ((verb,), 66, "no file is named"),
    ):
        said = emberd(*words, home=tmp_path)
        assert said.returncode == code
        assert message in said.stderr
        assert "Traceback" not in said.stderr


def test_a_sample_of_layers_is_refused(tmp_path: Path):
    assert emberd("residency", str(tmp_path), "--sample", "--layers", home=tmp_path).returncode == 2


def test_the_settings_model_is_measured_if_no_file_is_named(tmp_path: Path):
    model = tmp_path / "model.gguf"
    write_gguf(model)
    config = tmp_path / "config.toml"
    config.write_text(f'[model]\npath = "{model}"\n[state]\ndirectory = "{tmp_path / "state"}"\n')
    seen = as_json("--config", str(config), "residency", home=tmp_path)
    assert seen["files"] == [str(model)]
    assert seen["engine"] is None


def test_touching_tells_what_it_did(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * MIB))
    said = emberd("touch", str(path), home=tmp_path)
    assert "touched" in said.stdout
    assert "GiB/s" in said.stdout
    assert said.stderr == ""


def test_ctrl_c_ends_a_touch_cleanly_and_a_terminal_sees_progress(tmp_path: Path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(64 << 30)
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "touch", str(path)],
        stdout=subprocess.PIPE,
        stderr=its_end,
        text=True,
        env={**os.environ, "HOME": str(tmp_path), "TERM": "xterm"},
    )
    os.close(its_end)
    shown = b""
    deadline_s = time.monotonic() + LIMIT_S
    while b"B/s" not in shown and time.monotonic() < deadline_s:
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=LIMIT_S)
    os.close(terminal)
    assert process.returncode == 130
    assert "of 64.00 GiB touched" in said


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (
            {"share": None, "message": "the file belongs to another user"},
            "UNKNOWN: the file belongs to another user",
        ),
        (
            {"share": 0.5, "at_least": 0.5, "at_most": 0.5, "resident_bytes": 1 << 30, "total_bytes": 2 << 30},
            "50.0%, 1.00 of 2.00 GiB",
        ),
        (
            {"share": 0.5, "at_least": 0.4, "at_most": 0.6, "resident_bytes": 1 << 30, "total_bytes": 2 << 30},
            "50.0%, 1.00 of 2.00 GiB (between 40.0% and 60.0%)",
        ),
    ],
)
def test_a_residency_is_said_in_a_line(seen: dict[str, Any], expected: str):
    assert residency_words(ResidencyStatus(**seen)) == expected
