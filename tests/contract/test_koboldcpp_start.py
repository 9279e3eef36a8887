from __future__ import annotations

import json
import os
import re
import socket
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from contract.targets import START_S, Target, without_lock_permission
from emberd.core.load_facts import LoadFacts
from emberd.engine.llama_log import note
from engine_process import free_port, is_port_open, wait_until
from synthetic_gguf import write_not_gguf, write_truncated, write_unknown_architecture

if TYPE_CHECKING:
    from pathlib import Path

LOCKED_SHARE = 0.9
"""Part of the file that must be locked; the header and a remainder may not be."""


def locked_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:  # noqa: PTH123 - a proc file
        found = re.search(r"VmLck:\s+(\d+) kB", status.read())
    assert found
    return int(found[1]) * 1024


def test_the_port_is_closed_until_the_model_is_loaded(target: Target, model: Path) -> None:
    port = free_port()
    arguments = ("--model", model, "--host", "127.0.0.1", "--port", str(port), "--gpulayers", "0")
    with target.start(*arguments, STANDIN_LOAD_SECONDS="0.3") as process:
        process.wait_for_output(
            "Loading Text Model: " if not target.is_old else "Loading model: ", within_s=START_S
        )
        assert not is_port_open(port)
        wait_until(lambda: is_port_open(port), within_s=START_S)
        process.wait_for_output("Load Text Model OK: True", within_s=2)


def test_an_answer_comes_within_moments_of_the_invitation_to_connect(target: Target, model: Path) -> None:
    port = free_port()
    arguments = ("--model", model, "--host", "127.0.0.1", "--port", str(port), "--gpulayers", "0")
    with target.start(*arguments) as process:
        invitation = f"Please connect to custom endpoint at http://127.0.0.1:{port}"
        process.wait_for_output(invitation, within_s=START_S)
        process.wait_for_answer(f"http://127.0.0.1:{port}/api/v1/model", within_s=2)
        process.wait_for_output("IPv6 Socket Failed to Bind.", within_s=2)


def test_the_loader_says_whether_the_file_is_mapped(new_target: Target, model: Path) -> None:
    for flags, word in (((), "false"), (("--usemmap",), "true")):
        with new_target.serving(model, *flags) as server:
            line = f"load_tensors: loading model tensors, this can take a while... (mmap = {word}"
            assert line in server.process.stderr
            told = [note(LoadFacts(), each).is_mapped for each in server.process.stderr.splitlines()]
            assert (word == "true") in told


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_weights_are_file_pages_when_mapped_and_anonymous_otherwise(target: Target, model: Path) -> None:
    mapped, copied = ([], ["--nommap"]) if target.is_old else (["--usemmap"], [])
    size = model.stat().st_size
    anonymous = {}
    for name, flags in (("mapped", mapped), ("copied", copied)):
        with target.serving(model, *flags) as server:
            server.generate("ba ke", 1)
            full = psutil.Process(server.process.pid).memory_info()
            anonymous[name] = full.rss - full.shared
    assert anonymous["copied"] - anonymous["mapped"] > size / 2


@pytest.mark.parametrize(
    ("writer", "code_old", "code_new", "sign"),
    [
        (None, 2, 2, "Cannot find text model file"),
        (write_not_gguf, 3, 3, "Could not load text model"),
        (write_truncated, -11, -11, "model is corrupted or incomplete"),
        (write_unknown_architecture, -11, -11, "unknown model architecture"),
    ],
    ids=["missing", "no-gguf", "truncated", "unknown-architecture"],
)
def test_a_bad_model_ends_the_process_with_its_code(
    target: Target, tmp_path: Path, writer: object, code_old: int, code_new: int, sign: str
) -> None:
    path = tmp_path / "bad.gguf"
    if callable(writer):
        writer(path)
    with target.start("--model", path, "--port", str(free_port()), "--host", "127.0.0.1") as process:
        assert process.wait_for_exit(within_s=START_S) == (code_old if target.is_old else code_new)
        assert sign in process.output


def test_a_broken_model_is_explained_by_one_line_on_stderr(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    write_unknown_architecture(path)
    with target.start("--model", path, "--port", str(free_port())) as process:
        process.wait_for_exit(within_s=START_S)
        assert "llama_model_load: error loading model: " in process.stderr


def test_an_unknown_flag_is_a_usage_error_on_stderr(target: Target, model: Path) -> None:
    with target.start("--model", model, "--nosuchflag") as process:
        assert process.wait_for_exit() == 2
        assert process.stderr.rstrip().endswith("koboldcpp.py: error: unrecognized arguments: --nosuchflag")


def test_the_flag_for_mapping_is_known_to_newer_versions_only(target: Target, tmp_path: Path) -> None:
    with target.start("--model", tmp_path / "missing.gguf", "--usemmap") as process:
        assert process.wait_for_exit(within_s=START_S) == 2
        assert ("unrecognized arguments: --usemmap" in process.stderr) == target.is_old


def test_two_backends_exclude_each_other(target: Target, model: Path) -> None:
    with target.start("--model", model, "--noblas", "--usecpu") as process:
        assert process.wait_for_exit() == 2
        assert "error: argument --usecpu: not allowed with argument --noblas" in process.stderr


def test_a_value_out_of_range_is_a_usage_error(target: Target, model: Path) -> None:
    with target.start("--model", model, "--contextsize", "255") as process:
        assert process.wait_for_exit() == 2
        assert "argument --contextsize" in process.stderr


def test_help_shows_the_known_flags_but_not_the_hidden_ones(target: Target) -> None:
    with target.start("--help") as process:
        assert process.wait_for_exit() == 0
        assert "--usemlock" in process.stdout
        assert "--noblas" not in process.stdout
        assert ("--nommap" in process.stdout) == target.is_old
        assert ("--usemmap" in process.stdout) != target.is_old


def test_version_is_printed_alone_by_newer_versions(target: Target) -> None:
    with target.start("--version") as process:
        if target.is_old:
            assert process.wait_for_exit() == 2
        else:
            assert process.wait_for_exit() == 0
            assert process.stdout.splitlines()[-1].startswith(".".join(map(str, target.version)))


def test_aliases_are_known_to_newer_versions_only(target: Target, tmp_path: Path) -> None:
    missing = tmp_path / "missing.gguf"
    with target.start("--model", missing, "--mlock", "-c", "512", "-ngl", "0") as process:
        assert process.wait_for_exit(within_s=START_S) == 2
        assert ("error: " in process.stderr) == target.is_old


def test_the_folk_recipe_starts_and_locks_the_model(target: Target, model: Path) -> None:
    with target.serving(model, "--usemlock", "--noblas", "--gpulayers") as server:
        assert server.generate("ba ke", 2).strip()
        if sys.platform == "linux" and "failed to mlock" not in server.process.stderr:
            assert locked_bytes(server.process.pid) > LOCKED_SHARE * model.stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="needs tools that take permissions away")
def test_a_refused_lock_is_only_a_warning(target: Target, model: Path) -> None:
    command = without_lock_permission(target.command, 1 << 20)
    if command is None:
        pytest.skip("prlimit or setpriv is missing")
    weak = Target(target.name, command, target.version, target.environment)
    with weak.serving(model, "--usemlock") as server:
        pattern = (
            r"warning: failed to mlock \d+-byte buffer \(after previously locking \d+ bytes\): Cannot allocate"
        )
        assert re.search(pattern, server.process.stderr)
        assert "Try increasing RLIMIT_MEMLOCK" in server.process.stderr
        assert server.generate("ba ke", 1)


def test_on_a_taken_port_the_old_and_the_newest_exit_and_1_104_spins_for_ever(target: Target, model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ("--model", model, "--host", "127.0.0.1", "--port", str(port), "--gpulayers", "0")
        with target.start(*arguments) as process:
            process.wait_for_output(f"Warning: Port {port} already appears to be in use", within_s=START_S)
            if target.is_old:
                assert process.wait_for_exit() == 1
                assert "Address already in use" in process.stderr
                return
            process.wait_for_output("IPv4 Socket Failed to Bind.")
            if target.is_batching:
                process.wait_for_output("Both IPv4 and IPv6 cannot bind")
                assert process.wait_for_exit() == 0
                return
            child = psutil.Process(process.pid)
            before = sum(child.cpu_times()[:2])
            wait_until(lambda: sum(child.cpu_times()[:2]) > before + 0.5, what=lambda: "it spins")
            assert process.exit_code is None


def test_a_settings_file_wins_unless_the_exact_flag_is_given(target: Target, model: Path, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "settings.kcpps"
    settings = {"model_param": str(model), "port": 1, "contextsize": 512, "gpulayers": 0, "nosuchkey": 1}
    config.write_text(json.dumps(settings | {"onready": "echo from-the-file"}), encoding="utf-8")
    words = ("--config", config, "--host", "127.0.0.1", "--port", str(port), "--contextsize=1024")
    with target.start(*words) as process:
        url = f"http://127.0.0.1:{port}"
        process.wait_for_answer(url + "/api/v1/model", within_s=START_S)
        process.wait_for_output("Overriding Config Value: port", within_s=2)
        assert "Overriding Config Value: contextsize" not in process.output
        assert "contextsize=512" in process.output


def test_a_missing_settings_file_is_an_error(target: Target, tmp_path: Path) -> None:
    with target.start("--config", tmp_path / "missing.kcpps") as process:
        assert process.wait_for_exit(within_s=START_S) == 2
        assert "Specified kcpp config file invalid or not found." in process.stdout


def test_without_a_model_it_exits_or_serves_as_told(target: Target) -> None:
    port = free_port()
    with target.start("--nomodel", "--host", "127.0.0.1", "--port", str(port)) as process:
        process.wait_for_answer(f"http://127.0.0.1:{port}/api/v1/model", within_s=START_S)
    if "DISPLAY" not in os.environ and sys.platform == "linux":
        with target.start("--port", str(port)) as process:
            assert process.wait_for_exit(within_s=START_S) == 2
