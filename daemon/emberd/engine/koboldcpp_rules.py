"""What emberd does about single options of KoboldCPP: one table for command line and file.

The effects were read in, and mostly tested with, KoboldCPP 1.76, 1.104 and 1.115.1.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from emberd.core.types import Notice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ARGUMENTS = "engine.extra_args"
FILE = "engine.kcpps"

SECRETS = frozenset({"password", "adminpassword", "hordekey"})
"""Options whose value is never shown."""

BACKENDS = frozenset({"usecuda", "usecublas", "usevulkan", "useclblast", "usecpu", "noblas"})

RIVALS = (
    BACKENDS,
    frozenset({"usemmap", "nommap"}),
    frozenset({"sdvae", "sdvaeauto"}),
    frozenset({"sdquant", "sdlora"}),
)
"""Only one of these options may be given: one on the command line removes the others from the file."""

_UNTOUCHED_DEFAULTS = {"port": 5001, "port_param": 5001, "gpulayers": -1}


class Act(Enum):
    """What becomes of an option."""

    KEEP = auto()
    WARN = auto()
    """It stays, and the owner is told what it does."""
    DROP = auto()
    """It is left out silently: emberd says the same, or KoboldCPP would ignore it."""
    REPLACE = auto()
    """It is left out, and the owner is told why."""
    REFUSE = auto()
    """emberd does not start the engine."""


def is_on(value: object) -> bool:
    """Return True if a value, a word of a command line or JSON, asks for something."""
    if isinstance(value, list):
        return any(is_on(item) for item in value)
    return bool(value) and value != "0"


def is_wish(dest: str, value: object) -> bool:
    """Return True if a value in a file is intended: an exported file has every key with its default."""
    if dest in BACKENDS or dest == "gpulayers":  # device 0, no device at all, and 0 layers are wishes too
        return value is not None and value is not False and value != _UNTOUCHED_DEFAULTS.get(dest)
    return is_on(value) and value != _UNTOUCHED_DEFAULTS.get(dest)


def is_verbose(value: object) -> bool:
    """Return True if a --debugmode prints more; -1 prints less."""
    return is_on(value) and str(value) != "-1"


def is_public(host: object) -> bool:
    """Return True if other computers can reach an address to listen on."""
    try:
        return not ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return is_on(host) and host != "localhost"


@dataclass(frozen=True, slots=True)
class Rule:
    """What emberd does about one option.

    Attributes:
        on_command_line: what becomes of it in engine.extra_args.
        in_file: what becomes of it in the .kcpps file.
        text: its effect, or why emberd decides it.
        code: of the notice.
        remedy: of the refusal.
        concerns: the values that are told to the owner, or refused.
    """

    on_command_line: Act
    in_file: Act
    text: str = ""
    code: str = "kcpps_conflict"
    remedy: str = "Remove it."
    concerns: Callable[[object], bool] = is_on


OWNERS_BUSINESS = Rule(Act.KEEP, Act.KEEP)

_NO_SERVER = Rule(Act.REFUSE, Act.REFUSE, "With it KoboldCPP does its work without serving anybody.")
# KoboldCPP acts on these before it reads a file, and an exported file has the path of its own export.
_NO_SERVER_FROM_WORDS = Rule(Act.REFUSE, Act.DROP, _NO_SERVER.text)
_PORT = Rule(
    Act.REPLACE, Act.REPLACE, "emberd chooses the engine's port; clients use endpoint.port.", "port_ignored"
)
_MODEL = Rule(Act.REFUSE, Act.DROP, "emberd names the model.", remedy="Set model.path instead.")
_ROUTER = Rule(
    Act.REFUSE,
    Act.REFUSE,
    "KoboldCPP's router listens on all interfaces, at port 5001, past emberd's endpoint and its key (1.115).",
    remedy="Remove it; --admin with --admindir switches models through emberd's endpoint.",
)
_IDLE = Rule(Act.WARN, Act.WARN, "KoboldCPP will unload the model that emberd keeps warm.", "idle_unloading")

RULES: Mapping[str, Rule] = {
    # What emberd decides.
    "config": Rule(Act.REFUSE, Act.DROP, "emberd merges the file itself.", remedy=f"Set {FILE} instead."),
    "model": _MODEL,
    "model_param": _MODEL,
    "port": _PORT,
    "port_param": _PORT,
    "host": Rule(
        Act.REPLACE,
        Act.REPLACE,
        "The engine listens on 127.0.0.1 only; clients use emberd's own endpoint.",
        "public_host",
        concerns=is_public,
    ),
    "ssl": Rule(Act.REPLACE, Act.REPLACE, "emberd speaks plain HTTP with the engine, on 127.0.0.1.", "ssl_ignored"),
    "quiet": Rule(Act.KEEP, Act.DROP),
    "skiplauncher": Rule(Act.KEEP, Act.DROP),
    "showgui": Rule(Act.REFUSE, Act.REPLACE, "It waits for somebody to click."),
    "usemmap": Rule(Act.KEEP, Act.DROP),
    "nommap": Rule(
        Act.KEEP,
        Act.REPLACE,
        f"emberd has the model mapped. --nommap in {ARGUMENTS} prevents that.",
    ),
    # Modes without a server.
    "benchmark": _NO_SERVER,
    "cli": _NO_SERVER,
    "prompt": _NO_SERVER,
    "analyze": _NO_SERVER_FROM_WORDS,
    "exportconfig": _NO_SERVER_FROM_WORDS,
    "exporttemplate": _NO_SERVER_FROM_WORDS,
    "help": _NO_SERVER_FROM_WORDS,
    "testmemory": _NO_SERVER_FROM_WORDS,
    "unpack": _NO_SERVER_FROM_WORDS,
    "version": _NO_SERVER_FROM_WORDS,
    # In a file it only allows a start without a model, and emberd always names one.
    "nomodel": Rule(Act.REFUSE, Act.DROP, "Without a model there is nothing to keep warm."),
    # Privacy.
    "debugmode": Rule(
        Act.REFUSE,
        Act.REFUSE,
        "It switches --quiet off and prints prompts and replies.",
        remedy="Remove it, or set it to 0.",
        concerns=is_verbose,
    ),
    "remotetunnel": Rule(
        Act.WARN,
        Act.WARN,
        "It publishes the engine on the internet, past emberd's endpoint.",
        "remote_tunnel",
    ),
    # What undoes emberd's work, or surprises.
    "adminunloadtimeout": _IDLE,
    "autoswapmode": _ROUTER,
    "routermode": _ROUTER,
    "baseconfig": Rule(
        Act.REFUSE,
        Act.REPLACE,
        "It is a second settings file, which emberd does not read.",
        remedy=f"Put its content into the file of {FILE}.",
    ),
    "launch": Rule(
        Act.WARN,
        Act.REPLACE,
        "It opens a browser at every restart, on the engine's own port and not on emberd's endpoint.",
        "opens_browser",
    ),
    "nofastforward": Rule(Act.WARN, Act.WARN, "Every turn processes the whole prompt again.", "no_fast_forward"),
    "onready": Rule(Act.KEEP, Act.REPLACE, f"KoboldCPP ignores it in a file; it works in {ARGUMENTS}."),
    "ratelimit": Rule(
        Act.WARN,
        Act.WARN,
        "It counts by address, and behind emberd's endpoint all clients share one.",
        "rate_limit",
    ),
    "smartcontext": Rule(
        Act.WARN,
        Act.WARN,
        "It reserves part of the context and changes which prompts are found in the cache.",
        "smart_context",
    ),
}
"""By destination; other options are passed on."""


def say(where: str, act: Act, code: str, text: str) -> list[Notice]:
    """Return the notice of an act that the owner is told of, none for other acts."""
    fate = {Act.WARN: "is kept", Act.REPLACE: "is left out"}.get(act)
    return [Notice(code, f"{where} {fate}. {text}")] if fate else []


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def is_same(one: object, other: object) -> bool:
    """Return True if JSON and words of a command line say the same."""
    return _text(one) == _text(other)


def shown(value: object) -> str:
    """Return a value as notices show it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return _text(value) or "on"
