"""Names and origins in the settings: understood, or refused with the right spelling."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.errors import ConfigError
from emberd.core.origins import matches_name, matches_origin, name_pattern, origin_pattern
from emberd.core.settings import read


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("https://lite.koboldai.net/index.html", "https://lite.koboldai.net"),
        ("https://lite.koboldai.net:443?x", "https://lite.koboldai.net:443"),
        ("file:///home/me/klite.html", "null"),
        ("https://lite.*.net", "https://*.example.org"),
        ("https://user@lite.koboldai.net", "https://lite.koboldai.net"),
        ("", "https://lite.koboldai.net"),
    ],
)
def test_a_wrong_origin_is_refused_with_the_right_spelling(written: str, right: str):
    with pytest.raises(ConfigError) as refused:
        read({"endpoint": {"origins": [written]}}, "config.toml")
    assert "endpoint.origins" in refused.value.message
    assert f'"{right}"' in refused.value.message


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("http://studio.example.org:5001/", '"studio.example.org"'),
        ("studio.example.org:5001", '"studio.example.org"'),
        ("*", '"*.example.org"'),
        ("*.com", '"*.example.org"'),
        ("studio.*.org", '"*.example.org"'),
        ("a b", '"studio.example.org"'),
        ("", '"studio.example.org"'),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_spelling(written: str, right: str):
    with pytest.raises(ConfigError) as refused:
        read({"endpoint": {"names": [written]}}, "config.toml")
    assert "endpoint.names" in refused.value.message
    assert right in refused.value.message


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_text_is_too_strange_and_a_pattern_stays_as_it_is(written: str, sent: str):
    for normal in (name_pattern, origin_pattern):
        with contextlib.suppress(ValueError):
            assert normal(normal(written)) == normal(written)
    matches_name(sent, [written])
    matches_origin(sent, [written])
