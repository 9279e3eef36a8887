"""Every property list that emberd ships or writes keeps to launchd.plist(5) and steps into none of its traps."""

from __future__ import annotations

import plistlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launchctl_process import FOLDER

sys.path.insert(0, str(FOLDER))

import schema

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Service

SHIPPED = sorted((Path(__file__).parents[2] / "launchd").glob("*.plist"))


def test_there_is_a_list_to_check():
    assert [each.name for each in SHIPPED] == ["io.github.emberd.plist"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_list_is_valid_and_named_after_its_label(path: Path):
    job = plistlib.loads(path.read_bytes())
    assert schema.errors(job) == []
    assert schema.warnings(job) == []
    assert path.name == f"{job['Label']}.plist"


@pytest.mark.parametrize("words", [(), ("--on-demand",), ("--label", "small"), ("--at-login", "--label", "a.b")])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_what_install_would_write_is_valid(make_service: Callable[..., Service], words: tuple[str, ...], host: str):
    service = make_service(endpoint__host=host)
    text = service.do("install", "--print", *words)
    job = plistlib.loads(text.encode())
    assert schema.errors(job) == []
    assert schema.warnings(job) == []
    assert service.launchctl.call("print", f"{service.launchctl.gui}/{job['Label']}").returncode == 113
