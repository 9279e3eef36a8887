"""Who may use the endpoint: hosts, pages and keys, as a browser, a program and an attacker send them."""

from __future__ import annotations

import base64

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emberd.core.access import AccessRules, is_loopback, is_own_host, judge, own_names
from emberd.core.credentials import SESSION_S, session_cookie, without_keys

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
        "host.containers.internal",
        "gateway.docker.internal:5001",
        "host.lima.internal",
        "HOST.Orb.Internal.",
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
        "host.docker.internal.evil.example",
        "evil.internal",
        "localhost@evil.example",
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
        ("http://tauri.localhost", "127.0.0.1:5001", True),
        ("tauri://localhost", "127.0.0.1:5001", True),
        ("app://obsidian.md", "127.0.0.1:5001", True),
        ("vscode-webview://0abc", "127.0.0.1:5001", True),
        ("app://", "127.0.0.1:5001", False),
        ("chrome-extension://abcdef", "127.0.0.1:5001", False),
        ("moz-extension://1-2-3", "127.0.0.1:5001", False),
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
        ("s3cret", ""),  # as llama.cpp takes it
        ("Basic s3cret", "wrong_key"),
        ("Basic " + base64.b64encode(b"anybody:s3cret").decode(), ""),
        ("Basic " + base64.b64encode(b"s3cret:").decode(), ""),
        ("Basic " + base64.b64encode(b"s3cret:wrong").decode(), "wrong_key"),
        ("Bearer s3cret\xff", "wrong_key"),
    ],
)
def test_a_key_is_taken_as_a_bearer_token_as_a_password_and_alone(sent: str, code: str):
    assert refusal(AccessRules(key="s3cret"), host="localhost", authorization=sent) == code


def test_a_key_of_other_letters_is_compared_as_it_was_sent():
    sent = "Bearer schlüssel".encode().decode("latin-1")
    assert refusal(AccessRules(key="schlüssel"), host="localhost", authorization=sent) == ""


def test_without_the_key_only_a_preflight_passes():
    assert refusal(AccessRules(key="s3cret"), host="localhost") == "wrong_key"
    asks = {"host": "localhost", "origin": "http://localhost:1"}
    assert refusal(AccessRules(key="s3cret"), method="OPTIONS", **asks) == "wrong_key"
    asks |= {"access_control_request_method": "POST"}
    assert refusal(AccessRules(key="s3cret"), method="OPTIONS", **asks) == ""
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


# --- what owners write ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "origin", "allowed"),
    [
        ("https://Lite.KoboldAI.net/", LITE, True),
        ("https://lite.koboldai.net:443", LITE, True),
        ("lite.koboldai.net", LITE, True),
        ("lite.koboldai.net", "http://lite.koboldai.net", True),
        ("lite.koboldai.net", "https://lite.koboldai.net:8443", False),
        ("lite.koboldai.net", "ftp://lite.koboldai.net", False),
        ("https://*.example.org", "https://a.b.example.org", True),
        ("https://*.example.org", "https://example.org", False),
        ("https://*.example.org", "https://evilexample.org", False),
        ("https://*.example.org", "http://a.example.org", False),
        ("https://*.example.org", "https://a.example.org:8443", False),
        ("https://*.example.org:*", "https://a.example.org:8443", True),
        ("*.example.org", "http://a.example.org", True),
        ("chrome-extension://*", "chrome-extension://abcdef", True),
        ("chrome-extension://*", "moz-extension://abcdef", False),
        ("chrome-extension://*", "chrome-extension://a@evil.example", False),
        ("moz-extension://0F-1/", "moz-extension://0f-1", True),
        ("http://192.168.1.9:3000", "http://192.168.1.9:3000", True),
        ("http://[fd00::1]:3000", "http://[fd00::1]:3000", True),
        ("https://bücher.example", "https://xn--bcher-kva.example", True),
    ],
)
def test_an_origin_is_understood_however_it_is_written(written: str, origin: str, *, allowed: bool):
    assert refusal(AccessRules(origins=(written,)), origin=origin, host="localhost") == (
        "" if allowed else "foreign_page"
    )


def test_a_refused_extension_is_told_the_pattern_for_each_installation():
    headers = [(b"host", b"localhost"), (b"origin", b"chrome-extension://abcdef")]
    found = judge("POST", "/api/v1/generate", headers, AccessRules())
    assert found is not None
    assert '"chrome-extension://*"' in found.message


@pytest.mark.parametrize(
    ("written", "host", "allowed"),
    [
        ("*.example.org", "a.b.example.org:5001", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "evilexample.org", False),
        ("*.local", "studio.local", True),
        ("STUDIO.Example.org.", "studio.example.org", True),
        ("bücher.example", "xn--bcher-kva.example:5001", True),
    ],
)
def test_a_name_is_understood_however_it_is_written(written: str, host: str, *, allowed: bool):
    assert refusal(AccessRules(names=(written,)), host=host) == ("" if allowed else "foreign_host")


def test_the_computers_own_names_are_those_that_nobody_else_can_own():
    assert own_names("Studio.local") == ("studio", "studio.local", "studio.local")
    assert own_names("studio.fritz.box") == ("studio", "studio.local"), "the network could have named it so"
    assert own_names("nas.home.arpa") == ("nas", "nas.local", "nas.home.arpa")
    assert own_names("") == ()


# --- DNS rebinding ----------------------------------------------------------------------------------------------

LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
PUBLIC = st.sampled_from(["com", "org", "net", "example", "dev", "ai", "co.uk"])
SOMEBODYS = st.builds(lambda labels, ending: ".".join([*labels, ending]), st.lists(LABEL, min_size=1), PUBLIC)
"""Names that somebody on the internet can own."""
OURS = AccessRules(names=("*.home.arpa", "studio.mine.example"), origins=("https://*.mine.example", LITE))


@given(SOMEBODYS, st.sampled_from(["", ":5001", ".", ".:80"]), st.sampled_from(["GET", "POST", "OPTIONS"]))
def test_no_name_that_somebody_can_own_reaches_the_engine(name: str, port: str, method: str):
    """The page of that name is of the same origin as the endpoint, whatever it sends."""
    if name == "studio.mine.example":
        return
    for path in ("/", "/api/tags", "/api/generate"):
        host = (name + port).upper() if port else name
        assert refusal(OURS, method, path, host=host) == "foreign_host"
        same = {"host": host, "origin": f"http://{host}", "sec_fetch_site": "same-origin"}
        assert refusal(OURS, method, path, **same) == "foreign_host"


@given(SOMEBODYS, st.sampled_from(["http", "https"]), st.sampled_from(["", ":5001", ":443"]))
def test_no_page_of_somebody_elses_is_let_in(name: str, scheme: str, port: str):
    origin = f"{scheme}://{name}{port}"
    is_mine = name.endswith(".mine.example") and scheme == "https" and port != ":5001"
    if not is_mine and origin not in {LITE, LITE + ":443"}:
        assert refusal(OURS, origin=origin, host="localhost:5001") == "foreign_page"


@given(st.text(max_size=40), st.text(max_size=40))
@example("", ":")
@example("evil@", ":80")
def test_a_name_is_never_let_in_for_the_name_that_it_begins_or_ends_with(before: str, after: str):
    for name in ("localhost", "host.docker.internal", "studio.mine.example", "127.0.0.1"):
        for host in (f"{name}.{after}.example", f"{before}{name}.example"):
            assert not is_own_host(host, ("studio.mine.example",)) or host.strip() == "studio.mine.example"


# --- keys and sessions ------------------------------------------------------------------------------------------

KEYED = AccessRules(key="s3cret")
NOW_S = 1_800_000_000.0


@pytest.mark.parametrize("header", ["x_api_key", "api_key", "apikey"])
def test_a_key_is_taken_in_every_header_that_clients_know(header: str):
    assert refusal(KEYED, host="localhost", **{header: "s3cret"}) == ""
    assert refusal(KEYED, host="localhost", authorization="Bearer dummy", **{header: "s3cret"}) == ""
    assert refusal(KEYED, host="localhost", **{header: "wrong"}) == "wrong_key"


def test_no_key_and_no_session_is_left_for_the_engine():
    sent = [
        (b"authorization", b"Bearer s3cret"),
        (b"x-api-key", b"s3cret"),
        (b"api-key", b"s3cret"),
        (b"apikey", b"s3cret"),
        (b"cookie", b"a=1; emberd_session_5001=2.ff; b=3"),
        (b"cookie", b"emberd_session_5002=2.ff"),
        (b"accept", b"*/*"),
        (b"x-empty", b""),
    ]
    assert without_keys(sent) == [(b"cookie", b"a=1; b=3"), (b"accept", b"*/*"), (b"x-empty", b"")]


def logged_in(method: str = "POST", path: str = "/api/v1/generate", *, later_s: float = 1.0, **headers: str) -> str:
    cookie = session_cookie("s3cret", "localhost:5001", NOW_S).partition(";")[0]
    sent = {"host": "localhost:5001", "cookie": f"other=1; {cookie}", **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in sent.items()]
    found = judge(method, path, raw, KEYED, now_s=NOW_S + later_s)
    return found.code if found else ""


def test_a_session_counts_for_the_pages_of_the_endpoint_and_ends():
    assert logged_in(origin="http://localhost:5001") == ""
    assert logged_in(origin="https://localhost:5001") == ""
    assert logged_in(sec_fetch_site="same-origin") == ""
    assert logged_in("GET", "/", sec_fetch_site="none", sec_fetch_mode="navigate") == ""
    assert logged_in("GET", "/api/v1/model") == "", "a browser that tells nothing of the page may read"
    assert logged_in("GET", "/api/v1/model", later_s=SESSION_S + 1) == "wrong_key"


def test_a_session_does_not_count_for_a_page_of_another_port_or_of_nowhere():
    assert logged_in(origin="http://localhost:3000") == "wrong_key", "cookies know no ports"
    assert logged_in(sec_fetch_site="same-site") == "wrong_key"
    assert logged_in() == "wrong_key"
    assert logged_in("GET", "/noscript") == "wrong_key", "it generates"


def test_a_session_of_another_key_port_or_time_is_none():
    good = session_cookie("s3cret", "localhost:5001", NOW_S).partition(";")[0]
    until, _, signature = good.partition("=")[2].partition(".")
    assert "HttpOnly; SameSite=Strict" in session_cookie("s3cret", "localhost:5001", NOW_S)
    assert "s3cret" not in good
    for cookie in (
        session_cookie("other", "localhost:5001", NOW_S).partition(";")[0],
        session_cookie("s3cret", "localhost:5002", NOW_S).partition(";")[0],
        f"emberd_session_5001={int(until) + 1}.{signature}",
        f"emberd_session_5001={until}.",
        "emberd_session_5001=",
        f"emberd_session_5001=\u00b2.{signature}",
    ):
        assert logged_in("GET", "/api/v1/model", cookie=cookie) == "wrong_key"


def test_an_open_page_needs_no_key_but_its_own_name():
    headers = [(b"host", b"localhost:5001")]
    assert judge("GET", "/", headers, KEYED, is_open=True) is None
    foreign = judge("GET", "/", [(b"host", b"evil.example")], KEYED, is_open=True)
    assert foreign is not None
    assert foreign.code == "foreign_host"
