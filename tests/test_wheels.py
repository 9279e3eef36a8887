"""What scripts/wheels concludes from pip's answers; pip itself and the registry are not asked here."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SCRIPT = Path(__file__).parent.parent / "scripts" / "wheels"


def load() -> Any:
    loader = importlib.machinery.SourceFileLoader("wheels", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    wrote, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = wrote
    return module


wheels = load()
MAC = wheels.TARGETS[0]
PINS = """anyio==4.16.0 \\
    --hash=sha256:00 \\
    --hash=sha256:11
psutil==7.2.2 \\
    --hash=sha256:22
typing-extensions==4.16.0 ; python_full_version < '3.13' \\
    --hash=sha256:33
tzdata==2026.6 ; sys_platform == 'win32' \\
    --hash=sha256:44
pyoslog==1.2.0 ; sys_platform == 'darwin' \\
    --hash=sha256:55
"""


def registry(**oldest: str) -> Callable[..., dict[str, str] | None]:
    """A registry in which packages named here have a wheel from that version of macOS on, others everywhere."""

    def ask(wanted: Sequence[str], platforms: Sequence[str], python: str) -> dict[str, str] | None:
        names = [name.partition("==")[0] for name in wanted]
        needs = {name: oldest[name] for name in names if name in oldest}
        known = [platform for platforms in MAC.platforms for platform in platforms]
        if any(known.index(platforms[0]) < [*known, ""].index(need) for need in needs.values()):
            return None
        tag = python.replace(".", "")
        return {
            n: f"{n}-1-cp{tag}-cp{tag}-{needs[n]}.whl" if n in needs else f"{n}-1-py3-none-any.whl" for n in names
        }

    return ask


def test_pins_are_read_without_their_hashes():
    assert [str(each).partition(";")[0].strip() for each in wheels.pins(PINS)] == [
        "anyio==4.16.0",
        "psutil==7.2.2",
        "typing-extensions==4.16.0",
        "tzdata==2026.6",
        "pyoslog==1.2.0",
    ]


def test_all_pins_of_emberd_are_read():
    text = (SCRIPT.parent.parent / "requirements" / "run.txt").read_text(encoding="utf-8")
    assert len(wheels.pins(text)) == sum("==" in line for line in text.splitlines()) > 15


@pytest.mark.parametrize(
    ("target", "python", "names"),
    [
        (0, "3.12", ["anyio", "psutil", "typing-extensions", "pyoslog"]),
        (0, "3.13", ["anyio", "psutil", "pyoslog"]),
        (2, "3.11", ["anyio", "psutil", "typing-extensions"]),
    ],
)
def test_only_what_a_system_and_python_need_is_asked_for(target: int, python: str, names: list[str]):
    wanted = wheels.needed(wheels.pins(PINS), wheels.TARGETS[target], python)
    assert [each.partition("==")[0] for each in wanted] == names


def test_the_oldest_system_on_which_all_are_found_is_told():
    row = wheels.resolve(["anyio==4", "psutil==7"], MAC, "3.12", registry(psutil="macosx_13_0_arm64"))
    assert (row.oldest, row.built, row.missing) == ("macosx_13_0_arm64", ("psutil",), ())
    assert wheels.system_words(row.oldest) == "macOS 13.0"
    assert wheels.exit_code([row]) == 0


def test_what_has_no_wheel_anywhere_is_named_and_fails():
    row = wheels.resolve(["anyio==4", "psutil==7"], MAC, "3.12", registry(psutil=""))
    assert (row.oldest, row.missing) == (None, ("psutil==7",))
    assert wheels.exit_code([row]) == 1
    assert "| macOS arm64 | 3.12 | 1 of 2 | none | none | psutil==7 |" in wheels.as_table([row])


def test_what_is_optional_does_not_fail():
    row = wheels.resolve(["pyoslog==1"], MAC, "3.14", registry(pyoslog=""))
    optional = wheels.Row(**{**{name: getattr(row, name) for name in row.__slots__}, "optional": "macos"})
    assert wheels.exit_code([optional]) == 0
    assert "macOS arm64, optional: macos" in wheels.as_table([optional])


def test_every_system_and_python_is_asked_for():
    asked: list[str] = []
    rows = wheels.all_rows(registry(), asked.append)
    needed = [row for row in rows if not row.optional]
    assert len(needed) == len(wheels.TARGETS) * len(wheels.PYTHONS) == 16
    assert len(asked) == len(rows) > len(needed)


def test_the_names_of_systems_are_pips():
    assert [platforms[0] for platforms in wheels.macos("arm64", "11.0", "26.0")] == [
        "macosx_11_0_arm64",
        "macosx_26_0_arm64",
    ]
    assert "manylinux2014_x86_64" in wheels.manylinux("x86_64")[-1]
    assert wheels.system_words("manylinux2014_x86_64") == "glibc 2.17"
    assert wheels.system_words("manylinux_2_28_x86_64") == "glibc 2.28"


def test_extras_are_those_of_the_project():
    project = '[project.optional-dependencies]\ndemo = ["xllamacpp>=1"]\ndev = ["ruff"]\n'
    assert wheels.extras(project) == {"demo": [Requirement("xllamacpp>=1")]}


def test_pips_report_is_read_and_what_it_cannot_tell_is_an_error():
    url = "https://wheels.example/psutil-7.2.2-cp36-abi3-macosx_11_0_arm64.whl"
    report = {"install": [{"metadata": {"name": "psutil"}, "download_info": {"url": url}}]}
    assert wheels.answer(0, json.dumps(report), "") == {"psutil": "psutil-7.2.2-cp36-abi3-macosx_11_0_arm64.whl"}
    missing = "ERROR: No matching distribution found for pyoslog"
    assert wheels.answer(1, "", missing) is None
    for errors in (
        "ERROR: disk full",
        f"WARNING: Retrying (Retry(total=4)) after connection broken\n{missing}",
        "",
    ):
        with pytest.raises(wheels.CannotAskError):
            wheels.answer(1, "", errors)
