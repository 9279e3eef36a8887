"""What KoboldCPP prints: counts of a generation, and lines that nobody may keep. Versions: docs/engines.md."""

from __future__ import annotations

import re

from emberd.core.turn import PromptCounts

_PRIVATE = re.compile(r"Namespace\(|Body Err:|^(?:Input|Output):|password='")
"""`Namespace(` shows passwords and `Body Err:` whole request bodies, both even with --quiet. Either can follow
the counts of a generation, whose line ends only with the next one (1.104, 1.115)."""
_REPLY = "Output:"
_OWN_WORDS = re.compile(
    r"\[\d\d:\d\d:\d\d\] CtxLimit|Processing Prompt|Generating|Admin: |Reloading new |Terminating old "
    r"|Restarting Kobold|Attempting to recover|\[Unload Timeout\]|llama_|load_|System: |Loading |Initializing "
)
"""What ends a reply in the log. A model that was switched in place prints them: --quiet is lost (1.104, 1.115)."""


class PrivateLines:
    """Tells which lines hold passwords, prompts or replies; a reply has several, so the lines before count."""

    def __init__(self) -> None:
        self._is_in_reply = False

    def is_one(self, line: str) -> bool:
        """Judge the next line."""
        is_begun = _PRIVATE.search(line) is not None
        self._is_in_reply = line.startswith(_REPLY) or (
            self._is_in_reply and not is_begun and _OWN_WORDS.match(line) is None
        )
        return is_begun or self._is_in_reply


_CONTEXT = re.compile(r"(?:^|\] )CtxLimit:(?P<held>\d+)/\d+, ")
_PROCESSED = re.compile(r" Processed:(?P<count>\d+) in ")
_PROCESS = re.compile(r" Process:(?P<seconds>[\d.]+)s \((?:[\d.]+ms/T = )?(?P<rate>[\d.]+)T/s\)")
_GENERATED = re.compile(r" (?:Amt|Generated):(?P<count>\d+)/")
_BATCHED = re.compile(r"\] BatchRequest:\d+, Prompt:(?P<prompt>\d+), Generated:(?P<generated>\d+)/")


def read_counts(line: str) -> PromptCounts | None:
    """Read the counts at the end of a generation, None from any other line (gpttype_adapter.cpp).

    1.104 and before print seconds and tokens a second, each to a hundredth: their product is the count of
    processed tokens, off by at most 0.005 s times the rate. 1.115 prints the count. Its continuous batching
    processes a request's whole prompt.
    """
    found = _BATCHED.search(line)
    if found:
        return PromptCounts(0, int(found["prompt"]), int(found["generated"]))
    context, generated = _CONTEXT.search(line), _GENERATED.search(line)
    if not context or not generated:
        return None
    made = int(generated["count"])
    prompt = max(int(context["held"]) - made, 0)
    exact, process = _PROCESSED.search(line), _PROCESS.search(line)
    if exact:
        processed = int(exact["count"])
    elif process:
        processed = round(float(process["seconds"]) * float(process["rate"]))
    else:
        return PromptCounts(generated=made)
    return PromptCounts(max(prompt - processed, 0), processed, made)
