"""What an event looks like in each sink of the log, how often it may come, and where it goes.

An event is a mapping: `event` (a constant name of the code), `level`, `category`, `timestamp`, and its fields.
Facts: os_log(3), os_log(5) and log(1) of macOS; syslog(3); sd_journal_print(3), systemd.journal-fields(7) and
https://systemd.io/JOURNAL_NATIVE_PROTOCOL/ of systemd.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping

    from emberd.core.settings import LogSink

SUBSYSTEM = "io.github.emberd"
"""Of macOS' unified log."""
IDENTIFIER = "emberd"
"""SYSLOG_IDENTIFIER of the journal, and the name that syslog writes."""
CATEGORIES = (
    "daemon",
    "supervisor",
    "engine",
    "keepwarm",
    "forecast",
    "endpoint",
    "memory",
    "power",
    "residency",
    "swap",
    "history",
    "control",
    "library",
    "log",
)
"""Which service logs; `engine` is the engine's output, `library` that of other people's modules."""
LEVELS = ("debug", "info", "warning", "error", "critical")
"""The least important first."""
LONGEST_LINE_BYTES = 1000
"""os_log cuts a message at 1,024 bytes, its own description of the arguments included (os_log(3))."""
LONGEST_FIELD_BYTES = 16 * 1024
"""The longest field in the journal: a traceback fits, and an event stays one datagram."""
USUAL_INSTANCE = "default"
"""Name in the journal of the emberd with the default state directory: journalctl cannot ask for a missing
field."""
CUT_MARK = "…"
WITHHELD = "(withheld)"
PRIVATE_FIELDS = frozenset(
    {
        "api_key",
        "authorization",
        "body",
        "chat",
        "completion",
        "content",
        "conversation",
        "cookie",
        "headers",
        "history",
        "input",
        "key",
        "memory",
        "messages",
        "output",
        "password",
        "payload",
        "prompt",
        "query",
        "reply",
        "request",
        "response",
        "results",
        "secret",
        "text",
        "token",
        "turn",
    }
)
"""Names of fields that might hold a prompt, a reply or a secret by mistake: their values are withheld."""
_ROUTINE = frozenset({"engine_line", "engine_loading", "keepwarm", "keepwarm_dwelt"})
"""Events of level info that come often and are of no use later: macOS keeps them in memory only."""
_HEAD = ("timestamp", "level", "category", "event", "instance")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BARE = re.compile(r"[^\s\"={}\[\]\\]+")
_FIELD_NAME = re.compile(r"[^A-Z0-9]+")
_LONGEST_NAME = 64
"""Longest name of a field of the journal (systemd, src/libsystemd/sd-journal/journal-file.c:
journal_field_valid)."""
BURST_S = 60.0
"""A bucket holds as many events as may come in this time: an engine prints a hundred lines at first, then few."""


class OsLogType(IntEnum):
    """os_log_type_t (<os/log.h>): default, error, fault persist; info stays in memory; debug is off (os_log(5))."""

    DEFAULT = 0x00
    INFO = 0x01
    DEBUG = 0x02
    ERROR = 0x10
    FAULT = 0x11


_OS_LOG_TYPES = {
    "debug": OsLogType.DEBUG,
    "info": OsLogType.DEFAULT,
    "warning": OsLogType.DEFAULT,
    "critical": OsLogType.FAULT,
}


class Priority(IntEnum):
    """Of syslog(3)."""

    CRITICAL = 2
    ERROR = 3
    WARNING = 4
    INFO = 6
    DEBUG = 7


def os_log_type(level: str, event: str) -> OsLogType:
    """Return the type under which macOS keeps an event; events that matter later are persisted."""
    if level == "info" and event in _ROUTINE:
        return OsLogType.INFO
    return _OS_LOG_TYPES.get(level, OsLogType.ERROR)


def priority(level: str) -> Priority:
    """Return the syslog priority of a level; that of an error for an unknown one."""
    return Priority[level.upper()] if level in LEVELS else Priority.ERROR


def withhold(event: MutableMapping[str, Any]) -> None:
    """Replace in place the values of fields with private names.

    emberd logs no such field, and a test reads every call. This is for future mistakes.
    """
    for name in event:
        if name in PRIVATE_FIELDS:
            event[name] = WITHHELD


def line(event: Mapping[str, Any], limit_bytes: int = LONGEST_LINE_BYTES) -> str:
    """Return an event as one line, `level name field=value ...`, without control characters, of at most that size.

    The level is in the line, because os_log has no warning. Fields that are None are left out. `instance` comes
    first, so that it is never cut off.
    """
    words = [str(event.get("level", "info")), str(event["event"])]
    if event.get("instance"):
        words.append(f"instance={_value(event['instance'])}")
    words += [
        f"{name}={_value(value)}" for name, value in event.items() if name not in _HEAD and value not in (None, "")
    ]
    return cut(_CONTROL.sub(" ", " ".join(words)), limit_bytes)


def syslog_line(event: Mapping[str, Any]) -> str:
    """Return an event for syslog(3), which knows no categories: the category stands before the line."""
    head = f"{event.get('category', 'daemon')}: "
    return head + line(event, LONGEST_LINE_BYTES - len(head.encode()))


def _value(value: Any) -> str:
    """Return a value as a bare word if it is one, otherwise as JSON."""
    if isinstance(value, str) and _BARE.fullmatch(value) and not _CONTROL.search(value):
        return value
    return json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":"))


def cut(text: str, limit_bytes: int) -> str:
    """Return `text` in at most so many bytes of UTF-8, cut between characters, with a mark if it was cut."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit_bytes:
        return text
    return encoded[: max(limit_bytes - len(CUT_MARK.encode()), 0)].decode("utf-8", "ignore") + CUT_MARK


def json_line(event: Mapping[str, Any]) -> str:
    """Return an event as a line of JSON; values without a JSON form become text."""
    return json.dumps(event, default=str)


def journal_fields(event: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the fields of a journal entry: journalctl's own, then the event's, each with EMBERD_ before it.

    Names that begin with an underscore are journald's own and would be dropped.
    """
    level = str(event.get("level", "info"))
    yield "MESSAGE", line(event, LONGEST_FIELD_BYTES)
    yield "PRIORITY", str(int(priority(level)))
    yield "SYSLOG_IDENTIFIER", IDENTIFIER
    yield "EMBERD_INSTANCE", str(event.get("instance") or USUAL_INSTANCE)
    for name, value in event.items():
        if name not in {"timestamp", "instance"} and value is not None:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            yield journal_name(name), cut(text.replace("\0", ""), LONGEST_FIELD_BYTES)


def journal_name(name: str) -> str:
    """Return the journal's name of a field: capitals, digits and underscores, at most 64."""
    return f"EMBERD_{_FIELD_NAME.sub('_', name.upper()).strip('_')}"[:_LONGEST_NAME]


def journal_datagram(fields: Iterable[tuple[str, str]]) -> bytes:
    r"""Return the native protocol's form of an entry.

    It is `NAME=value\n`; for a value with a line end `NAME\n`, its length as 64 bits, little endian, the
    value, `\n`.
    """
    parts = []
    for name, text in fields:
        value = text.encode("utf-8", "replace")
        if b"\n" in value:
            parts.append(name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n")
        else:
            parts.append(name.encode() + b"=" + value + b"\n")
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Suppressed:
    """Events of one name that were not logged, and since when."""

    event: str
    category: str
    count: int
    seconds: float


@dataclass(slots=True)
class _Bucket:
    rate_per_s: float
    tokens: float
    filled_s: float
    category: str = ""
    suppressed: int = 0
    since_s: float = 0.0

    def fill(self, now_s: float) -> None:
        more = max(now_s - self.filled_s, 0.0) * self.rate_per_s
        self.tokens, self.filled_s = min(self.tokens + more, self.rate_per_s * BURST_S), now_s


class RateLimit:
    """Decides for each event whether it may be logged: a token bucket for each name.

    A flood of one event must not bury the others, nor fill a disk, nor cost the daemon. Events that are left out
    are counted, and reported in one line as soon as the bucket has room for it.

    Args:
        per_minute: how many events of one name may be logged in a minute, 0 for any number.
        exceptions: other limits for some names.
    """

    def __init__(self, per_minute: int, exceptions: Mapping[str, int] | None = None) -> None:
        self._per_minute = per_minute
        self._exceptions = exceptions or {}
        self._buckets: dict[str, _Bucket] = {}
        self.has_suppressed = False
        """Whether something is left to report."""

    def allows(self, event: str, category: str, now_s: float) -> bool:
        """Return True if an event may be logged now, and count it."""
        rate_per_s = self._exceptions.get(event, self._per_minute) / 60
        if not rate_per_s:
            return True
        bucket = self._buckets.get(event)
        if bucket is None:
            bucket = self._buckets[event] = _Bucket(rate_per_s, rate_per_s * BURST_S, now_s)
        bucket.fill(now_s)
        if not bucket.suppressed:
            if bucket.tokens >= 1:
                bucket.tokens -= 1
                return True
            bucket.since_s, bucket.category = now_s, category
        bucket.suppressed += 1
        self.has_suppressed = True
        return False

    def told(self, now_s: float, *, all_of_it: bool = False) -> list[Suppressed]:
        """Return what was left out and can be reported now, or all of it; from then on it may be logged again.

        A name is reported when its bucket is an eighth full, so a lasting flood is reported now and then.
        """
        if not self.has_suppressed:
            return []
        told = []
        for event, bucket in self._buckets.items():
            bucket.fill(now_s)
            if bucket.suppressed and (all_of_it or bucket.tokens >= max(bucket.rate_per_s * BURST_S / 8, 1)):
                told.append(Suppressed(event, bucket.category, bucket.suppressed, max(now_s - bucket.since_s, 0.0)))
                bucket.suppressed = 0
        self.has_suppressed = any(bucket.suppressed for bucket in self._buckets.values())
        return told


def choose_sinks(
    asked: LogSink,
    system: str,
    *,
    is_terminal: bool = False,
    is_journals: bool = False,
    is_launchds: bool = False,
    has_system_log: bool = True,
) -> list[str]:
    """Return where the log goes: any of stderr, system, file, and one at least.

    A terminal always gets the log: a person who starts emberd there wants to see it.

    Args:
        asked: the setting log.sink.
        system: name of the host, `darwin` or `linux`.
        is_terminal: a person looks at standard error.
        is_journals: systemd has connected it to the journal ($JOURNAL_STREAM, systemd.exec(5)).
        is_launchds: launchd writes it to StandardErrorPath, which is not rotated.
        has_system_log: there is a system log that takes lines.
    """
    if asked == "stderr":
        used = (True, False, False)
    elif asked == "file":
        used = (is_terminal, False, True)
    elif asked == "system":
        used = (is_terminal, has_system_log, not has_system_log)
    elif system == "darwin":
        # A person asked for a file or a pipe that is not launchd's: `emberd run 2> log`.
        used = (not is_launchds, has_system_log, True)
    elif is_journals and has_system_log:
        used = (False, True, False)  # standard error would be a second copy in the same journal
    else:
        used = (True, False, not is_journals)
    return [name for name, is_used in zip(("stderr", "system", "file"), used, strict=True) if is_used]
