"""Keys and types of a property list of launchd, and the documented traps (launchd.plist(5)). Pure.

`errors` is what launchd would refuse or not understand; `warnings` are keys that it takes and that do harm. launchd
itself passes over unknown keys with a line in its log; here they are errors, because a misspelt key does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Check = Callable[[Any, str], list[str]]
"""Takes a value and its place in the list; returns what is wrong."""

SESSION_TYPES = ("Aqua", "Background", "LoginWindow", "StandardIO", "System")
PROCESS_TYPES = ("Background", "Standard", "Adaptive", "Interactive")
DEFAULT_SESSION_TYPE = "Aqua"


# --- types -------------------------------------------------------------------------------------------------------


def boolean(value: Any, where: str) -> list[str]:
    """A <true/> or <false/>."""
    return [] if isinstance(value, bool) else [f"{where}: must be a boolean"]


def integer(value: Any, where: str) -> list[str]:
    """An <integer>; a boolean is none."""
    return [] if isinstance(value, int) and not isinstance(value, bool) else [f"{where}: must be an integer"]


def whole(value: Any, where: str) -> list[str]:
    """An integer that is not negative."""
    return integer(value, where) or ([f"{where}: must not be negative"] if value < 0 else [])


def string(value: Any, where: str) -> list[str]:
    """A <string> without a NUL."""
    if not isinstance(value, str):
        return [f"{where}: must be a string"]
    return [f"{where}: must not hold a NUL"] if "\0" in value else []


def text(value: Any, where: str) -> list[str]:
    """A string that is not empty."""
    return string(value, where) or ([] if value else [f"{where}: must not be empty"])


def path(value: Any, where: str) -> list[str]:
    """An absolute path: launchd expands neither `~` nor variables."""
    return text(value, where) or ([] if value.startswith("/") else [f"{where}: must be an absolute path"])


def anything(_value: Any, _where: str) -> list[str]:
    """Whatever the event's own library expects (xpc_events(3))."""
    return []


def one_of(*words: str) -> Check:
    """One of these strings."""

    def check(value: Any, where: str) -> list[str]:
        return string(value, where) or ([] if value in words else [f"{where}: must be one of {', '.join(words)}"])

    return check


def either(*checks: Check) -> Check:
    """What fits one of these types."""

    def check(value: Any, where: str) -> list[str]:
        found = [each(value, where) for each in checks]
        return [] if any(not each for each in found) else found[0]

    return check


def array(of: Check, *, at_least: int = 0) -> Check:
    """An <array> of values of one type."""

    def check(value: Any, where: str) -> list[str]:
        if not isinstance(value, list):
            return [f"{where}: must be an array"]
        wrong = [f"{where}: needs at least {at_least}"] if len(value) < at_least else []
        return wrong + [said for number, each in enumerate(value) for said in of(each, f"{where}[{number}]")]

    return check


def mapping(of: Check) -> Check:
    """A <dict> with names of one's own and values of one type."""

    def check(value: Any, where: str) -> list[str]:
        if not isinstance(value, dict):
            return [f"{where}: must be a dictionary"]
        return [said for name, each in value.items() for said in of(each, f"{where}.{name}")]

    return check


def table(keys: Mapping[str, Check]) -> Check:
    """A <dict> with these keys only, none required."""

    def check(value: Any, where: str) -> list[str]:
        if not isinstance(value, dict):
            return [f"{where}: must be a dictionary"]
        wrong = []
        for name, each in value.items():
            place = f"{where}.{name}" if where else str(name)
            wrong += keys[name](each, place) if name in keys else [f"{place}: is no key of launchd.plist(5)"]
        return wrong

    return check


def octal(value: Any, where: str) -> list[str]:
    """A umask: an integer, or a string that is read in octal."""
    if isinstance(value, str):
        is_mask = value != "" and set(value) <= set("01234567") and int(value, 8) <= 0o777
        return [] if is_mask else [f"{where}: must be an octal number up to 0777"]
    return whole(value, where)


# --- keys --------------------------------------------------------------------------------------------------------

LIMITS = table(
    dict.fromkeys(
        (
            "Core",
            "CPU",
            "Data",
            "FileSize",
            "MemoryLock",
            "NumberOfFiles",
            "NumberOfProcesses",
            "ResidentSetSize",
            "Stack",
        ),
        whole,
    )
)
CALENDAR = table(dict.fromkeys(("Minute", "Hour", "Day", "Weekday", "Month"), whole))
KEEP_ALIVE = table(
    {
        "SuccessfulExit": boolean,
        "Crashed": boolean,
        "NetworkState": boolean,
        "PathState": mapping(boolean),
        "OtherJobEnabled": mapping(boolean),
        "AfterInitialDemand": boolean,
    }
)
SOCKET = table(
    {
        "SockType": one_of("stream", "dgram", "seqpacket"),
        "SockPassive": boolean,
        "SockNodeName": text,
        # The page says string; a number is understood too, and is in Apple's own lists.
        "SockServiceName": either(text, whole),
        "SockFamily": one_of("IPv4", "IPv6", "IPv4v6", "Unix"),
        "SockProtocol": one_of("TCP", "UDP"),
        "SockPathName": path,
        "SecureSocketWithKey": text,
        "SockPathOwner": whole,
        "SockPathGroup": whole,
        "SockPathMode": whole,
        "Bonjour": either(boolean, text, array(text)),
        "MulticastGroup": text,
        "ReceivePacketInfo": boolean,
    }
)
MACH_SERVICE = either(boolean, table({"ResetAtClose": boolean, "HideUntilCheckIn": boolean}))

KEYS: Mapping[str, Check] = {
    "Label": text,
    "Disabled": boolean,
    "UserName": text,
    "GroupName": text,
    "InitGroups": boolean,
    "inetdCompatibility": table({"Wait": boolean, "Instances": whole}),
    "LimitLoadToHosts": array(text),
    "LimitLoadFromHosts": array(text),
    "LimitLoadToSessionType": either(one_of(*SESSION_TYPES), array(one_of(*SESSION_TYPES), at_least=1)),
    "LimitLoadToHardware": mapping(array(text)),
    "LimitLoadFromHardware": mapping(array(text)),
    "Program": path,
    "BundleProgram": text,
    "ProgramArguments": array(string, at_least=1),
    "EnableGlobbing": boolean,
    "EnableTransactions": boolean,
    "EnablePressuredExit": boolean,
    "OnDemand": boolean,
    "ServiceIPC": boolean,
    "KeepAlive": either(boolean, KEEP_ALIVE),
    "RunAtLoad": boolean,
    "RootDirectory": path,
    "WorkingDirectory": path,
    "EnvironmentVariables": mapping(string),
    "Umask": octal,
    "TimeOut": whole,
    "ExitTimeOut": whole,
    "ThrottleInterval": whole,
    "WatchPaths": array(path),
    "QueueDirectories": array(path),
    "StartOnMount": boolean,
    "StartInterval": whole,
    "StartCalendarInterval": either(CALENDAR, array(CALENDAR)),
    "StandardInPath": path,
    "StandardOutPath": path,
    "StandardErrorPath": path,
    "Debug": boolean,
    "WaitForDebugger": boolean,
    "SoftResourceLimits": LIMITS,
    "HardResourceLimits": LIMITS,
    "Nice": integer,
    "ProcessType": one_of(*PROCESS_TYPES),
    "AbandonProcessGroup": boolean,
    "LowPriorityIO": boolean,
    "LowPriorityBackgroundIO": boolean,
    "MaterializeDatalessFiles": boolean,
    "LaunchOnlyOnce": boolean,
    "MachServices": mapping(MACH_SERVICE),
    "Sockets": mapping(either(SOCKET, array(SOCKET))),
    "LaunchEvents": mapping(mapping(anything)),
    "HopefullyExitsLast": boolean,
    "HopefullyExitsFirst": boolean,
    "SessionCreate": boolean,
    "LegacyTimers": boolean,
    "AssociatedBundleIdentifiers": either(text, array(text)),
    "SpawnConstraint": mapping(anything),
}
_NICE_RANGE = range(-20, 21)


def errors(job: Any) -> list[str]:
    """Return what is wrong with a parsed property list; empty for nothing."""
    if not isinstance(job, dict):
        return ["the property list must be a dictionary"]
    wrong = table(KEYS)(job, "")
    if "Label" not in job:
        wrong.append("Label: is required")
    if not {"Program", "ProgramArguments", "BundleProgram"} & set(job):
        wrong.append("ProgramArguments: Program or ProgramArguments is required")
    if not wrong:
        if job.get("Nice", 0) not in _NICE_RANGE:
            wrong.append("Nice: must be from -20 to 20")
        arguments = job.get("ProgramArguments", [])
        # A name without a slash is looked for in launchd's own path only.
        if "Program" not in job and arguments and not arguments[0].startswith("/"):
            wrong.append("ProgramArguments[0]: must be an absolute path")
    return wrong


# --- traps -------------------------------------------------------------------------------------------------------


def warnings(job: Mapping[str, Any]) -> list[str]:
    """Return the documented traps that a valid property list of an agent steps into."""
    keep_alive = job.get("KeepAlive", False)
    conditions = keep_alive if isinstance(keep_alive, dict) else {}
    soft, hard = job.get("SoftResourceLimits", {}), job.get("HardResourceLimits", {})
    traps: Sequence[tuple[bool, str]] = (
        (job.get("EnableTransactions") is True, "EnableTransactions: a stop is an immediate SIGKILL"),
        (job.get("EnablePressuredExit") is True, "EnablePressuredExit: killed under memory pressure when idle"),
        (conditions.get("Crashed") is False, "KeepAlive.Crashed: false relaunches after every clean exit"),
        ("NetworkState" in conditions, "KeepAlive.NetworkState: is no longer implemented"),
        (len(conditions) > 1, "KeepAlive: conditions are OR-ed, not AND-ed"),
        (
            bool(keep_alive) and job.get("RunAtLoad") is False,
            "KeepAlive: implies RunAtLoad, whatever RunAtLoad says",
        ),
        ("ProcessType" not in job, "ProcessType: missing means Standard, throttled CPU and disk"),
        (
            job.get("ProcessType") in {"Background", "Standard", "Adaptive"},
            "ProcessType: only Interactive is not throttled",
        ),
        ("ExitTimeOut" not in job, "ExitTimeOut: missing means 5 s from SIGTERM to SIGKILL"),
        (job.get("ExitTimeOut") == 0, "ExitTimeOut: 0 waits for ever and can stall a shutdown"),
        (
            "LimitLoadToSessionType" not in job,
            "LimitLoadToSessionType: missing means Aqua, not without a GUI login",
        ),
        (
            job.get("LowPriorityIO") is True or job.get("LowPriorityBackgroundIO") is True,
            "LowPriorityIO: throttles page-ins",
        ),
        ("Nice" in job, "Nice: leave unset"),
        (job.get("SessionCreate") is True, "SessionCreate: do not use"),
        ("OnDemand" in job, "OnDemand: replaced by KeepAlive"),
        ("TimeOut" in job, "TimeOut: is no longer implemented"),
        ("StartInterval" in job, "StartInterval: fires are missed while asleep"),
        (
            "MemoryLock" in soft or "MemoryLock" in hard,
            "MemoryLock: macOS sets no limit of its own; a value can only lower it",
        ),
        (
            any(
                "~" in str(job.get(key, "")) for key in ("StandardOutPath", "StandardErrorPath", "WorkingDirectory")
            ),
            "paths: ~ is not expanded",
        ),
        (
            any(name in job.get("EnvironmentVariables", {}) for name in ("XPC_SERVICE_NAME", "XPC_FLAGS")),
            "EnvironmentVariables: XPC_ names are launchd's own",
        ),
    )
    return [said for is_so, said in traps if is_so]
