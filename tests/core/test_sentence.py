"""The sentence in large letters, the events in words, and the report: what a person reads on the page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emberd.core import words
from emberd.core.event_words import say_event
from emberd.core.lock import LockState, LockVerdict
from emberd.core.memory import Power
from emberd.core.report import make_report
from emberd.core.sentence import Finding, Tone, say
from emberd.core.status import (
    EngineMemoryStatus,
    EngineStatus,
    FirstTokenStatus,
    ForecastStatus,
    MemoryStatus,
    ProgressStatus,
    ResidencyStatus,
    Status,
    SwapStatus,
    SystemMemoryStatus,
    WarmthStatus,
)
from emberd.core.types import LoadProgress, Notice

WARM = Status(state="READY", warmth=WarmthStatus(mode="auto", forecast=ForecastStatus("hot", 0.214)))
COLD = replace(WARM, warmth=WarmthStatus(mode="auto", next_look_in_s=9, forecast=ForecastStatus("cold", 12.4)))
FOUND = Finding("The computer swaps", "3 GB in swap", "Close other programs.")

DISK = Finding("The disk is full", "0 bytes free\n | last words", "Make room.", is_error=True)


def idle(**changes: object) -> Status:
    """Return the status of a cold model, with other warmth."""
    assert COLD.warmth is not None
    return replace(COLD, warmth=replace(COLD.warmth, **changes))  # type: ignore[arg-type]


def test_a_warm_model_says_when_the_next_reply_starts():
    said = say(WARM, FOUND)
    assert (said.text, said.tone) == ("Warm. The next reply starts in about 0.21 s.", Tone.GOOD)
    assert not said.why, "a warm model needs no doctor"


def test_a_cold_model_says_why_and_what_helps_by_the_doctors_first_condition():
    said = say(COLD, FOUND)
    assert (said.text, said.tone) == ("Cold. The next reply starts in about 12 s.", Tone.WARN)
    assert said.why == "The computer swaps: 3 GB in swap"
    assert said.helps == "Close other programs."


def test_a_cold_model_that_nobody_knows_more_of_says_when_emberd_looks_again():
    assert say(COLD).helps == "emberd looks again in 9 s; Warm does it now."


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mode": "off"}, "Keeping warm is off."),
        ({"paused_for_s": 1800.0}, "Keeping warm is paused for 30 min."),
        ({"is_helpless": True}, "The computer swaps, and nothing that emberd may let go would help."),
        ({"hold": "no_outside_lock"}, "The computer needs the memory: emberd has let go of its lock."),
        ({"hold": "a_new_word"}, "The computer needs the memory: emberd has let go."),
        ({"over_budget_for_s": 61.0}, "Keeping warm is over its budget for 1 min."),
    ],
)
def test_what_emberd_does_on_purpose_comes_before_what_the_doctor_found(changes: dict[str, object], why: str):
    assert say(idle(**changes), FOUND).why == why


def test_a_cool_spell_is_no_trouble():
    said = say(idle(cool_for_s=3600.0), FOUND)
    assert said.text == "Cool for 1 h 0 min: the memory is free for other programs."
    assert (said.tone, said.why) == (Tone.QUIET, "The next reply starts in about 12 s.")


def test_a_pass_tells_how_far_it_is():
    said = say(idle(progress=ProgressStatus(1_200_000_000, 4_000_000_000)), FOUND)
    assert (said.text, said.tone) == ("Warming: 1.2 GB of 4.0 GB are in memory.", Tone.BUSY)


def test_an_unknown_warmth_is_not_called_cold():
    seen = replace(idle(forecast=ForecastStatus()), residency=ResidencyStatus(message="the file is another user's"))
    said = say(seen)
    assert said.text == "Ready. How soon the next reply starts is not known yet."
    assert (said.tone, said.why) == (Tone.QUIET, "the file is another user's")


@pytest.mark.parametrize(
    ("waiting", "text"),
    [
        (0, "At work on 1 request."),
        (1, "At work on 1 request. One more waits."),
        (3, "At work on 1 request. 3 more wait."),
    ],
)
def test_a_busy_engine_says_how_many_requests_there_are(waiting: int, text: str):
    assert say(replace(COLD, requests_in_flight=1, requests_waiting=waiting)).text == text


@pytest.mark.parametrize(
    ("status", "text", "tone"),
    [
        (Status(state="LOADING", loading=LoadProgress("tensors", "12/40")), "The model is loading.", Tone.BUSY),
        (Status(state="BACKOFF", next_start_in_s=5.2), "The engine has crashed. It starts again in 5 s.", Tone.BAD),
        (Status(state="FAILED", reason="no such file\nlast words"), "There is no engine.", Tone.BAD),
        (Status(state="STOPPED"), "The engine is stopped.", Tone.QUIET),
        (Status(state="COOL"), "Cool: the engine's memory is free for other programs.", Tone.QUIET),
        (Status(state="DANCING"), "What the engine does is unknown.", Tone.WARN),
        (Status(state="STANDBY", next_start_in_s=60.0), "emberd cannot start. The next try is in 1 min.", Tone.BAD),
    ],
)
def test_each_state_without_a_ready_engine_has_its_words(status: Status, text: str, tone: Tone):
    said = say(status)
    assert (said.text, said.tone) == (text, tone)


def test_a_failed_engine_says_why_in_one_line_and_what_helps():
    failed = Status(state="FAILED", reason="no such file\nlast words")
    assert say(failed).why == "no such file"
    assert say(failed, FOUND).why == "no such file", "a warning is no reason"
    assert say(failed, DISK).why == "The disk is full: 0 bytes free"
    assert say(failed, DISK).helps == "Make room."
    assert say(replace(failed, remedy="Bring it back."), DISK).why == "no such file"
    assert say(replace(failed, remedy="Bring it back."), DISK).helps == "Bring it back."
    assert say(replace(failed, state="STANDBY", remedy="Mend it.")).helps == "Mend it."


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0513, "0.051 s"),
        (0.2, "0.2 s"),
        (3.14, "3.1 s"),
        (9.96, "10 s"),
        (14.4, "14 s"),
        (119.6, "120 s"),
        (150, "2 min"),
    ],
)
def test_seconds_have_two_digits_that_count(value: float, text: str):
    assert words.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 MB"), (641e6, "641 MB"), (1.94e9, "1.9 GB"), (24.2e9, "24 GB")])
def test_sizes_are_those_of_a_disk(value: float, text: str):
    assert words.size(value) == text


# --- events -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            {
                "event": "keepwarm",
                "steps": ["touch"],
                "reason": "due",
                "seconds": 1.52,
                "cold_share": 0.09,
            },
            "emberd touched the weights in 1.5 s, because it was time; 9% of the weights had been cold",
        ),
        (
            {"event": "engine_state", "state": "BACKOFF", "reason": "signal 9\nwords"},
            "The engine has crashed: signal 9",
        ),
        ({"event": "engine_state", "state": "READY", "reason": "x"}, "The engine is ready"),
        (
            {"event": "first_token", "took_s": 0.31, "forecast_s": 0.2, "temperature": "hot"},
            "A reply began after 0.31 s; 0.2 s had been forecast",
        ),
        (
            {"event": "memory_pressure", "level": "warn", "was": "normal"},
            "Memory pressure went from normal to warn",
        ),
        ({"event": "reply_continued", "tokens_so_far": 1}, "A cut reply was continued after 1 token"),
    ],
)
def test_an_event_becomes_a_sentence(event: dict[str, object], text: str):
    assert say_event(event) == text


@pytest.mark.parametrize(
    "event", [{"event": "engine_line", "line": "x"}, {"event": "keepwarm"}, {"event": "keepwarm", "steps": []}, {}]
)
def test_an_event_of_no_interest_or_of_another_form_is_left_out(event: dict[str, object]):
    assert say_event(event) is None


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_report_has_figures_states_and_codes_and_nothing_of_its_owner():
    secret = "/home/ada/secret"
    status = replace(
        WARM,
        version="9.9",
        model=f"{secret}.gguf",
        settings_file=secret,
        endpoint=f"http://{secret}",
        reason=secret,
        last_exit=secret,
        output_file=secret,
        log=(secret,),
        notices=(Notice("public_host", secret),),
        lock=LockVerdict(LockState.PARTIAL, 1, 2, message=secret, remedy=secret),
        engine=EngineStatus("koboldcpp", 1, 2, False, 0.0, (secret,)),
        residency=ResidencyStatus(0.973, 0.9, 1.0, 1, 2_000_000_000, "mincore", message=secret),
        memory=MemoryStatus(
            EngineMemoryStatus(resident_bytes=3_000_000_000),
            SystemMemoryStatus(total_bytes=16e9),
            Power(),
            None,  # type: ignore[arg-type]
        ),
        swap=SwapStatus(7_000_000),
        warmth=WarmthStatus(mode="auto", forecast=ForecastStatus("hot", 0.2, FirstTokenStatus("hot", 0.2, 0.25))),
    )
    report = make_report(status, ["SWAP_FULL"], "Linux")
    assert secret not in report
    assert "ada" not in report
    for fact in (
        "9.9",
        "koboldcpp, READY",
        "PARTIAL",
        "97.3% of 2.0 GB",
        "3.0 GB resident",
        "public_host",
        "SWAP_FULL",
    ):
        assert fact in report
