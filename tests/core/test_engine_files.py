"""What the options name and what the processes map, put together; and paths that belong to their file."""

from __future__ import annotations

import dataclasses

import pytest

from emberd.core.engine_files import (
    EngineFile,
    FileOnDisk,
    Held,
    MappedFile,
    Role,
    anchored,
    anchored_arguments,
    anchored_file,
    is_model_mapped,
    may_be_weights,
    merge,
    touchable,
)
from emberd.core.settings import read

GIB = 1 << 30
MODEL = FileOnDisk("/m/a.gguf", Role.MODEL, "/m/a.gguf", (1, 10), 4 * GIB)
PROJECTOR = FileOnDisk("/m/p.gguf", Role.PROJECTOR, "/m/p.gguf", (1, 11), GIB)


def mapped(path: str, inode: int, size: int = GIB, locked: int | None = 0) -> MappedFile:
    return MappedFile(path, (1, inode), size, locked)


def held(*files: EngineFile) -> list[tuple[str, Role, Held]]:
    return [(each.path, each.role, each.held) for each in files]


def test_a_named_file_is_mapped_or_copied_as_the_processes_show():
    seen = merge([MODEL, PROJECTOR], [mapped("/m/a.gguf", 10, locked=GIB)])
    assert held(*seen) == [
        ("/m/a.gguf", Role.MODEL, Held.MAPPED),
        ("/m/p.gguf", Role.PROJECTOR, Held.COPIED),
    ]
    assert (seen[0].size_bytes, seen[0].locked_bytes, seen[1].locked_bytes) == (4 * GIB, GIB, None)
    assert touchable(seen) == ("/m/a.gguf",)


def test_processes_that_cannot_be_asked_leave_it_unknown():
    seen = merge([MODEL], None)
    assert held(*seen) == [("/m/a.gguf", Role.MODEL, Held.UNKNOWN)]
    assert touchable(seen) == ()
    assert is_model_mapped(seen) is None


def test_a_link_of_a_download_cache_is_found_by_what_it_points_to():
    link = dataclasses.replace(MODEL, path="/hub/snapshots/1/a.gguf", real_path="/hub/blobs/77", identity=(9, 77))
    seen = merge([link], [mapped("/hub/blobs/77", 78)])  # btrfs tells another device, overlayfs another inode
    assert held(*seen) == [("/hub/snapshots/1/a.gguf", Role.MODEL, Held.MAPPED)]


def test_a_file_that_was_replaced_since_the_load_is_not_touched():
    replaced = dataclasses.replace(MODEL, identity=(1, 99))
    seen = merge([replaced], [mapped("/m/a.gguf (deleted)", 10)])
    assert held(*seen) == [("/m/a.gguf", Role.MODEL, Held.REPLACED)]
    assert touchable(seen) == ()
    assert is_model_mapped(seen) is True


def test_pieces_and_processes_add_up():
    seen = merge([MODEL], [mapped("/m/a.gguf", 10, GIB, 5), mapped("/m/a.gguf", 10, GIB, 7)])
    assert seen[0].locked_bytes == 12
    assert merge([MODEL], [mapped("/m/a.gguf", 10, GIB, None), mapped("/m/a.gguf", 10)])[0].locked_bytes is None


def test_weights_that_no_option_names_are_found_and_other_files_are_not():
    others = [
        mapped("/m/vad.bin", 1, 1),
        mapped("/blobs/4ab", 2, GIB),
        mapped("/usr/lib/locale/locale-archive", 3, 3 << 20),
        mapped("/m/gone.gguf (deleted)", 4),
    ]
    seen = merge([], others)
    assert held(*seen) == [("/m/vad.bin", Role.OTHER, Held.MAPPED), ("/blobs/4ab", Role.OTHER, Held.MAPPED)]
    assert seen[1].size_bytes == GIB


def test_a_draft_that_is_not_mapped_beside_a_mapped_model_is_not_called_a_copy():
    draft = dataclasses.replace(PROJECTOR, role=Role.DRAFT)
    assert merge([MODEL, draft], [mapped("/m/a.gguf", 10)])[1].held is Held.UNKNOWN
    assert merge([MODEL, draft], [])[1].held is Held.COPIED


def test_a_file_named_twice_counts_once():
    again = dataclasses.replace(MODEL, role=Role.DRAFT)
    assert held(*merge([MODEL, again], [])) == [("/m/a.gguf", Role.MODEL, Held.COPIED)]


@pytest.mark.parametrize(
    "path",
    ["/usr/lib/libcuda.so.550", "/lib/libc.so", "/opt/libggml.dylib", "[heap]", "/dev/nvidia0", "//anon"][:5],
)
def test_libraries_and_devices_are_no_weights(path: str):
    assert not may_be_weights(path)
    assert may_be_weights("/m/some.so-called.gguf")


# --- paths in options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--mmproj", "p.gguf"], ("--mmproj", "/set/p.gguf")),
        (["--mmproj=~/p.gguf"], ("--mmproj=/home/me/p.gguf",)),
        (["-md", "../d.gguf", "-c", "512"], ("-md", "/set/../d.gguf", "-c", "512")),
        (["--lora", "a.gguf,/b.gguf"], ("--lora", "/set/a.gguf,/b.gguf")),
        (["--lora", "one, two.gguf"], ("--lora", "/set/one, two.gguf")),
        (["--lora-scaled", "a.gguf:0.5,b.gguf:-1"], ("--lora-scaled", "/set/a.gguf:0.5,/set/b.gguf:-1")),
        (["--admindir", "./admin"], ("--admindir", "/set/admin")),
        (["--whispermodel", "https://example.org/w.bin"], ("--whispermodel", "https://example.org/w.bin")),
        (["--chatcompletionsadapter", "AutoGuess"], ("--chatcompletionsadapter", "AutoGuess")),
        (["--savedatafile", "~/story.jsondb"], ("--savedatafile", "/home/me/story.jsondb")),
        (["--onready", "echo ~"], ("--onready", "echo ~")),
        (["--onready", "~"], ("--onready", "/home/me")),
        (["--slot-save-path", "slots"], ("--slot-save-path", "/set/slots")),
        (["--grammar-file=g.gbnf", "-jf", "s.json"], ("--grammar-file=/set/g.gbnf", "-jf", "/set/s.json")),
        (["-lcs", "a", "-lcd", "b"], ("-lcs", "/set/a", "-lcd", "/set/b")),
        (["--mcpfile", "mcp", "--savedatafile", "s"], ("--mcpfile", "/set/mcp", "--savedatafile", "/set/s")),
        (["--path", "www", "--media-path", "m"], ("--path", "/set/www", "--media-path", "/set/m")),
        (["--preloadstory", "s.json"], ("--preloadstory", "/set/s.json")),
        (["--preloadstory", '{"prompt": 1}'], ("--preloadstory", '{"prompt": 1}')),
        (["--lora-scaled", "a.gguf", "0.5"], ("--lora-scaled", "/set/a.gguf", "0.5")),
        (["--lora=a.gguf", "-.5", "--lora", "7"], ("--lora=/set/a.gguf", "-.5", "--lora", "/set/7")),
    ],
)
def test_paths_of_options_belong_to_the_file_that_names_them(words: list[str], found: tuple[str, ...]):
    assert anchored_arguments(words, "/set", "/home/me") == found


def test_paths_of_settings_belong_to_the_settings_file():
    given = {"model": {"path": "m.gguf"}, "engine": {"kcpps": "~/k.kcpps", "path": "koboldcpp"}}
    seen = anchored(read(given, "a test"), "/set", "/home/me")
    assert (seen.model.path, seen.engine.kcpps) == ("/set/m.gguf", "/home/me/k.kcpps")
    assert seen.engine.path == "koboldcpp"  # a name on PATH
    given["engine"]["path"] = "kcpp/koboldcpp.py"
    assert anchored(read(given, "a test"), "/set", "/home/me").engine.path == "/set/kcpp/koboldcpp.py"
    assert anchored(read({}, "a test"), "/set", "/home/me") == read({}, "a test")


def test_paths_of_a_kcpps_file_belong_to_it():
    content = {"model_param": "m.gguf", "mmproj": "", "lora": ["~/a.gguf", "b.gguf"], "threads": 4, "model": ["x"]}
    more = {"lora": ["a.gguf", "0.5"], "preloadstory": {"prompt": "x"}, "savedatafile": "s", "admindir": "~"}
    assert anchored_file(more, "/k", "/home/me") == {
        "lora": ["/k/a.gguf", "0.5"],
        "preloadstory": {"prompt": "x"},
        "savedatafile": "/k/s",
        "admindir": "/home/me",
    }
    assert anchored_file(content, "/k", "/home/me") == {
        "model_param": "/k/m.gguf",
        "mmproj": "",
        "lora": ["/home/me/a.gguf", "/k/b.gguf"],
        "threads": 4,
        "model": ["/k/x"],
    }
