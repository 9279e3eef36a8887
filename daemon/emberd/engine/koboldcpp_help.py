"""The options of one build of KoboldCPP, from its own `--help` and its own refusals.

KoboldCPP's options differ between releases (`--usemmap` is an error in 1.76, `--nommap` a hidden no-op in
1.104), and a version number says nothing about forks. So the build is asked: `--help` lists every option that is
not hidden, and one run with an impossible argument makes argparse name every word that it does not know, before
any model is touched. This file reads both answers; the caller runs the program.
"""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emberd.core.errors import ConfigError, EngineNotUsable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PROBE_ARGUMENT = "--emberd-argument-probe"
"""No build knows this argument: appended to a command line, it makes argparse stop and list all unknown words."""

MANY = sys.maxsize
"""The option takes every following word that does not look like an option."""

HIDDEN_OPTIONS = {
    "--forceversion": ("forceversion", 0),
    "--hordeconfig": ("hordeconfig", MANY),
    "--no-mmap": ("nommap", 0),
    "--noblas": ("noblas", 0),
    "--nommap": ("nommap", 0),
    "--sdconfig": ("sdconfig", MANY),
    "--sdnotile": ("sdnotile", 0),
    "--testmemory": ("testmemory", 0),
}
"""Accepted by some builds (read in 1.76 to 1.104) but not shown by their help: destination, most values."""

_ARGUMENT_ERROR_EXIT = 2  # argparse's exit status for every usage error
_STDERR_LINES_SHOWN = 5
_EVERY_BUILD_HAS = frozenset({"model", "port", "usemlock", "contextsize"})
_OPTION_LINE = re.compile(r"^ {2}(-\S.*)$")  # exactly two spaces: help texts are indented more
_VERSION = re.compile(r"\bVersion\s+(\d\S*)")  # a narrow terminal breaks the line before the number
_DEFAULT_CONTEXT = re.compile(
    r"^ {2}--contextsize\b(?:(?!^ {2}-).)*?\(default:? ([\d,]+)", re.DOTALL | re.MULTILINE
)
"""4,096 in 1.76, 8,192 in 1.104, 16,384 in 1.115.1."""
_ERROR_LINE = re.compile(r"^\S.*?: error: (.*)$")
_NEGATIVE_NUMBER = re.compile(r"^-\d+$|^-\d*\.\d+$")
_HINTS = {"--usemmap": "this build maps the model unless it is given --nommap; leave --usemmap out"}


@dataclass(frozen=True, slots=True)
class Build:
    """The options of one KoboldCPP build.

    Attributes:
        spellings: every option word that the help shows, with argparse's name for it (its destination).
        widths: destination -> most values it takes: 0 for a switch, MANY without a limit.
        version: as the help prints it, with a fork's suffix; None if it prints none.
        context_tokens: the context unless told; None if the help does not say.
    """

    spellings: Mapping[str, str]
    widths: Mapping[str, int]
    version: str | None
    context_tokens: int | None = None

    def offers(self, dest: str) -> bool:
        """Return True if the help shows an option with this destination."""
        return dest in self.widths

    def destination_of_key(self, key: str) -> str:
        """Return the destination that a key of a .kcpps file means, old names included."""
        known = _known_options(self).get(f"--{key}")
        return known[0] if known else key


@dataclass(frozen=True, slots=True)
class Given:
    """One option of a command line with its values, or one word that belongs to no option.

    Attributes:
        words: exactly as written.
        dest: argparse's name for the option; a guess from the spelling if the build does not show it, and
            empty for a word that belongs to no option.
        values: the values alone.
    """

    words: tuple[str, ...]
    dest: str
    values: tuple[str, ...] = ()

    @property
    def spelling(self) -> str:
        """The option as it was written, without a value."""
        return self.words[0].partition("=")[0]

    @property
    def value(self) -> object:
        """Its value: True for a bare option, its word, or the list of its words."""
        if not self.values:
            return True
        return self.values[0] if len(self.values) == 1 else list(self.values)


def read_help(text: str) -> Build:
    """Read the standard output of `koboldcpp --help`.

    Raises:
        EngineNotUsable: the text is not KoboldCPP's help.
    """
    spellings: dict[str, str] = {}
    widths: dict[str, int] = {}
    for line in text.splitlines():
        match = _OPTION_LINE.match(line)
        if not match:
            continue
        invocation = re.split(r" {2,}", match[1])[0]
        # Python up to 3.12 repeats the placeholder after every spelling, 3.13 prints it once, at the end.
        parts = [part.partition(" ") for part in re.split(r", (?=-)", invocation)]
        words = [word for word, _, _ in parts]
        dest = _destination(words)
        spellings.update(dict.fromkeys(words, dest))
        widths[dest] = max(_most_values(placeholder) for _, _, placeholder in parts)
    if not widths.keys() >= _EVERY_BUILD_HAS:
        raise EngineNotUsable(
            "The program does not answer --help as KoboldCPP does.",
            "Set engine.path to KoboldCPP's binary, its koboldcpp.py, or the folder it is in.",
        )
    version, context = _VERSION.search(text), _DEFAULT_CONTEXT.search(text)
    return Build(
        spellings, widths, version[1] if version else None, int(context[1].replace(",", "")) if context else None
    )


def read_arguments(build: Build, arguments: Sequence[str]) -> tuple[Given, ...]:
    """Split a command line into options and their values, as the build's argparse would."""
    return tuple(_split(build, arguments))


def unknown_arguments(build: Build, extra_args: Sequence[str]) -> tuple[str, ...]:
    """Return the option words that the help does not show, in order.

    They may be hidden options (`--noblas`): only the build itself can tell.
    """
    shown = _shown_options(build)
    return tuple(
        given.spelling
        for given in read_arguments(build, extra_args)
        if given.dest and _find(shown, given.words[0]) is None
    )


def read_probe(build: Build, extra_args: Sequence[str], exit_code: int, stderr: str) -> None:
    """Judge a run of the build on the user's arguments, followed by PROBE_ARGUMENT.

    Returns normally if the probe is the only argument that the build refuses.

    Args:
        build: the build that was run.
        extra_args: the user's own arguments. Of a mistyped option with a value (`--contextsise 4096`) argparse
            first takes the value for a model file. So the words that the help does not show are named beside the
            build's sentence.
        exit_code: of the run.
        stderr: of the run.

    Raises:
        ConfigError: the build refuses an argument, a value or a pair.
        EngineNotUsable: the run ended in any other way.
    """
    lines = [line for line in stderr.splitlines() if line.strip()]
    refusals = [match[1] for line in lines if (match := _ERROR_LINE.match(line))]
    if exit_code != _ARGUMENT_ERROR_EXIT or not refusals:
        last_lines = "\n".join(lines[-_STDERR_LINES_SHOWN:]) or "(it printed no error)"
        raise EngineNotUsable(
            f"KoboldCPP did not check its arguments: exit status {exit_code}.\n{last_lines}",
            "Start the program by hand with --help to see what is wrong with it.",
        )
    sentence = refusals[-1]
    label, _, rest = sentence.partition("unrecognized arguments: ")
    if not label:
        refused = [word for word in rest.split() if word.startswith("-") and word != PROBE_ARGUMENT]
        if not refused and rest.split() == [PROBE_ARGUMENT]:
            return
        named = [word.partition("=")[0] for word in refused] or ["a word that belongs to no option"]
        raise ConfigError(
            f"This KoboldCPP ({build.version or 'unknown version'}) does not know {', '.join(named)}.",
            _advice(build, named),
        )
    unknown = [word for word in unknown_arguments(build, extra_args) if word not in HIDDEN_OPTIONS]
    doubt = f" It may not know {', '.join(unknown)}." if unknown else ""
    raise ConfigError(f"KoboldCPP refuses its arguments: {sentence}.{doubt}", _advice(build, unknown))


def _advice(build: Build, words: Sequence[str]) -> str:
    """Return the remedy for arguments that the build refuses, with the nearest known word for each."""
    hints = [hint for word in words if (hint := _hint(build, word))]
    return " ".join(["Correct engine.extra_args.", *hints])


def _hint(build: Build, word: str) -> str:
    if word in _HINTS:
        return f"{word}: {_HINTS[word]}."
    if word in HIDDEN_OPTIONS:
        nearest = [shown for shown, dest in build.spellings.items() if dest == HIDDEN_OPTIONS[word][0]]
    else:
        nearest = difflib.get_close_matches(word, _known_options(build), n=1)
    return f"{word}: did you mean {nearest[0]}?" if nearest else ""


def _destination(words: Sequence[str]) -> str:
    """Return argparse's name of an option: its first long spelling, else its first."""
    named = next((word for word in words if word.startswith("--")), words[0])
    return named.lstrip("-").replace("-", "_")


def _most_values(placeholder: str) -> int:
    """Return how many values a placeholder of the help means.

    argparse ends a repeated placeholder with ` ...]`. Brackets do not mean an optional value, because KoboldCPP's
    own placeholders have them, so with or without brackets it counts as one.
    """
    if re.search(r" \.\.\.\]+$", placeholder):
        return MANY
    depth = 0
    bare = ""
    for character in placeholder:
        depth += (character in "[{") - (character in "]}")
        bare += "x" if depth else character
    return len(bare.split())


def _shown_options(build: Build) -> dict[str, tuple[str, int]]:
    """Return spelling -> (destination, most values) of the options that the help shows."""
    return {spelling: (dest, build.widths[dest]) for spelling, dest in build.spellings.items()}


def _known_options(build: Build) -> dict[str, tuple[str, int]]:
    """Return the shown options and the known hidden ones."""
    return HIDDEN_OPTIONS | _shown_options(build)


def _split(build: Build, arguments: Sequence[str]) -> Iterator[Given]:
    known = _known_options(build)
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if not _looks_like_an_option(word):
            yield Given((word,), "")
            continue
        # An unknown option takes its values along: `--contextsise 4096` is one mistake, not two.
        name, equals, after_equals = word.partition("=")
        unknown = (_destination([name]), MANY, after_equals if equals else None)
        dest, width, attached = _find(known, word) or unknown
        start = position
        while attached is None and position < len(arguments) and position - start < width:
            if arguments[position] == "--" or _looks_like_an_option(arguments[position]):
                break
            position += 1
        following = tuple(arguments[start:position])
        yield Given((word, *following), dest, following if attached is None else (attached,))


def _looks_like_an_option(word: str) -> bool:
    """Return True if argparse takes the word for an option; `--` is neither option nor value."""
    is_dashed = len(word) > 1 and word.startswith("-") and word != "--"
    return is_dashed and " " not in word.partition("=")[0] and not _NEGATIVE_NUMBER.match(word)


def _find(known: Mapping[str, tuple[str, int]], word: str) -> tuple[str, int, str | None] | None:
    """Return destination, most values and the value joined to the word; None if unknown or ambiguous."""
    name, equals, after_equals = word.partition("=")
    if name in known:
        return *known[name], after_equals if equals else None
    found: set[tuple[str, int, str | None]] = {
        (*option, after_equals if equals else None)
        for spelling, option in known.items()
        if spelling.startswith(name)
    }
    if not word.startswith("--") and word[:2] in known:  # -c4096
        found.add((*known[word[:2]], word[2:]))
    return found.pop() if len(found) == 1 else None
