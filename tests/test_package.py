"""The wheel and the source archive: what is in them, and what an index would say of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEMPLATES = ("launchd/io.github.emberd.plist", "systemd/emberd.service", "systemd/emberd.socket")
SOURCES = ("daemon/", "docs/", "launchd/", "requirements/", "scripts/", "systemd/", "tests/")


def build(kind: str, source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=100)
    [archive] = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sources"))


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def package_files() -> set[str]:
    package = ROOT / "daemon" / "emberd"
    return {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_the_package_its_templates_and_nothing_else(wheel: Path):
    inside = {name for name in names_in_wheel(wheel) if ".dist-info/" not in name}
    assert inside == package_files() | {f"emberd/{name}" for name in TEMPLATES}


def test_the_wheel_has_the_licence_and_the_command(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        [folder] = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "emberd = emberd.cli.main:main" in archive.read(f"{folder}/entry_points.txt").decode()


def test_the_templates_are_found_without_the_checkout(wheel: Path, tmp_path: Path):
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    code = "from emberd.service.files import template; print(template(*{!r}.split('/')), end='')"
    for name in TEMPLATES:
        said = subprocess.run(
            [sys.executable, "-c", code.format(name)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        ).stdout
        assert said == (ROOT / name).read_text(encoding="utf-8")


def test_the_source_archive_has_what_scripts_and_tests_need_and_nothing_of_a_workplace(sources: Path):
    with tarfile.open(sources) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    known = {".gitignore", "LICENSE", "PKG-INFO", "pyproject.toml", *(path.name for path in ROOT.glob("*.md"))}
    assert {name for name in inside if not name.startswith(SOURCES)} == known
    assert {f"daemon/{name}" for name in package_files()} <= inside
    assert {"scripts/test", "scripts/demo", "requirements/run.txt", "tests/conftest.py"} <= inside
    assert not [name for name in inside if "__pycache__" in name or ".egg-info" in name]


def test_a_wheel_made_from_the_source_archive_is_the_same(wheel: Path, sources: Path, tmp_path: Path):
    with tarfile.open(sources) as archive:
        archive.extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    again = build("wheel", folder, tmp_path / "wheel")
    assert names_in_wheel(again) == names_in_wheel(wheel)


def test_an_index_would_accept_both(wheel: Path, sources: Path):
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sources)]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert said.returncode == 0, said.stdout + said.stderr
