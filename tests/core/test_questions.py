"""Which of an engine's paths need no key: pages, and nothing that only looks like one."""

from __future__ import annotations

import pytest

from emberd.core.questions import KOBOLDCPP, LLAMA_SERVER, Questions


@pytest.mark.parametrize(
    ("questions", "path"),
    [
        (KOBOLDCPP, "/"),
        (KOBOLDCPP, "/static/klite.css"),
        (KOBOLDCPP, "/static/js/main.min.js"),
        (LLAMA_SERVER, "/_app/immutable/entry/start.A1_b-2.js"),
        (LLAMA_SERVER, "/health"),
    ],
)
def test_pages_and_their_files_are_open(questions: Questions, path: str):
    assert questions.is_open("GET", path)
    assert not questions.is_open("POST", path)


@pytest.mark.parametrize(
    ("path", "query"),
    [
        # 1.115 removes each /static and opens what is left, with the query, below its folder.
        ("/static/x.js", b"/../../../../etc/passwd"),
        ("/static/./static./etc/page.css", b""),
        ("/static/../koboldcpp.js", b""),
        ("/static//etc/page.css", b""),
        ("/static/%2e%2e/page.css", b""),
        ("/static/notes.txt", b""),
        ("/static/key", b""),
        # 1.104 looks at the end of a path.
        ("/static/api/extra/generate/check", b""),
        ("/static/noscript", b""),
        ("/static/", b""),
    ],
)
def test_what_only_looks_like_a_pages_file_is_not(path: str, query: bytes):
    assert not KOBOLDCPP.is_open("GET", path, query)
