"""KoboldCPP: a single-file binary, or `koboldcpp.py` of a checkout. Facts and versions: docs/engines.md."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.core import questions
from emberd.core.errors import ConfigError, EmberdError, StateUnusable
from emberd.core.generation import Dialect, continued
from emberd.core.gguf import F16_BYTES
from emberd.core.replay import fits
from emberd.core.reuse import CacheRoom
from emberd.core.turn import UNTOLD, PromptCounts, prompt_text
from emberd.core.types import Activity, LaunchPlan, Readiness
from emberd.engine import koboldcpp_log, koboldcpp_switch, llama_log
from emberd.engine.http import NOTHING_LISTENS
from emberd.engine.koboldcpp_flags import Wishes, compose, model_of_file, switched
from emberd.engine.koboldcpp_help import PROBE_ARGUMENT, read_help, read_probe
from emberd.engine.process import STOP_SIGNALS
from emberd.engine.program import check_executable, check_ran, find_program
from emberd.engine.wishes import PASSWORD_VARIABLE, of_koboldcpp
from emberd.host.files import make_private_folder
from emberd.host.model_file import check_files, check_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emberd.core.generation import Generation, Rest
    from emberd.core.ports import Host
    from emberd.core.replay import Replay
    from emberd.core.settings import Settings
    from emberd.core.turn import Turn
    from emberd.core.types import LoadProgress, Switch
    from emberd.core.wishes import OwnerWishes
    from emberd.engine.http import Answer, EngineHttp
    from emberd.engine.koboldcpp_help import Build
    from emberd.engine.program import Asker

USUAL_NAMES = ("koboldcpp", "koboldcpp-mac-arm64", "koboldcpp-linux-x64", "koboldcpp-linux-x64-nocuda")
_SCRIPT = "koboldcpp.py"
_NAMED, _NO_MODEL = "koboldcpp/", "inactive"
_HTTP_OK = 200
_WILL_NEVER_SERVE = ("IPv4 Socket Failed to Bind", "Both IPv4 and IPv6 cannot bind")
"""1.104 then spins on the unbound socket for ever; 1.76 exits with 1, later builds with 0."""
_PROTECTED_MODEL = "koboldcpp/protected-model"
CONTINUES_TURNS = (1, 104)
"""Knows `continue_assistant_turn`, and gives a fifth of the context to the prompt (not in 1.76)."""
_MOST_CONNECTIONS = 16
"""KoboldCPP has 24 threads, one for each connection, and no time-outs; eight are left for emberd's own
questions."""
_QUEUE = 10
"""What its queue takes unless told, the one that runs counted; further ones get 503 (1.115)."""
_LIGHT_POSTS = (
    "/api/show",
    "/api/extra/tokencount",
    "/api/extra/tokenize",
    "/api/extra/detokenize",
    "/api/extra/json_to_grammar",
    "/api/extra/abort",
    "/api/extra/generate/check",
    "/api/extra/last_logprobs",
    "/api/extra/multiplayer/status",
    "/api/extra/multiplayer/getstory",
    "/api/extra/multiplayer/setstory",
    "/api/extra/websearch",
    "/api/extra/shutdown",
    "/api/admin/reload_config",
    "/mcp",
    "/set_tts_settings",
    *(f"/api/data/{act}" for act in ("list", "metadata", "get", "put", "delete")),
    *(f"/api/extra/fs/{act}" for act in ("write_lines", "mkdir", "rmdir", "delete", "write", "move", "copy")),
    *(f"/api/extra/fs/{act}" for act in ("replace_regex", "upload")),
)
"""POSTs that do not wait for the model (`do_POST`, 1.76 to 1.115; data, files, `/mcp` and `/api/show` from 1.115).
Searches in documents do not wait either, but use the model for embeddings."""
_UNITS_OF_A_GENERATION = 1_000_000
"""Makes the count of finished generations exceed any length of a running reply."""
_OLD_DEFAULT_LENGTH_TOKENS, _DEFAULT_LENGTH_TOKENS = 1024, 2048
"""Above 896, 1.104's (`--defaultgenamt`), and what older versions take; and 1.115's."""


class KoboldCpp:
    """Adapter for KoboldCPP.

    Args:
        scratch: folder for its TMPDIR, so that no other KoboldCPP deletes what it unpacked.
        kcpps_target: where merged settings are written.
    """

    name = "koboldcpp"
    questions = questions.KOBOLDCPP
    stop_signals = STOP_SIGNALS
    """SIGINT is right in every mode; SIGTERM to the parent alone would orphan the worker of --admin."""

    def __init__(
        self,
        settings: Settings,
        host: Host,
        http: EngineHttp,
        asker: Asker,
        scratch: Path,
        kcpps_target: Path,
    ) -> None:
        self._settings = settings
        self._host = host
        self._http = http
        self._asking: set[asyncio.Task[Answer]] = set()
        self._asker = asker
        self._scratch = scratch
        self._kcpps_target = kcpps_target
        self._build: Build | None = None
        self._password: str | None = None
        self.switch: Switch | None = None
        self._private_lines = koboldcpp_log.PrivateLines()
        self.most_at_work = 1
        """It works on one unless told. Six more may wait in its queue, further ones get 503 (1.104)."""

    refusals = frozenset({500})
    """The request is unreadable or too long (1.104, do_POST); within a generation it fails silently."""
    room = CacheRoom()

    def is_work(self, method: str, path: str) -> bool:
        """Return True if a request waits for the model: every POST that is not known to be light."""
        return method == "POST" and not path.rstrip("/").endswith(_LIGHT_POSTS) and "/api/extra/data/" not in path

    @property
    def password(self) -> str:
        """Return the key that the engine wants: the owner's, before anything is planned (an adopted engine)."""
        if self._password is None:
            file: Mapping[str, object] = {}
            with contextlib.suppress(ConfigError):
                file = self._read_kcpps() or {}
            self._password = of_koboldcpp(self._settings.engine.extra_args, file).password or _password_given()
        return self._password

    @property
    def most_connections(self) -> int:
        """Return the setting, but no more than this server can serve."""
        return min(self._settings.endpoint.max_concurrent, _MOST_CONNECTIONS)

    def model_path(self) -> Path | None:
        """Return model.path, or else the model that the .kcpps file names; of a switch what its file names."""
        file: Mapping[str, object] = {}
        with contextlib.suppress(ConfigError):
            file = self._file_in_force()
        named = (self._settings.model.path if self.switch is None else "") or model_of_file(file)
        return Path(named).expanduser().absolute() if named else None

    def wishes(self) -> OwnerWishes:
        """Return what extra_args and the .kcpps file ask for; `plan` reports an unreadable file."""
        file: Mapping[str, object] = {}
        with contextlib.suppress(ConfigError):
            file = self._read_kcpps() or {}
        settings = _as_built(of_koboldcpp(self._settings.engine.extra_args, file), self._build)
        if self.switch is None:
            return settings
        with contextlib.suppress(ConfigError):
            file = self._file_in_force()
        # A switch keeps its own options only, and those of --admin (koboldcpp.py, reload_from_new_args).
        own = _as_built(of_koboldcpp((), file), self._build)
        return replace(own, can_switch=settings.can_switch, switch_folder=settings.switch_folder)

    async def ask_build(self) -> None:
        """Ask the program for its options and defaults, which `wishes` then tells; never raises."""
        with contextlib.suppress(EmberdError, OSError):
            await self._ask_build(*self._command())

    async def _ask_build(self, program: Path, command: tuple[str, ...]) -> Build:
        with contextlib.suppress(StateUnusable):  # a full disk: it is rarely needed
            make_private_folder(self._scratch)
        said = await self._asker.ask(command, ("--help",), program, self._environment())
        check_ran(program, said)
        self._build = read_help(said.out)
        return self._build

    def _file_in_force(self) -> Mapping[str, object]:
        """Return the .kcpps file that counts: the owner's, or that of the switch.

        Raises:
            ConfigError: it cannot be read.
        """
        owners = self._read_kcpps() or {}
        if self.switch is None:
            return owners
        return koboldcpp_switch.content(self.switch, of_koboldcpp(self._settings.engine.extra_args, owners))

    async def served_name(self, port: int, timeout_s: float) -> str | None:
        """Ask for the model's name, which is `inactive` without one."""
        name = (await self._http.get(port, "/api/v1/model", timeout_s, self.password)).get("result")
        if not isinstance(name, str) or name == _PROTECTED_MODEL:
            return None
        return "" if name == _NO_MODEL else name

    def calls_it(self, model: Path, name: str) -> bool:
        """Compare with the file's name, unless --hordemodelname gives another one."""
        return name == model_name(str(model)) or self.wishes().is_renamed

    def switch_in_line(self, line: str) -> Switch | None:
        """Recognise what the supervising process of --admin says."""
        return koboldcpp_switch.read_line(line)

    def switch_in_request(self, method: str, path: str, body: bytes) -> Switch | None:
        """Recognise /api/admin/reload_config: a frozen binary's own lines come late."""
        return koboldcpp_switch.read_request(path, body) if method == "POST" else None

    def loads_again(self, line: str) -> bool:
        """Recognise what the supervising process says between two workers, or what llama.cpp says."""
        return line.startswith(koboldcpp_switch.RESTARTS) or llama_log.reads_model(line) is not None

    async def plan(self, port: int, *, will_lock: bool, switch: Switch | None = None) -> LaunchPlan:
        """Compose the command line from this build's options.

        Raises:
            EngineNotUsable: the program is missing or cannot run.
            ModelError: the model cannot be used.
            ConfigError: an argument that this build refuses, or that would undo emberd's work; a missing file.
        """
        engine = self._settings.engine
        program, command = self._command()
        environment = self._environment()
        build = await self._ask_build(program, command)
        wished = Wishes(
            model=str(check_model(self._settings.model.path)) if self._settings.model.path else None,
            port=port,
            lock=will_lock,
            context_size=engine.context_size or None,
            gpu_layers=engine.gpu_layers if engine.gpu_layers >= 0 else None,
            extra_args=engine.extra_args,
            kcpps=self._read_kcpps(),
            kcpps_target=str(self._kcpps_target),
            password=_password_given(),
            is_metal=self._host.name == "darwin" and engine.gpu_layers != 0,
        )
        if switch is not None:
            wishes = of_koboldcpp(engine.extra_args, wished.kcpps or {})
            wished = switched(build, wished, koboldcpp_switch.content(switch, wishes))
        line = compose(build, wished)
        self._password = line.password
        self.most_at_work = self._slots() if build.offers("parallelrequests") else 1
        if wished.model is None:
            check_model(line.model)
        asked = of_koboldcpp(wished.extra_args, wished.kcpps or {})
        if not asked.ignores_missing:
            check_files((*asked.files, *asked.paths), "engine.extra_args or the .kcpps file")
        if wished.extra_args:
            probed = await self._asker.ask(command, (*wished.extra_args, PROBE_ARGUMENT), program, environment)
            read_probe(build, wished.extra_args, probed.exit_code, probed.err)
        return LaunchPlan(
            arguments=(*command, *line.arguments),
            environment=environment,
            port=port,
            notices=line.notices,
            hidden=line.hidden,
            files={} if line.kcpps is None else {str(self._kcpps_target): json.dumps(line.kcpps, indent=1)},
            by_own_python=command[0] == sys.executable and not self._settings.engine.python,
        )

    async def probe_readiness(self, port: int, timeout_s: float) -> Readiness:
        """Ask for the model's name; the port is closed until the model is loaded."""
        answer = await self._http.get(port, "/api/v1/model", timeout_s)
        if answer.status == NOTHING_LISTENS:
            return Readiness.REFUSED
        if answer.status is None:
            return Readiness.LOADING
        name = answer.get("result")
        is_empty = name == _NO_MODEL and self.wishes().can_switch
        if answer.status != _HTTP_OK or not isinstance(name, str) or not (is_empty or name.startswith(_NAMED)):
            return Readiness.STRANGER
        return Readiness.READY if self._is_our_model(name) else Readiness.STRANGER

    async def probe_activity(self, port: int, timeout_s: float) -> Activity:
        """Ask /api/extra/perf, and for the length of a running reply.

        It uses `idle` and not `idletime`, which counts from the start of the last generation and so grows while a
        long one runs.
        """
        perf = await self._http.get(port, "/api/extra/perf", timeout_s)
        idle = perf.get("idle")
        if perf.status != _HTTP_OK or idle is None:
            return Activity(answered=False)
        uptime = perf.get("uptime")
        serves_for_s = float(uptime) if isinstance(uptime, (int, float)) else None
        if idle == 1:
            return Activity(answered=True, is_generating=False, serves_for_s=serves_for_s)
        check = await self._http.get(port, "/api/extra/generate/check", timeout_s, self.password)
        reply = check.get("results", 0, "text")
        finished = perf.get("total_gens")
        units = (finished if isinstance(finished, int) else 0) * _UNITS_OF_A_GENERATION
        return Activity(
            answered=True,
            is_generating=True,
            generated_units=units + (len(reply) if isinstance(reply, str) else 0),
            serves_for_s=serves_for_s,
        )

    async def abort(self, port: int, key: str, timeout_s: float) -> bool:
        """Ask /api/extra/abort; an empty key ends whatever runs, if nothing waits in the engine."""
        answer = await self._http.post(port, "/api/extra/abort", {"genkey": key}, timeout_s, self.password)
        return answer.status == _HTTP_OK

    async def count_tokens(self, port: int, text: str, timeout_s: float) -> int | None:
        """Ask /api/extra/tokencount, which also counts the token before each text."""
        counts = []
        for each in ("", text):
            asked = {"prompt": each}
            answer = await self._http.post(port, "/api/extra/tokencount", asked, timeout_s, self.password)
            counts.append(answer.get("value"))
        empty, whole = counts
        return whole - max(empty, 0) if isinstance(whole, int) and isinstance(empty, int) else None

    async def took_whole(self, port: int, turn: Turn, timeout_s: float) -> bool | None:
        """Compare prompt and greatest reply with the context; a text has no more tokens than bytes."""
        told = (await self._http.get(port, "/api/extra/true_max_context_length", timeout_s)).get("value")
        if not isinstance(told, int):
            return None
        version = read_version((await self._http.get(port, "/api/extra/version", timeout_s)).get("version"))
        keeps_a_fifth = version >= CONTINUES_TURNS
        usual = _DEFAULT_LENGTH_TOKENS if version[:2] > CONTINUES_TURNS else _OLD_DEFAULT_LENGTH_TOKENS
        text, default = prompt_text(turn), max(usual, self.wishes().reply_tokens or 0)
        if fits(turn, len(text.encode("utf-8", "surrogatepass")), told, default, keeps_a_fifth=keeps_a_fifth):
            return True
        counted = await self.count_tokens(port, text, timeout_s)
        return None if counted is None else fits(turn, counted, told, default, keeps_a_fifth=keeps_a_fifth)

    async def rest(
        self, port: int, generation: Generation, text: str, used_tokens: int, timeout_s: float
    ) -> Rest | None:
        """Continue a prompt, and a chat whose turn can be left open: not by a template of Jinja's (--jinja)."""
        if generation.dialect is Dialect.CHAT:
            told = await self._http.get(port, "/api/extra/version", timeout_s)
            if told.get("jinja") or read_version(told.get("version")) < CONTINUES_TURNS:
                return None
        return continued(generation, text, used_tokens)

    async def send(self, port: int, request: Replay, timeout_s: float) -> Mapping[str, Any] | None:
        """POST it.

        The answer is read even if the caller stops waiting: if KoboldCPP cannot send it, the next request waits
        another 0.25 s (1.104, `time.sleep` in do_POST with the model's lock held).

        Raises:
            RequestRefused: the answer's status is not 200.
        """
        # With --routermode the name of another model would load that one.
        body = {key: value for key, value in request.body.items() if key != "model"}
        asked = self._http.post(port, request.path, body, timeout_s, self.password)
        asking = asyncio.create_task(asked)
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        return (await asyncio.shield(asking)).object_if_any()

    def counts_in_reply(self, told: Mapping[str, Any]) -> PromptCounts:  # noqa: ARG002  # the Engine protocol
        """Return nothing: a reply has the length of its prompt, but not how much was reused (up to 1.115)."""
        return UNTOLD

    def counts_in_line(self, line: str) -> PromptCounts | None:
        """Read the line at the end of each generation, which is printed even with --quiet."""
        return koboldcpp_log.read_counts(line)

    def read_progress(self, line: str) -> LoadProgress | None:
        """Recognise llama.cpp's and KoboldCPP's loading lines."""
        return llama_log.read_progress(line)

    def is_private(self, line: str) -> bool:
        """Recognise the lines that hold passwords, prompts or replies; a reply can have several."""
        return self._private_lines.is_one(line)

    def is_fatal(self, line: str) -> bool:
        """Recognise that the port was taken."""
        return any(text in line for text in _WILL_NEVER_SERVE)

    def _slots(self) -> int:
        """Return how many requests are worked on together.

        One that cannot be (its grammar, its samplers) runs alone, and the others wait in the queue meanwhile.
        """
        wishes = self.wishes()
        queue = wishes.queue if wishes.queue and wishes.queue > 1 else _QUEUE
        return min(wishes.slots or 1, queue, self.most_connections)

    def _is_our_model(self, name: str) -> bool:
        """Compare names, unless it can be switched, is named elsewhere or renamed by --hordemodelname."""
        path, wishes = self._settings.model.path, self.wishes()
        is_renamed = bool(self._settings.engine.kcpps) or wishes.is_renamed or wishes.can_switch
        return is_renamed or not path or name in {model_name(path), _PROTECTED_MODEL}

    def _command(self) -> tuple[Path, tuple[str, ...]]:
        """Return the program's file and the command that starts it."""
        found = find_program(self._settings.engine.path, USUAL_NAMES, "KoboldCPP's binary, or its koboldcpp.py")
        program = found / _SCRIPT if found.is_dir() and (found / _SCRIPT).is_file() else found
        if program.suffix == ".py":
            return program, (os.path.expanduser(self._settings.engine.python) or sys.executable, str(program))  # noqa: PTH111  # may be a name on PATH
        check_executable(program, self._host)
        return program, (str(program),)

    def _environment(self) -> Mapping[str, str]:
        return {
            # Its stdout is block-buffered into a file, so the first lines would come minutes late.
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self._scratch),
            **self._host.engine_environment(self._settings.engine.metal_keep_alive_s),
        }

    def _read_kcpps(self) -> Mapping[str, object] | None:
        if not self._settings.engine.kcpps:
            return None
        path = Path(self._settings.engine.kcpps).expanduser().absolute()
        return koboldcpp_switch.read_kcpps(path, "engine.kcpps", path.parent)


def _password_given() -> str:
    return os.environ.get(PASSWORD_VARIABLE, "").strip()


def _as_built(wishes: OwnerWishes, build: Build | None) -> OwnerWishes:
    """Fill in what this build does unless told.

    Sliding windows and flash attention are on where they can be switched off (1.115). Without flash attention only
    keys are quantised (1.104, 1.115, load_model in koboldcpp.py).
    """
    if build is None:
        return wishes
    has_flash = build.offers("noflashattention")
    if wishes.has_flash_attention is not None:
        has_flash = wishes.has_flash_attention
    return replace(
        wishes,
        default_context_tokens=build.context_tokens,
        has_flash_attention=has_flash,
        value_bytes=wishes.value_bytes if has_flash else max(wishes.value_bytes, F16_BYTES),
        has_windows=build.offers("noswa") if wishes.has_windows is None else wishes.has_windows,
    )


def read_version(text: object) -> tuple[int, ...]:
    """Return the leading numbers of a version such as `1.104.yr0-ROCm`, empty if there are none."""
    found = re.match(r"\d+(?:\.\d+)*", text) if isinstance(text, str) else None
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def model_name(path: str) -> str:
    """Return the name under which KoboldCPP serves a model file: letters, digits and `._-` of its stem."""
    stem = os.path.splitext(os.path.basename(path))[0]  # noqa: PTH119, PTH122  # as KoboldCPP does it
    return "koboldcpp/" + re.sub(r"[^\w\d.\-_]", "", stem)
