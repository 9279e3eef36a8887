"""The property list of emberd's launchd job: filled in from the template, checked, compared with the installed one.

Pure. Keys and types are those of launchd.plist(5).
"""

from __future__ import annotations

import ipaddress
import plistlib
from typing import TYPE_CHECKING, Any
from xml.parsers.expat import ExpatError

from emberd.host.activation import SOCKET_NAME
from emberd.service.wanted import LABEL_VARIABLE, Installed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from emberd.service.wanted import WantedService

_HEAD = (
    "<!-- Written by `emberd install`: change the settings and run it again. `emberd uninstall` removes it. -->\n"
)
_LIMITS = {
    "Core",
    "CPU",
    "Data",
    "FileSize",
    "MemoryLock",
    "NumberOfFiles",
    "NumberOfProcesses",
    "ResidentSetSize",
    "Stack",
}
_SOCKET_KEYS = {
    "SockNodeName": str,
    "SockServiceName": str,
    "SockFamily": str,
    "SockType": str,
    "SockPassive": bool,
    "SockProtocol": str,
    "SockPathName": str,
    "SockPathMode": int,
}
_KEEP_ALIVE = {"SuccessfulExit": bool, "Crashed": bool, "PathState": dict, "OtherJobEnabled": dict}
_SESSIONS = {"Aqua", "Background", "LoginWindow", "StandardIO", "System"}
_PROCESS_TYPES = {"Background", "Standard", "Adaptive", "Interactive"}
_TYPES: dict[str, tuple[type, ...]] = {
    "AbandonProcessGroup": (bool,),
    "Disabled": (bool,),
    "EnvironmentVariables": (dict,),
    "ExitTimeOut": (int,),
    "HardResourceLimits": (dict,),
    "KeepAlive": (bool, dict),
    "Label": (str,),
    "LimitLoadToSessionType": (str, list),
    "ProcessType": (str,),
    "ProgramArguments": (list,),
    "RunAtLoad": (bool,),
    "Sockets": (dict,),
    "SoftResourceLimits": (dict,),
    "StandardErrorPath": (str,),
    "StandardOutPath": (str,),
    "ThrottleInterval": (int,),
    "Umask": (int, str),
    "WorkingDirectory": (str,),
}
"""The keys that emberd's job may have. Others exist; none of them belongs into it."""


def fill(template: Mapping[str, Any], wanted: WantedService) -> dict[str, Any]:
    """Return the template with label, program, port, times and paths of `wanted`."""
    job = dict(template)
    job["Label"] = wanted.label
    job["ProgramArguments"] = list(wanted.program)
    job["EnvironmentVariables"] = {
        **template["EnvironmentVariables"],
        **wanted.environment,
        LABEL_VARIABLE: wanted.label,
    }
    job["ExitTimeOut"] = wanted.stop_limit_s
    listeners = [_listener(address, wanted.port) for address in wanted.addresses]
    job["Sockets"] = {SOCKET_NAME: listeners if len(listeners) > 1 else listeners[0]}
    job["StandardOutPath"] = job["StandardErrorPath"] = wanted.log
    if not wanted.starts_at_login:
        job["RunAtLoad"] = False
        del job["KeepAlive"]  # it implies RunAtLoad; the next connection starts the job again
    return job


def _listener(address: str, port: int) -> dict[str, str]:
    listener = {"SockNodeName": address, "SockServiceName": str(port)}
    if family := _family(address):
        listener["SockFamily"] = family
    return {**listener, "SockType": "stream"}


def _family(host: str) -> str | None:
    """Return the address family of an address, None for a name: launchd then listens on all that it stands for."""
    try:
        return f"IPv{ipaddress.ip_address(host).version}"
    except ValueError:
        return None


def problems(job: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what launchd would refuse or misread in a job, in words; empty if nothing."""
    checks = (_types, _values, _tables, _sockets)
    return tuple(problem for check in checks for problem in check(job))


def _types(job: Mapping[str, Any]) -> Iterator[str]:
    for key, value in job.items():
        if key not in _TYPES:
            yield f"{key} is not a key of emberd's job"
        elif not _is_of(value, *_TYPES[key]):
            yield f"{key} is {type(value).__name__}, not {' or '.join(each.__name__ for each in _TYPES[key])}"


def _values(job: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{key} is missing" for key in ("Label", "ProgramArguments") if not job.get(key))
    words = job.get("ProgramArguments")
    if isinstance(words, list) and words:
        if not all(isinstance(word, str) for word in words):
            yield "ProgramArguments holds something else than strings"
        elif not words[0].startswith("/"):
            yield "ProgramArguments does not begin with an absolute path"
    if job.get("ExitTimeOut") == 0:
        yield "ExitTimeOut is 0: the computer could wait for emberd for ever when it shuts down"
    if job.get("ProcessType") not in {None, *_PROCESS_TYPES}:
        yield f"ProcessType is {job['ProcessType']}"
    sessions = job.get("LimitLoadToSessionType", [])
    for session in sessions if isinstance(sessions, list) else [sessions]:
        if session not in _SESSIONS:
            yield f"LimitLoadToSessionType has {session}"
    for key in ("StandardOutPath", "StandardErrorPath", "WorkingDirectory"):
        if isinstance(job.get(key), str) and not job[key].startswith("/"):
            yield f"{key} is not an absolute path"


def _tables(job: Mapping[str, Any]) -> Iterator[str]:
    for name, value in _entries(job, "EnvironmentVariables"):
        if not isinstance(value, str):
            yield f"EnvironmentVariables.{name} is not a string"
    for table in ("SoftResourceLimits", "HardResourceLimits"):
        for name, value in _entries(job, table):
            if name not in _LIMITS or not _is_of(value, int):
                yield f"{table}.{name} is no limit in whole numbers"
    for name, value in _entries(job, "KeepAlive"):
        if not _is_of(value, _KEEP_ALIVE.get(name)):
            yield f"KeepAlive.{name} is not known, or not of its type"


def _sockets(job: Mapping[str, Any]) -> Iterator[str]:
    for name, value in _entries(job, "Sockets"):
        for socket in value if isinstance(value, list) else [value]:
            if not isinstance(socket, dict):
                yield f"Sockets.{name} is no dictionary"
                continue
            for key, entry in socket.items():
                if not _is_of(entry, _SOCKET_KEYS.get(key)):
                    yield f"Sockets.{name}.{key} is not known, or not of its type"


def _entries(job: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    value = job.get(key)
    return list(value.items()) if isinstance(value, dict) else []


def _is_of(value: object, *types: type | None) -> bool:
    # By the very type: a boolean is no number here. None stands for no type, and is no value's.
    return type(value) in types


def differences(installed: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys in which an installed job differs from the wanted one, sorted; empty if it is up to date."""
    return tuple(sorted(key for key in {*installed, *wanted} if installed.get(key) != wanted.get(key)))


def starts_at_login(job: Mapping[str, Any]) -> bool:
    """Return True if launchd starts the job when it is loaded."""
    return bool(job.get("RunAtLoad")) or bool(job.get("KeepAlive"))


def installed(job: Mapping[str, Any], label: str) -> Installed:
    """Return what a job says that is installed under this label."""
    variables, program = job.get("EnvironmentVariables"), job.get("ProgramArguments")
    is_ours = isinstance(variables, dict) and LABEL_VARIABLE in variables
    words = tuple(map(str, program)) if isinstance(program, list) else ()
    return Installed(label if is_ours else None, words, starts_at_login(job))


def write(job: Mapping[str, Any]) -> str:
    """Return the text of a property list."""
    head, opening, rest = plistlib.dumps(job, sort_keys=False).decode().partition('<plist version="1.0">')
    return head + _HEAD + opening + rest


def read(content: bytes) -> dict[str, Any] | None:
    """Return the job of a property list, None if it is no property list."""
    try:
        job = plistlib.loads(content)
    except (ValueError, ExpatError, plistlib.InvalidFileException):
        return None
    return job if isinstance(job, dict) else None
