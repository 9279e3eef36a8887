"""The one sentence that a person wants to read: is the model warm, and if not, why, and what helps. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.forecast import Temperature
from emberd.core.lifecycle import State
from emberd.core.words import count, duration, seconds, size

if TYPE_CHECKING:
    from emberd.core.status import Status, WarmthStatus


class Tone(Enum):
    """How the sentence is to be taken."""

    GOOD = "good"
    BUSY = "busy"
    """Something goes on that ends by itself."""
    QUIET = "quiet"
    """Its owner wanted it so."""
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """What the doctor found first: an error or a warning.

    Attributes:
        title: in a few words.
        evidence: what was seen, with figures.
        remedy: what to do, may be empty.
        is_error: something does not work; a warning is never why there is no engine.
    """

    title: str
    evidence: str
    remedy: str = ""
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Sentence:
    """How it is now.

    Attributes:
        text: one sentence, or two short ones.
        tone: how it is to be taken.
        why: the reason, may be empty.
        helps: what helps, may be empty.
    """

    text: str
    tone: Tone
    why: str = ""
    helps: str = ""


_STATES = {
    State.STOPPED: ("The engine is stopped.", Tone.QUIET),
    State.STARTING: ("The engine is starting.", Tone.BUSY),
    State.LOADING: ("The model is loading.", Tone.BUSY),
    State.DRAINING: ("The engine ends its last replies.", Tone.BUSY),
    State.STOPPING: ("The engine is stopping.", Tone.BUSY),
    State.COOL: ("Cool: the engine's memory is free for other programs.", Tone.QUIET),
    State.BACKOFF: ("The engine has crashed.", Tone.BAD),
    State.FAILED: ("There is no engine.", Tone.BAD),
}
_HELD = {
    "no_warming": "brings nothing back",
    "no_outside_lock": "has let go of its lock",
    "nothing": "holds nothing",
}


def say(status: Status, finding: Finding | None = None) -> Sentence:
    """Return the sentence for a status.

    Args:
        status: of a daemon that serves or stands by.
        finding: the doctor's first condition that is more than a note, None if there is none or nobody has looked.
    """
    if status.state == "STANDBY":
        tried = "" if status.next_start_in_s is None else f" The next try is in {duration(status.next_start_in_s)}."
        return Sentence(f"emberd cannot start.{tried}", Tone.BAD, _first_line(status.reason), status.remedy or "")
    if status.state != State.READY.value:
        return _of_no_engine(status, finding)
    if status.requests_in_flight:
        waiting = f" {status.requests_waiting} more wait." if status.requests_waiting > 1 else ""
        waiting = " One more waits." if status.requests_waiting == 1 else waiting
        return Sentence(f"At work on {count(status.requests_in_flight, 'request')}.{waiting}", Tone.GOOD)
    if status.warmth is None:
        return Sentence("The engine is ready.", Tone.GOOD)
    return _of_idle(status, status.warmth, finding)


def _of_no_engine(status: Status, finding: Finding | None) -> Sentence:
    known = next((each for each in State if each.value == status.state), None)
    if known not in _STATES:
        return Sentence("What the engine does is unknown.", Tone.WARN, status.state)
    text, tone = _STATES[known]
    if status.next_start_in_s is not None:
        text += f" It starts again in {duration(max(status.next_start_in_s, 0))}."
    if tone is Tone.BAD and not status.remedy and finding is not None and finding.is_error:
        return Sentence(text, tone, f"{finding.title}: {_first_line(finding.evidence)}", finding.remedy)
    if status.loading is not None and known is State.LOADING:
        return Sentence(text, tone, f"{status.loading.phase} {status.loading.detail}".strip())
    if known is State.COOL:
        return Sentence(text, tone, "", "The next request starts the engine; so does Resume.")
    why = _first_line(status.reason or (status.last_exit or "" if tone is Tone.BAD else ""))
    helps = "Restart it, here or by: emberd restart" if known in {State.FAILED, State.STOPPED} else ""
    return Sentence(text, tone, why, status.remedy or helps)


def _of_idle(status: Status, warmth: WarmthStatus, finding: Finding | None) -> Sentence:
    temperature, progress = warmth.forecast.temperature, warmth.progress
    told = warmth.forecast.first_token_s
    next_reply = "" if told is None else f"The next reply starts in about {seconds(told)}."
    if warmth.cool_for_s:
        words = f"Cool for {duration(warmth.cool_for_s)}: the memory is free for other programs."
        return Sentence(words, Tone.QUIET, next_reply, "A request, or Resume, makes it warm again.")
    text = f"{_WARM.get(temperature, 'Ready.')} {next_reply or _UNTOLD}"
    why, helps = _why_held_back(warmth)
    if temperature == Temperature.HOT.value:
        return Sentence(text, Tone.GOOD, why, helps)
    if progress is not None and progress.total_bytes:
        words = f"Warming: {size(progress.done_bytes)} of {size(progress.total_bytes)} are in memory."
        return Sentence(words, Tone.BUSY, next_reply)
    if not why and finding is not None:
        why, helps = f"{finding.title}: {finding.evidence}", finding.remedy
    if temperature not in _WARM:
        unknown = status.residency.message if status.residency is not None else ""
        return Sentence(text, Tone.QUIET, why or unknown, helps)
    if not helps and warmth.next_look_in_s is not None:
        helps = f"emberd looks again in {duration(max(warmth.next_look_in_s, 0))}; Warm does it now."
    return Sentence(text, Tone.WARN, why, helps)


_WARM = {
    Temperature.HOT.value: "Warm.",
    Temperature.WARM.value: "Almost warm.",
    Temperature.COLD.value: "Cold.",
}
_UNTOLD = "How soon the next reply starts is not known yet."


def _why_held_back(warmth: WarmthStatus) -> tuple[str, str]:
    """Return why emberd keeps the model less warm than it could, and what helps; empty if it does not."""
    reasons = (
        (warmth.mode == "off", "Keeping warm is off.", 'Set warmth.mode = "auto", or press Warm for once.'),
        (
            warmth.paused_for_s,
            f"Keeping warm is paused for {duration(warmth.paused_for_s or 0)}.",
            "Resume ends the pause.",
        ),
        (
            warmth.is_helpless,
            "The computer swaps, and nothing that emberd may let go would help.",
            "Close other programs.",
        ),
        (
            warmth.hold != "all",
            f"The computer needs the memory: emberd {_HELD.get(warmth.hold, 'has let go')}.",
            "Close other programs.",
        ),
        (
            warmth.over_budget_for_s,
            f"Keeping warm is over its budget for {duration(warmth.over_budget_for_s)}.",
            "",
        ),
    )
    return next(((why, helps) for holds, why, helps in reasons if holds), ("", ""))


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
