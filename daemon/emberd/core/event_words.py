"""What the log's events mean to a person, in words. Pure; events have no prompt and no reply in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emberd.core.words import count, duration, seconds, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Words = Callable[[Mapping[str, Any]], str]


def say_event(event: Mapping[str, Any]) -> str | None:
    """Return a sentence for an event of the log, None if it is of no interest on the page.

    Args:
        event: its name as `event`, and its fields; one without the expected fields is of no interest.
    """
    words = _WORDS.get(event.get("event", ""))
    try:
        return None if words is None else words(event) or None
    except (KeyError, TypeError, ValueError):
        return None


def _state(event: Mapping[str, Any]) -> str:
    words = _STATES[event["state"]]
    reason = str(event.get("reason") or "").partition("\n")[0]
    return f"{words}: {reason}" if reason and event["state"] in {"BACKOFF", "FAILED", "STARTING"} else f"{words}"


_STATES = {
    "STARTING": "The engine starts",
    "LOADING": "The model loads",
    "READY": "The engine is ready",
    "DRAINING": "Running replies end before a stop",
    "STOPPING": "The engine is told to stop",
    "STOPPED": "The engine has stopped",
    "COOL": "The engine was stopped, and its memory given to other work",
    "BACKOFF": "The engine has crashed",
    "FAILED": "The engine cannot start",
}
_STEPS = {
    "touch": "touched the weights",
    "lock": "locked the weights",
    "unlock": "let go of its lock",
    "replay": "replayed the last turn",
    "tiny": "generated one token",
    "restart": "restarted the engine",
}
_REASONS = {
    "due": "it was time",
    "asked": "it was asked to",
    "woken": "the computer woke up",
    "knock": "a client came back",
    "restarted": "the engine was new",
    "relieved": "memory pressure was over",
    "losing": "memory was being taken",
}


def _pass(event: Mapping[str, Any]) -> str:
    steps = [_STEPS.get(each, each) for each in event["steps"]]
    if not steps:
        return ""
    why = _REASONS.get(event["reason"])
    found = f"; {event['cold_share']:.0%} of the weights had been cold" if event.get("cold_share") else ""
    return f"emberd {' and '.join(steps)} in {seconds(event['seconds'])}{f', because {why}' if why else ''}{found}"


def _first_token(event: Mapping[str, Any]) -> str:
    told = event.get("forecast_s")
    words = f"A reply began after {seconds(event['took_s'])}"
    return words if told is None else f"{words}; {seconds(told)} had been forecast"


def _pressure(event: Mapping[str, Any]) -> str:
    return f"Memory pressure went from {event['was']} to {event['level']}"


def _guard(event: Mapping[str, Any]) -> str:
    held = {"all": "emberd holds the whole model again", "no_warming": "emberd brings nothing back for a while"}
    return held.get(event["hold"], "emberd lets go of the model, because the computer swaps")


_WORDS: dict[str, Words] = {
    "emberd_started": lambda event: f"emberd {event['version']} started",
    "emberd_stopping": lambda _: "emberd stops",
    "emberd_replacing_itself": lambda _: "emberd makes room for a new one",
    "engine_state": _state,
    "engine_adopted": lambda _: "A running engine was taken over",
    "engine_restarted": lambda event: (
        f"A new engine came {event['milliseconds_since_death']} ms after the last one"
    ),
    "engine_exited": lambda event: f"The engine ended: {str(event['meaning']).partition(chr(10))[0]}",
    "engine_lock": lambda event: f"The engine's lock is {event['state']}",
    "engine_killed": lambda _: "The engine did not end by itself and was killed",
    "engine_silent": lambda _: "The engine does not answer",
    "engine_will_not_die": lambda _: "The engine cannot be ended",
    "keepwarm": _pass,
    "keepwarm_dwelt": lambda event: (
        f"The weights were touched for {duration(event['seconds'])}, while memory was short"
    ),
    "keepwarm_over_budget": lambda event: f"Keeping warm rests for {duration(event['wait_s'])}: over its budget",
    "keepwarm_failed": lambda event: f"Keeping warm failed: {event['reason']}",
    "first_token": _first_token,
    "memory_pressure": _pressure,
    "thrash_guard": _guard,
    "locked_outside": lambda event: f"emberd locked {size(event['locked_bytes'])} of the model",
    "lock_outside_refused": lambda event: f"The system refused the lock: {event['reason']}",
    "replays_barred": lambda _: "Replays save nothing on this engine, and are sent no more",
    "replay_missed": lambda _: "A replay did not find the prompt cache",
    "reply_cut": lambda _: "A reply was cut off by the engine's end",
    "reply_continued": lambda event: f"A cut reply was continued after {count(event['tokens_so_far'], 'token')}",
    "reply_broken_off": lambda _: "A reply broke off with the engine, and cannot be continued",
    "request_failed": lambda _: "The engine closed a connection before it answered",
    "request_invalid": lambda event: f"A request was no valid HTTP: {event['reason']}",
    "request_refused": lambda event: f"A request was refused: {str(event['reason']).replace('_', ' ')}",
    "reloaded": lambda _: "The settings were read again",
    "reload_refused": lambda event: f"The new settings are wrong: {event['error']}",
    "settings_not_usable": lambda event: f"The settings are wrong: {event['error']}",
    "sleep_prevented": lambda _: "The computer is kept awake",
    "sleep_allowed": lambda _: "The computer may sleep again",
    "woken": lambda event: f"The computer woke after {duration(event['slept_s'])}",
    "history_not_written": lambda event: f"The history is not written: {event['reason']}",
    "history_set_aside": lambda _: "The history was damaged, and set aside",
    "toucher_lost": lambda event: f"The toucher ended: {event['reason']}",
}
