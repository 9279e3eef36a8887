"""Reads the log back: a person's wishes, how to ask each system, and what its answer means.

Facts: log(1) of macOS (predicates, styles), journalctl(1), systemd.journal-fields(7).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from emberd.core.log_lines import IDENTIFIER, LEVELS, SUBSYSTEM, USUAL_INSTANCE, Priority, journal_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_SPANS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_WORD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[\[{].*?[\]}](?=\s|$)|\S+)')
_HEAD = re.compile(r"(\w+) (\w+)(?: |$)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of the log, wherever it was read.

    Attributes:
        time: with its time zone; None if it was not written down.
        event: its name, empty for a line that is not in emberd's own form.
        instance: which emberd, empty for that with the default state directory.
        fields: the others; numbers and lists of the journal and the unified log are read back from text.
        text: the line itself, if it has another form.
    """

    time: datetime | None
    level: str
    category: str
    event: str
    instance: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the entry as in the file log."""
        return {
            "timestamp": None if self.time is None else self.time.isoformat(),
            "level": self.level,
            "category": self.category,
            "event": self.event,
            **({"instance": self.instance} if self.instance else {}),
            **({"text": self.text} if self.text else {}),
            **self.fields,
        }


@dataclass(frozen=True, slots=True)
class Wanted:
    """The events that a person wants to see.

    Attributes:
        since: with time zone; None from the beginning.
        level: the least important one.
        categories: any of these, empty for all; the same for events.
        instance: of this emberd; None for all.
        user_id: of this user, if the log has other users' entries too.
    """

    since: datetime | None = None
    level: str = "debug"
    categories: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    instance: str | None = None
    user_id: int | None = None

    def takes(self, entry: Entry) -> bool:
        """Return True if an entry is wanted; a system's own filter may be coarser."""
        return (
            (self.since is None or entry.time is None or entry.time >= self.since)
            and LEVELS.index(entry.level) >= LEVELS.index(self.level)
            and (not self.categories or entry.category in self.categories)
            and (not self.events or entry.event in self.events)
            and (self.instance is None or not entry.event or entry.instance == self.instance)
        )


def read_since(text: str, now: datetime) -> datetime:
    """Return the moment that a person names: 90s, 30m, 1h, 2d; today, yesterday; or a date or time in ISO 8601.

    A time without a zone is in that of `now`, which has one.

    Raises:
        ValueError: it is none.
    """
    word = text.strip().lower()
    span = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?([smhdw])", word)
    if span:
        try:
            return now - timedelta(**{_SPANS[span[2]]: float(span[1])})
        except OverflowError:
            raise ValueError(f"{text!r} is before the first year") from None
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if word == "today":
        return midnight
    if word == "yesterday":
        return midnight - timedelta(days=1)
    clock = re.fullmatch(r"(\d{1,2}):(\d\d)(?::(\d\d))?", word)
    try:
        if clock:
            return now.replace(hour=int(clock[1]), minute=int(clock[2]), second=int(clock[3] or 0), microsecond=0)
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(
            f"{text!r} is no time: write 30m, 2h, 1d, today, yesterday, 14:30 or 2026-05-31T14:30"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=now.tzinfo)


# --- the file log -------------------------------------------------------------------------------------------


def from_json_line(text: str) -> Entry:
    """Return the entry in a line of the file log; a line of another form becomes its text."""
    content = _object(text)
    if not isinstance(content.get("event"), str):
        return Entry(None, "info", "daemon", "", text=text)
    return Entry(
        _moment(content.pop("timestamp", None)),
        _level(content.pop("level", "info")),
        str(content.pop("category", "daemon")),
        content.pop("event"),
        str(content.pop("instance", "")),
        content,
    )


def _object(text: str) -> dict[str, Any]:
    """Return the JSON object in a line, empty if it holds none."""
    content = _plain(text)
    return content if isinstance(content, dict) else {}


def _plain(text: str) -> Any:
    """Return the value from which a word was written; text that is no JSON is a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _level(word: Any) -> str:
    return word if word in LEVELS else "error"


def _moment(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo is not None else None


# --- macOS --------------------------------------------------------------------------------------------------


def predicate(wanted: Wanted) -> str:
    """Return the predicate of log(1); the names in it are quoted so that nothing in them ends the quote."""
    terms = [f"subsystem == {_quoted(SUBSYSTEM)}"]
    if wanted.categories:
        terms.append(_any_of([f"category == {_quoted(category)}" for category in wanted.categories]))
    if wanted.events:
        # The line begins with the level, and then the event.
        terms.append(_any_of([f"eventMessage CONTAINS {_quoted(f' {event}')}" for event in wanted.events]))
    if LEVELS.index(wanted.level) >= LEVELS.index("error"):
        terms.append(_any_of(["messageType == error", "messageType == fault"]))
    return " && ".join(terms)


def _any_of(terms: list[str]) -> str:
    return f"({' || '.join(terms)})" if len(terms) > 1 else terms[0]


def _quoted(word: str) -> str:
    """Return a string of NSPredicate: in double quotes, backslash before both kinds of special characters."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(character for character in escaped if character.isprintable()) + '"'


def log_show(wanted: Wanted, default_span: str) -> list[str]:
    """Return the arguments of `log show`. Without --info and --debug it leaves those out (log(1)).

    It looks back for `default_span` if `wanted` has no time: the whole store takes minutes.
    """
    since = wanted.since
    span = ["--last", default_span] if since is None else ["--start", since.strftime("%Y-%m-%d %H:%M:%S%z")]
    kinds = {"debug": ["--info", "--debug"], "info": ["--info"]}.get(wanted.level, [])
    return ["show", *span, *kinds, "--style", "ndjson", "--predicate", predicate(wanted)]


def log_stream(wanted: Wanted) -> list[str]:
    """Return the arguments of `log stream`, whose --level takes default, info or debug."""
    level = wanted.level if wanted.level in {"debug", "info"} else "default"
    return ["stream", "--level", level, "--style", "ndjson", "--predicate", predicate(wanted)]


def is_last_of_unified(text: str) -> bool:
    """Return True for the last record of ndjson; without it the answer is incomplete."""
    content = _object(text)
    return "finished" in content and "eventMessage" not in content


def from_unified(text: str) -> Entry | None:
    """Return the entry in a line of ndjson, None for other lines (the last record, headings)."""
    content = _object(text)
    if not isinstance(content.get("eventMessage"), str):
        return None
    time = _moment(content.get("timestamp"))
    entry = from_line(content["eventMessage"], time, str(content.get("category") or "daemon"))
    if not entry.event:
        level = {"Debug": "debug", "Error": "error", "Fault": "critical"}.get(
            str(content.get("messageType")), "info"
        )
        return Entry(time, level, entry.category, "", text=entry.text)
    return entry


def from_line(text: str, time: datetime | None, category: str) -> Entry:
    """Return the entry in a line that `log_lines.line` wrote; fields behind a cut are lost."""
    found = _HEAD.fullmatch(text)
    if not found or found[1] not in LEVELS:
        return Entry(time, "info", category, "", text=text)
    fields = {word[1]: _plain(word[2]) for word in _WORD.finditer(found[3])}
    return Entry(time, found[1], category, found[2], str(fields.pop("instance", "")), fields)


# --- the journal --------------------------------------------------------------------------------------------


def journalctl(wanted: Wanted, *, lines: int | None, follow: bool) -> list[str]:
    """Return the arguments of journalctl. Matches of one field are alternatives; different fields must all match.

    `--user` would show nothing where the journal is not split by user (volatile storage, system users). Without
    it journalctl shows all that this user may read, and `_UID` selects this user's. Without `--all` a field above
    4,096 bytes is null.
    """
    words = ["--quiet", "--no-pager", "--output=json", "--all", f"--identifier={IDENTIFIER}"]
    if wanted.since is not None:
        words.append(f"--since=@{wanted.since.timestamp():.6f}")
    if lines is not None:
        words.append(f"--lines={lines}")
    if follow:
        words.append("--follow")
    if wanted.level in LEVELS[1:]:
        words.append(f"--priority={int(Priority[wanted.level.upper()])}")
    mine = [] if wanted.user_id is None else [f"_UID={wanted.user_id}"]
    events = mine + ([] if wanted.instance is None else [f"EMBERD_INSTANCE={wanted.instance or USUAL_INSTANCE}"])
    events += [f"EMBERD_CATEGORY={category}" for category in wanted.categories]
    events += [f"EMBERD_EVENT={event}" for event in wanted.events]
    if events and not wanted.categories and not wanted.events:
        # Early messages of emberd, and Python's last words, come through standard error.
        events += ["+", *mine, "_TRANSPORT=stdout"]
    return words + events


_BY_PRIORITY = {str(int(each)): each.name.lower() for each in Priority}
_JOURNAL_HEAD = {journal_name(name): name for name in ("level", "category", "event", "instance")}


def from_journal(text: str) -> Entry | None:
    """Return the entry in a line of journalctl's JSON, None if it is none.

    Values are strings. A value that is not UTF-8 is a list of bytes, and a field that occurs twice a list of
    values.
    """
    content = _object(text)
    if "__REALTIME_TIMESTAMP" not in content:
        return None
    time = datetime.fromtimestamp(0).astimezone() + timedelta(microseconds=int(content["__REALTIME_TIMESTAMP"]))
    head = {name: _journal_text(content.get(known)) for known, name in _JOURNAL_HEAD.items()}
    if not head["event"]:
        level = _BY_PRIORITY.get(str(content.get("PRIORITY")), "info")
        return Entry(time, level, "daemon", "", text=_journal_text(content.get("MESSAGE")))
    fields = {
        name.removeprefix("EMBERD_").lower(): _plain(_journal_text(value))
        for name, value in content.items()
        if name.startswith("EMBERD_") and name not in _JOURNAL_HEAD
    }
    instance = "" if head["instance"] == USUAL_INSTANCE else head["instance"]
    return Entry(time, _level(head["level"]), head["category"], head["event"], instance, fields)


def _journal_text(value: Any) -> str:
    if isinstance(value, list):
        if all(isinstance(each, int) for each in value):
            return bytes(value).decode("utf-8", "replace")
        return _journal_text(value[0]) if value else ""
    return "" if value is None else str(value)


# --- for a person -------------------------------------------------------------------------------------------


def words(entry: Entry) -> Iterable[tuple[str, str]]:
    """Yield an entry as pieces of one line, each with its kind: time, level, category, event, field, text."""
    if entry.time is not None:
        yield "time", entry.time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    yield "level", f"{entry.level:<7}"
    yield "category", f"{entry.category:<10}"
    if entry.instance:
        yield "instance", f"[{entry.instance}]"
    if entry.event:
        yield "event", entry.event
    if entry.text:
        yield "text", _printable(entry.text)
    for name, value in entry.fields.items():
        if value in (None, ""):
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if name == "exception" and text is value:
            yield "traceback", "\n" + "\n".join(f"    {_printable(each)}" for each in text.splitlines())
        else:
            yield "field", f"{name}={_printable(text)}"


def _printable(text: str) -> str:
    """Return text that is safe on a terminal: an engine may print escape sequences."""
    return "".join(character if character.isprintable() else " " for character in text)
