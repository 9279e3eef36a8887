"""An engine's program as a doctor sees it, without starting it."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from emberd.core.health_facts import EngineHealth, EngineProblem

if TYPE_CHECKING:
    from pathlib import Path

    from emberd.core.ports import Host

_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64"}
"""ELF e_machine (elf.h)."""
_MACH_O = {0x01000007: "x86_64", 0x0100000C: "arm64"}
"""Mach-O cputype (<mach/machine.h>)."""
_HEAD_BYTES = 4096
_MOST_SLICES = 16
_NOEXEC = getattr(os, "ST_NOEXEC", 0)
"""Of statvfs(3), on Linux; macOS has no such flag."""


def look_at_program(path: Path, host: Host, machine: str | None) -> EngineHealth:
    """Judge an engine's file.

    Args:
        path: the program, a folder with a checkout, or its script.
        host: knows of quarantine.
        machine: the computer's processor in uname's words, None if unknown.
    """
    if not path.exists():
        return EngineHealth(EngineProblem.MISSING, f"{path} does not exist", "Set engine.path.")
    if path.is_dir() or path.suffix == ".py":
        return EngineHealth()
    return _may_execute(path, host) or _is_of_this_processor(path, machine) or EngineHealth()


def _may_execute(path: Path, host: Host) -> EngineHealth | None:
    if os.statvfs(path).f_flag & _NOEXEC:
        words = f"{path} is on a volume that is mounted noexec"
        return EngineHealth(EngineProblem.NOT_EXECUTABLE, words, "Copy it to another volume and set engine.path.")
    if not os.access(path, os.X_OK):
        return EngineHealth(EngineProblem.NOT_EXECUTABLE, f"{path} is not executable", f"chmod +x {path}")
    if host.quarantine(path):
        words = (
            f"{path} was downloaded and not approved: started in the background it would be killed without a word"
        )
        return EngineHealth(EngineProblem.QUARANTINED, words, f"xattr -d com.apple.quarantine {path}")
    return None


def _is_of_this_processor(path: Path, machine: str | None) -> EngineHealth | None:
    built_for = machines_of(path)
    if not built_for or not machine or machine in built_for:
        return None
    words = f"{path} is built for {' and '.join(sorted(built_for))}, this computer is {machine}"
    if machine == "arm64":
        words += ": at best it runs under Rosetta, without Metal"
    return EngineHealth(EngineProblem.WRONG_ARCHITECTURE, words, "Download the build for this computer.")


def machines_of(path: Path) -> frozenset[str]:
    """Return the processors that a program is built for, in uname's words; none if it is no ELF and no Mach-O.

    Layouts: elf(5); <mach-o/loader.h>, <mach-o/fat.h>.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    found: set[str | None] = set()
    if head[:4] == b"\x7fELF" and len(head) > 20:  # noqa: PLR2004  # e_machine's end
        found = {_MACHINES.get(struct.unpack_from("<H", head, 18)[0])}
    elif head[:4] == b"\xcf\xfa\xed\xfe":
        found = {_MACH_O.get(struct.unpack_from("<I", head, 4)[0])}
    elif head[:4] == b"\xca\xfe\xba\xbe":
        count = min(struct.unpack_from(">I", head, 4)[0], _MOST_SLICES)
        found = {_MACH_O.get(struct.unpack_from(">I", head, 8 + 20 * number)[0]) for number in range(count)}
    return frozenset(each for each in found if each)
