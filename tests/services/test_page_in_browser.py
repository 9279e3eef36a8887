"""The page in a real browser, on a real daemon with the stand-in for the engine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import structlog

from browser import PROGRAM
from emberd.core.minute import COLUMNS, FirstToken, Minute, what_it_brought
from emberd.services.history import History
from memory_squeeze import can_squeeze, memory_group
from page_cache import evict, slow_disk
from page_viewer import Viewer
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

AXE = Path(os.environ.get("EMBERD_TEST_AXE") or Path(sys.prefix, "axe.min.js"))
AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
"""npm, axe-core 4.14.1; scripts/environment fetches it."""
SHOTS = os.environ.get("EMBERD_TEST_SHOTS", "")
"""A folder for screenshots, which CI can keep; CONTRIBUTING.md."""
HEAR_LABELS = """{
    window.labels = [];
    const fill = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (text, ...more) {
        labels.push([this.canvas.closest('.chart')?.querySelector('h3').textContent, text]);
        return fill.call(this, text, ...more);
    };
}"""
NO_HISTORY = """{
    window.told = [];
    window.asked = 0;
    window.minutely = [];
    const [get, every] = [fetch, setInterval];
    window.fetch = async (path, ...more) => {
        if (!path.startsWith('history')) return get(path, ...more);
        window.asked += 1;
        const answer = await get(path, ...more);
        return new Response(JSON.stringify({...await answer.json(), days: told}));
    };
    window.setInterval = (act, ms) => ms === 60_000 ? minutely.push(act) : every(act, ms);
}"""
NO_EVENTS = "window.EventSource = class { constructor() { window.source = this; } close() {} }"
BEGIN_S = 1_780_272_000
PHONE = {"width": 360, "height": 740}
MOST_BYTES = 150 * 1024
IS_LIVE = "document.getElementById('link').dataset.link === 'live'"
SHARES = "[...document.querySelectorAll('.cell i')].map((each) => Number(each.style.transform.slice(7, -1)))"
COLD_BYTES = 192 << 20
SENTENCE = "document.getElementById('sentence').textContent"
IS_ZOOMED = "!document.getElementById('zoomed').hidden"
ZOOM = "document.getElementById('zoom').textContent"
CHART = """[...document.querySelectorAll('.chart')].find((each) => each.querySelector('h3').textContent === '{}')"""

pytestmark = [pytest.mark.skipif(not PROGRAM, reason="Chromium is not installed"), pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    with Viewer(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    made = make_daemon({"warmth.mode": "auto"})
    made.start()
    made.wait_ready()
    return made


@pytest.fixture
def week(make_daemon: MakeDaemon) -> Daemon:
    """Make a daemon with a past of a week before today, at noon; a first token was cold.

    On the day before yesterday nothing tells of swap.
    """
    made = make_daemon({"warmth.mode": "auto"})
    noon = datetime.now().astimezone().replace(hour=12, minute=0)
    minutes, tokens = [], []
    for back in range(1, 8):
        at_s = int((noon - timedelta(days=back)).timestamp())
        swapped = None if back == 2 else 987_000_000_000
        minutes.append(Minute(at_s, observed_s=60, warm_s=59, swap_other_bytes=swapped))
        tokens += [FirstToken(at_s + many * 400.0, 3900.0, "hot", 0.21, 0.23, 0, 3900, 100) for many in range(12)]
    made.state.directory.mkdir(mode=0o700)
    tokens.append(FirstToken(at_s + 4800.0, 3900.0, "cold", 400.0, 450.0, 34_000_000_000 // 12, 0, 4000))
    history = History(made.state.history, structlog.get_logger())
    assert history.write([], minutes, tokens)
    history.close()
    made.start()
    made.wait_ready()
    return made


@pytest.fixture(autouse=True)
def picture(browser: Viewer, make_daemon: MakeDaemon, request: pytest.FixtureRequest) -> Iterator[None]:  # noqa: ARG001  # ends after this
    """Keep what each test saw at its end."""
    yield
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        browser.picture(Path(SHOTS) / f"{request.node.name.removeprefix('test_')}.png")


def look_at(browser: Viewer, daemon: Daemon, **how: Any) -> None:
    """Open the page, and return when everything that it shows at first is there."""
    browser.view(f"{daemon.url}/emberd/", **how)
    browser.wait_for(IS_LIVE)
    browser.wait_for("document.querySelector('.cell') && document.querySelector('#figures dd')")
    browser.wait_for("!document.getElementById('doctor').textContent.includes('Examining')")
    browser.wait_for("performance.getEntriesByName('charts').length")


def can_be_read(browser: Viewer) -> None:
    """Let axe-core examine the page, with every table open."""
    if not AXE.exists():
        pytest.skip("axe-core is not there to check for accessibility; scripts/test fetches it where there is npm")
    script = AXE.read_bytes()
    assert hashlib.sha256(script).hexdigest() == AXE_SHA256
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    browser.run(script.decode())
    found = browser.run(
        "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']})"
        ".then(({violations, passes}) => [passes.length, violations.map(({id, nodes}) => "
        "`${id}: ${nodes.map((node) => node.html.slice(0, 200)).join(' | ')}`)])"
    )
    assert found[1] == []
    assert found[0] > 20


def chart(title: str) -> str:
    """Return JavaScript that finds the chart of that title."""
    return CHART.format(title)


def draw(
    browser: Viewer, past: dict[str, Any], from_s: float, to_s: float, *, keeps_zoom: bool = False, step_s: int = 60
) -> None:
    """Draw a past: `at_s`, the columns that are known, and first tokens by their attributes."""
    rows = len(past.get("at_s", ()))
    told = {
        "step_s": step_s,
        "at_s": [],
        **{name: [None] * rows for name in COLUMNS if name != "at_s"},
        **past,
        "tokens": {**{each.name: [] for each in fields(FirstToken)}, **past.get("tokens", {})},
        "days": [],
    }
    browser.run(
        "import('/emberd/web/charts.js').then((charts) => charts.drawCharts("
        f"{json.dumps(told)}, [{from_s}, {to_s}], {{keepsZoom: {json.dumps(keeps_zoom)}}}))"
    )


def labels(browser: Viewer, title: str, past: dict[str, Any]) -> list[str]:
    """Draw a past, and return the labels of values at the axes of the chart of that title."""
    browser.run("labels.length = 0")
    draw(browser, past, past["at_s"][0], past["at_s"][-1])
    browser.wait_for("new Set(labels.map(([title]) => title)).size === 5")
    told: list[str] = browser.run(f"labels.filter(([title]) => title === '{title}').map(([, text]) => text)")
    return [each for each in told if ":" not in each and each[:1].isdigit()]


def open_table(browser: Viewer, place: str) -> None:
    """Open the table in an element, and return when it is there."""
    browser.run(f"{place}.querySelector('details').open = true")
    browser.wait_for(f"{place}.querySelector('td')")


def texts(browser: Viewer, elements: str) -> list[str]:
    """Return the text of each of these elements."""
    found: list[str] = browser.run(f"[...{elements}].map((each) => each.textContent)")
    return found


def test_it_shows_a_warm_model_and_asks_nobody_else_and_complains_of_nothing(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon)
    browser.wait_for(f"{SENTENCE}.startsWith('Warm.')")
    sent = browser.seen("Network.requestWillBeSent")
    assert all(each["request"]["url"].startswith(daemon.url) for each in sent)
    loaded = browser.seen("Network.loadingFinished")
    assert sum(each["encodedDataLength"] for each in loaded) <= MOST_BYTES
    assert browser.complaints() == []


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_on_a_phone_nothing_is_cut_off_and_everything_can_be_read(browser: Viewer, daemon: Daemon, is_dark: bool):
    look_at(browser, daemon, is_dark=is_dark, **PHONE)
    assert browser.run("document.documentElement.scrollWidth") <= PHONE["width"]
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == is_dark
    can_be_read(browser)


def test_the_map_shows_each_layer(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon)
    shares = "[...document.querySelectorAll('.cell i')].map((cell) => cell.style.transform)"
    browser.wait_for(f"{shares}.every((each) => each === 'scaleY(1)')")
    assert browser.run(f"{shares}.length") == 5


@can_squeeze
def test_a_pass_over_a_cold_model_fills_the_map_layer_by_layer(
    browser: Viewer, make_daemon: MakeDaemon, tmp_path: Path
):
    model = write_gguf(tmp_path / "large.gguf", target_bytes=COLD_BYTES).path
    evict(model)  # the engine is to bring it in, so that it counts as the group's
    with memory_group(f"emberd-test-{os.getpid()}") as group, slow_disk(model, COLD_BYTES // 5) as slow:
        daemon = make_daemon({"model.path": str(model), "engine.lock": "never", "warmth.mode": "auto"})
        daemon.launcher = group.joining()
        daemon.start()
        try:
            engine = daemon.wait_ready()["engine"]["pid"]
            assert daemon.verb("pause", "1h").returncode == 0
            look_at(browser, daemon)
            group.limit(group.used_bytes - COLD_BYTES * 3 // 4)  # the weights leave, which nobody uses now
            group.limit(2 << 30)
            browser.wait_for(f"{SHARES}.some((share) => share < 0.1)")
            for child in psutil.Process(daemon.status()["pid"]).children():
                if child.pid != engine:
                    slow(child.pid)
            browser.run(
                "window.seen = []; setInterval(() => window.seen.push("
                f"[document.getElementById('answer').textContent, ...{SHARES}]), 50); "
                "document.querySelector('[data-do=warm]').click()"
            )
            browser.wait_for("document.getElementById('answer').textContent.startsWith('Done in')")
            browser.wait_for(f"{SHARES}.every((share) => share === 1)")
            seen = browser.run("window.seen")
            assert browser.complaints() == []
        finally:
            daemon.close()
    while_it_ran = {round(sum(shares), 1) for said, *shares in seen if said == "Warming …"}
    assert len(while_it_ran) >= 5, sorted(while_it_ran)


def test_it_follows_an_engine_that_dies_and_comes_back(browser: Viewer, make_daemon: MakeDaemon):
    daemon = make_daemon({"warmth.mode": "auto"}, STANDIN_LOAD_SECONDS="4")  # longer than two events are apart
    daemon.start()
    pid = daemon.wait_ready()["engine"]["pid"]
    look_at(browser, daemon)
    os.kill(pid, signal.SIGKILL)
    browser.wait_for(f"{SENTENCE} === 'The model is loading.'")
    browser.wait_for(f"{SENTENCE}.startsWith('Warm.')")
    browser.wait_for("document.getElementById('events').textContent.includes('The engine ended: ')")
    assert browser.complaints() == []


def test_it_says_that_it_is_stale_while_the_daemon_is_away_and_comes_back_with_it(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon)
    daemon.signal(signal.SIGTERM)
    daemon.end()
    browser.wait_for("document.getElementById('link').textContent.startsWith('emberd does not answer')")
    assert browser.run("document.body.classList.contains('stale')")
    daemon.start()
    browser.wait_for(IS_LIVE)
    browser.wait_for(f"{SENTENCE}.startsWith('Warm.')")
    assert not browser.run("document.body.classList.contains('stale')")


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_it_can_be_read_when_the_daemon_has_ended_and_when_the_engine_has_failed(
    browser: Viewer, make_daemon: MakeDaemon, is_dark: bool
):
    daemon = make_daemon({"warmth.mode": "auto", "lifecycle.crash_limit": 1})
    daemon.start()
    engine = daemon.wait_ready()["engine"]["pid"]
    look_at(browser, daemon, is_dark=is_dark, **PHONE)
    os.kill(engine, signal.SIGKILL)
    daemon.wait_for(lambda status: status["state"] == "FAILED", "the failure")
    browser.wait_for("document.body.dataset.tone === 'bad'")
    can_be_read(browser)
    daemon.signal(signal.SIGTERM)
    daemon.end()
    browser.wait_for("document.body.classList.contains('stale')")
    can_be_read(browser)


def test_it_can_be_used_by_keyboard_alone(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon)
    active = "document.activeElement"

    def tab_to(condition: str) -> None:
        for _ in range(40):
            browser.press("Tab")
            if browser.run(condition):
                return
        raise AssertionError(f"the Tab key never comes to {condition}")

    tab_to(f"{active}.dataset.do === 'pause'")
    assert browser.run(f"getComputedStyle({active}).outlineStyle") == "solid"
    browser.press("Enter")
    browser.wait_for("document.getElementById('answer').textContent === 'Paused for 1 h 0 min.'")
    daemon.wait_for(lambda status: status["warmth"]["paused_for_s"], "the pause")
    browser.wait_for("!document.querySelector('[data-do=resume]').disabled")
    tab_to(f"{active}.dataset.do === 'resume'")
    browser.press("Enter")
    daemon.wait_for(lambda status: not status["warmth"]["paused_for_s"], "the end of the pause")
    tab_to(f"{active}.dataset.do === 'restart'")
    browser.press("Enter")
    browser.wait_for("document.getElementById('sure').open")
    browser.press("Escape")
    browser.wait_for("!document.getElementById('sure').open")
    assert daemon.status()["starts"] == 1, "Escape is no yes"
    tab_to(f"{active}.className === 'strip'")
    for key, layer in (("Home", "token embd"), ("ArrowRight", "layer 0"), ("End", "output")):
        browser.press(key)
        assert browser.run(f"{active}.getAttribute('aria-valuetext')").startswith(f"{layer}: 100 %")
    tab_to(f"{active}.className === 'plot'")


def test_the_charts_zoom_by_finger_and_by_mouse_and_show_all_again(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon, **PHONE)
    browser.run("document.querySelector('.u-over').scrollIntoView({block: 'center'})")
    assert not browser.run(IS_ZOOMED)
    browser.pinch(".u-over", 40, 160)
    browser.wait_for(IS_ZOOMED)
    shown = browser.run(ZOOM)
    browser.pinch(".u-over", 40, 160)
    browser.wait_for(f"{ZOOM} !== '{shown}'")
    for _ in range(2):
        browser.pinch(".u-over", 200, 40)
    browser.wait_for(f"!({IS_ZOOMED})")
    browser.drag(".u-over", 40, 120)
    browser.wait_for(IS_ZOOMED)
    browser.run("document.getElementById('all').click()")
    browser.wait_for(f"!({IS_ZOOMED})")
    assert browser.complaints() == []


def test_the_charts_follow_the_time_and_stay_where_they_were_zoomed_to(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon)
    place = chart("Memory pressure")
    begin, later, hour = BEGIN_S, BEGIN_S + 3600, 3600

    def past(end_s: int) -> dict[str, Any]:
        at_s = list(range(begin, end_s, 60))
        return {"at_s": at_s, "available_bytes": [at - begin for at in at_s]}

    browser.run(f"{place}.querySelector('details').open = true")
    draw(browser, past(later), begin, later)
    rows = f"{place}.querySelectorAll('tbody tr')"
    browser.wait_for(f"{rows}.length === 60")
    draw(browser, past(later + 1200), begin + 1200, later + 1200, keeps_zoom=True)
    assert not browser.run(IS_ZOOMED), "nobody has zoomed"
    assert browser.run(f"{rows}.length") == 60
    newest = browser.run(f"import('/emberd/web/words.js').then(({{words}}) => words.moment({later + 1140}))")
    assert browser.run(f"{rows}[0].cells[0].textContent") == newest

    browser.run(f"{place}.querySelector('.plot').focus()")
    browser.press("+")
    browser.wait_for(IS_ZOOMED)
    shown = browser.run(ZOOM)
    draw(browser, past(later + 1800), begin + 1800, later + 1800, keeps_zoom=True)
    assert browser.run(IS_ZOOMED)
    assert browser.run(ZOOM) == shown
    draw(browser, past(later + 2 * hour), begin + 2 * hour, later + 2 * hour, keeps_zoom=True)
    assert browser.run(IS_ZOOMED)
    assert browser.run(ZOOM) != shown, "what was zoomed to is no longer in the span"
    browser.press("Escape")
    browser.wait_for(f"!({IS_ZOOMED})")
    assert browser.complaints() == []


def test_each_axis_has_labels_that_differ_and_none_where_there_is_no_value(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon, script=HEAR_LABELS)
    at_s = list(range(BEGIN_S, BEGIN_S + 3600, 60))
    unknown, nothing, one = [None] * 60, [0] * 60, [1] + [0] * 59
    passes, swap = chart("Passes and losses"), chart("Written to swap")
    said = "querySelector('output').textContent"

    past: dict[str, Any] = {"at_s": at_s, "passes": one, "lost_bytes": [2_400_000_000, *unknown[1:]]}
    assert labels(browser, "Passes and losses", past) == ["0", "1", "0 MB", "1.0 GB", "2.0 GB"]
    assert labels(browser, "Passes and losses", {"at_s": at_s, "passes": one}) == ["0", "1"]
    assert browser.run(f"{passes}.{said}") == ""
    assert labels(browser, "Written to swap", {"at_s": at_s, "swap_engine_bytes": [3_000_000, *nothing[1:]]}) == [
        "0 MB",
        "1 MB",
        "2 MB",
        "3 MB",
    ]
    assert labels(browser, "Written to swap", {"at_s": at_s, "swap_engine_bytes": nothing}) == []
    assert browser.run(f"{swap}.{said}") == "Nothing was written to swap in this span."
    assert labels(browser, "Written to swap", {"at_s": at_s}) == []
    assert browser.run(f"{swap}.{said}") == "Nothing was recorded in this span.", "unknown is not nothing"
    assert browser.run(f"{chart('First tokens')}.{said}") == "No first token in this span."
    assert browser.complaints() == []


def test_what_was_said_of_a_pause_goes_when_it_is_ended_elsewhere(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon)
    answer = "document.getElementById('answer').textContent"
    can_resume = "!document.querySelector('[data-do=resume]').disabled"
    for verb, said in (("pause", "Paused for 1 h 0 min."), ("cool", "Cool for 1 h 0 min.")):
        browser.run(f"document.querySelector('[data-do={verb}]').click()")
        browser.wait_for(f"{answer} === '{said}' && {can_resume}")
        assert daemon.verb("resume").returncode == 0
        browser.wait_for(f"{answer} === '' && !({can_resume})")
        browser.wait_for("!document.querySelector('[data-do=cool]').disabled")
    browser.run("document.querySelector('[data-do=warm]').click()")
    browser.wait_for(f"/^(Done in|Nothing was done)/.test({answer})")
    assert browser.complaints() == []


def test_the_days_are_asked_for_each_minute_until_there_is_one(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon, script=NO_HISTORY)
    days = "document.getElementById('days')"
    note = "document.getElementById('days-note').textContent"
    assert browser.run(f"{note}") == "Nothing is known yet."
    day = {"day": "2026-05-01", **asdict(what_it_brought([Minute(0, observed_s=60, warm_s=60)], [], []))}
    browser.run(f"told = {json.dumps([day])}; minutely.forEach((each) => each())")
    browser.wait_for(f"{days}.textContent.includes('100')")
    assert browser.run(note) == "What was spared is not known: no first token of a cold model was seen yet."
    browser.run("told = []; asked = 0; minutely.forEach((each) => each())")
    assert browser.run("asked") == 1, "the charts' past; the days are good for ten minutes"


def test_the_table_of_first_tokens_says_what_each_one_met(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon)
    tokens = {
        "at_s": [BEGIN_S + 60, BEGIN_S + 600],
        "took_s": [0.2, 9.0],
        "forecast_s": [0.3, None],
        "idle_s": [420, 7200],
        "temperature": ["hot", "cold"],
        "reused": [3900, None],
        "processed": [100, None],
    }
    draw(browser, {"tokens": tokens}, BEGIN_S, BEGIN_S + 3600)
    open_table(browser, chart("First tokens"))
    place = f"{chart('First tokens')}.querySelectorAll"
    assert texts(browser, f"{place}('th')") == [
        *("Time", "Measured", "Forecast", "Idle before", "Found", "Tokens reused")
    ]
    assert texts(browser, f"{place}('tbody tr:first-child td')")[1:] == [
        *("9 s", "unknown", "2 h 0 min", "cold", "unknown")
    ]
    assert texts(browser, f"{place}('tbody tr:last-child td')")[1:] == [
        *("0.2 s", "0.3 s", "7 min", "hot", "3900 of 4000")
    ]


def test_an_open_table_keeps_focus_and_place_while_it_is_refreshed(browser: Viewer, daemon: Daemon):
    look_at(browser, daemon)
    place = chart("Memory pressure")
    at_s = list(range(BEGIN_S, BEGIN_S + 3600, 60))
    draw(browser, {"at_s": at_s, "available_bytes": [10**9] * 60}, BEGIN_S, BEGIN_S + 3600)
    open_table(browser, place)
    box = f"{place}.querySelector('.scroll')"
    browser.run(f"{box}.focus(); {box}.scrollTop = 200")
    at_s.append(BEGIN_S + 3600)
    draw(browser, {"at_s": at_s, "available_bytes": [2 * 10**9] * 61}, BEGIN_S, BEGIN_S + 3660, keeps_zoom=True)
    assert browser.run(f"{box}.textContent.includes('2.0 GB')")
    assert browser.run(f"document.activeElement === {box} && {box}.scrollTop") == 200


def test_on_a_phone_all_of_a_day_is_there_without_scrolling(browser: Viewer, week: Daemon):
    look_at(browser, week, **PHONE)
    browser.wait_for("document.querySelector('#days td')")
    box = "document.querySelector('#days .scroll')"
    browser.wait_for(f"{box}.textContent.includes('0.16\u00a0%')")
    assert browser.run(f"{box}.textContent.includes('1\u00a0h\u00a029\u00a0min, 34\u00a0GB')")
    assert browser.run(f"{box}.scrollWidth <= {box}.clientWidth")
    assert browser.run(f"{box}.scrollHeight <= {box}.clientHeight")


def test_the_days_say_what_they_wrote_to_swap_and_unknown_where_nothing_tells(browser: Viewer, week: Daemon):
    browser.view(f"{week.url}/emberd/", script=NO_EVENTS)
    swapped = "document.querySelectorAll('#days td:last-child')"
    browser.wait_for(f"{swapped}.length")
    told = ["987\u00a0GB", "unknown", "987\u00a0GB"]
    assert texts(browser, swapped)[-7:-4] == told, "the rating comes with the first event"
    browser.run("fetch('status').then((found) => found.text()).then((data) => source.onmessage({data}))")
    browser.wait_for("document.getElementById('days').textContent.includes('0.16\u00a0%')")
    told = ["987\u00a0GB, 0.16\u00a0%", "unknown", "987\u00a0GB, 0.16\u00a0%"]
    assert texts(browser, swapped)[-7:-4] == told
    assert texts(browser, swapped)[-1] == told[0], "the oldest day counts as a whole"


def test_a_browser_without_a_session_logs_in_and_then_sees_the_page(browser: Viewer, make_daemon: MakeDaemon):
    daemon = make_daemon({"warmth.mode": "auto", "endpoint.api_key": "sesame"})
    daemon.write_settings()
    daemon.config.chmod(0o600)
    daemon.start()
    daemon.wait_ready()
    browser.view(f"{daemon.url}/emberd/")
    browser.wait_for("location.pathname === '/emberd/login' && document.querySelector('input[name=key]')")
    assert "sesame" not in browser.run("document.documentElement.outerHTML")
    browser.run("document.querySelector('input[name=key]').value = 'sesame'")
    browser.run("void setTimeout(() => document.querySelector('form').submit())")
    browser.wait_for("location.pathname === '/emberd/'")
    browser.wait_for(f"{IS_LIVE} && {SENTENCE}.startsWith('Warm.')")
    browser.run("document.querySelector('[data-do=pause]').click()")
    daemon.wait_for(lambda status: status["warmth"]["paused_for_s"], "the pause")
