"""Starts a job's process as launchd would, and opens its sockets.

What macOS has and this system has not: launch_activate_socket(3). The job is given its sockets as systemd gives
them, by sd_listen_fds(3), each under its key of `Sockets`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PATH = "/usr/bin:/bin:/usr/sbin:/sbin"
FIRST_SOCKET = 3
_SETUP_FAILED = texts.EX_CONFIG
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIMITS = {
    "Core": "RLIMIT_CORE",
    "CPU": "RLIMIT_CPU",
    "Data": "RLIMIT_DATA",
    "FileSize": "RLIMIT_FSIZE",
    "MemoryLock": "RLIMIT_MEMLOCK",
    "NumberOfFiles": "RLIMIT_NOFILE",
    "NumberOfProcesses": "RLIMIT_NPROC",
    "ResidentSetSize": "RLIMIT_RSS",
    "Stack": "RLIMIT_STACK",
}


def environment_of(job: Mapping[str, Any]) -> dict[str, str]:
    """Return all that the job gets: launchd's own variables and those of the list; nothing of a shell."""
    person = pwd.getpwuid(os.getuid())
    return {
        "PATH": PATH,
        "HOME": os.environ.get("HOME", person.pw_dir),
        "USER": person.pw_name,
        "LOGNAME": person.pw_name,
        "SHELL": person.pw_shell or "/bin/sh",
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),  # noqa: S108  # of the user, as launchd's own
        **job.get("EnvironmentVariables", {}),
        "XPC_SERVICE_NAME": job["Label"],
        "XPC_FLAGS": "0x0",
    }


def start(job: Mapping[str, Any], sockets: Sequence[tuple[str, socket.socket]]) -> int:
    """Start the job and return its pid. What it lacks to start shows as its exit code 78."""
    pid = os.fork()
    if pid == 0:
        try:
            _become(job, sockets)
        except BaseException as error:  # noqa: BLE001  # nothing may run on in the copy
            os.write(2, f"{job['Label']}: cannot start: {error!r}\n".encode())
            os._exit(_SETUP_FAILED)
    # Both sides set it: whoever is first.
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    return pid


def _become(job: Mapping[str, Any], sockets: Sequence[tuple[str, socket.socket]]) -> NoReturn:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        # The stand-in's own: when it is killed, no job outlives it.
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    _limit(job)
    if "Nice" in job:
        os.setpriority(os.PRIO_PROCESS, 0, job["Nice"])
    mask = job.get("Umask", 0o022)
    os.umask(int(mask, 8) if isinstance(mask, str) else mask)
    os.chdir(job.get("WorkingDirectory", "/"))
    copies = _standard_files(job)
    environment = environment_of(job)
    if sockets:
        environment |= {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(sockets)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in sockets),
        }
    # Copies above all targets first: a source may stand where another is to go.
    top = FIRST_SOCKET + len(sockets)
    sources = [*copies, *(each.fileno() for _, each in sockets)]
    high = [_above(each, top) for each in sources]
    for target, each in enumerate(high):
        os.dup2(each, target, inheritable=True)
    os.closerange(top, 4096)
    arguments = job.get("ProgramArguments") or [job["Program"]]
    os.execve(job.get("Program", arguments[0]), arguments, environment)  # noqa: S606  # launchd uses no shell


def _above(descriptor: int, floor: int) -> int:
    made = []
    while True:
        made.append(os.dup(descriptor))
        if made[-1] >= floor:
            break
    for each in made[:-1]:
        os.close(each)
    return made[-1]


def _standard_files(job: Mapping[str, Any]) -> list[int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return [
        os.open(job.get("StandardInPath", os.devnull), os.O_RDONLY),
        os.open(job.get("StandardOutPath", os.devnull), flags, 0o666),
        os.open(job.get("StandardErrorPath", os.devnull), flags, 0o666),
    ]


def _limit(job: Mapping[str, Any]) -> None:
    soft = {"NumberOfFiles": texts.OPEN_FILES, **job.get("SoftResourceLimits", {})}
    hard = job.get("HardResourceLimits", {})
    for key, name in _LIMITS.items():
        number = getattr(resource, name)
        old_soft, old_hard = resource.getrlimit(number)
        new_hard = hard.get(key, old_hard)
        new_soft = soft.get(key, old_soft)
        if new_hard != resource.RLIM_INFINITY:
            new_soft = new_hard if new_soft == resource.RLIM_INFINITY else min(new_soft, new_hard)
        # launchd is root and may raise; the stand-in may not where it is not.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(number, (new_soft, new_hard))


def open_sockets(job: Mapping[str, Any]) -> tuple[list[tuple[str, socket.socket]], list[str]]:
    """Open what `Sockets` asks for; return the sockets by key, and what could not be opened.

    A socket that cannot be opened does not keep the job from being loaded: the job then misses it.
    """
    opened: list[tuple[str, socket.socket]] = []
    failures: list[str] = []
    for key, entries in job.get("Sockets", {}).items():
        for entry in entries if isinstance(entries, list) else [entries]:
            try:
                opened += [(key, each) for each in _open(entry)]
            except OSError as error:
                failures.append(f"socket {key}: {error.strerror or error}")
    return opened, failures


def _open(entry: Mapping[str, Any]) -> list[socket.socket]:
    kind = {"dgram": socket.SOCK_DGRAM, "seqpacket": socket.SOCK_SEQPACKET}.get(
        entry.get("SockType", "stream"), socket.SOCK_STREAM
    )
    if "SockPathName" in entry:
        place = entry["SockPathName"]
        Path(place).unlink(missing_ok=True)
        addresses: list[tuple[int, Any]] = [(socket.AF_UNIX, place)]
    else:
        families = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
        found = socket.getaddrinfo(
            entry.get("SockNodeName"),
            str(entry.get("SockServiceName", 0)),
            family=families.get(entry.get("SockFamily", ""), socket.AF_UNSPEC),
            type=kind,
            flags=socket.AI_PASSIVE,
        )
        addresses = [(each[0], each[4]) for each in found]
    made: list[socket.socket] = []
    try:
        for family, address in addresses:
            each = socket.socket(family, kind)
            made.append(each)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if family != socket.AF_UNIX:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(address)
            if family == socket.AF_UNIX and "SockPathMode" in entry:
                Path(address).chmod(entry["SockPathMode"])
            if kind != socket.SOCK_DGRAM and entry.get("SockPassive", True):
                each.listen(texts.BACKLOG)
    except OSError:
        for each in made:
            each.close()
        raise
    return made
