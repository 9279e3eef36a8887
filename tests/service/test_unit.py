"""The systemd units: filling in, quoting, comparing; and systemd's own opinion of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.settings import Settings
from emberd.service.unit import (
    assignments,
    differences,
    fill_service,
    fill_socket,
    read_show,
    starts_at_login,
    variable,
    words,
)
from emberd.service.wanted import WantedService, stop_limit_s

ROOT = Path(__file__).parent.parent.parent
SERVICE = (ROOT / "systemd" / "emberd.service").read_text(encoding="utf-8")
SOCKET = (ROOT / "systemd" / "emberd.socket").read_text(encoding="utf-8")
ANALYZE = shutil.which("systemd-analyze") or ""
WANTED = WantedService(
    label="io.github.emberd",
    program=("/usr/bin/env", "-P", "--config", '/home/me/a b%h "$c"\\d.toml', "run"),
    host="127.0.0.1",
    port=5002,
    log="/dev/null",
    stop_limit_s=95,
    starts_at_login=True,
    environment={"XDG_STATE_HOME": "/home/me/my state"},
)


def test_filling_in_keeps_the_comments_and_sets_the_rest():
    text = fill_service(SERVICE, WANTED)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in SERVICE.splitlines() if line.startswith("#")
    ]
    values = assignments(text)
    assert values["Service.TimeoutStopSec"] == ("95",)
    assert words(values["Service.ExecStart"][0]) == list(WANTED.program)
    assert variable(values, "EMBERD_SERVICE") == "io.github.emberd"
    assert variable(values, "XDG_STATE_HOME") == "/home/me/my state"
    assert variable(values, "HOME") is None
    assert values["Unit.Requires"] == values["Unit.After"] == ("emberd.socket",)
    assert assignments(fill_socket(SOCKET, WANTED))["Socket.ListenStream"] == ("127.0.0.1:5002", "[::1]:5002")
    alone = replace(WANTED, host="localhost", has_ipv6=False)
    assert assignments(fill_socket(SOCKET, alone))["Socket.ListenStream"] == ("127.0.0.1:5002",)
    assert assignments(fill_socket(SOCKET, replace(WANTED, host="::1")))["Socket.ListenStream"] == ("[::1]:5002",)


def test_a_service_on_demand_cannot_be_enabled():
    text = fill_service(SERVICE, replace(WANTED, starts_at_login=False))
    assert not starts_at_login(text)
    assert starts_at_login(SERVICE)
    assert differences(text, fill_service(SERVICE, WANTED)) == ("Install.WantedBy",)


def test_an_instance_has_units_of_its_own_that_belong_together():
    values = assignments(fill_service(SERVICE, replace(WANTED, label="io.github.emberd.small")))
    assert values["Unit.Requires"] == values["Unit.After"] == ("emberd-small.socket",)
    assert "small" in values["Unit.Description"][0]


def test_the_templates_say_the_defaults():
    values = assignments(SERVICE)
    assert values["Service.TimeoutStopSec"] == (str(stop_limit_s(Settings().lifecycle)),)
    endpoint = Settings().endpoint
    assert assignments(SOCKET)["Socket.ListenStream"] == (
        f"{endpoint.host}:{endpoint.port}",
        f"[::1]:{endpoint.port}",
    )
    assert values["Service.Type"] == ("notify",)
    assert values["Service.KillMode"] == ("process",)


@given(
    st.lists(
        st.text(
            st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp", "Zs")) | st.just(" "), min_size=1
        ),
        min_size=1,
    )
)
def test_a_command_line_is_read_back_as_it_was(program: list[str]):
    text = fill_service(SERVICE, replace(WANTED, program=tuple(program)))
    assert words(assignments(text)["Service.ExecStart"][0]) == program


def test_differences_are_named_by_section_and_key_and_comments_do_not_count():
    text = fill_service(SERVICE, WANTED)
    assert differences(text + "# a comment\n", text) == ()
    assert differences(text.replace("RestartSec=1\n", "RestartSec=9\n"), text) == ("Service.RestartSec",)


def test_what_systemctl_shows_is_read():
    assert read_show("MainPID=4\nExecStart={ path=/x ; argv[]=y }\n\n") == {
        "MainPID": "4",
        "ExecStart": "{ path=/x ; argv[]=y }",
    }


@pytest.mark.skipif(not ANALYZE, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("label", ["io.github.emberd", "io.github.emberd.small"])
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path, label: str):
    wanted = replace(WANTED, label=label)
    name = "emberd" if label == WANTED.label else "emberd-small"
    files = [tmp_path / f"{name}.service", tmp_path / f"{name}.socket"]
    files[0].write_text(fill_service(SERVICE, wanted))
    files[1].write_text(fill_socket(SOCKET, wanted))
    assert verified(tmp_path, files) == (0, "")
    files[0].write_text(fill_service(SERVICE, wanted).replace("WatchdogSec=", "WatchDogSec="))
    assert "WatchDogSec" in verified(tmp_path, files)[1]


def verified(folder: Path, files: list[Path]) -> tuple[int, str]:
    """Return systemd's verdict on user units."""
    ran = subprocess.run(
        [ANALYZE, "--user", "--man=no", "verify", *files],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)},
    )
    return ran.returncode, re.sub(r"^.*man page.*\n", "", ran.stderr, flags=re.MULTILINE)
