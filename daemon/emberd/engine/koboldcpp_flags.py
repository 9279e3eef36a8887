"""KoboldCPP's command line and merged settings file, composed from three sources.

emberd's settings win over the owner's engine.extra_args, which win over the owner's .kcpps file. A notice names
each intended wish that loses.

In KoboldCPP a key of the file wins over the command line, unless the exact word `--key` is there (tested with
1.76 and 1.104): `--contextsize=1024`, `-c 1024` and `--mlock` lose to it. So emberd removes every key from the
file that its settings or the owner's arguments decide.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from emberd.core.errors import ConfigError
from emberd.core.types import Notice
from emberd.engine.koboldcpp_help import read_arguments
from emberd.engine.koboldcpp_rules import (
    ARGUMENTS,
    FILE,
    OWNERS_BUSINESS,
    RIVALS,
    RULES,
    SECRETS,
    Act,
    is_same,
    is_wish,
    say,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from emberd.engine.koboldcpp_help import Build, Given

    Decided = Mapping[str, tuple[str, object]]
    """Destination -> name of the setting that decides it, value."""

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What emberd's settings and its owner want of KoboldCPP.

    Attributes:
        model: path of the GGUF file; None if the .kcpps file names it.
        port: loopback TCP port that emberd chose for the engine.
        lock: ask for the model to be locked in memory.
        context_size: tokens; None leaves it to extra_args, the file or the engine.
        gpu_layers: layers on the GPU; None as for context_size.
        extra_args: the owner's own arguments, one word each.
        kcpps: content of the owner's .kcpps file; None if there is none.
        kcpps_target: path of the merged file, which the caller writes.
        is_metal: the engine runs on Apple's Metal.
        password: what the environment names, for where nothing else names one.
    """

    model: str | None
    port: int
    lock: bool
    context_size: int | None
    gpu_layers: int | None
    extra_args: tuple[str, ...]
    kcpps: Mapping[str, object] | None
    kcpps_target: str
    is_metal: bool
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class CommandLine:
    """How KoboldCPP is to be started.

    Attributes:
        arguments: everything behind the executable.
        kcpps: settings to write to Wishes.kcpps_target, passwords included; None if there are none.
        notices: what the owner should know.
        hidden: passwords, and the words that contain them.
        model: the model that will be loaded, as named.
        password: the password that clients of the engine need, empty for none.
    """

    arguments: tuple[str, ...]
    kcpps: Mapping[str, object] | None
    notices: tuple[Notice, ...]
    hidden: tuple[str, ...]
    model: str
    password: str = field(default="", repr=False)


def compose(build: Build, wishes: Wishes) -> CommandLine:
    """Compose the command line and the merged settings file.

    The owner's arguments come first, then emberd's own; no option is given twice.

    Raises:
        ConfigError: an argument or a key that emberd cannot serve with, or no model.
    """
    file = wishes.kcpps or {}
    decided = _decided_by_settings(wishes)
    kept: list[Given] = []
    notices: list[Notice] = []
    for given in read_arguments(build, wishes.extra_args):
        if not given.dest:
            raise _stray_word(given.words[0], kept)
        act, said = _judge_argument(given, decided)
        notices += said
        if act in {Act.KEEP, Act.WARN}:
            kept.append(given)

    model, said = _choose_model(wishes.model, file)
    merged, said_of_file = merge(build, file, kept, decided)
    notices += [*said, *said_of_file, *_memory_notices(kept, wishes)]
    if wishes.password and not _password(kept, merged):
        merged["password"] = wishes.password
    if build.offers("config"):
        # Everybody on this computer can read a command line; the file has mode 0600.
        merged |= {given.dest: given.value for given in kept if given.dest in SECRETS}
        kept = [given for given in kept if given.dest not in SECRETS]
    has_file = wishes.kcpps is not None or bool(merged)
    own = [
        word
        for dest, values in _own_arguments(kept, wishes, model, has_file=has_file)
        if build.offers(dest)
        for word in (f"--{dest}", *values)
    ]
    return CommandLine(
        arguments=(*(word for given in kept for word in given.words), *own),
        kcpps=merged if has_file else None,
        notices=tuple(notices),
        hidden=tuple(dict.fromkeys(_secrets(kept, merged))),
        model=model,
        password=_password(kept, merged),
    )


_STAYS = frozenset(
    {"admin", "adminpassword", "admindir", "admintextmodelsdir", "admindatadir", "admindocsdir", "adminallowhf"}
    | {"adminunloadtimeout", "routermode", "remotetunnel", "nocertify", "password", "downloaddir", "baseconfig"}
)
"""What outlives a switch of the model (koboldcpp.py, reload_from_new_args in 1.115; 1.104 keeps fewer)."""


def switched(build: Build, wishes: Wishes, content: Mapping[str, object]) -> Wishes:
    """Return the wishes for a start with what a running KoboldCPP was switched to.

    Args:
        build: tells the options apart.
        wishes: those of the settings.
        content: what the switch loads. It has its own context and layers, or KoboldCPP's defaults.
    """
    kept = [given for given in read_arguments(build, wishes.extra_args) if given.dest in _STAYS]
    file = {key: value for key, value in (wishes.kcpps or {}).items() if build.destination_of_key(key) in _STAYS}
    return replace(
        wishes,
        model=None,
        context_size=None if "contextsize" in content else wishes.context_size,
        gpu_layers=None if "gpulayers" in content else wishes.gpu_layers,
        extra_args=tuple(word for given in kept for word in given.words),
        kcpps={**content, **file},
    )


def _password(kept: Sequence[Given], merged: Mapping[str, object]) -> str:
    values = [given.value for given in kept if given.dest == "password"] or [merged.get("password")]
    return values[-1] if isinstance(values[-1], str) else ""


def _decided_by_settings(wishes: Wishes) -> Decided:
    decided: dict[str, tuple[str, object]] = {"usemlock": ("engine.lock", wishes.lock)}
    if wishes.context_size is not None:
        decided["contextsize"] = ("engine.context_size", wishes.context_size)
    if wishes.gpu_layers is not None:
        decided["gpulayers"] = ("engine.gpu_layers", wishes.gpu_layers)
    return decided


def _stray_word(word: str, before: Sequence[Given]) -> ConfigError:
    """Return the error for a word that KoboldCPP would take for a model file or a port."""
    follows_a_secret = bool(before) and before[-1].dest in SECRETS
    named = "A word" if follows_a_secret else f'"{word}"'
    remedy = "Set model.path to choose the model."
    if word.startswith("-") and " " in word:
        remedy = "Write the option and its value as two entries."
    return ConfigError(f"{named} in {ARGUMENTS} belongs to no option; KoboldCPP would load it as a model.", remedy)


def _judge_argument(given: Given, decided: Decided) -> tuple[Act, list[Notice]]:
    """Decide about one of the owner's arguments.

    Raises:
        ConfigError: it is refused.
    """
    where = f"{given.spelling} in {ARGUMENTS}"
    value = given.value
    if given.dest in decided:
        setting, chosen = decided[given.dest]
        if is_same(value, chosen):
            return Act.KEEP, []
        said = f"{where} is left out: {setting} ({shown(chosen)}) decides."
        return Act.REPLACE, [Notice("setting_wins", said)]
    rule = RULES.get(given.dest, OWNERS_BUSINESS)
    act = rule.on_command_line
    if not rule.concerns(value):
        return (Act.KEEP if act is Act.REFUSE else act), []
    if act is Act.REFUSE:
        raise ConfigError(f"{where} is not possible. {rule.text}", rule.remedy)
    return act, say(where, act, rule.code, rule.text)


def _choose_model(wished: str | None, file: Mapping[str, object]) -> tuple[str, list[Notice]]:
    """Return the model to load, and notices.

    Raises:
        ConfigError: no model is named, or it would have to be downloaded.
    """
    in_file = model_of_file(file)
    model = wished or in_file
    if not model:
        raise ConfigError("No model is named.", f"Set model.path, or name a model in the file of {FILE}.")
    if model.startswith(("http://", "https://")):
        raise ConfigError(f"The model is an address: {model}", "Download it and set model.path to the file.")
    if in_file in {None, model}:
        return model, []
    return model, [conflict("model", in_file, f"model.path ({shown(model)})")]


def _memory_notices(kept: Sequence[Given], wishes: Wishes) -> Iterator[Notice]:
    """Yield notices for an owner who does not want the model mapped."""
    unmapped = next((given.spelling for given in kept if given.dest == "nommap"), None)
    if unmapped is None:
        return
    yield Notice(
        "mmap_off",
        f"{unmapped} in {ARGUMENTS} is kept. The model is copied into the memory of the process, which the "
        "system may swap out unless it is locked.",
    )
    if wishes.lock and wishes.is_metal:
        yield Notice(
            "metal_lock_without_mmap",
            f"With {unmapped}, builds from 2025 on lock nothing of the part that runs on Metal, and do not "
            f"tell. Remove {unmapped} from {ARGUMENTS}.",
        )


def _own_arguments(
    kept: Sequence[Given], wishes: Wishes, model: str, *, has_file: bool
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield destination and values of emberd's own options, without those that the owner already gave.

    The two-word form with the destination is the only one that wins over a file.
    """
    given = {each.dest for each in kept}
    own: dict[str, tuple[str, ...]] = {
        "host": (_LOOPBACK,),
        "port": (str(wishes.port),),
        "quiet": (),
        "skiplauncher": (),
    }
    if wishes.lock:
        own["usemlock"] = ()
    if "nommap" not in given:
        own["usemmap"] = ()  # older builds do not offer it: they map by default
    own["model"] = (model,)
    if wishes.context_size is not None:
        own["contextsize"] = (str(wishes.context_size),)
    if wishes.gpu_layers is not None:
        own["gpulayers"] = (str(wishes.gpu_layers),)
    if has_file:
        own["config"] = (wishes.kcpps_target,)
    yield from ((dest, values) for dest, values in own.items() if dest not in given)


def _secrets(kept: Sequence[Given], merged: Mapping[str, object]) -> Iterator[str]:
    for given in kept:
        if given.dest in SECRETS:
            for value in filter(None, given.values):
                yield value
                yield from (word for word in given.words if word != value and value in word)
    yield from (str(value) for key, value in merged.items() if key in SECRETS and value)


def model_of_file(file: Mapping[str, object]) -> str | None:
    """Return the model that KoboldCPP would load from this file, in its own order."""
    for key in ("model_param", "model"):
        value = file.get(key)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, str) and first:
            return first
    return None


def merge(
    build: Build, file: Mapping[str, object], kept: Sequence[Given], decided: Decided
) -> tuple[dict[str, object], list[Notice]]:
    """Return the owner's file without the keys that are decided elsewhere, and notices about them.

    Raises:
        ConfigError: a key is refused.
    """
    merged: dict[str, object] = {}
    notices: list[Notice] = []
    for key, value in file.items():
        dest = build.destination_of_key(key)
        is_meant = is_wish(dest, value)
        winner = _winner(dest, kept, decided)
        if winner:
            who, chosen = winner
            if is_meant and not is_same(value, chosen):
                notices.append(conflict(key, value, who))
            continue
        rule = RULES.get(dest, OWNERS_BUSINESS)
        if is_meant and rule.concerns(value):
            if rule.in_file is Act.REFUSE:
                raise ConfigError(f'"{key}" in {FILE} is not possible. {rule.text}', rule.remedy)
            notices += say(f'"{key}" in {FILE}', rule.in_file, rule.code, rule.text)
        if rule.in_file not in {Act.DROP, Act.REPLACE}:
            merged[key] = value
    return merged, notices


def _winner(dest: str, kept: Sequence[Given], decided: Decided) -> tuple[str, object] | None:
    """Return what decides an option over the file, and its value; None if nothing does."""
    if dest in decided:
        setting, chosen = decided[dest]
        return f"{setting} ({shown(chosen)})", chosen
    rivals = next((group for group in RIVALS if dest in group), frozenset({dest}))
    given = next((given for given in reversed(kept) if given.dest in rivals), None)
    if given is None:
        return None
    value = given.value if given.dest == dest else None
    what = f" ({shown(value)})" if given.values and dest not in SECRETS else ""
    return f"{given.spelling}{what} in {ARGUMENTS}", value


def conflict(key: str, value: object, winner: str) -> Notice:
    """Return the notice of a key of the file that loses; a password's value is not named."""
    was = "" if key in SECRETS else f" is {shown(value)}"
    return Notice("kcpps_conflict", f'"{key}"{was} in {FILE}, but {winner} decides.')
