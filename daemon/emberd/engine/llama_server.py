"""llama.cpp's server: an external `llama-server`, or the embedded one in a child process."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.core import questions
from emberd.core.errors import ConfigError, EmberdError, EngineNotUsable
from emberd.core.generation import Dialect, continued, continued_as_text, templated
from emberd.core.preflight import USUAL_PROMPT_CACHE_MIB, prompt_cache_bound_mib
from emberd.core.reuse import CacheRoom
from emberd.core.turn import PromptCounts
from emberd.core.types import Activity, LaunchPlan, Notice, Readiness, Switch
from emberd.core.wishes import OwnerWishes
from emberd.engine import llama_log
from emberd.engine.embedded import PROMPT_CACHE_MIB
from emberd.engine.http import NOTHING_LISTENS, Answer
from emberd.engine.process import HARMFUL, STOP_SIGNALS
from emberd.engine.program import check_executable, check_ran, find_program
from emberd.engine.wishes import (
    API_KEY,
    API_KEY_FILE,
    API_KEY_VARIABLE,
    FIT_CONTEXT_TOKENS,
    PROMPT_CACHE,
    given,
    of_llama_server,
    without,
)
from emberd.host.model_file import check_files, check_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emberd.core.generation import Generation, Rest
    from emberd.core.ports import Host
    from emberd.core.replay import Replay
    from emberd.core.settings import Settings
    from emberd.core.turn import Turn
    from emberd.core.types import LoadProgress
    from emberd.engine.http import EngineHttp
    from emberd.engine.program import Asker

_HTTP_OK = 200
_SLEEP = "ing sleeping state"
"""`server is entering sleeping state`, `... exiting ...` (tools/server/server-context.cpp, build 11434)."""
_HTTP_LOADING = 503
"""llama-server answers 503 "Loading model" to everything until the model is there (tools/server/README.md)."""
_OWNED = {
    "--host": "the engine listens on 127.0.0.1 only; clients use emberd's endpoint",
    "--port": "emberd chooses a private port",
    "-m": "the model is model.path",
    "--model": "the model is model.path",
    "--api-prefix": "emberd's questions and its endpoint know the engine's paths without one",
    "--ssl-key-file": "the engine is on 127.0.0.1, and emberd speaks plain HTTP with it",
    "--ssl-cert-file": "the engine is on 127.0.0.1, and emberd speaks plain HTTP with it",
}
_OWNED_VARIABLES = {
    "LLAMA_ARG_API_PREFIX": "--api-prefix",
    "LLAMA_ARG_SSL_KEY_FILE": "--ssl-key-file",
    "LLAMA_ARG_SSL_CERT_FILE": "--ssl-cert-file",
}
"""Those that no argument of emberd's overrides."""
_ROUTER = {"--models-dir": "LLAMA_ARG_MODELS_DIR", "--models-preset": "LLAMA_ARG_MODELS_PRESET"}
"""Options of the router, and their variables. With a model llama-server is none and ignores them (tools/server)."""
_MODES_WITHOUT_SERVER = frozenset({"-h", "--help", "--usage", "--version", "--completion-bash", "--list-devices"})
_VERBOSE = frozenset(
    {"-v", "--verbose", "--log-verbose", "-lv", "--verbosity", "--log-verbosity", "--log-prompts-dir"}
)
_HELP_COLUMN = 40
_USUAL_SLOTS = 4
"""Unless told (tools/server/server.cpp, since 2025)."""
_OWN_THREADS = 8
"""HTTP threads beyond those that wait for a reply. By default the server has four more than slots (llama.cpp,
tools/server, `n_threads_http`), and requests that wait for a slot would leave none for /health."""


class LlamaServer:
    """HTTP and log, as the external and the embedded server share them."""

    name = "llama-server"
    questions = questions.LLAMA_SERVER
    stop_signals = STOP_SIGNALS
    refusals: frozenset[int] = frozenset()

    def __init__(self, settings: Settings, host: Host, http: EngineHttp) -> None:
        self._settings = settings
        self._host = host
        self._http = http
        self.room = CacheRoom()
        self.switch: Switch | None = None

    @property
    def most_connections(self) -> int:
        """Return the setting: the server is told to have as many threads, and some to spare."""
        return self._settings.endpoint.max_concurrent

    @property
    def most_at_work(self) -> int:
        """Return the same: its own queue is long enough."""
        return self.most_connections

    def is_work(self, method: str, path: str) -> bool:  # noqa: ARG002  # the Engine protocol
        """Return False: the server manages slots and queue itself."""
        return False

    @property
    def password(self) -> str:
        """Return nothing: the embedded engine wants no key."""
        return ""

    def model_path(self) -> Path | None:
        """Return model.path."""
        named = self._settings.model.path
        return Path(named).expanduser().absolute() if named else None

    async def served_name(self, port: int, timeout_s: float) -> str | None:
        """Return the model's path in /props, which a sleeping server answers without waking."""
        props = await self._http.get(port, "/props", timeout_s, self.password)
        served = props.get("model_path")
        if props.get("is_sleeping") is True:
            return ""
        return served if isinstance(served, str) else None

    def calls_it(self, model: Path, name: str) -> bool:
        """Compare with the path that it was given."""
        return name == str(model)

    def switch_in_line(self, line: str) -> None:  # the Engine protocol
        """Return None: a server that was given a model serves no other one."""

    def switch_in_request(self, method: str, path: str, body: bytes) -> None:  # the Engine protocol
        """Return None, for the same reason."""

    def loads_again(self, line: str) -> bool:
        """Recognise both ends of an idle server's sleep (--sleep-idle-seconds), in which it has no model."""
        return _SLEEP in line

    def wishes(self) -> OwnerWishes:
        """Return what the embedded engine does, which takes no options from its owner."""
        return OwnerWishes(
            least_context_tokens=FIT_CONTEXT_TOKENS, has_windows=True, prompt_cache_mib=PROMPT_CACHE_MIB
        )

    async def ask_build(self) -> None:
        """Do nothing: the embedded engine's build is known."""

    async def probe_readiness(self, port: int, timeout_s: float) -> Readiness:
        """Ask /health, then compare the model's path in /props."""
        health = await self._http.get(port, "/health", timeout_s)
        if health.status == NOTHING_LISTENS:
            return Readiness.REFUSED
        if health.status is None or health.status == _HTTP_LOADING:
            return Readiness.LOADING
        if health.status != _HTTP_OK or health.get("status") != "ok":
            return Readiness.STRANGER
        props = await self._http.get(port, "/props", timeout_s, self.password)
        served, slots = props.get("model_path"), props.get("total_slots")
        cells = _as_count(props.get("default_generation_settings", "n_ctx"))
        self.room = CacheRoom(_as_count(slots) or 1, cells)
        if served is None:
            return Readiness.LOADING
        return Readiness.READY if served == str(self.model_path()) else Readiness.STRANGER

    async def probe_activity(self, port: int, timeout_s: float) -> Activity:
        """Ask /slots, which the thread that runs the model answers; fall back to /health."""
        slots = await self._http.get(port, "/slots", timeout_s, self.password)
        if slots.status == _HTTP_OK and isinstance(slots.content, list):
            return _read_slots(slots.content)
        if slots.status in {None, NOTHING_LISTENS}:
            return Activity(answered=False)
        health = await self._http.get(port, "/health", timeout_s)
        return Activity(answered=health.status == _HTTP_OK)

    async def abort(self, port: int, key: str, timeout_s: float) -> bool:  # noqa: ARG002  # the Engine protocol
        """Return False: the server ends a generation whose connection was closed, and has no call for it.

        A stream ends with its next token. For other replies the server checks the connection once a second
        (llama.cpp, tools/server, HTTP_POLLING_SECONDS; measured 0.02 to 1.02 s), but any slot's result starts
        that second anew: beside busy slots the reply runs to its end.
        """
        return False

    async def count_tokens(self, port: int, text: str, timeout_s: float) -> int | None:
        """Ask /tokenize, which adds no token before the text."""
        answer = await self._http.post(port, "/tokenize", {"content": text}, timeout_s, self.password)
        tokens = answer.get("tokens")
        return len(tokens) if isinstance(tokens, list) else None

    async def took_whole(self, port: int, turn: Turn, timeout_s: float) -> bool | None:  # noqa: ARG002
        """Return True: a prompt that is too long is refused (tools/server, exceed_context_size_error)."""
        return True

    async def rest(
        self, port: int, generation: Generation, text: str, used_tokens: int, timeout_s: float
    ) -> Rest | None:
        """Continue a prompt; of a chat the prompt that /apply-template makes."""
        if generation.dialect is not Dialect.CHAT:
            return continued(generation, text, used_tokens)
        chats, prompts = templated(generation), list[str]()
        for each in chats or ():
            answer = await self._http.post(port, "/apply-template", each, timeout_s, self.password)
            prompt = answer.get("prompt") if answer.status == _HTTP_OK else None
            prompts += [prompt] if isinstance(prompt, str) else []
        if len(prompts) < 2:  # noqa: PLR2004  # both
            return None
        return continued_as_text(generation, text, used_tokens, *prompts)

    async def send(self, port: int, request: Replay, timeout_s: float) -> Mapping[str, Any] | None:
        """POST it.

        Raises:
            RequestRefused: the answer's status is not 200.
        """
        answer = await self._http.post(port, request.path, request.body, timeout_s, self.password)
        return answer.object_if_any()

    def counts_in_reply(self, told: Mapping[str, Any]) -> PromptCounts:
        """Read `timings` (cache_n, prompt_n, predicted_n), or else the `usage` of OpenAI or Anthropic.

        Anthropic's `input_tokens` are those not found in the cache (its API reference), Responses' are all.
        """
        said = Answer(_HTTP_OK, told)
        if (found := _as_count(said.get("usage", "cache_read_input_tokens"))) is not None:
            input_tokens, output_tokens = (
                _as_count(said.get("usage", name)) for name in ("input_tokens", "output_tokens")
            )
            return PromptCounts(found, input_tokens, output_tokens)
        processed = _as_count(said.get("timings", "prompt_n"))
        reused = _as_count(said.get("timings", "cache_n"))
        generated = _as_count(said.get("timings", "predicted_n"))
        if generated is None:
            generated = _as_count(said.get("usage", "completion_tokens"))
        if generated is None:
            generated = _as_count(said.get("usage", "output_tokens"))
        whole = _as_count(said.get("usage", "prompt_tokens"))
        if whole is None:
            whole = _as_count(said.get("usage", "input_tokens"))
        if whole is None:
            whole = _as_count(said.get("tokens_evaluated"))
        if reused is None:
            reused = _as_count(said.get("usage", "prompt_tokens_details", "cached_tokens"))
        if reused is None:
            reused = _as_count(said.get("usage", "input_tokens_details", "cached_tokens"))
        if reused is None and whole is not None and processed is not None:
            reused = max(whole - processed, 0)
        if processed is None and whole is not None and reused is not None:
            processed = max(whole - reused, 0)
        return PromptCounts(reused, processed, generated)

    def counts_in_line(self, line: str) -> PromptCounts | None:  # noqa: ARG002  # the Engine protocol
        """Return None: the replies have the counts."""
        return None

    def read_progress(self, line: str) -> LoadProgress | None:
        """Recognise llama.cpp's loading lines."""
        return llama_log.read_progress(line)

    def is_private(self, line: str) -> bool:  # noqa: ARG002  # the Engine protocol
        """Return False: prompts are printed only at verbosities that `plan` refuses."""
        return False

    def is_fatal(self, line: str) -> bool:  # noqa: ARG002  # the Engine protocol
        """Return False: llama-server exits when it cannot serve."""
        return False


def _as_count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _load_mode(*, will_lock: bool) -> str:
    return "mmap+mlock" if will_lock else "mmap"


def _read_slots(slots: list[Any]) -> Activity:
    decoded = 0
    for slot in slots:
        part = slot.get("next_token")  # an object in older builds, a list of one in newer
        for one in part if isinstance(part, list) else [part]:
            decoded += one.get("n_decoded", 0) if isinstance(one, dict) else 0
        decoded += slot.get("id_task", 0) if isinstance(slot.get("id_task"), int) else 0
    return Activity(
        answered=True,
        is_generating=any(slot.get("is_processing") for slot in slots),
        generated_units=decoded,
    )


class EmbeddedServer(LlamaServer):
    """llama.cpp's server through the xllamacpp wheel, in a child process."""

    name = "embedded"

    async def plan(self, port: int, *, will_lock: bool, switch: Switch | None = None) -> LaunchPlan:  # noqa: ARG002
        """Compose `python -m emberd.engine.embedded ...`.

        Raises:
            EngineNotUsable: the extra is not installed.
            ModelError: the model cannot be used.
            ConfigError: settings that this engine does not know.
        """
        engine = self._settings.engine
        if importlib.util.find_spec("xllamacpp") is None:
            raise EngineNotUsable(
                "the embedded engine is not installed", 'Run: pip install "emberd[demo]", or set engine.kind.'
            )
        if engine.extra_args or engine.kcpps:
            raise ConfigError(
                "engine.extra_args and engine.kcpps mean nothing to the embedded engine",
                "Remove them, or set engine.kind to the engine that they are for.",
            )
        model = check_model(self._settings.model.path)
        arguments = [sys.executable, "-m", "emberd.engine.embedded", "--model", str(model)]
        arguments += ["--host", "127.0.0.1", "--port", str(port), "--load-mode", _load_mode(will_lock=will_lock)]
        arguments += ["--threads-http", str(self.most_connections + _OWN_THREADS)]
        arguments += _sizes(engine.context_size, engine.gpu_layers)
        return LaunchPlan(
            tuple(arguments),
            {"PYTHONUNBUFFERED": "1", **self._host.engine_environment(engine.metal_keep_alive_s)},
            port,
            by_own_python=True,
        )


class ExternalServer(LlamaServer):
    """A `llama-server` binary of the user's.

    Args:
        keys_target: where the keys of --api-key-file are written as it reads them.
    """

    def __init__(self, settings: Settings, host: Host, http: EngineHttp, asker: Asker, keys_target: Path) -> None:
        super().__init__(settings, host, http)
        self._asker = asker
        self._keys_target = keys_target
        self._password: str | None = None
        self._offered: frozenset[str] | None = None

    @property
    def password(self) -> str:
        """Return one of the owner's keys; of a file that cannot be read `plan` tells."""
        if self._password is None:  # an adopted engine is asked before anything is planned
            with contextlib.suppress(ConfigError):
                self._password = _a_key(self.wishes(), _keys_in_files(self.wishes()))
        return self._password or ""

    def wishes(self) -> OwnerWishes:
        """Return what extra_args and llama.cpp's own variables, which the engine inherits, ask for."""
        wishes = of_llama_server(self._settings.engine.extra_args, os.environ)
        if self._offered is None:
            return wishes
        return replace(
            wishes,
            least_context_tokens=wishes.least_context_tokens if "--fit" in self._offered else None,
            has_windows="--swa-full" in self._offered if wishes.has_windows is None else wishes.has_windows,
            slots=wishes.slots or _USUAL_SLOTS,
            prompt_cache_mib=self._bound() if wishes.prompt_cache_mib is None else wishes.prompt_cache_mib,
        )

    def _bound(self) -> int | None:
        """Return the bound for copies of prompts in MiB, None if this build keeps none."""
        if PROMPT_CACHE not in (self._offered or ()):
            return None
        return prompt_cache_bound_mib(self._host.system_memory().total_bytes)

    async def ask_build(self) -> None:
        """Ask the program for its options, which `wishes` then heeds; never raises."""
        with contextlib.suppress(EmberdError, OSError):
            await self._ask_build()

    async def _ask_build(self) -> tuple[Path, frozenset[str]]:
        program = find_program(self._settings.engine.path, ("llama-server",), "llama-server")
        check_executable(program, self._host)
        said = await self._asker.ask((str(program),), ("--help",), program, {})
        check_ran(program, said)
        offered = self._offered = read_options(said.out)
        return program, offered

    async def plan(self, port: int, *, will_lock: bool, switch: Switch | None = None) -> LaunchPlan:  # noqa: ARG002
        """Compose the command line from this build's --help.

        Raises:
            EngineNotUsable: the program is missing or cannot run.
            ModelError: the model cannot be used.
            ConfigError: an argument that this build does not know, or that emberd owns; a file of keys that cannot
                be read.
        """
        engine = self._settings.engine
        if not self._settings.model.path:
            check_router(engine.extra_args, os.environ)
        model = check_model(self._settings.model.path)
        program, offered = await self._ask_build()
        if "--port" not in offered or "--ctx-size" not in offered:
            raise EngineNotUsable(
                f"{program} is not llama-server (its --help offers no --ctx-size)", "Set engine.path."
            )
        check_arguments(engine.extra_args, offered)
        check_variables(os.environ)
        wishes = self.wishes()
        check_files((*wishes.files, *wishes.paths), "engine.extra_args or LLAMA_ARG_*")
        keys = _keys_in_files(wishes)
        self._password = _a_key(wishes, keys)
        notices = notices_of(wishes) + inherited(os.environ)
        if engine.kcpps:
            notices += (Notice("kcpps_ignored", "engine.kcpps is for KoboldCPP; llama-server does not read it"),)
        # Everybody on this computer can read a command line.
        owners = without(without(engine.extra_args, API_KEY), API_KEY_FILE)
        arguments = [str(program), *owners, "--model", str(model)]
        if keys:
            arguments += [API_KEY_FILE, str(self._keys_target)]
        arguments += ["--host", "127.0.0.1", "--port", str(port)]
        arguments += self._lock_arguments(offered, will_lock=will_lock)
        if "--threads-http" in offered - {name for name, _ in given(engine.extra_args)}:
            arguments += ["--threads-http", str(self.most_connections + _OWN_THREADS)]
        arguments += _sizes(engine.context_size, engine.gpu_layers)
        bound_mib = self._bound()
        is_unset = of_llama_server(engine.extra_args, os.environ).prompt_cache_mib is None
        if is_unset and bound_mib is not None and bound_mib < USUAL_PROMPT_CACHE_MIB:
            arguments += [PROMPT_CACHE, str(bound_mib)]
            notices += (_bounded_cache(bound_mib),)
        environment = dict(self._host.engine_environment(engine.metal_keep_alive_s))
        if wishes.api_keys:
            environment[API_KEY_VARIABLE] = ",".join(wishes.api_keys)
        files = {str(self._keys_target): "".join(f"{key}\n" for key in keys)} if keys else {}
        return LaunchPlan(tuple(arguments), environment, port, notices, files=files)

    def _lock_arguments(self, offered: frozenset[str], *, will_lock: bool) -> list[str]:
        """Return the option of the load mode (since 2026), or --mlock; before, mmap was the default."""
        wishes = self.wishes()
        if wishes.locks is not None or wishes.maps is not None:
            return []  # the owner decides
        if "--load-mode" in offered:
            return ["--load-mode", _load_mode(will_lock=will_lock)]
        return ["--mlock"] if will_lock else []


def _bounded_cache(mib: int) -> Notice:
    said = (
        f"llama-server would keep copies of earlier prompts in up to {USUAL_PROMPT_CACHE_MIB >> 10} GiB of memory; "
        f"it is told {PROMPT_CACHE} {mib}, a sixteenth of this computer's. Set {PROMPT_CACHE} in engine.extra_args "
        "to choose another size."
    )
    return Notice("prompt_cache_bounded", said)


def _sizes(context_size: int, gpu_layers: int) -> list[str]:
    arguments = ["--ctx-size", str(context_size)] if context_size else []
    return arguments + (["--n-gpu-layers", str(gpu_layers)] if gpu_layers >= 0 else [])


def read_options(help_text: str) -> frozenset[str]:
    """Return every option word that llama-server's --help shows.

    A line that describes options begins in the first column with a dash. Descriptions begin at column 40, or on
    the next line if the options need more room (llama.cpp, common/arg.cpp, `common_arg::to_string`).
    """
    words: set[str] = set()
    for line in help_text.splitlines():
        if not line.startswith("-") or line.startswith("-----"):
            continue
        has_description = line[_HELP_COLUMN - 1 : _HELP_COLUMN].isspace()
        spelled = line[:_HELP_COLUMN] if has_description else line
        words.update(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", spelled))
    return frozenset(words)


def check_arguments(extra_args: Sequence[str], offered: frozenset[str]) -> None:
    """Refuse words that the build does not know or that emberd decides.

    Raises:
        ConfigError: with the nearest known word, or what to set instead.
    """
    for word, _ in given(extra_args):
        if word in _OWNED:
            raise ConfigError(f"engine.extra_args: {word}: {_OWNED[word]}", f"Remove {word}.")
        if word in _MODES_WITHOUT_SERVER:
            raise ConfigError(f"engine.extra_args: {word} starts no server", f"Remove {word}.")
        if word in _VERBOSE:
            raise ConfigError(
                f"engine.extra_args: {word} would write prompts into the log",
                "Remove it; run the engine by hand to debug it.",
            )
        if word not in offered:
            near = difflib.get_close_matches(word, sorted(offered), n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(
                f"engine.extra_args: this llama-server does not know {word}{hint}", "Mend the setting."
            )


def check_router(extra_args: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse llama-server's router, which it is without a model, if options ask for it.

    Raises:
        ConfigError: with the reason.
    """
    named = [word for word, _ in given(extra_args) if word in _ROUTER]
    named += [f"{name} in the environment" for name in _ROUTER.values() if environment.get(name)]
    if named:
        raise ConfigError(
            f"{named[0]}: llama-server's router loads and unloads models by itself, each in a process of its own; "
            "emberd keeps one model warm",
            f"Set model.path to that model; {named[0]} then means nothing. For several models run several emberds.",
        )


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse llama.cpp's variables, which the engine inherits, for what emberd owns.

    Raises:
        ConfigError: with the reason.
    """
    for name, option in _OWNED_VARIABLES.items():
        if environment.get(name):
            raise ConfigError(f"{name} in the environment: {_OWNED[option]}", f"Unset {name}.")


def _a_key(wishes: OwnerWishes, in_files: Sequence[str]) -> str:
    """Return the first key that the engine takes, empty if it wants none."""
    return next(iter((*wishes.api_keys, *in_files)), "")


def _keys_in_files(wishes: OwnerWishes) -> tuple[str, ...]:
    """Return the keys in the owner's files.

    llama-server takes a line as it stands (common/arg.cpp, build 11434): with a byte order mark, or a carriage
    return at its end, it is a key that no client can send.

    Raises:
        ConfigError: a file cannot be read, or has no key.
    """
    keys: list[str] = []
    for name in wishes.api_key_files:
        path = Path(name)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(
                f"cannot read {API_KEY_FILE} {path}: {reason}", "Mend the path or its permissions."
            ) from error
        found = [line.rstrip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"{API_KEY_FILE} {path} has no key", "Write one into it, or remove the option.")
        keys += found
    return tuple(keys)


def notices_of(wishes: OwnerWishes) -> tuple[Notice, ...]:
    """Return notices of wishes that undo emberd's work."""
    notices: list[Notice] = []
    if wishes.unloads_by:
        undoes = f"{wishes.unloads_by} unloads the model when it idles, which undoes keep-warm"
        notices.append(Notice("idle_unloading", undoes))
    if wishes.maps is False:
        said = "the model is not to be mapped: its weights become ordinary memory that is swapped when they idle"
        notices.append(Notice("mmap_off", said))
    return tuple(notices)


def inherited(environment: Mapping[str, str]) -> tuple[Notice, ...]:
    """Return a notice of llama.cpp's variables in emberd's environment, without their values."""
    names = sorted(name for name in environment if name.startswith("LLAMA_") and environment[name])
    kept = ", ".join(name for name in names if not HARMFUL.match(name))
    left_out = ", ".join(name for name in names if HARMFUL.match(name))
    said = [f"the engine takes options from the environment: {kept}"] if kept else []
    said += [f"kept from it, as emberd could not do its work or prompts would be printed: {left_out}"] * bool(
        left_out
    )
    return (Notice("inherited_options", "; ".join(said)),) if said else ()
