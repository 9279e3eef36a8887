"""What an event looks like in each log."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import emberd
from emberd.core import log_lines, log_reading
from emberd.core.log_lines import (
    CATEGORIES,
    LONGEST_LINE_BYTES,
    PRIVATE_FIELDS,
    OsLogType,
    Priority,
    RateLimit,
    choose_sinks,
)

SOURCE = Path(emberd.__file__).parent
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), ANYTHING, max_size=5)


def log_calls() -> list[tuple[str, ast.Call]]:
    """Return every call of a logger in the package."""
    return [
        (f"{path.relative_to(SOURCE)}:{node.lineno}", node)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"debug", "info", "warning", "error", "critical", "exception"}
        and "log" in ast.unparse(node.func.value).lower()
    ]


def test_every_event_of_the_code_has_a_constant_name_and_no_private_field():
    calls = log_calls()
    assert len(calls) > 50
    for place, call in calls:
        assert isinstance(call.args[0], ast.Constant), place
        assert re.fullmatch(r"[a-z_]+", call.args[0].value), place
        fields = {word.arg for word in call.keywords if word.arg}
        assert not fields & PRIVATE_FIELDS, place
        for word in call.keywords:
            if word.arg == "category":
                assert isinstance(word.value, ast.Constant), place
                assert word.value.value in CATEGORIES, place


def test_every_logger_of_the_daemon_has_a_known_category():
    named = re.findall(r'logger\("(\w+)"\)', "".join(path.read_text() for path in SOURCE.rglob("*.py")))
    assert len(set(named)) > 8
    assert set(named) <= set(CATEGORIES)


@pytest.mark.parametrize(
    ("level", "event", "kind"),
    [
        ("critical", "x", OsLogType.FAULT),
        ("error", "emberd_failed", OsLogType.ERROR),
        ("warning", "engine_exited", OsLogType.DEFAULT),
        ("info", "engine_started", OsLogType.DEFAULT),
        ("info", "engine_state", OsLogType.DEFAULT),
        ("info", "engine_line", OsLogType.INFO),
        ("warning", "engine_line", OsLogType.DEFAULT),
        ("debug", "keepwarm_rests", OsLogType.DEBUG),
        ("nonsense", "x", OsLogType.ERROR),
    ],
)
def test_what_matters_is_of_a_type_that_macos_persists(level: str, event: str, kind: OsLogType):
    assert log_lines.os_log_type(level, event) is kind


def test_a_line_is_the_level_the_event_and_its_fields():
    event = {
        "timestamp": "t",
        "category": "supervisor",
        "level": "warning",
        "event": "engine_exited",
        "pid": 7,
        "meaning": 'killed: "out of memory"',
        "status": None,
        "pids": [1, 2],
    }
    assert log_lines.line(event) == ('warning engine_exited pid=7 meaning="killed: \\"out of memory\\"" pids=[1,2]')
    assert log_lines.syslog_line(event).startswith("supervisor: warning engine_exited pid=7")


@given(FIELDS)
def test_no_field_makes_a_line_too_long_or_breaks_it(fields: dict[str, object]):
    event = {**fields, "event": "x", "level": "info", "category": "engine"}
    for line in (log_lines.line(event), log_lines.syslog_line(event)):
        assert len(line.encode()) <= LONGEST_LINE_BYTES
        assert not re.search(r"[\x00-\x1f\x7f]", line)


@given(st.text(), st.integers(3, 50))
def test_a_cut_text_is_whole_characters_with_a_mark(text: str, limit: int):
    short = log_lines.cut(text, limit)
    assert len(short.encode(errors="replace")) <= limit
    if short != text:
        assert short.endswith("…")
        assert text.startswith(short[:-1])


@given(FIELDS)
def test_a_line_that_was_not_cut_is_read_back(fields: dict[str, object]):
    fields = {
        name: value
        for name, value in fields.items()
        if isinstance(value, str | int | bool)
        and name not in {"event", "level", "category", "timestamp", "instance"}
        if not isinstance(value, str) or (value.isprintable() and value)
    }
    line = log_lines.line({"event": "x_y", "level": "debug", "instance": "two", **fields})
    entry = log_reading.from_line(line, None, "engine")
    assert (entry.level, entry.event, entry.instance) == ("debug", "x_y", "two")
    if not line.endswith("…"):
        for name, value in fields.items():
            # A bare word that looks like a number is read as one.
            assert str(entry.fields[name]) == str(value) or isinstance(value, str)


def test_private_fields_are_withheld():
    event = {"event": "x", "prompt": "SECRET", "pid": 1}
    log_lines.withhold(event)
    assert event == {"event": "x", "prompt": "(withheld)", "pid": 1}


def test_a_journal_entry_has_the_known_fields_and_emberds_own():
    fields = dict(
        log_lines.journal_fields(
            {"event": "engine_exited", "level": "warning", "category": "supervisor", "pid": 7, "timestamp": "t"}
        )
    )
    assert fields == {
        "MESSAGE": "warning engine_exited pid=7",
        "PRIORITY": str(int(Priority.WARNING)),
        "SYSLOG_IDENTIFIER": "emberd",
        "EMBERD_INSTANCE": "default",
        "EMBERD_EVENT": "engine_exited",
        "EMBERD_LEVEL": "warning",
        "EMBERD_CATEGORY": "supervisor",
        "EMBERD_PID": "7",
    }


def test_a_value_with_line_ends_goes_with_its_length():
    assert log_lines.journal_datagram([("A", "1"), ("B", "x\ny")]) == (
        b"A=1\nB\n\x03\x00\x00\x00\x00\x00\x00\x00x\ny\n"
    )


@given(st.text(max_size=100))
def test_every_name_of_a_journal_field_is_one_that_journald_takes(name: str):
    assert re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", log_lines.journal_name(name))


def test_what_comes_within_the_rate_passes_and_a_flood_is_counted():
    limit = RateLimit(60)
    passed = sum(limit.allows("a", "engine", 0.0) for _ in range(1000))
    assert passed == 60
    assert limit.told(1.0) == []
    told = limit.told(10.0)
    assert [(each.event, each.category, each.count, each.seconds) for each in told] == [("a", "engine", 940, 10.0)]
    assert limit.allows("a", "engine", 10.0)
    assert not limit.has_suppressed


def test_a_flood_of_one_event_does_not_silence_another():
    limit = RateLimit(60)
    for _ in range(1000):
        limit.allows("chatter", "engine", 0.0)
    assert limit.allows("engine_exited", "supervisor", 0.0)


def test_an_exception_has_its_own_rate_and_zero_is_no_limit():
    limit = RateLimit(1, {"engine_line": 100, "free": 0})
    assert sum(limit.allows("engine_line", "engine", 0.0) for _ in range(1000)) == 100
    assert all(limit.allows("free", "x", 0.0) for _ in range(1000))


def test_at_the_end_everything_is_told():
    limit = RateLimit(1)
    for _ in range(5):
        limit.allows("a", "x", 0.0)
    assert [each.count for each in limit.told(0.0, all_of_it=True)] == [4]


@given(st.lists(st.floats(0, 5), max_size=300), st.integers(1, 200))
def test_nothing_is_lost_uncounted_and_no_minute_has_more_than_twice_the_rate(gaps: list[float], rate: int):
    limit, now_s, passed, told = RateLimit(rate), 0.0, [], 0
    for gap in gaps:
        now_s += gap
        told += sum(each.count for each in limit.told(now_s))
        if limit.allows("a", "x", now_s):
            passed.append(now_s)
    told += sum(each.count for each in limit.told(now_s, all_of_it=True))
    assert len(passed) + told == len(gaps)
    for start in passed:
        assert sum(start <= each < start + 60 for each in passed) <= 2 * rate + 1


@pytest.mark.parametrize(
    ("asked", "system", "now", "sinks"),
    [
        ("auto", "linux", {"is_journals": True}, ["system"]),
        ("auto", "linux", {"is_terminal": True}, ["stderr", "file"]),
        ("auto", "linux", {}, ["stderr", "file"]),
        ("auto", "linux", {"is_journals": True, "has_system_log": False}, ["stderr"]),
        ("auto", "darwin", {"is_launchds": True}, ["system", "file"]),
        ("auto", "darwin", {"is_terminal": True}, ["stderr", "system", "file"]),
        ("auto", "darwin", {"is_launchds": True, "has_system_log": False}, ["file"]),
        ("stderr", "darwin", {"is_launchds": True}, ["stderr"]),
        ("file", "linux", {"is_journals": True}, ["file"]),
        ("file", "linux", {"is_terminal": True}, ["stderr", "file"]),
        ("system", "linux", {}, ["system"]),
        ("system", "linux", {"has_system_log": False}, ["file"]),
    ],
)
def test_the_log_goes_where_it_can_be_found_and_not_twice(
    asked: str, system: str, now: dict[str, bool], sinks: list[str]
):
    assert choose_sinks(asked, system, **now) == sinks  # type: ignore[arg-type]
    assert sinks
