"""What KoboldCPP says and is asked when it is switched to another model, and what it then loads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from emberd.core.errors import ConfigError
from emberd.core.settings import read
from emberd.core.types import Switch
from emberd.core.wishes import OwnerWishes
from emberd.engine.http import EngineHttp
from emberd.engine.koboldcpp import KoboldCpp
from emberd.engine.koboldcpp_switch import content, read_line, read_request
from emberd.host import ThisHost

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("line", "switch"),
    [
        ("Reloading new model/config: b.kcpps", Switch("b.kcpps")),
        ("Reloading new model/config: my b.gguf with override config c.kcpps", Switch("my b.gguf", "c.kcpps")),
        (
            "Reloading new config: b.kcpps with override config c.kcpps with model d.gguf",
            Switch("b.kcpps", "c.kcpps", "d.gguf"),
        ),
        ("Reloading new model/config: unload_model", Switch("unload_model")),
        ("Attempting to recover to safe mode, launching known-good config...", Switch("initial_model")),
        ("Admin: Received request to reload config to b.kcpps", None),
        ("Input: Reloading new model/config: b.kcpps", None),
    ],
)
def test_what_the_supervising_process_says_tells_the_switch(line: str, switch: Switch | None):
    assert read_line(line) == switch


@pytest.mark.parametrize(
    ("path", "body", "switch"),
    [
        ("/api/admin/reload_config", {"filename": "b.kcpps"}, Switch("b.kcpps")),
        (
            "/api/admin/reload_config",
            {"filename": "b.gguf", "overrideconfig": "c.kcpps"},
            Switch("b.gguf", "c.kcpps"),
        ),
        ("/api/admin/reload_config", {"filename": "b", "baseconfig": "c", "modelName": "d"}, Switch("b", "c", "d")),
        ("/api/admin/reload_config", {"filename": 7}, None),
        ("/api/admin/reload_config", ["b.kcpps"], None),
        ("/api/v1/generate", {"filename": "b.kcpps"}, None),
    ],
)
def test_a_request_tells_it_too(path: str, body: Any, switch: Switch | None):
    assert read_request(path, json.dumps(body).encode()) == switch
    assert read_request("/api/admin/reload_config", b"no JSON") is None


def test_a_switch_is_what_its_files_say_together(tmp_path: Path):
    (tmp_path / "base.kcpps").write_text(json.dumps({"contextsize": 1024, "mmproj": "/p.gguf", "threads": 3}))
    # As leniently as KoboldCPP reads it: bytes that are no UTF-8 are left out.
    (tmp_path / "top.kcpps").write_bytes(
        b'{"model_param": "/m\xff.gguf", "contextsize": 2048, "mmproj": "", "new": null}'
    )
    wishes = OwnerWishes(switch_folder=str(tmp_path), switch_models="/models")
    assert content(Switch("top.kcpps", "base.kcpps"), wishes) == {
        "contextsize": 2048,
        "mmproj": "/p.gguf",
        "threads": 3,
        "model_param": "/m.gguf",
        "new": None,
    }
    assert content(Switch("other.gguf"), wishes) == {"model_param": str(tmp_path / "other.gguf"), "model": None}
    assert content(Switch("top.kcpps", "", "d.gguf"), wishes)["model_param"] == "/models/d.gguf"
    assert content(Switch("unload_model"), wishes) == {}
    with pytest.raises(ConfigError, match="gone"):
        content(Switch("gone.kcpps"), wishes)


def test_the_adapter_follows_the_switch(tmp_path: Path):
    (tmp_path / "b.kcpps").write_text(
        json.dumps({"model_param": "/m/b.gguf", "usemlock": True, "mmproj": "/p.gguf"})
    )
    words = ["--admin", "--admindir", str(tmp_path), "--draftmodel", "/d.gguf", "--contextsize", "512"]
    unused: Any = None
    settings = read({"model": {"path": "/m/a.gguf"}, "engine": {"extra_args": words}}, "a test")
    engine = KoboldCpp(settings, ThisHost(), EngineHttp(), unused, unused, unused)
    assert str(engine.model_path()) == "/m/a.gguf"
    assert [each.path for each in engine.wishes().files] == ["/d.gguf"]
    engine.switch = Switch("b.kcpps")
    assert str(engine.model_path()) == "/m/b.gguf"
    seen = engine.wishes()
    assert [each.path for each in seen.files] == ["/p.gguf"]
    assert (seen.locks, seen.context_tokens, seen.can_switch) == (True, None, True)
    engine.switch = Switch("unload_model")
    assert engine.model_path() is None
    (tmp_path / "b.kcpps").unlink()
    engine.switch = Switch("b.kcpps")
    assert engine.model_path() is None
