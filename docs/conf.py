"""How Sphinx builds the site (`scripts/docs`). The pages are plain Markdown: a code host shows them as well.

The source is the whole checkout, so that links between docs/ and the files beside it are followed and checked, and
the order of the pages stands here instead of in a page. Nothing is fetched, neither when the site is built nor
when it is read: the theme is part of Sphinx and has no font, script or style of another server.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from pygments.lexers.special import TextLexer

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
NAVIGATION = {
    "Begin": ("install", "service", "folk-recipe", "troubleshooting"),
    "Use": ("settings", "warmth", "locking", "memory", "page", "endpoint", "several", "engines", "metrics"),
    "When something is wrong": ("doctor", "logs", "survives", "lifecycle", "exit-codes"),
    "More": ("privacy", "../launchd/README", "architecture", "../CONTRIBUTING", "../CHANGELOG"),
}
"""Headings of the table of contents, and their pages in order. A page that is missing here is a warning."""
FIRST_PAGE = "docs/index"

project = "emberd"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
extensions = ["myst_parser"]
root_doc = FIRST_PAGE
include_patterns = ["docs/*.md", "launchd/README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "daemon", "requirements", "scripts", "site", "tests"]
myst_heading_anchors = 4
html_theme = "alabaster"
html_theme_options = {"description": "Keeps a local LLM warm.", "page_width": "1080px", "show_powered_by": False}
html_show_copyright = False
html_copy_source = False
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}


def add_navigation(_: Sphinx, page: str, source: list[str]) -> None:
    """Put the table of contents behind the first page; a name without a page is left out."""
    if page != FIRST_PAGE:
        return
    for heading, names in NAVIGATION.items():
        there = [name for name in names if (ROOT / "docs" / f"{name}.md").exists()]
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {heading}", "", *there, "```", ""])


def lead_to_first_page(app: Sphinx, failure: Exception | None) -> None:
    """Write the site's index.html, which leads to the first page."""
    if failure is None and app.builder.format == "html":
        leads = f'<meta http-equiv="refresh" content="0; url={FIRST_PAGE}.html">'
        text = f"<!doctype html><title>emberd</title>{leads}\n"
        (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Add the two, and show diagrams as their source: drawing them takes a script of another server."""
    app.add_lexer("mermaid", TextLexer)
    app.connect("source-read", add_navigation)
    app.connect("build-finished", lead_to_first_page)
