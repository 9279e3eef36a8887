"""Who may use the endpoint: hosts, pages and keys, as a browser, a program and an attacker send them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.access import AccessRules, is_loopback, is_own_host, judge

LITE = "https://lite.koboldai.net"


def refusal(
    rules: AccessRules | None = None, method: str = "POST", path: str = "/api/v1/generate", **headers: str
) -> str:
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    found = judge(method, path, raw, rules or AccessRules())
    return found.code if found else ""


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:5001",
        "localhost",
        "LOCALHOST:5001",
        "localhost.:5001",
        "[::1]:5001",
        "me.localhost",
        "192.168.1.7:5001",
        "host.docker.internal:5001",
    ],
)
def test_this_computer_is_known_by_its_own_names_and_by_any_address(host: str):
    assert refusal(host=host) == ""


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:5001",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "[::1",
        "a b",
        ",",
    ],
)
def test_a_foreign_name_is_refused_for_it_may_be_rebound(host: str):
    assert refusal(host=host) == "foreign_host"


def test_a_name_of_the_owners_is_known_and_http_1_0_needs_none():
    assert refusal(AccessRules(names=("Studio.local",)), host="studio.local:5001") == ""
    assert refusal() == ""


def test_two_hosts_are_nobodys():
    headers = [(b"host", b"localhost"), (b"host", b"evil.example")]
    found = judge("GET", "/", headers, AccessRules())
    assert found is not None
    assert found.status == 403


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        ("http://localhost:8000", "127.0.0.1:5001", True),
        ("http://127.0.0.1:5001", "127.0.0.1:5001", True),
        ("http://[::1]:3000", "localhost:5001", True),
        ("http://192.168.1.7:5001", "192.168.1.7:5001", True),
        ("http://192.168.1.9", "192.168.1.7:5001", False),
        ("https://evil.example", "localhost:5001", False),
        ("http://localhost.evil.example", "localhost:5001", False),
        ("http://localhost@evil.example", "localhost:5001", False),
        ("http://[x", "localhost:5001", False),
        ("null", "localhost:5001", False),
        ("file://", "localhost:5001", False),
        ("", "localhost:5001", False),
        (LITE, "localhost:5001", False),
    ],
)
def test_pages_of_this_computer_may_ask_and_foreign_ones_may_not(origin: str, host: str, *, allowed: bool):
    assert refusal(origin=origin, host=host) == ("" if allowed else "foreign_page")


def test_an_owner_can_let_pages_in_one_by_one_or_all():
    assert refusal(AccessRules(origins=(LITE,)), origin=LITE, host="localhost") == ""
    assert refusal(AccessRules(origins=(LITE,)), origin=LITE + ".evil.example", host="localhost") == "foreign_page"
    assert refusal(AccessRules(origins=("null",)), origin="null", host="localhost") == ""
    assert refusal(AccessRules(origins=("*",)), origin="https://any.example", host="localhost") == ""


@pytest.mark.parametrize(
    ("path", "mode", "code"),
    [
        ("/", "navigate", ""),
        ("/noscript", "navigate", "foreign_page"),
        ("/api/v1/model", "no-cors", "foreign_page"),
    ],
)
def test_a_link_may_be_followed_but_no_page_can_generate_with_an_image(path: str, mode: str, code: str):
    assert (
        refusal(method="GET", path=path, host="localhost", sec_fetch_site="cross-site", sec_fetch_mode=mode) == code
    )
    assert (
        refusal(method="GET", path=path, host="localhost", sec_fetch_site="same-origin", sec_fetch_mode=mode) == ""
    )


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("Bearer s3cret", ""),
        ("bearer  s3cret ", ""),
        ("Bearer wrong", "wrong_key"),
        ("Bearer ", "wrong_key"),
        ("s3cret", "wrong_key"),
        ("Basic s3cret", "wrong_key"),
        ("Bearer s3cret\xff", "wrong_key"),
    ],
)
def test_a_key_is_wanted_as_a_bearer_token(sent: str, code: str):
    assert refusal(AccessRules(key="s3cret"), host="localhost", authorization=sent) == code


def test_a_key_of_other_letters_is_compared_as_it_was_sent():
    sent = "Bearer schlüssel".encode().decode("latin-1")
    assert refusal(AccessRules(key="schlüssel"), host="localhost", authorization=sent) == ""


def test_without_the_key_only_a_preflight_passes():
    assert refusal(AccessRules(key="s3cret"), host="localhost") == "wrong_key"
    assert refusal(AccessRules(key="s3cret"), method="OPTIONS", host="localhost", origin="http://localhost:1") == ""
    assert "s3cret" not in repr(AccessRules(key="s3cret"))


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60))
def test_no_header_is_too_strange(host: bytes, origin: bytes, key: bytes):
    headers = [(b"host", host), (b"origin", origin), (b"authorization", key)]
    judge("POST", "/v1/completions", headers, AccessRules(key="k"))


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
)
def test_an_address_that_others_reach_is_told(host: str, own: bool):
    assert is_loopback(host) is own
    assert is_own_host(host if ":" not in host else f"[{host}]", ())
