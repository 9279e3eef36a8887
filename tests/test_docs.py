"""What the documentation says is what the code does, where a machine can tell."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from emberd.core import errors, lifecycle
from emberd.core.errors import EmberdError
from emberd.core.lifecycle import Lifecycle, State
from emberd.core.residency import Unknown
from emberd.core.settings import LifecycleSettings, Settings, read, to_toml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EVENTS = (
    lifecycle.Start(),
    lifecycle.Stop(),
    lifecycle.Cool(""),
    lifecycle.Wake(),
    lifecycle.Restart("asked"),
    lifecycle.Launched(),
    lifecycle.Adopted(),
    lifecycle.LaunchFailed("disk full", is_permanent=False),
    lifecycle.LaunchFailed("no model", is_permanent=True),
    lifecycle.BecameReady(),
    lifecycle.LostReadiness(),
    lifecycle.Exited("crashed"),
    lifecycle.Stuck("hung"),
    lifecycle.Drained(),
    lifecycle.Gone(),
    lifecycle.DeadlinePassed(),
)


@pytest.mark.parametrize("script", ["settings-doc", "doctor-doc"])
def test_what_is_written_from_declarations_is_up_to_date(script: str):
    checked = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_each_section_of_the_doctor_tells_what_is_seen_and_what_helps():
    """Its code, title and place come from the declaration."""
    for section in re.split(r"^### ", (DOCS / "doctor.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        assert re.search(r"^Seen: .*^Remedy: ", section, re.MULTILINE | re.DOTALL), section


def test_the_example_file_is_the_defaults_and_is_read_back_as_them():
    text = (DOCS / "example.toml").read_text(encoding="utf-8")
    assert text == to_toml(Settings())
    assert read(tomllib.loads(text), "example.toml") == Settings()


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as hosts of Markdown make them."""
    headings = re.findall(r"^#+ +(.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path):
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        is_there = target.exists() and target.is_relative_to(ROOT)
        if not is_there or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def build_site(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as scripts/docs does."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-E",
        "-c",
        source / "docs",
        source,
        target,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_site_is_built_without_a_warning_and_loads_nothing_of_another_server(tmp_path: Path):
    built = build_site(ROOT, tmp_path)
    assert (built.returncode, built.stderr) == (0, "")
    pages = {page.stem for page in (tmp_path / "docs").glob("*.html")}
    assert pages == {page.stem for page in DOCS.glob("*.md")}
    loads = re.compile(
        r"""<(?:link|script|img|iframe)\b[^>]*?(?:href|src)=["']?(?:https?:)?//|@import|url\(["']?(?:https?:)?//"""
    )
    for page in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        assert not loads.search(page.read_text(encoding="utf-8")), page
    first = (tmp_path / "docs" / "index.html").read_text(encoding="utf-8")
    for page in pages - {"index"}:
        assert f'href="{page}.html"' in first, f"{page} is not in the table of contents"


def test_each_dead_link_fails_the_site(tmp_path: Path):
    (tmp_path / "launchd").mkdir()
    for name in ("pyproject.toml", "CONTRIBUTING.md", "CHANGELOG.md", "launchd/README.md"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copytree(DOCS, tmp_path / "docs")
    links = ("settings.md#no-anchor", "no-page.md", "../daemon/no-file.py")
    with (tmp_path / "docs" / "memory.md").open("a", encoding="utf-8") as page:
        page.write("".join(f"\n[a]({link})\n" for link in links))
    built = build_site(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    for link in links:
        assert re.search(rf"memory\.md:\d+: WARNING:.*{re.escape(link.partition('#')[2] or link)}", built.stderr), (
            link
        )


def test_every_exit_code_is_documented():
    text = (DOCS / "exit-codes.md").read_text(encoding="utf-8")
    documented = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)}
    family = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, EmberdError)]
    assert documented == {each.__name__: each.exit_code for each in family}


def test_every_reason_of_an_unknown_residency_is_documented():
    text = (DOCS / "memory.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == {each.value for each in Unknown}


def test_the_diagram_of_states_has_exactly_the_arrows_of_the_lifecycle():
    text = (DOCS / "lifecycle.md").read_text(encoding="utf-8")
    drawn = {
        (State[here], State[there]) for here, there in re.findall(r"^ +([A-Z]+) --> ([A-Z]+):", text, re.MULTILINE)
    }
    assert drawn == possible_arrows(LifecycleSettings(crash_limit=4))


def possible_arrows(settings: LifecycleSettings) -> set[tuple[State, State]]:
    """Return every change of state that some sequence of events can bring about."""
    waiting, seen = [Lifecycle()], {Lifecycle()}
    arrows: set[tuple[State, State]] = set()
    while waiting:
        here = waiting.pop()
        for event in EVENTS:
            # All deadlines are in the past, so that DeadlinePassed always counts.
            there, _ = lifecycle.step(here, event, 0.0, settings)
            if there.state is not here.state:
                arrows.add((here.state, there.state))
            crashes = min(there.crashes, settings.crash_limit)  # more make no difference
            deadline_s = None if there.deadline_s is None else 0.0
            there = replace(there, reason="", crashes=crashes, deadline_s=deadline_s)
            if there not in seen:
                seen.add(there)
                waiting.append(there)
    return arrows
