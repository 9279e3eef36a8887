"""What launchd and systemd need alike: templates, files, running their programs."""

from __future__ import annotations

import contextlib
import os
import plistlib
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING
from xml.parsers.expat import ExpatError

from emberd.core.errors import ServiceManagerFailed, StateUnusable
from emberd.host.files import remove_leftovers, write_atomically
from emberd.host.posix import ask_program
from emberd.service import unit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FILE_MODE = 0o644
"""launchd refuses files that others may write; both managers' files hold no secret."""
RUN_LIMIT_S = 30.0
_PACKAGE = Path(__file__).parent.parent


def template(folder: str, name: str) -> str:
    """Return the text of a template: of the installed package, or of the checkout that an editable install uses.

    Raises:
        ServiceManagerFailed: the package is not complete.
    """
    for place in (_PACKAGE, _PACKAGE.parent.parent):
        path = place / folder / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise ServiceManagerFailed(f"{folder}/{name} is not in this installation of emberd", "Install emberd again.")


def run(program: str, *words: str, limit_s: float = RUN_LIMIT_S) -> subprocess.CompletedProcess[str]:
    """Run a service manager's program, looked for on PATH, and return what it printed.

    Raises:
        ServiceManagerFailed: it is not there, or did not end in time.
    """
    path = shutil.which(program)
    if path is None:
        raise ServiceManagerFailed(
            f"{program} was not found on PATH", "Without launchd or systemd, run emberd by hand: emberd run."
        )
    try:
        return ask_program((path, *words), limit_s)
    except subprocess.TimeoutExpired as error:
        raise ServiceManagerFailed(
            f"{program} {' '.join(words)} has not ended within {limit_s:.0f} s", "Try again."
        ) from error
    except OSError as error:
        raise ServiceManagerFailed(f"cannot run {path}: {error.strerror}", f"Mend {program}.") from error


def said(ran: subprocess.CompletedProcess[str]) -> str:
    """Return all that a program printed, in one line."""
    return " ".join(f"{ran.stderr} {ran.stdout}".split())


def write_files(texts: Mapping[Path, str]) -> None:
    """Write files atomically with mode 0644, make their folders, and remove what an interrupted write has left.

    Raises:
        StateUnusable: a folder or file cannot be written; each old file is untouched or replaced as a whole.
    """
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateUnusable(
                f"cannot make {path.parent}: {error.strerror}", "Mend the owner or mode of the folder above it."
            ) from error
        remove_leftovers(path)
        write_atomically(path, text, FILE_MODE)


def remove_files(paths: Sequence[Path]) -> bool:
    """Remove files and what interrupted writes have left; False if there was nothing.

    Raises:
        StateUnusable: one cannot be removed.
    """
    was_there = False
    for path in paths:
        remove_leftovers(path)
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StateUnusable(
                f"cannot remove {path}: {error.strerror}", "Mend the owner or mode of its folder."
            ) from error
        was_there = True
    return was_there


def file_problems(path: Path) -> tuple[str, ...]:
    """Return what is wrong with a file's owner and mode, in words; empty if it is right or not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    except OSError as error:
        return (f"{path} cannot be looked at: {error.strerror}",)
    wrong = []
    if found.st_uid != os.geteuid():
        wrong.append(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if (mode := stat.S_IMODE(found.st_mode)) != FILE_MODE:
        wrong.append(f"{path} has mode {mode:04o}, not {FILE_MODE:04o}")
    return tuple(wrong)


def installed_program(paths: Sequence[Path]) -> Path | None:
    """Return the program that an installed property list or unit starts, None if none tells it."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, ExpatError):
            if path.suffix == ".plist":
                return Path(plistlib.loads(path.read_bytes())["ProgramArguments"][0])
            values = unit.assignments(path.read_text(encoding="utf-8"))
            return Path(unit.words(values["Service.ExecStart"][0])[0])
    return None


def has_leftovers(path: Path) -> bool:
    """Return True if an interrupted write has left a temporary file."""
    return any(path.parent.glob(f".{path.name}.*.tmp"))
