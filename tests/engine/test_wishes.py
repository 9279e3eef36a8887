"""What an owner asks of the engine, in every spelling: the one reader of options, for every question."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from emberd.core.engine_files import NamedFile, Role
from emberd.core.gguf import F16_BYTES
from emberd.core.settings import Settings, read
from emberd.core.wishes import OwnerWishes, context_tokens, lock_policy
from emberd.engine.http import EngineHttp
from emberd.engine.koboldcpp import KoboldCpp, _as_built
from emberd.engine.koboldcpp_help import Build, read_help
from emberd.engine.llama_server import EmbeddedServer, ExternalServer
from emberd.engine.wishes import of_koboldcpp, of_llama_server, without
from emberd.host import ThisHost

if TYPE_CHECKING:
    from collections.abc import Sequence

Q8, Q4 = 1.0625, 0.5625
MODEL, PROJECTOR, DRAFT, ADAPTER, CONTROL_VECTOR, EMBEDDINGS, SPEECH, VOICE, IMAGE, MUSIC, TEXT, FOLDER = list(
    Role
)[:-2]
unused: Any = None


def plain(answer: Any) -> Any:
    """Return an answer as the tables write it: files as role and path."""
    is_files = isinstance(answer, tuple) and answer and isinstance(answer[0], NamedFile)
    return tuple((each.role, each.path) for each in answer) if is_files else answer


@pytest.mark.parametrize(
    ("words", "question", "answer"),
    [
        # disagreements of the five readers that were here before
        (["--mlock"], "locks", True),
        (["--contextsize=32768"], "context_tokens", 32768),
        (["--quantkv", "1"], "key_bytes", Q8),
        (["--defaultgenamt=4000"], "reply_tokens", 4000),
        # lock and map
        (["--usemlock"], "locks", True),
        ([], "locks", None),
        (["--usemmap"], "maps", True),
        (["--nommap"], "maps", False),
        (["--no-mmap"], "maps", False),
        ([], "maps", None),
        # context
        (["--contextsize", "8192"], "context_tokens", 8192),
        (["--ctx-size", "8192"], "context_tokens", 8192),
        (["-c", "8192", "--quiet"], "context_tokens", 8192),
        (["--contextsize", "4096", "--contextsize", "8192"], "context_tokens", 8192),
        (["--contextsize"], "context_tokens", None),
        (["--contextsize", "many"], "context_tokens", None),
        # numbers of the cache
        (["--quantkv", "2"], "value_bytes", Q4),
        (["--quantkv", "q4_0"], "key_bytes", Q4),
        (["--quantkv=Q8_0"], "value_bytes", Q8),
        (["--quantkv", "0"], "key_bytes", F16_BYTES),
        (["--quantkv", "q99"], "key_bytes", F16_BYTES),
        # slots
        (["--parallelrequests", "4"], "slots", 4),
        (["--contbatch=4"], "slots", 4),
        (["--parallelrequests", "0"], "slots", None),
        (["--parallelrequests", "4", "--smartcontext"], "slots", None),
        (["--parallelrequests", "4", "--draftmodel", "d.gguf"], "slots", None),
        (["--parallelrequests", "4", "--multiuser", "3"], "queue", 3),
        (["--multiuser"], "queue", None),
        # unloading
        (["--adminunloadtimeout", "300"], "unloads_by", "--adminunloadtimeout"),
        (["--adminunloadtimeout=0"], "unloads_by", ""),
        (["--autoswapmode"], "unloads_by", "--autoswapmode"),
        # files
        (["--mmproj", "p.gguf", "-md", "d.gguf"], "files", ((PROJECTOR, "p.gguf"), (DRAFT, "d.gguf"))),
        (["--lora", "a.gguf", "b.gguf", "--quiet"], "files", ((ADAPTER, "a.gguf"), (ADAPTER, "b.gguf"))),
        (["--mmproj", "p.gguf", "--mmproj=q.gguf"], "files", ((PROJECTOR, "q.gguf"),)),
        (
            ["--whispermodel=w.bin", "--sdmodel", "s.safetensors"],
            "files",
            ((SPEECH, "w.bin"), (IMAGE, "s.safetensors")),
        ),
        (["--ttsmodel", "t.gguf", "--ttswavtokenizer", "w.gguf"], "files", ((VOICE, "t.gguf"), (VOICE, "w.gguf"))),
        (
            ["--embeddingsmodel", "e.gguf", "--musicllm", "m.gguf"],
            "files",
            ((EMBEDDINGS, "e.gguf"), (MUSIC, "m.gguf")),
        ),
        (["--chatcompletionsadapter", "AutoGuess"], "files", ()),
        (["--lora", "a.gguf", "0.5"], "files", ((ADAPTER, "a.gguf"),)),
        (["--lora", "a.gguf", "base.gguf"], "files", ((ADAPTER, "a.gguf"), (ADAPTER, "base.gguf"))),
        # what else is read
        (["--jinjatemplate", "t", "--ttsdir", "v"], "paths", ((TEXT, "t"), (FOLDER, "v"))),
        (["--mcpfile", "m", "--mcpfile=n.json"], "paths", ((TEXT, "m.json"), (TEXT, "n.json"))),
        (["--admindir", "d"], "paths", ()),
        (["--admindir", "d", "--admin"], "paths", ((FOLDER, "d"),)),
        (["--savedatafile", "s", "--downloaddir", "d", "--admindatadir", "e"], "paths", ()),
        (["--preloadstory", "[1]"], "paths", ()),
        (["--hordemodelname", "other"], "is_renamed", True),
        ([], "is_renamed", False),
    ],
)
def test_koboldcpp_is_asked_in_every_spelling(words: list[str], question: str, answer: object):
    assert plain(getattr(of_koboldcpp(words, {}), question)) == answer


@pytest.mark.parametrize(
    ("file", "question", "answer"),
    [
        ({"contextsize": 32768}, "context_tokens", 32768),
        ({"usemlock": True}, "locks", True),
        ({"usemlock": False}, "locks", None),
        ({"nommap": True}, "maps", False),
        ({"nommap": False, "usemmap": True}, "maps", True),
        ({"quantkv": 1}, "key_bytes", Q8),
        ({"parallelrequests": 4}, "slots", 4),
        ({"parallelrequests": 4, "smartcontext": False, "draftmodel": ""}, "slots", 4),
        ({"parallelrequests": 4, "enableguidance": True}, "slots", None),
        ({"multiuser": 10}, "queue", 10),
        ({"adminunloadtimeout": 300}, "unloads_by", "--adminunloadtimeout"),
        ({"adminunloadtimeout": 0, "autoswapmode": False}, "unloads_by", ""),
        ({"mmproj": "p.gguf", "draftmodel": "", "lora": None}, "files", ((PROJECTOR, "p.gguf"),)),
        (
            {"jinjatemplate": "", "preloadstory": {"x": 1}, "mcpfile": None, "ttsdir": "v"},
            "paths",
            ((FOLDER, "v"),),
        ),
        ({"lora": ["a.gguf", "b.gguf"]}, "files", ((ADAPTER, "a.gguf"), (ADAPTER, "b.gguf"))),
        ({"sdlora": ["a.safetensors"], "sdclip1": "c"}, "files", ((IMAGE, "a.safetensors"), (IMAGE, "c"))),
        ({"defaultgenamt": 2000}, "reply_tokens", 2000),
        ({"hordemodelname": ""}, "is_renamed", False),
        ({"contextsize": {"odd": 1}}, "context_tokens", None),
    ],
)
def test_a_kcpps_file_asks_the_same(file: dict[str, object], question: str, answer: object):
    assert plain(getattr(of_koboldcpp([], file), question)) == answer


def test_an_argument_wins_over_the_file():
    file: dict[str, object] = {"contextsize": 4096, "quantkv": 2}
    assert of_koboldcpp(["--ctx-size=8192"], file).context_tokens == 8192
    assert of_koboldcpp(["--contextsize", "8192"], file).context_tokens == 8192
    assert of_koboldcpp(["--contextsize", "8192"], file).key_bytes == Q4


@pytest.mark.parametrize(
    ("words", "variables", "question", "answer"),
    [
        (["--mlock"], {}, "locks", True),
        (["--load-mode", "mlock"], {}, "locks", True),
        (["--load-mode=mmap+mlock"], {}, "locks", True),
        (["-lm", "mmap"], {}, "locks", None),
        (["-lm", "mmap"], {}, "maps", True),
        (["--load-mode", "mlock"], {}, "maps", False),
        (["--load-mode", "none"], {}, "maps", False),
        (["--load-mode", "auto"], {}, "maps", None),
        (["--no-mmap"], {}, "maps", False),
        (["--mmap"], {}, "maps", True),
        ([], {"LLAMA_ARG_MLOCK": "1"}, "locks", True),
        ([], {"LLAMA_ARG_MLOCK": "false"}, "locks", False),
        ([], {"LLAMA_ARG_LOAD_MODE": "mmap+mlock"}, "locks", True),
        ([], {"LLAMA_ARG_NO_MMAP": "1"}, "maps", False),
        ([], {"LLAMA_ARG_MMAP": "0"}, "maps", False),
        (["-c", "4096"], {}, "context_tokens", 4096),
        (["--ctx-size=4096"], {}, "context_tokens", 4096),
        ([], {"LLAMA_ARG_CTX_SIZE": "4096"}, "context_tokens", 4096),
        (["-c", "4096"], {"LLAMA_ARG_CTX_SIZE": "512"}, "context_tokens", 4096),
        (["-c", "0"], {}, "context_tokens", None),
        (["-ctk", "q8_0"], {}, "key_bytes", Q8),
        (["-ctk", "q8_0"], {}, "value_bytes", F16_BYTES),
        ([], {"LLAMA_ARG_CACHE_TYPE_V": "q4_0"}, "value_bytes", Q4),
        (["-np", "2"], {}, "slots", 2),
        (["--parallel", "-1"], {}, "slots", None),
        ([], {"LLAMA_ARG_N_PARALLEL": "8"}, "slots", 8),
        (["--sleep-idle-seconds", "60"], {}, "unloads_by", "--sleep-idle-seconds"),
        (["--sleep-idle-seconds", "-1"], {}, "unloads_by", ""),
        (
            ["-mm", "p.gguf", "--lora", "a.gguf,b.gguf"],
            {},
            "files",
            ((PROJECTOR, "p.gguf"), (ADAPTER, "a.gguf"), (ADAPTER, "b.gguf")),
        ),
        (["--lora-scaled", "a.gguf:0.5,b,c.gguf:1"], {}, "files", ((ADAPTER, "a.gguf"), (ADAPTER, "b,c.gguf"))),
        (["--control-vector", "v.gguf"], {}, "files", ((CONTROL_VECTOR, "v.gguf"),)),
        (["--lora-scaled", "a.gguf", "0.5"], {}, "files", ((ADAPTER, "a.gguf"),)),
        (["--grammar-file", "g", "-lcs", "c"], {}, "paths", ((TEXT, "g"), (TEXT, "c"))),
        (["--slot-save-path", "s", "-lcd", "d"], {}, "paths", ((FOLDER, "s"),)),
        ([], {"LLAMA_ARG_CHAT_TEMPLATE_FILE": "t"}, "paths", ((TEXT, "t"),)),
        (
            ["-md", "d.gguf"],
            {"LLAMA_ARG_SPEC_DRAFT_MODEL": "e.gguf"},
            "files",
            ((DRAFT, "d.gguf"),),
        ),
        ([], {"LLAMA_ARG_MMPROJ": "p.gguf"}, "files", ((PROJECTOR, "p.gguf"),)),
        (["--api-key", "a,b"], {}, "api_keys", ("a", "b")),
        (["--api-key=a"], {}, "api_keys", ("a",)),
        ([], {"LLAMA_API_KEY": "a"}, "api_keys", ("a",)),
        (["--api-key", "a", "--api-key", "b"], {"LLAMA_API_KEY": "c"}, "api_keys", ("c", "a", "b")),
        (["--api-key-file", "keys"], {}, "api_key_files", ("keys",)),
        (["--api-key-file=b"], {"LLAMA_ARG_API_KEY_FILE": "a"}, "api_key_files", ("a", "b")),
        (["--embedding"], {}, "serves", "embeddings"),
        (["--embeddings", "--reranking"], {}, "serves", "rerank"),
        ([], {"LLAMA_ARG_EMBEDDINGS": "1"}, "serves", "embeddings"),
        (["--parallel", "1"], {}, "serves", ""),
    ],
)
def test_llama_server_is_asked_in_every_spelling(
    words: list[str], variables: dict[str, str], question: str, answer: object
):
    assert plain(getattr(of_llama_server(words, variables), question)) == answer


def test_an_option_and_its_values_can_be_left_out():
    words = ["--api-key", "a", "-c", "512", "--api-key=b", "--api-key-file", "keys", "--api-key"]
    assert without(words, "--api-key") == ("-c", "512", "--api-key-file", "keys")


def test_a_key_is_not_shown():
    assert "horse" not in repr(of_llama_server(["--api-key", "horse"], {}))


def test_the_adapters_read_arguments_file_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "mine.kcpps"
    file.write_text(json.dumps({"contextsize": 32768}))
    settings = read({"engine": {"extra_args": ["--usemlock"], "kcpps": str(file)}}, "a test")
    kobold = KoboldCpp(settings, ThisHost(), EngineHttp(), unused, unused, unused)
    assert kobold.wishes() == OwnerWishes(locks=True, context_tokens=32768)
    file.write_text(json.dumps({"contextsize": 16384}), encoding="utf-8-sig")
    assert kobold.wishes() == OwnerWishes(locks=True, context_tokens=16384)
    file.write_text("broken")
    assert kobold.wishes() == OwnerWishes(locks=True)
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "512")
    external = ExternalServer(
        read({"engine": {"extra_args": ["-np", "2"]}}, "a test"), ThisHost(), EngineHttp(), unused, unused
    )
    assert external.wishes() == OwnerWishes(context_tokens=512, slots=2)
    assert EmbeddedServer(Settings(), ThisHost(), EngineHttp()).wishes() == OwnerWishes(
        least_context_tokens=4096, has_windows=True, prompt_cache_mib=512
    )


def test_the_owner_s_own_flag_decides_what_auto_would_weigh():
    def policy(lock: str, wishes: OwnerWishes) -> str:
        return lock_policy(read({"engine": {"lock": lock}}, "a test"), wishes)

    assert policy("auto", OwnerWishes(locks=True)) == "always"
    assert policy("auto", OwnerWishes(locks=False)) == "auto"
    assert policy("never", OwnerWishes(locks=True)) == "never"


@pytest.mark.parametrize(
    ("engine", "wished", "tokens"),
    [
        ({}, None, 8192),
        ({}, 32768, 32768),
        ({"context_size": 4096}, 32768, 4096),
        ({"kind": "llama-server"}, None, 0),
        ({"kind": "llama-server"}, 512, 512),
    ],
)
def test_the_context_is_the_settings_else_the_owners_else_the_engines(
    engine: dict[str, Any], wished: int | None, tokens: int
):
    assert context_tokens(read({"engine": engine}, "a test"), OwnerWishes(context_tokens=wished)) == tokens


@pytest.mark.parametrize(
    ("words", "question", "answer"),
    [
        ([], "least_context_tokens", 4096),
        (["--fit-ctx", "8192"], "least_context_tokens", 8192),
        (["-fit", "off"], "least_context_tokens", None),
        (["-c", "0"], "least_context_tokens", None),
        (["--ctx-size", "8192"], "least_context_tokens", None),
        (["--swa-full"], "has_windows", False),
        ([], "has_windows", None),
        (["-cram", "-1"], "prompt_cache_mib", -1),
        (["--cache-ram=0"], "prompt_cache_mib", 0),
        ([], "prompt_cache_mib", None),
    ],
)
def test_llama_server_is_asked_how_it_chooses_its_memory(words: list[str], question: str, answer: object):
    assert getattr(of_llama_server(words, {}), question) == answer


@cache
def build_of(version: str) -> Build:
    """Return the options of a KoboldCPP by the stand-in's help."""
    standin = Path(__file__).parent.parent / "koboldcpp_standin" / "koboldcpp.py"
    said = subprocess.run(
        [sys.executable, str(standin), "--help"],
        env={**os.environ, "STANDIN_VERSION": version},
        capture_output=True,
        text=True,
        check=True,
    )
    return read_help(said.stdout)


def built(words: Sequence[str], version: str) -> OwnerWishes:
    """Return what a build of KoboldCPP makes of these arguments."""
    return _as_built(of_koboldcpp(words, {}), build_of(version))


def test_koboldcpp_is_counted_with_the_defaults_of_its_build():
    old, middle, new = (built([], version) for version in ("1.76", "1.104", "1.115.1"))
    assert [each.default_context_tokens for each in (old, middle, new)] == [4096, 8192, 16384]
    assert [each.has_windows for each in (old, middle, new)] == [False, False, True]
    assert not built(["--noswa"], "1.115.1").has_windows
    assert built(["--useswa"], "1.104").has_windows
    whole = OwnerWishes().value_bytes
    for words, version, value_bytes in (
        (["--quantkv", "q8_0"], "1.115.1", 1.0625),
        (["--quantkv", "q8_0", "-nofa"], "1.115.1", whole),
        (["--quantkv", "1"], "1.104", whole),
        (["--quantkv", "1", "--flashattention"], "1.104", 1.0625),
    ):
        wishes = built(words, version)
        assert (wishes.key_bytes, wishes.value_bytes) == (1.0625, value_bytes)


def test_an_unset_context_is_the_one_of_the_build():
    settings = read({"engine": {"kind": "koboldcpp"}}, "a test")
    assert context_tokens(settings, built([], "1.115.1")) == 16384
    assert context_tokens(settings, built(["--ctx-size", "4096"], "1.115.1")) == 4096
