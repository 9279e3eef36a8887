"""Settings: each default once, each mistake named."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.errors import ConfigError
from emberd.core.settings import Settings, declarations, read, to_toml


def parsed(text: str) -> Settings:
    return read(tomllib.loads(text), "test.toml")


def test_an_empty_file_gives_the_defaults():
    assert parsed("") == Settings()


def test_what_is_written_is_read_back_the_same():
    assert parsed(to_toml(Settings())) == Settings()
    assert parsed(to_toml(Settings(), with_help=False)) == Settings()


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",))))
def test_any_text_survives_writing_and_reading(text: str):
    settings = parsed("")
    odd = type(settings)(model=type(settings.model)(path=text))
    assert parsed(to_toml(odd)).model.path == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[endpoint]\nprot = 5001", "endpoint.prot is not a setting (did you mean port?)"),
        ("[endpont]\nport = 5001", "[endpont] is not a table of emberd's settings (did you mean endpoint?)"),
        ("endpoint = 5", "write [endpoint]"),
        ('[endpoint]\nport = "5001"', "endpoint.port: must be a whole number, not '5001'"),
        ("[endpoint]\nport = 70000", "must be 1 to 65535"),
        ("[endpoint]\nport = true", "must be a whole number"),
        ("[lifecycle]\nhang_after_s = nan", "must be 1 to 86400 s"),
        ("[model]\npath = 5", "must be a string in quotes"),
        ('[engine]\nextra_args = "--quiet"', "must be a list of strings"),
        ('[engine]\nkind = "kobold"', "must be one of koboldcpp, llama-server, embedded"),
        ("[warmth]\nreplay = 1", "warmth.replay: must be true or false, not 1"),
        ("[warmth]\nmin_interval_s = 1000", "is more than warmth.max_interval_s"),
        ("[lifecycle]\nbackoff_initial_s = 100", "is more than lifecycle.backoff_max_s"),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(text: str, words: str):
    with pytest.raises(ConfigError) as refused:
        parsed(text)
    assert words in refused.value.message
    assert refused.value.remedy


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as refused:
        parsed("[endpoint]\nport = 0\nprot = 1\n[log]\nlevel = 3")
    assert refused.value.message.count(";") == 2


def test_every_setting_has_a_meaning_and_every_number_a_range():
    for declaration in declarations():
        assert declaration.help.endswith((".", ")")), declaration.key
        if declaration.type in {int, float}:
            assert declaration.low is not None, declaration.key
            assert declaration.high is not None, declaration.key
            assert declaration.low <= declaration.default <= declaration.high, declaration.key
        if declaration.name.endswith("_s"):
            assert declaration.unit == "s", declaration.key
