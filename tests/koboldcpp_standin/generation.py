"""The model as seen from outside: one context with a prompt cache, one generation at a time, a queue before it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switches import BATCHING, die

if TYPE_CHECKING:
    import argparse

    from switches import Switches
    from weights import Weights

BEGIN = "<s>"
"""The token before every text; it counts in every number of tokens."""
PROMPT_BATCH = 512
LEAST_COMMON_TOKENS = 4
WAITING_BY_DEFAULT, WAITING_IN_NEWEST = 6, 9
STATE_IS_COPIED_TOKENS = 16
BUSY_AFTER_REPLY_S = 0.05
BUSY_AFTER_LOST_REPLY_S = 0.25
_SLICE_S = 0.025
_BURNT_PER_SLICE_S = 0.003
"""Processor time used while a prompt is processed, so that a watcher of processor time sees work."""
_SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
_TOKEN = re.compile(r"\s?\w{1,4}|\s?[^\w\s]|\s")

STOP_LENGTH, STOP_END_OF_TEXT, STOP_SEQUENCE = 0, 1, 2


def tokens_of(text: str) -> list[str]:
    """Cut text into tokens. A reply is cut the same way alone and behind its prompt."""
    return [BEGIN, *_TOKEN.findall(text)]


def next_token(text: str) -> str:
    """Return the token behind a text: a word of two letters behind a space.

    It depends on the text alone, as that of a model at temperature 0 does: a reply taken up in its middle goes
    on as it would have.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return " " + _SYLLABLES[digest[0] % len(_SYLLABLES)]


@dataclass(slots=True)
class Job:
    """One generation: what was asked, and how far it is.

    Attributes:
        length: tokens asked for; none are computed if it is below 1.
        prompt_tokens: filled when the work begins.
        is_streamed: whether the client reads the text as it grows.
        finished: set when no more text will come.
        aborted: set to make it end early.
        cache: tokens of its sequence, shared with the next generation unless it is batched.
    """

    prompt: str
    length: int
    key: str = ""
    stop: tuple[str, ...] = ()
    ignores_end: bool = False
    is_streamed: bool = False
    text: str = ""
    produced: int = 0
    prompt_tokens: int = 0
    finish_reason: str = "length"
    finished: threading.Event = field(default_factory=threading.Event)
    aborted: threading.Event = field(default_factory=threading.Event)
    cache: list[str] = field(default_factory=list)


class Turns:
    """The model lock with its bounded queue; who comes first is served first, and the batched run without it."""

    def __init__(self, multiuser: int, waiting: int = WAITING_BY_DEFAULT) -> None:
        self._limit = waiting if multiuser == 1 else max(0, multiuser - 1)
        self._batched = 0
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    def enter(self) -> bool:
        """Wait for the turn; False at once if the queue is full."""
        ticket = object()
        with self._changed:
            if len(self._line) > self._limit:
                return False
            self._line.append(ticket)
            while self._line[0] is not ticket:
                self._changed.wait(1.0)
        return True

    def begin(self, *, is_batched: bool) -> None:
        """Begin to generate: beside the others without the turn, or alone, once the batched ones have ended."""
        with self._changed:
            if is_batched:
                self._line.popleft()
                self._batched += 1
                self._changed.notify_all()
                return
            while self._batched:
                self._changed.wait(1.0)

    def leave(self, *, is_batched: bool) -> None:
        """Give the turn to the next."""
        with self._changed:
            if is_batched:
                self._batched -= 1
            else:
                self._line.popleft()
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """How many wait, the one that runs not counted."""
        return max(0, len(self._line) - 1)

    @property
    def is_free(self) -> bool:
        """Whether nothing runs."""
        return not self._line and not self._batched


class Model:
    """The loaded model.

    Args:
        options: the parsed command line.
        switches: speed and misbehaviour.
        weights: memory to touch, None without a model.
        began: monotonic time of the process start, in seconds.
    """

    def __init__(
        self, options: argparse.Namespace, switches: Switches, weights: Weights | None, began: float
    ) -> None:
        self.options = options
        self.switches = switches
        slots = max(getattr(options, "parallelrequests", 1), 1)
        self.turns = Turns(options.multiuser, WAITING_IN_NEWEST if switches.is_batching else WAITING_BY_DEFAULT)
        self._slots = threading.Semaphore(slots)
        self.began = self.last_start = began
        self.job: Job | None = None
        self._weights = weights
        self._cache: list[str] = []
        self._doomed_key = ""
        self._counters: dict[str, Any] = {"total_gens": 0, "stop_reason": -1, "last_seed": -1}
        self._last_process_ms = self._last_eval_ms = 0.0
        self._last_job: Job | None = None
        self._frozen_file = _unpack() if switches.is_frozen else None

    def is_hung(self) -> bool:
        """Whether the hang switch has taken effect."""
        return bool(self.switches.hang) and self._counters["total_gens"] >= self.switches.hang_after

    def is_intact(self) -> bool:
        """Whether the unpacked file is still there."""
        return self._frozen_file is None or self._frozen_file.exists()

    def remove_unpacked(self) -> None:
        """Clean up as the bootloader does on an orderly end."""
        if self._frozen_file is not None:
            self._frozen_file.unlink(missing_ok=True)
            self._frozen_file.parent.rmdir()

    def mark_start(self) -> None:
        """Note that a request reached generation; perf counts idleness from here."""
        self.last_start = time.monotonic()

    def run(self, job: Job) -> None:
        """Generate, growing `job.text`. The caller holds the turn."""
        self.job = job
        try:
            if job.key and job.key == self._doomed_key:
                self._doomed_key = ""
                return
            with self._slots:
                self._generate(job)
        finally:
            job.finished.set()

    def _generate(self, job: Job) -> None:
        if self.switches.hang == "generation" and self.is_hung():
            hang(burns_cpu=self.switches.hang_burns_cpu)
        tokens = tokens_of(job.prompt)
        room = self.options.contextsize - max(job.length, 0)
        if len(tokens) > room > 0:
            tokens = tokens[-room:]
        is_batched = self.is_batched(job)
        kept = 0 if is_batched else _common_prefix(self._cache, tokens)
        if self._weights is not None and self._weights.keeps_state and kept < len(self._cache):
            # A state cannot be cut back; the newest goes back to a copy of it, made a few tokens earlier.
            kept = max(kept - STATE_IS_COPIED_TOKENS, 0) if self.switches.is_batching else 0
        job.cache = tokens[:kept]
        if not is_batched:
            self._cache = job.cache
        began = time.monotonic()
        processed = 0
        if job.length > 0 and self._weights is not None:
            job.prompt_tokens = len(tokens)
            processed = self._process_prompt(job, tokens, kept)
        prompt_s = time.monotonic() - began
        reason = self._speak(job) if processed and not job.aborted.is_set() else STOP_LENGTH
        eval_s = time.monotonic() - began - prompt_s
        job.finish_reason = "stop" if reason == STOP_END_OF_TEXT else "length"
        self._last_process_ms = prompt_s * 1000 / processed if processed else 0.0
        self._last_eval_ms = eval_s * 1000 / job.produced if job.produced else 0.0
        self._last_job = job
        self._counters["total_gens"] += 1
        self._counters["stop_reason"] = reason
        self._counters["last_seed"] = 1
        self._report(job, prompt_s, eval_s, processed)

    def is_batched(self, job: Job) -> bool:
        """Whether the worker of the continuous batching takes it; the original leaves some samplers out."""
        return getattr(self.options, "parallelrequests", 1) > 1 and job.length > 0

    def _process_prompt(self, job: Job, tokens: list[str], kept: int) -> int:
        new = len(tokens) - kept
        self._wait(job, self.switches.prompt_base_s)
        self._progress(f"Processing Prompt (0 / {new} tokens)")
        for start in range(0, new, PROMPT_BATCH):
            count = min(PROMPT_BATCH, new - start)
            if not self._wait(job, count * self.switches.prompt_token_s):
                break
            job.cache += tokens[kept + start : kept + start + count]
            self._progress(f"Processing Prompt ({start + count} / {new} tokens)")
        return new

    def _speak(self, job: Job) -> int:
        natural = 0 if job.ignores_end else self.switches.reply_tokens
        while job.produced < job.length:
            if natural and job.produced >= natural:
                return STOP_END_OF_TEXT
            if not self._wait(job, self.switches.token_s):
                return STOP_LENGTH
            token = next_token(job.prompt + job.text)
            job.cache.append(token)
            if self._weights is not None:
                self._weights.store_token(len(job.cache))
            job.text += token
            job.produced += 1
            self._progress(f"Generating ({job.produced} / {job.length} tokens)")
            if job.produced == self.switches.crash_after_tokens:
                # What was produced reaches the client first: a stream is read every few milliseconds.
                threading.Event().wait(0.4)
                die(self.switches.crash_with)
            if any(word in job.text for word in job.stop):
                job.text = job.text[: min(job.text.find(word) for word in job.stop if word in job.text)]
                return STOP_SEQUENCE
        return STOP_LENGTH

    def _wait(self, job: Job, seconds: float) -> bool:
        """Work for a while on all weights; False if the job was aborted meanwhile.

        The original looks for that between two batches and two tokens only.
        """
        end = time.monotonic() + seconds
        if self._weights is not None:
            self._weights.touch()
        while (rest := end - time.monotonic()) > 0:
            time.sleep(min(_SLICE_S, rest))
            _burn(min(_BURNT_PER_SLICE_S, end - time.monotonic()))
        return not job.aborted.is_set()

    def _progress(self, text: str) -> None:
        if not self.options.quiet:
            sys.stdout.write("\r" + text)
            sys.stdout.flush()

    def _report(self, job: Job, prompt_s: float, eval_s: float, processed: int) -> None:
        """Print the counts; the original ends the line when it begins the next one."""
        used = len(job.cache) if processed else 0
        stamp = "" if self.switches.is_old else time.strftime("[%H:%M:%S] ")
        context = f"CtxLimit:{used}/{self.options.contextsize}"
        made, total_s = f"{job.produced}/{max(job.length, 0)}", prompt_s + eval_s
        made_rate = f"{eval_s:.2f}s ({_rate(job.produced, eval_s)})"
        if self.is_batched(job):
            words = f"BatchRequest:1, Prompt:{job.prompt_tokens}, Generated:{made} in {made_rate}, Stop:0"
        elif self.switches.version == BATCHING:
            processing = f"Processed:{processed} in {prompt_s:.2f}s ({_rate(processed, prompt_s)})"
            words = f"{context}, Init:0.00s, {processing}, Generated:{made} in {made_rate}, Total:{total_s:.2f}s"
        else:
            processing = f"Process:{prompt_s:.2f}s ({_rate(processed, prompt_s)})"
            words = f"{context}, Amt:{made}, Init:0.00s, {processing}, Generate:{made_rate}, Total:{total_s:.2f}s"
        sys.stdout.write(f"\n{stamp}{words}")
        if not self.options.quiet:
            sys.stdout.write(f"\nOutput: {job.text}\n")
        sys.stdout.flush()

    def announce(self, body: dict[str, Any]) -> None:
        """Print the request as the original does when it is not told to be quiet."""
        if not self.options.quiet:
            stamp = time.strftime("[%H:%M:%S] Input Received\n") if self.switches.is_old else ""
            sys.stdout.write(f"\n{stamp}Input: {json.dumps(body)}\n")
            sys.stdout.flush()

    def abort(self, key: str) -> dict[str, str]:
        """Stop the running generation, or remember the key of a queued one."""
        job = self.job
        waiting = self.turns.waiting
        is_running = job is not None and not job.finished.is_set()
        if (not key and waiting == 0) or (key and is_running and job is not None and key == job.key):
            if job is not None and not self.is_batched(job):
                job.aborted.set()
            sys.stdout.write("\nGeneration Aborted\n")
            return {"success": "true", "done": "true"}
        if key and waiting:
            self._doomed_key = key
            return {"success": "true", "done": "false"}
        return {"success": "false", "done": "false"}

    def text_so_far(self, key: str) -> str:
        """Return the text of the running or last generation, empty for who may not see it."""
        job = self.job
        if job is None or key != job.key or (not key and self.turns.waiting):
            return ""
        return job.text

    def perf(self) -> dict[str, Any]:
        """Return what `/api/extra/perf` tells."""
        job = self._last_job
        produced = job.produced if job else 0
        answer: dict[str, Any] = {
            "last_process": self._last_process_ms,
            "last_eval": self._last_eval_ms,
            "last_token_count": produced,
        }
        if not self.switches.is_old:
            prompt = job.prompt_tokens if job else 0
            process_s, eval_s = self._last_process_ms * prompt / 1000, self._last_eval_ms * produced / 1000
            answer |= {
                "last_input_count": prompt,
                "last_process_time": process_s,
                "last_eval_time": eval_s,
                "last_process_speed": prompt / process_s if process_s else 0,
                "last_eval_speed": produced / eval_s if eval_s else 0,
                "last_draft_success": 0,
                "last_draft_failed": 0,
                "total_tts_gens": 0,
                "total_transcribe_gens": 0,
            }
        now = time.monotonic()
        return (
            answer
            | self._counters
            | {
                "total_img_gens": 0,
                "queue": self.turns.waiting,
                "idle": 1 if self.turns.is_free else 0,
                "hordeexitcounter": -1,
                "uptime": now - self.began,
                "idletime": now - self.last_start,
                "quiet": bool(self.options.quiet),
            }
        )


def hang(*, burns_cpu: bool) -> None:
    """Never return."""
    never = threading.Event()
    while not never.is_set():
        if not burns_cpu:
            never.wait(60)


def _burn(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.2f}T/s" if seconds else "infT/s"


def _common_prefix(cache: list[str], tokens: list[str]) -> int:
    """Return how many tokens of the cache stay useful; the last token of a prompt is always computed anew."""
    limit = min(len(cache), len(tokens) - 1)
    common = next((index for index in range(limit) if cache[index] != tokens[index]), limit)
    return common if common >= LEAST_COMMON_TOKENS else 0


def _unpack() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="_MEI"))
    marker = directory / "koboldcpp_default.so"
    marker.write_bytes(b"unpacked")
    return marker
