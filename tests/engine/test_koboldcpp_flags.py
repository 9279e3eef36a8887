"""The command line of KoboldCPP, composed for two builds that differ as an old and a new release do."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
from typing import TYPE_CHECKING, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.errors import ConfigError, EngineNotUsable
from emberd.engine.koboldcpp_flags import CommandLine, Wishes, compose
from emberd.engine.koboldcpp_help import (
    MANY,
    PROBE_ARGUMENT,
    Build,
    read_arguments,
    read_help,
    read_probe,
    unknown_arguments,
)
from emberd.engine.koboldcpp_rules import RULES, Act

if TYPE_CHECKING:
    from collections.abc import Mapping

SECRET = "hunter2-hunter2"
FOLK_RECIPE = ("--usemlock", "--noblas", "--gpulayers")


class OneRefusal(argparse.ArgumentParser):
    """A parser that keeps its refusal instead of ending the test run."""

    def error(self, message: str) -> NoReturn:
        """Raise what would be printed."""
        raise ValueError(f"usage: kcpp [-h]\nkcpp: error: {message}\n")


def parser_of(*, is_new: bool, version: str = "9.9") -> OneRefusal:
    """Build a parser whose options have the shapes of KoboldCPP's: aliases, groups, hidden and bare ones."""
    parser = OneRefusal(prog="kcpp", description=f"A server - Version {version}")

    def aliases(*words: str) -> tuple[str, ...]:
        return words if is_new else ()

    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", *aliases("-m"), metavar="[files]", nargs="+" if is_new else None, help="text")
    model.add_argument("model_param", nargs="?")
    port = parser.add_mutually_exclusive_group()
    port.add_argument("--port", metavar="[portnumber]", type=int, default=5001)
    port.add_argument("port_param", nargs="?", type=int, default=5001)
    backend = parser.add_mutually_exclusive_group()
    backend.add_argument("--usecuda" if is_new else "--usecublas", *aliases("--usecublas"), nargs="*")
    backend.add_argument("--usevulkan", nargs="*", metavar="[Device IDs]", type=int)
    backend.add_argument("--useclblast", nargs=2, type=int, choices=range(3))
    backend.add_argument("--usecpu", action="store_true")
    backend.add_argument("--noblas", action="store_true", help=argparse.SUPPRESS)
    mapping = parser.add_mutually_exclusive_group()
    hidden = argparse.SUPPRESS if is_new else "a help text that is long enough to be wrapped by argparse itself"
    mapping.add_argument("--nommap", *aliases("--no-mmap"), action="store_true", help=hidden)
    parser.add_argument("--usemlock", *aliases("--mlock"), action="store_true")
    parser.add_argument("--contextsize", *aliases("--ctx-size", "-c"), metavar="[256 to 9]", type=int)
    parser.add_argument("--gpulayers", *aliases("-ngl"), metavar="[layers]", nargs="?", const=1, type=int)
    parser.add_argument("--ropeconfig", metavar=("[scale]", "[base]"), type=float, nargs="+")
    parser.add_argument("--debugmode", nargs="?", const=1, type=int, default=0)
    parser.add_argument("--benchmark", metavar="[filename]", nargs="?", const="stdout")
    for switch in ("quiet", "launch", "remotetunnel", "smartcontext", "nomodel"):
        parser.add_argument(f"--{switch}", action="store_true")
    for valued in ("host", "config", "prompt", "password", "threads", "unpack", "onready"):
        parser.add_argument(f"--{valued}", metavar=f"[{valued}]")
    parser.add_argument("--ssl", metavar=("[cert]", "[key]"), nargs="+")
    launcher = parser.add_mutually_exclusive_group()
    launcher.add_argument("--showgui", action="store_true")
    launcher.add_argument("--skiplauncher", action="store_true")
    if is_new:
        mapping.add_argument("--usemmap", action="store_true")
        for switch in ("cli", "version", "nofastforward", "admin", "autoswapmode", "routermode"):
            parser.add_argument(f"--{switch}", action="store_true")
        for valued in ("analyze", "exportconfig", "exporttemplate", "adminpassword", "hordekey"):
            parser.add_argument(f"--{valued}", metavar=f"[{valued}]")
        parser.add_argument("--ratelimit", type=int)
        parser.add_argument("--adminunloadtimeout", type=int)
        parser.add_argument("--sddefaults", metavar='{"parameter":"value",...}')
    return parser


OLD = read_help(parser_of(is_new=False, version="1.70").format_help())
NEW = read_help(parser_of(is_new=True, version="1.110.fork-GPU").format_help())
BOTH = pytest.mark.parametrize("build", [OLD, NEW], ids=["old", "new"])

PLAIN = Wishes(
    model="/models/a.gguf",
    port=50123,
    lock=True,
    context_size=None,
    gpu_layers=None,
    extra_args=(),
    kcpps=None,
    kcpps_target="/state/merged.kcpps",
    is_metal=False,
)


def with_words(*words: str, build: Build = NEW, **changes: object) -> CommandLine:
    return compose(build, dataclasses.replace(PLAIN, extra_args=words, **changes))  # type: ignore[arg-type]


def with_file(content: Mapping[str, object], *words: str, build: Build = NEW, **changes: object) -> CommandLine:
    return with_words(*words, build=build, kcpps=content, **changes)


def codes(line: CommandLine) -> list[str]:
    return [notice.code for notice in line.notices]


def parsed(build: Build, line: CommandLine) -> argparse.Namespace:
    """Let the argparse of that build read the command line."""
    return parser_of(is_new=build is NEW).parse_args(line.arguments)


def refusal_of(build: Build, words: tuple[str, ...]) -> str:
    """Return what that build prints when it is run with the words and the probe."""
    with pytest.raises(ValueError, match="error: ") as caught, contextlib.redirect_stdout(io.StringIO()):
        parser_of(is_new=build is NEW).parse_args([*words, PROBE_ARGUMENT])
    return str(caught.value)


# Reading the help
def test_every_alias_leads_to_the_first_long_spelling() -> None:
    for word in ("--gpulayers", "-ngl"):
        assert NEW.spellings[word] == "gpulayers"
    assert NEW.spellings["-m"] == "model"
    assert NEW.spellings["--usecublas"] == "usecuda"
    assert OLD.spellings["--usecublas"] == "usecublas"


def test_the_version_keeps_a_forks_suffix() -> None:
    assert (OLD.version, NEW.version) == ("1.70", "1.110.fork-GPU")


def test_a_help_without_a_version_is_read_all_the_same() -> None:
    text = parser_of(is_new=True).format_help().replace("Version", "Edition")
    assert read_help(text).version is None


def test_hidden_options_are_not_offered() -> None:
    assert OLD.offers("nommap")
    assert not OLD.offers("usemmap")
    assert NEW.offers("usemmap")
    assert not NEW.offers("nommap")


def test_placeholders_tell_how_many_values_an_option_takes() -> None:
    widths = {name: NEW.widths[name] for name in ("quiet", "contextsize", "gpulayers", "useclblast")}
    assert widths == {"quiet": 0, "contextsize": 1, "gpulayers": 1, "useclblast": 2}
    assert NEW.widths["model"] == NEW.widths["ropeconfig"] == NEW.widths["usevulkan"] == MANY
    assert NEW.widths["sddefaults"] == 1
    assert OLD.widths["model"] == 1


@pytest.mark.parametrize("columns", ["30", "80", "400"])
def test_the_width_of_the_terminal_does_not_matter(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert read_help(parser_of(is_new=True, version="1.110.fork-GPU").format_help()) == NEW


def test_a_placeholder_printed_once_for_all_spellings_is_enough() -> None:
    """Python 3.13 prints `-c, --contextsize N` where older ones print `-c N, --contextsize N`."""
    text = (
        "  --model, -m [files] [[files] ...]\n"
        "  --port [number]       text\n"
        "  --usemlock, --mlock   text\n"
        "  --contextsize, -c [256 to 9]\n"
    )
    build = read_help(text)
    assert (build.widths["model"], build.widths["contextsize"]) == (MANY, 1)
    assert build.spellings["-c"] == "contextsize"


@pytest.mark.parametrize("text", ["", "usage: ls [FILE]\n\noptions:\n  --all  show all\n", "Killed"])
def test_the_help_of_another_program_is_refused(text: str) -> None:
    with pytest.raises(EngineNotUsable, match="--help"):
        read_help(text)


# Reading arguments
def test_values_stay_with_their_option() -> None:
    words = (
        "--ropeconfig",
        "1.0",
        "10000",
        "--gpulayers",
        "--usevulkan",
        "0",
        "1",
        "--contextsize",
        "-5",
    )
    assert [(one.dest, one.values) for one in read_arguments(NEW, words)] == [
        ("ropeconfig", ("1.0", "10000")),
        ("gpulayers", ()),
        ("usevulkan", ("0", "1")),
        ("contextsize", ("-5",)),
    ]


@pytest.mark.parametrize("word", ["--contextsize=4096", "--ctx-size=4096", "-c4096", "-c=4096", "--contexts=4096"])
def test_every_way_of_joining_a_value_is_understood(word: str) -> None:
    (one,) = read_arguments(NEW, [word])
    assert (one.dest, one.values) == ("contextsize", ("4096",))


def test_a_hidden_option_is_known_by_its_destination() -> None:
    (one,) = read_arguments(NEW, ["--no-mmap"])
    assert one.dest == "nommap"


def test_an_unknown_option_takes_its_values_along() -> None:
    assert [one.words for one in read_arguments(NEW, ["--contextsise", "4096", "--quiet"])] == [
        ("--contextsise", "4096"),
        ("--quiet",),
    ]


@given(st.lists(st.sampled_from(["--gpulayers", "--quiet", "--lora", "-c", "-1", "a", "--x=1", "--", "-", ""])))
def test_no_word_is_lost(words: list[str]) -> None:
    assert [word for one in read_arguments(NEW, words) for word in one.words] == words


# Composing
@BOTH
def test_the_build_accepts_what_is_composed(build: Build) -> None:
    line = with_file({}, "--threads", "4", build=build, context_size=8192, gpu_layers=0)
    seen = vars(parsed(build, line))
    expected = {"host": "127.0.0.1", "port": 50123, "quiet": True, "skiplauncher": True, "usemlock": True}
    expected |= {"contextsize": 8192, "gpulayers": 0, "threads": "4", "config": "/state/merged.kcpps"}
    assert expected.items() <= seen.items()
    assert not line.notices


def test_the_owners_words_stand_first() -> None:
    assert with_words("--threads", "4").arguments[:4] == ("--threads", "4", "--host", "127.0.0.1")


def test_the_model_is_mapped_by_the_name_that_the_build_has_for_it() -> None:
    assert "--usemmap" in with_words(build=NEW).arguments
    assert not {"--usemmap", "--nommap"} & set(with_words(build=OLD).arguments)


def test_nothing_is_added_that_the_build_does_not_offer() -> None:
    without = parser_of(is_new=True).format_help().replace("--quiet", "--silent").replace("--skipl", "--skipl-")
    line = with_words(build=read_help(without))
    assert not {"--quiet", "--skiplauncher"} & set(line.arguments)


def test_without_a_file_there_is_none_to_write() -> None:
    line = with_words()
    assert line.kcpps is None
    assert "--config" not in line.arguments


def test_no_lock_is_asked_for_if_the_settings_say_never() -> None:
    assert "--usemlock" not in with_words(lock=False).arguments


@BOTH
def test_the_folk_recipe_composes_without_a_second_lock_or_gpulayers(build: Build) -> None:
    line = with_words(*FOLK_RECIPE, build=build)
    assert line.arguments[:4] == (*FOLK_RECIPE, "--host")
    assert line.arguments.count("--usemlock") == line.arguments.count("--gpulayers") == 1
    assert (parsed(build, line).gpulayers, parsed(build, line).noblas) == (1, True)


@pytest.mark.parametrize("words", [("--mlock",), ("--usemlo",), ("--quiet",), ("--skiplauncher",), ("--usemmap",)])
def test_what_the_owner_has_given_is_not_added_again(words: tuple[str, ...]) -> None:
    dests = [one.dest for one in read_arguments(NEW, with_words(*words).arguments)]
    assert len(dests) == len(set(dests))


def test_a_setting_wins_over_the_owners_argument_and_says_so() -> None:
    line = with_words("--gpulayers", "-c", "2048", context_size=4096, gpu_layers=20)
    assert codes(line) == ["setting_wins", "setting_wins"]
    assert parsed(NEW, line).contextsize == 4096
    assert line.arguments.count("--gpulayers") == 1
    assert "-c" not in line.arguments


def test_a_setting_and_an_argument_of_the_same_value_are_no_conflict() -> None:
    line = with_words("-c", "4096", context_size=4096)
    assert not line.notices
    assert "--contextsize" not in line.arguments


def test_a_lock_of_the_owners_gives_way_to_lock_never() -> None:
    line = with_words("--mlock", lock=False)
    assert codes(line) == ["setting_wins"]
    assert "--mlock" not in line.arguments


# Refusals
@pytest.mark.parametrize(
    "words",
    [
        ("--config", "a.kcpps"),
        ("--config=a.kcpps",),
        ("--conf", "a.kcpps"),
        ("--model", "b.gguf"),
        ("b.gguf",),
        ("--usemlock", "b.gguf", "5001"),
        ("--",),
        ("",),
        ("--benchmark",),
        ("--benchmark", "out.txt"),
        ("--cli",),
        ("--prompt", "hello"),
        ("--unpack", "there"),
        ("--analyze", "a.gguf"),
        ("--exportconfig", "x"),
        ("--exporttemplate", "x"),
        ("--version",),
        ("--help",),
        ("-h",),
        ("--nomodel",),
        ("--showgui",),
        ("--testmemory",),
        ("--debugmode",),
        ("--debugmode", "1"),
        ("--debugmode=2",),
        ("--routermode",),
        ("--autoswapmode",),
    ],
    ids=" ".join,
)
@BOTH
def test_an_argument_that_emberd_cannot_serve_with_is_refused_with_a_remedy(
    build: Build, words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"engine\.extra_args") as caught:
        with_words(*words, build=build)
    assert caught.value.remedy


@pytest.mark.parametrize("words", [("-m", "b.gguf"), ("-mb.gguf",), ("-m=b.gguf",)])
def test_a_model_by_its_short_name_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="emberd names the model"):
        with_words(*words)


@pytest.mark.parametrize("words", [("--debugmode", "0"), ("--debugmode", "-1"), ("--debugmode=-1",)])
def test_a_debugmode_that_prints_no_more_is_kept(words: tuple[str, ...]) -> None:
    assert with_words(*words).arguments[: len(words)] == words


def test_an_option_and_its_value_in_one_word_are_explained() -> None:
    with pytest.raises(ConfigError, match="two entries"):
        with_words("--contextsize 4096")


def test_a_word_behind_a_password_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        with_words("--password", "x", SECRET)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", ["benchmark", "cli", "prompt", "routermode", "autoswapmode"])
def test_a_file_that_switches_the_server_off_or_opens_another_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf'"{key}" in engine\.kcpps') as caught:
        with_file({key: "x"})
    assert caught.value.remedy


def test_a_verbose_file_is_refused_unless_the_owner_overrides_it() -> None:
    with pytest.raises(ConfigError, match="debugmode"):
        with_file({"debugmode": 1})
    assert with_file({"debugmode": 1}, "--debugmode", "0").kcpps == {}
    assert with_file({"debugmode": -1}).kcpps == {"debugmode": -1}


def test_no_model_anywhere_is_refused() -> None:
    nowhere: list[dict[str, object] | None] = [None, {}, {"model": [], "model_param": None}, {"model": ""}]
    for content in nowhere:
        with pytest.raises(ConfigError, match="No model") as caught:
            with_words(kcpps=content, model=None)
        assert "model.path" in caught.value.remedy


def test_a_model_that_would_be_downloaded_is_refused() -> None:
    with pytest.raises(ConfigError, match="Download it"):
        with_file({"model": ["https://example.org/a.gguf"]}, model=None)


# Notices
@pytest.mark.parametrize(
    ("code", "words", "is_kept"),
    [
        ("port_ignored", ("--port", "5001"), False),
        ("public_host", ("--host", "0.0.0.0"), False),
        ("public_host", ("--host=kitchen.local",), False),
        ("ssl_ignored", ("--ssl", "a.pem", "b.pem"), False),
        ("idle_unloading", ("--adminunloadtimeout", "300"), True),
        ("remote_tunnel", ("--remotetunnel",), True),
        ("opens_browser", ("--launch",), True),
        ("smart_context", ("--smartcontext",), True),
        ("no_fast_forward", ("--nofastforward",), True),
        ("rate_limit", ("--ratelimit", "2"), True),
        ("mmap_off", ("--no-mmap",), True),
    ],
)
def test_each_surprising_argument_has_its_notice(code: str, words: tuple[str, ...], *, is_kept: bool) -> None:
    line = with_words(*words)
    assert codes(line) == [code]
    assert words[0].partition("=")[0] in line.notices[0].message
    assert (set(words) <= set(line.arguments)) is is_kept
    assert SECRET not in line.notices[0].message


@pytest.mark.parametrize(
    ("code", "content", "is_kept"),
    [
        ("port_ignored", {"port": 5002}, False),
        ("port_ignored", {"port_param": 5002}, False),
        ("public_host", {"host": "192.168.1.2"}, False),
        ("ssl_ignored", {"ssl": ["a.pem", "b.pem"]}, False),
        ("idle_unloading", {"adminunloadtimeout": 300}, True),
        ("remote_tunnel", {"remotetunnel": True}, True),
        ("opens_browser", {"launch": True}, False),
        ("smart_context", {"smartcontext": True}, True),
        ("no_fast_forward", {"nofastforward": True}, True),
        ("rate_limit", {"ratelimit": 2}, True),
        ("kcpps_conflict", {"nommap": True}, False),
        ("kcpps_conflict", {"showgui": True}, False),
        ("kcpps_conflict", {"onready": ["say hello"]}, False),
    ],
)
def test_each_surprising_key_has_its_notice(code: str, content: dict[str, object], *, is_kept: bool) -> None:
    line = with_file(content)
    assert codes(line) == [code]
    assert f'"{next(iter(content))}"' in line.notices[0].message
    assert line.kcpps == (content if is_kept else {})


@pytest.mark.parametrize("words", [("--host", "127.0.0.1"), ("--host", "localhost"), ("--host", "::1")])
def test_a_loopback_host_is_dropped_silently(words: tuple[str, ...]) -> None:
    line = with_words(*words)
    assert not line.notices
    assert line.arguments.count("--host") == 1
    assert words[1] == "127.0.0.1" or words[1] not in line.arguments


@pytest.mark.parametrize("words", [("--adminunloadtimeout", "0"), ("--ratelimit=0",), ("--prompt", "")])
def test_an_option_that_is_set_to_nothing_is_no_surprise(words: tuple[str, ...]) -> None:
    assert not with_words(*words).notices


def test_unmapped_and_locked_on_metal_is_said_to_lock_nothing() -> None:
    assert codes(with_words("--nommap", is_metal=True)) == ["mmap_off", "metal_lock_without_mmap"]
    assert codes(with_words("--nommap", is_metal=True, lock=False)) == ["mmap_off"]
    assert "--usemmap" not in with_words("--nommap").arguments


@pytest.mark.parametrize(
    "words",
    [("--password", SECRET), (f"--password={SECRET}",), ("--adminpassword", SECRET), (f"--hordekey={SECRET}",)],
)
def test_a_password_goes_into_the_file_and_not_onto_the_command_line(words: tuple[str, ...]) -> None:
    line = with_words(*words)
    dest = words[0].partition("=")[0].removeprefix("--")
    assert line.kcpps == {dest: SECRET}
    assert "--config" in line.arguments
    assert not [word for word in line.arguments if SECRET in word]
    assert line.password == (SECRET if dest == "password" else "")
    assert SECRET not in repr(dataclasses.replace(line, kcpps=None, hidden=()))
    assert not line.notices


@pytest.mark.parametrize("file", [None, {}, {"password": None}, {"password": ""}])
def test_a_password_of_the_environment_goes_into_the_file(file: dict[str, object] | None) -> None:
    line = compose(NEW, dataclasses.replace(PLAIN, kcpps=file, password=SECRET))
    assert SECRET not in line.arguments
    assert line.password == SECRET
    assert line.kcpps is not None
    assert line.kcpps["password"] == SECRET
    assert SECRET in line.hidden


def test_a_password_of_the_environment_gives_way_to_any_other() -> None:
    assert with_words("--password", SECRET, password="other").password == SECRET
    line = compose(NEW, dataclasses.replace(PLAIN, kcpps={"password": SECRET}, password="other"))
    assert line.password == SECRET


def test_a_password_of_the_file_is_hidden_too() -> None:
    line = with_file({"password": SECRET, "adminpassword": None})
    assert line.hidden == (SECRET,)
    assert not line.notices


@pytest.mark.parametrize("dest", sorted(RULES))
def test_every_rule_that_speaks_has_something_to_say(dest: str) -> None:
    rule = RULES[dest]
    speaks = {rule.on_command_line, rule.in_file} & {Act.WARN, Act.REPLACE, Act.REFUSE}
    assert not speaks or rule.text.endswith(".")


# Merging the file
def test_an_exported_file_with_nothing_but_defaults_gives_no_notice() -> None:
    defaults: dict[str, object] = {
        "model": [], "model_param": None, "port": 5001, "port_param": 5001, "host": "", "launch": False,
        "config": None, "gpulayers": -1, "usemlock": False, "usemmap": False, "nommap": False,
        "quiet": False, "onready": "", "benchmark": None, "prompt": "", "cli": False, "ssl": None,
        "debugmode": 0, "usevulkan": None, "skiplauncher": False, "password": None, "ratelimit": 0,
        "exportconfig": "/home/me/exported.kcpps", "nomodel": False, "istemplate": False,
    }  # fmt: skip
    line = with_file(defaults, gpu_layers=20)
    assert not line.notices
    assert line.kcpps is not None
    emberds = {
        "model",
        "model_param",
        "port",
        "port_param",
        "host",
        "config",
        "usemlock",
        "usemmap",
        "quiet",
    }
    assert not emberds & set(line.kcpps)
    assert line.kcpps["istemplate"] is False


def test_keys_that_nobody_else_decides_are_kept_unchanged() -> None:
    content = {
        "contextsize": 4096,
        "usevulkan": [0],
        "chatcompletionsadapter": {"a": [1]},
        "future": None,
    }
    line = with_file(content)
    assert line.kcpps == content
    assert not line.notices
    assert line.arguments[-2:] == ("--config", "/state/merged.kcpps")


@pytest.mark.parametrize(
    "words",
    [
        ("--contextsize", "1024"),
        ("--ctx-size=1024",),
        ("-c", "1024"),
        ("-c1024",),
        ("--contextsi", "1024"),
    ],
)
def test_an_argument_wins_over_the_file_in_every_spelling(words: tuple[str, ...]) -> None:
    line = with_file({"contextsize": 4096}, *words)
    assert line.kcpps == {}
    (notice,) = line.notices
    assert notice.code == "kcpps_conflict"
    assert all(part in notice.message for part in ('"contextsize"', "4096", "1024", "engine.extra_args"))


def test_the_same_value_in_both_is_no_conflict() -> None:
    assert not with_file({"contextsize": 4096, "usemlock": True}, "-c", "4096").notices


def test_a_setting_wins_over_the_file() -> None:
    line = with_file(
        {"contextsize": 4096, "gpulayers": 0, "usemlock": True}, context_size=1, gpu_layers=2, lock=False
    )
    assert line.kcpps == {}
    assert codes(line) == ["kcpps_conflict"] * 3
    assert "engine.context_size" in line.notices[0].message


@pytest.mark.parametrize("content", [{"usevulkan": []}, {"usevulkan": [0]}, {"usecublas": ["normal"]}])
def test_a_backend_on_the_command_line_pushes_the_files_backend_out(content: dict[str, object]) -> None:
    line = with_file(content, "--noblas")
    assert line.kcpps == {}
    assert codes(line) == ["kcpps_conflict"]
    assert "--noblas" in line.notices[0].message


def test_an_old_key_is_known_by_the_new_option() -> None:
    line = with_file({"usecublas": ["normal"]}, "--usecuda", "0")
    assert line.kcpps == {}


def test_no_mmap_on_the_command_line_wins_over_the_files_mmap() -> None:
    line = with_file({"usemmap": True}, "--nommap")
    assert line.kcpps == {}
    assert codes(line) == ["kcpps_conflict", "mmap_off"]


def test_a_password_that_loses_is_not_shown() -> None:
    line = with_file({"password": f"{SECRET}-of-file"}, "--password", SECRET)
    assert codes(line) == ["kcpps_conflict"]
    assert line.password == SECRET
    assert line.kcpps == {"password": SECRET}
    assert not [notice for notice in line.notices if SECRET in notice.message]


@pytest.mark.parametrize(
    "content",
    [
        {"model": "/m/b.gguf"},
        {"model": ["/m/b.gguf", "/m/c.gguf"]},
        {"model_param": "/m/b.gguf"},
        {"model_param": "/m/b.gguf", "model": "/m/other.gguf"},
    ],
)
def test_the_files_model_is_used_if_the_settings_name_none(content: dict[str, object]) -> None:
    line = with_file(content, model=None)
    assert line.model == "/m/b.gguf"
    assert line.arguments[line.arguments.index("--model") + 1] == "/m/b.gguf"
    assert not line.notices
    assert line.kcpps == {}


def test_the_settings_model_wins_over_the_files() -> None:
    line = with_file({"model": "/m/b.gguf"})
    assert line.model == "/models/a.gguf"
    assert codes(line) == ["kcpps_conflict"]
    assert "/m/b.gguf" in line.notices[0].message
    assert not with_file({"model": "/models/a.gguf"}).notices


@given(st.dictionaries(st.sampled_from(sorted({*RULES, "usemlock", "threads", "gpulayers"})), st.integers(0, 9)))
def test_what_emberd_decides_is_never_left_in_the_file(content: dict[str, object]) -> None:
    try:
        line = with_file(content)
    except ConfigError:
        return
    assert line.kcpps is not None
    emberds = {
        "host",
        "port",
        "port_param",
        "model",
        "model_param",
        "usemlock",
        "usemmap",
        "nommap",
        "config",
    }
    assert not (emberds | {"quiet", "skiplauncher", "showgui", "launch", "onready", "ssl"}) & set(line.kcpps)


# Asking the build
def test_words_that_the_help_does_not_show_are_listed() -> None:
    words = ("--noblas", "--usemlok", "--quiet", "--contextsi", "1024", "--pass=x", "--no-mmap")
    assert unknown_arguments(NEW, words) == ("--noblas", "--usemlok", "--no-mmap")
    assert unknown_arguments(OLD, ("--no-mmap", "--nommap")) == ("--no-mmap",)


@BOTH
def test_a_command_line_that_the_build_accepts_passes(build: Build) -> None:
    line = with_words(*FOLK_RECIPE, build=build)
    read_probe(build, FOLK_RECIPE, 2, refusal_of(build, line.arguments))


@pytest.mark.parametrize(
    ("build", "word", "hint"),
    [
        (NEW, "--usemlok", "did you mean --usemlock?"),
        (OLD, "--mlock", "did you mean --usemlock?"),
        (OLD, "--no-mmap", "did you mean --nommap?"),
        (OLD, "--usemmap", "maps the model unless"),
    ],
)
def test_an_unknown_argument_is_named_with_the_nearest_known_one(build: Build, word: str, hint: str) -> None:
    stderr = refusal_of(build, with_words(word, build=build).arguments)
    with pytest.raises(ConfigError, match=f"does not know {word}") as caught:
        read_probe(build, (word,), 2, stderr)
    assert hint in caught.value.remedy
    assert PROBE_ARGUMENT not in str(caught.value)


def test_all_unknown_arguments_are_named_at_once() -> None:
    words = ("--zzz", "--usemlok")
    with pytest.raises(ConfigError, match="--zzz, --usemlok"):
        read_probe(NEW, words, 2, refusal_of(NEW, words))


@BOTH
def test_a_mistyped_option_with_a_value_is_named_beside_the_builds_own_sentence(build: Build) -> None:
    """The value is taken for a model file, and argparse complains of that alone."""
    words = ("--contextsise", "4096")
    stderr = refusal_of(build, with_words(*words, build=build).arguments)
    with pytest.raises(ConfigError, match="It may not know --contextsise") as caught:
        read_probe(build, words, 2, stderr)
    assert "did you mean --contextsize?" in caught.value.remedy


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--noblas", "--usecpu"), "not allowed with argument"),
        (("--contextsize", "many"), "invalid int value"),
        (("--threads",), "expected one argument"),
        (("--use",), "ambiguous option"),
    ],
)
def test_the_builds_own_sentence_is_passed_on(words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_probe(NEW, words, 2, refusal_of(NEW, words))


def test_a_hidden_option_is_not_suspected_for_another_ones_mistake() -> None:
    words = ("--noblas", "--usecpu")
    with pytest.raises(ConfigError) as caught:
        read_probe(NEW, words, 2, refusal_of(NEW, words))
    assert "may not know" not in caught.value.message


def test_the_value_of_an_unknown_argument_is_not_shown() -> None:
    words = (f"--pasword={SECRET}",)
    with pytest.raises(ConfigError, match="--pasword") as caught:
        read_probe(NEW, words, 2, refusal_of(NEW, words))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("exit_code", "stderr"),
    [
        (0, ""),
        (1, "Traceback\nModuleNotFoundError: No module named 'numpy'\n"),
        (2, "python3: can't open file 'koboldcpp.py'\n"),
        (-9, f"kcpp: error: unrecognized arguments: {PROBE_ARGUMENT}\n"),
    ],
)
def test_any_other_end_means_that_the_engine_is_not_usable(exit_code: int, stderr: str) -> None:
    with pytest.raises(EngineNotUsable, match=f"exit status {exit_code}") as caught:
        read_probe(NEW, (), exit_code, stderr)
    assert stderr.strip() in caught.value.message
