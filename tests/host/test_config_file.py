"""Settings files that are wrong: what can be told of them all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emberd.host.api_key import read_secret
from emberd.host.config_file import load, load_what_is_right

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "wrong",
    [
        '[model]\npath = no quotes\n[state]\ndirectory = "/srv/ember"\n[endpoint]\nport = 6001\n',
        '[state]\ndirectory = "/srv/ember"\n[endpoint]\nport = 6001\n[model]\npath = "no end',
        '[state\n[state]\ndirectory = "/srv/ember"\n[endpoint]\nport = 6001\nport = 6002\n',
        '[state]\ndirectory = "/srv/ember"\n[endpoint]\nport = 6001\nhost = 7\n[nonsense]\na = 1\n',
        'model = 3\n[state]\ndirectory = "/srv/ember"\n[endpoint]\nport = 6001\n',
    ],
)
def test_what_is_right_in_a_wrong_file_tells_where_emberd_is(tmp_path: Path, wrong: str):
    (tmp_path / "config.toml").write_text(wrong)
    loaded = load_what_is_right(str(tmp_path / "config.toml"))
    assert loaded.error is not None
    assert loaded.tells_place
    assert (loaded.settings.state.directory, loaded.settings.endpoint.port) == ("/srv/ember", 6001)


def test_a_named_file_that_does_not_tell_its_directory_is_not_taken_for_the_default_ones(tmp_path: Path):
    file = tmp_path / "config.toml"
    assert not load_what_is_right(str(file)).tells_place, "missing"
    file.write_text("[endpoint]\nport = six\n")
    assert not load_what_is_right(str(file)).tells_place
    file.write_bytes(b"\xff\xfe")
    assert not load_what_is_right(str(file)).tells_place


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path):
    file, key = tmp_path / "config.toml", tmp_path / "key"
    file.write_text("[endpoint]\nport = 6001\n", encoding="utf-8-sig")
    assert load(str(file))[0].endpoint.port == 6001
    key.write_text("horse\n", encoding="utf-8-sig")
    key.chmod(0o600)
    assert read_secret(key, "a test") == "horse"


def test_a_right_file_is_what_it_is_without_a_directory_too(tmp_path: Path):
    (tmp_path / "config.toml").write_text("[endpoint]\nport = 6001\n")
    loaded = load_what_is_right(str(tmp_path / "config.toml"))
    assert (loaded.error, loaded.tells_place, loaded.settings.endpoint.port) == (None, True, 6001)


def test_a_file_that_is_wrong_throughout_ends_the_search(tmp_path: Path):
    (tmp_path / "config.toml").write_text("= nonsense\n" * 1000)
    loaded = load_what_is_right(str(tmp_path / "config.toml"))
    assert (loaded.error is not None, loaded.tells_place) == (True, False)
