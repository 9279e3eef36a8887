"""The page at /emberd/ on a real daemon: its files, what it tells, and who may press its buttons."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import structlog

import emberd
from daemon_process import Daemon
from emberd.core.access import AccessRules, judge_view
from emberd.core.errors import EmberdError
from emberd.core.status import ForecastStatus, Status, WarmthStatus, to_plain
from emberd.services.door import Door
from emberd.services.page import Page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WEB = Path(emberd.__file__).parent / "web"
MOST_BYTES = 150 * 1024
OWN = {"x-emberd": "test"}
SECRET = "a-prompt-that-nobody-may-see"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, standin: Path, model: Path) -> Iterator[Daemon]:
    """A daemon with a ready engine, for tests that leave it as it was."""
    settings = {"model.path": str(model), "engine.path": str(standin), "warmth.mode": "auto"}
    made = Daemon(tmp_path_factory.mktemp("page"), settings, {"STANDIN_PROMPT_MS_PER_TOKEN": "1"})
    try:
        made.start()
        made.wait_ready()
        yield made
    finally:
        made.close()


def ask(daemon: Daemon, path: str, method: str = "GET", **options: Any) -> httpx.Response:
    return httpx.request(method, f"{daemon.url}/emberd/{path}", trust_env=False, timeout=60, **options)


# --- files --------------------------------------------------------------------------------------------------------


def test_every_file_of_others_is_as_published():
    rows = re.findall(r"^\| `(\S+)` \|.*`([0-9a-f]{64})` \|$", (WEB / "VENDORED.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in WEB.glob("uplot*")}
    for name, digest in rows:
        assert hashlib.sha256((WEB / name).read_bytes()).hexdigest() == digest, name


def test_all_that_a_browser_loads_is_small_and_names_no_other_server(daemon: Daemon):
    page = ask(daemon, "").text
    names = ("page.js", "charts.js", "live.js", "map.js", "words.js")
    scripts = {name: ask(daemon, f"web/{name}").text for name in names}
    wanted = {*re.findall(r'(?:href|src)="web/([^"]+)"', page), *scripts}
    for script in scripts.values():
        wanted |= set(re.findall(r'from "\./([^"]+)"', script))
    sizes = {name: len(ask(daemon, f"web/{name}").raise_for_status().content) for name in wanted}
    assert sum(sizes.values()) + len(page.encode()) <= MOST_BYTES, sizes
    assert {path.name for path in WEB.iterdir()} - wanted == {"index.html", "uplot.LICENSE.txt", "VENDORED.md"}
    assert not re.search(r"(src|href)=.?(https?:|//)", page + "".join(scripts.values()))


def test_a_file_that_the_browser_has_is_not_sent_again(daemon: Daemon):
    first = ask(daemon, "web/page.css").raise_for_status()
    again = ask(daemon, "web/page.css", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert ask(daemon, "web/page.css", headers={"if-none-match": '"other"'}).status_code == 200


def test_the_policy_forbids_everything_that_is_not_of_this_server(daemon: Daemon):
    for path in ("", "status", "nowhere"):
        headers = ask(daemon, path).headers
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
        assert headers["x-content-type-options"] == "nosniff"
    assert "style=" not in (WEB / "index.html").read_text()


@pytest.mark.parametrize(
    "path",
    ["web/../page.py", "web/%2e%2e/app.py", "VENDORED.md", "web/VENDORED.md", "web/none.js", "nowhere", "do/stop"],
)
def test_nothing_else_is_served(daemon: Daemon, path: str):
    with httpx.Client(trust_env=False, timeout=60) as client:
        request = client.build_request("GET", daemon.url)
        request.url = request.url.copy_with(raw_path=f"/emberd/{path}".encode())
        assert client.send(request).status_code == 404


def test_the_address_without_a_slash_leads_to_the_page(daemon: Daemon):
    answer = httpx.get(f"{daemon.url}/emberd", trust_env=False, follow_redirects=True)
    assert answer.headers["content-type"].startswith("text/html")


# --- what it tells ------------------------------------------------------------------------------------------------


def test_it_tells_sentence_status_and_events_and_never_a_prompt_or_a_reply(daemon: Daemon):
    reply = daemon.complete(SECRET)
    for path in ("status", "doctor", "report", "layers"):
        text = ask(daemon, path).raise_for_status().text
        assert SECRET not in text
        assert reply.strip()[:200] not in text
    view = ask(daemon, "status").json()
    assert view["sentence"]["tone"] == "good"
    assert view["status"]["pid"] == daemon.status()["pid"]
    assert any(event["text"] == "The engine is ready" for event in view["events"])


def test_a_running_request_shows_its_age_and_state_and_not_its_words(daemon: Daemon):
    body = {"prompt": SECRET, "max_length": 500}
    with httpx.stream("POST", f"{daemon.url}/api/extra/generate/stream", json=body, trust_env=False) as reply:
        parts = reply.iter_bytes()  # whose end would close the connection
        assert next(parts)
        (seen,) = ask(daemon, "status").json()["status"]["requests"]
    assert seen["state"] == "writes"
    assert seen["age_s"] > 0
    assert seen["tokens"] >= 1
    daemon.wait_for(lambda status: not status["requests"], "the end of the request")


def test_the_map_has_every_layer_of_the_model_and_what_of_it_is_in_memory(daemon: Daemon):
    (file,) = ask(daemon, "layers").json()["files"]
    layers = file["layers"]
    assert file["role"] == "model"
    assert [layer["name"] for layer in layers] == ["token_embd", "blk.0", "blk.1", "output_norm", "output"]
    assert all(layer["share"] == 1 for layer in layers), "the stand-in maps and reads the model"


def test_the_report_has_no_path(daemon: Daemon):
    text = ask(daemon, "report").json()["text"]
    assert "koboldcpp, READY" in text
    assert "/" not in text.replace(" / ", "")


# --- buttons ------------------------------------------------------------------------------------------------------


def test_the_buttons_do_what_the_verbs_do(daemon: Daemon):
    assert ask(daemon, "do/pause", "POST", headers=OWN, json={"seconds": 600}).json()["ok"]
    assert 0 < daemon.status()["warmth"]["paused_for_s"] <= 600
    assert ask(daemon, "do/resume", "POST", headers=OWN).json() == {"ok": True, "was_paused": True}
    assert daemon.status()["warmth"]["paused_for_s"] is None
    assert ask(daemon, "do/warm", "POST", headers=OWN).json()["steps"]


@pytest.mark.parametrize("body", [{}, {"seconds": 0}, {"seconds": "x"}, {"seconds": 1e9}, [1], {"seconds": None}])
def test_a_pause_without_a_sound_time_is_refused(daemon: Daemon, body: Any):
    answer = ask(daemon, "do/pause", "POST", headers=OWN, json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "no_seconds")
    assert daemon.status()["warmth"]["paused_for_s"] is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {**OWN, "origin": "https://example.com"},
        {**OWN, "origin": "http://127.0.0.1:1"},
        {**OWN, "origin": "null"},
        {**OWN, "sec-fetch-site": "cross-site"},
        {**OWN, "sec-fetch-site": "same-site"},
        {**OWN, "host": "example.com"},
    ],
)
def test_no_foreign_page_presses_a_button(daemon: Daemon, headers: dict[str, str]):
    answer = ask(daemon, "do/pause", "POST", headers=headers, json={"seconds": 600})
    assert answer.status_code == 403
    assert daemon.status()["warmth"]["paused_for_s"] is None


def test_a_page_that_may_use_the_model_may_still_not_see_or_press_anything():
    own = [(b"host", b"127.0.0.1:5001"), (b"x-emberd", b"page")]
    page = [*own, (b"origin", b"http://127.0.0.1:5001"), (b"sec-fetch-site", b"same-origin")]
    program = own
    for method in ("GET", "POST"):
        assert judge_view(method, page) is judge_view(method, program) is None
        assert judge_view(method, [*own, (b"origin", b"http://localhost:5001")]) is not None


def test_with_a_key_only_the_files_are_open(make_daemon: Callable[..., Daemon]):
    daemon = make_daemon({"endpoint.api_key": "sesame"})
    daemon.write_settings()
    daemon.config.chmod(0o600)
    daemon.start()
    daemon.wait_ready()
    assert ask(daemon, "web/page.js").status_code == 200
    visit = ask(daemon, "", headers={"accept": "text/html"})
    assert (visit.status_code, visit.headers["location"]) == (303, "/emberd/login?to=/emberd/")
    right, wrong = {"authorization": "Bearer sesame"}, {"authorization": "Bearer sesam"}
    for path in ("status", "doctor", "report", "layers"):
        assert [ask(daemon, path, headers=each).status_code for each in ({}, wrong, right)] == [401, 401, 200], path
    assert ask(daemon, "do/pause", "POST", headers=OWN, json={"seconds": 60}).status_code == 401
    assert ask(daemon, "do/resume", "POST", headers={**OWN, **right}).status_code == 200


# --- what it cannot tell ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["status", "doctor", "layers", "report"])
async def test_what_cannot_be_told_is_one_clear_error(name: str):
    def fail() -> dict[str, Any]:
        raise EmberdError("the file is broken", "Mend it.")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    log = structlog.get_logger()
    page = Page(dict.fromkeys(("status", "doctor", "layers"), fail), Door(AccessRules, log), log)
    scope = {"type": "http", "method": "GET", "path": f"/emberd/{name}", "query_string": b"", "headers": []}
    await page({**scope, "client": ("127.0.0.1", 1)}, receive, send)
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"]) == {
        "error": "the file is broken",
        "code": "cannot_tell",
        "remedy": "Mend it.",
    }


async def test_what_the_doctor_found_in_another_state_explains_nothing():
    status = Status(state="READY", warmth=WarmthStatus(mode="auto", forecast=ForecastStatus("cold", 12.4)))
    examined = {"shown": [{"title": "Leftovers", "evidence": "pid 1", "remedy": "End it.", "severity": "error"}]}
    log = structlog.get_logger()
    verbs = {"status": lambda: to_plain(status), "doctor": lambda: {**examined, "unknown": []}}
    page = Page(verbs, Door(AccessRules, log), log)
    await page.view()
    await page._doctor()
    assert (await page.view())["sentence"]["why"] == "Leftovers: pid 1"
    status = Status(state="FAILED", reason="exit code 1\nlast words")
    assert (await page.view())["sentence"]["why"] == "exit code 1"
