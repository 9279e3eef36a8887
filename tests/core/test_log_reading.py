"""Reading the log back: questions to the system's programs, and their answers."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest

from emberd.core import log_reading
from emberd.core.log_reading import Entry, Wanted, read_since

NOW = datetime(2026, 5, 31, 14, 30, 5, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("2d", NOW - timedelta(days=2)),
        ("today", NOW.replace(hour=0, minute=0, second=0)),
        ("Yesterday", NOW.replace(day=30, hour=0, minute=0, second=0)),
        ("9:05", NOW.replace(hour=9, minute=5, second=0)),
        ("2026-05-01", datetime(2026, 5, 1, tzinfo=NOW.tzinfo)),
        ("2026-05-01T10:00Z", datetime(2026, 5, 1, 10, tzinfo=UTC)),
    ],
)
def test_a_time_is_read_as_people_write_it(text: str, moment: datetime):
    assert read_since(text, NOW) == moment


@pytest.mark.parametrize("text", ["", "soon", "25:00", "1y", "-1h", "2026-13-01", "99999999999d"])
def test_what_is_no_time_is_refused(text: str):
    with pytest.raises(ValueError, match="no time"):
        read_since(text, NOW)


def test_a_time_before_time_is_refused():
    with pytest.raises(ValueError, match="before the first year"):
        read_since("999999d", NOW)


def test_the_question_to_log_show_quotes_what_it_is_given():
    wanted = Wanted(NOW, "info", ("engine", "swap"), ('a" || TRUE \\',))
    assert log_reading.log_show(wanted, "1d") == [
        "show",
        "--start",
        "2026-05-31 14:30:05+0200",
        "--info",
        "--style",
        "ndjson",
        "--predicate",
        (
            'subsystem == "io.github.emberd" && (category == "engine" || category == "swap") && '
            'eventMessage CONTAINS " a\\" || TRUE \\\\"'
        ),
    ]


def test_errors_only_are_asked_for_as_errors_and_faults():
    assert log_reading.log_show(Wanted(level="error"), "1d")[1:] == [
        "--last",
        "1d",
        "--style",
        "ndjson",
        "--predicate",
        'subsystem == "io.github.emberd" && (messageType == error || messageType == fault)',
    ]
    assert log_reading.log_stream(Wanted(level="warning"))[:3] == ["stream", "--level", "default"]
    assert log_reading.log_stream(Wanted())[:3] == ["stream", "--level", "debug"]


def test_the_question_to_journalctl():
    words = log_reading.journalctl(
        Wanted(NOW, "warning", ("engine",), instance="", user_id=501), lines=5, follow=True
    )
    assert words == [
        "--quiet",
        "--no-pager",
        "--output=json",
        "--all",
        "--identifier=emberd",
        "--since=@1780230605.000000",
        "--lines=5",
        "--follow",
        "--priority=4",
        "_UID=501",
        "EMBERD_INSTANCE=default",
        "EMBERD_CATEGORY=engine",
    ]


def test_what_came_through_standard_error_is_asked_for_too():
    words = log_reading.journalctl(Wanted(instance="", user_id=501), lines=None, follow=False)
    assert words[5:] == ["_UID=501", "EMBERD_INSTANCE=default", "+", "_UID=501", "_TRANSPORT=stdout"]
    assert "+" not in log_reading.journalctl(Wanted(), lines=None, follow=False)


def test_a_record_of_the_unified_log_is_an_entry():
    record = {
        "timestamp": "2026-05-31 14:30:05.123456789+0200",
        "category": "supervisor",
        "messageType": "Default",
        "eventMessage": 'warning engine_exited instance=two pid=7 meaning="out of memory" pids=[1,2]',
    }
    entry = log_reading.from_unified(json.dumps(record))
    assert entry == Entry(
        NOW.replace(microsecond=123456),
        "warning",
        "supervisor",
        "engine_exited",
        "two",
        {"pid": 7, "meaning": "out of memory", "pids": [1, 2]},
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "Filtering the log data", '{"count":0,"finished":1}'])
def test_what_is_no_record_is_none(text: str):
    assert log_reading.from_unified(text) is None
    assert log_reading.from_journal(text) is None


def test_the_last_record_is_recognised():
    assert log_reading.is_last_of_unified('{"count":0,"finished":1}')
    assert not log_reading.is_last_of_unified('{"eventMessage":"finished"}')
    assert not log_reading.is_last_of_unified("finished")


def test_a_journal_entry_of_bytes_and_of_repeated_fields_is_read():
    entry = log_reading.from_journal(
        json.dumps(
            {
                "__REALTIME_TIMESTAMP": "1780230605000000",
                "EMBERD_EVENT": ["engine_line", "again"],
                "EMBERD_LEVEL": "info",
                "EMBERD_CATEGORY": "engine",
                "EMBERD_INSTANCE": "default",
                "EMBERD_LINE": [104, 105, 27],
            }
        )
    )
    assert entry is not None
    assert (entry.event, entry.instance, entry.time, entry.fields) == ("engine_line", "", NOW, {"line": "hi\x1b"})


def test_a_line_of_another_form_is_its_own_text():
    assert log_reading.from_json_line("Traceback (most recent call last):").text.startswith("Traceback")
    assert log_reading.from_json_line('{"event": 5}').text == '{"event": 5}'


def test_only_wanted_entries_are_taken():
    entry = Entry(NOW, "warning", "engine", "engine_exited", "two")
    assert Wanted().takes(entry)
    assert Wanted(NOW, "warning", ("engine",), ("engine_exited",), "two").takes(entry)
    for wanted in (
        Wanted(NOW + timedelta(seconds=1)),
        Wanted(level="error"),
        Wanted(categories=("swap",)),
        Wanted(events=("x",)),
        Wanted(instance=""),
    ):
        assert not wanted.takes(entry)


def test_a_line_for_a_person_does_nothing_to_the_terminal():
    entry = Entry(NOW, "info", "engine", "engine_line", fields={"line": "\x1b[31mred\x07", "exception": "a\nb\x1b"})
    text = " ".join(piece for _, piece in log_reading.words(entry))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert text.endswith("\n    a\n    b ")
