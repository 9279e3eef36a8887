"""Templates in the wheel, files of services, programs with a time limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emberd.core.errors import ServiceManagerFailed, StateUnusable
from emberd.service.files import file_problems, remove_files, run, template, write_files

ROOT = Path(__file__).parent.parent.parent
TEMPLATES = ("launchd/io.github.emberd.plist", "systemd/emberd.service", "systemd/emberd.socket")


def test_a_missing_template_names_the_remedy():
    with pytest.raises(ServiceManagerFailed, match="not in this installation"):
        template("launchd", "no.plist")


def test_a_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "hangs"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ServiceManagerFailed, match="has not ended within"):
        run("hangs", limit_s=0.2)


def test_a_program_that_cannot_be_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken").write_bytes(b"\x00")
    (tmp_path / "broken").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceManagerFailed, match="cannot run"):
        run("broken")
    with pytest.raises(ServiceManagerFailed, match="not found on PATH"):
        run("absent")


def test_files_are_written_for_everybody_to_read_whatever_the_umask(tmp_path: Path):
    path = tmp_path / "a" / "b.plist"
    old = os.umask(0o077)
    try:
        write_files({path: "text"})
    finally:
        os.umask(old)
    assert file_problems(path) == ()
    path.chmod(0o664)
    assert "mode 0664" in file_problems(path)[0]
    path.with_name(".b.plist.7.tmp").touch()
    assert remove_files([path]) is True
    assert remove_files([path]) is False
    assert list(path.parent.iterdir()) == []


def test_a_file_of_another_user_is_named(tmp_path: Path):
    if os.geteuid():
        pytest.skip("needs root")
    path = tmp_path / "x.plist"
    write_files({path: "text"})
    os.chown(path, 1234, -1)
    assert "belongs to user 1234" in file_problems(path)[0]


def test_a_folder_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StateUnusable):
        write_files({tmp_path / "file" / "x.plist": "text"})
