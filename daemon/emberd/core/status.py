"""What the daemon tells of itself, its engine and this computer, for services, command line and JSON. Pure.

Attributes have the names of the keys in `emberd status --json`. Unknown is None. If a daemon of another version
does not tell a key, the attribute has its default; a key that this version does not know is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from emberd.core.load_facts import KeepAliveVerdict  # noqa: TC001  # from_plain reads the annotations
from emberd.core.lock import LockVerdict  # noqa: TC001  # same
from emberd.core.memory import EngineMemory, GpuLimits, Power, SystemMemory
from emberd.core.turn import UNTOLD, PromptCounts
from emberd.core.types import LoadProgress, Notice  # noqa: TC001  # same

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The engine's process.

    Attributes:
        kind: koboldcpp, llama-server or embedded.
        pid: of its main process.
        port: where it listens on loopback.
        adopted: an earlier emberd started it.
        started_at: seconds since the epoch.
        command: its command line, passwords masked.
    """

    kind: str
    pid: int
    port: int
    adopted: bool
    started_at: float
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineMemoryStatus(EngineMemory):
    """The memory of the engine's processes.

    Attributes:
        proportional_bytes: resident, each shared page divided by the number of its users (PSS).
    """

    proportional_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SystemMemoryStatus(SystemMemory):
    """The whole computer's memory.

    Attributes:
        swap_in_bytes_per_s: read from swap, over the last 20 to 30 s.
        swap_out_bytes_per_s: written to it.
    """

    swap_in_bytes_per_s: float | None = None
    swap_out_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """Memory and power, read when the status was asked for; `gpu` is macOS' only."""

    engine: EngineMemoryStatus
    system: SystemMemoryStatus
    power: Power
    gpu: GpuLimits | None


@dataclass(frozen=True, slots=True)
class ResidencyStatus:
    """How much of the model is in memory.

    Attributes:
        share: the estimate, from 0 to 1.
        at_least: lower bound; equal to `share` if every page was looked at.
        at_most: upper bound.
        resident_bytes: the estimate in bytes.
        total_bytes: size of what was measured.
        source: where it was read: mincore, cachestat or process.
        unknown: a word for why it is unknown, None if it is known.
        message: the same for a person, or how it was read; may be empty.
        age_s: seconds since it was read.
    """

    share: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    resident_bytes: int | None = None
    total_bytes: int | None = None
    source: str | None = None
    unknown: str | None = None
    message: str = ""
    age_s: float | None = None


@dataclass(frozen=True, slots=True)
class ContextStatus:
    """The context of the engine that runs.

    Attributes:
        tokens: length of the context, of each conversation.
        conversations: that the cache holds at once.
        kv_cache_bytes: size of the KV cache.
        is_measured: the engine told this size; otherwise it is estimated for the context that it told.
    """

    tokens: int | None = None
    conversations: int = 1
    kv_cache_bytes: int | None = None
    is_measured: bool = False


@dataclass(frozen=True, slots=True)
class FileStatus:
    """One of the engine's files.

    Attributes:
        path: absolute.
        role: model, projector, draft, adapter, control_vector, embeddings, speech, voice, image, music or other.
        size_bytes: of the file.
        held: mapped, copied, replaced (the engine maps a file that is no longer there) or unknown.
        resident_bytes: how much of it is in memory, by a sample; only of a mapped one.
        locked_bytes: how much of it is locked, by the engine or by emberd.
    """

    path: str = ""
    role: str = ""
    size_bytes: int | None = None
    held: str = "unknown"
    resident_bytes: int | None = None
    locked_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ServingStatus:
    """What the ready engine serves.

    Attributes:
        name: the model's name in the engine's words, empty if none is loaded.
        model: its first file, None if none is loaded or it is not known.
        is_of_settings: it is the model of the settings.
        switched_by: the settings file or model that the engine was switched to, None if it was not, or if nobody
            knows how.
        survives_restart: a restart of the engine serves it again.
    """

    name: str | None = None
    model: str | None = None
    is_of_settings: bool = True
    switched_by: str | None = None
    survives_restart: bool = True


@dataclass(frozen=True, slots=True)
class ReliefStatus:
    """Bytes written to swap per second, before and after the thrash guard last let go."""

    bytes_per_s_before: float | None = None
    bytes_per_s_after: float | None = None


@dataclass(frozen=True, slots=True)
class PassStatus:
    """The last pass.

    Attributes:
        reason: why it was made.
        steps: what was done.
        is_complete: every step was done.
        seconds: how long it took.
        had_lost: memory had been taken from the model.
        cold_share: of the weights, not in memory before.
        swapped_bytes: of the engine, in swap before.
        cpu_s: processor time of the engine and the toucher.
    """

    reason: str = ""
    steps: tuple[str, ...] = ()
    is_complete: bool = False
    seconds: float = 0.0
    had_lost: bool = False
    cold_share: float | None = None
    swapped_bytes: int | None = None
    cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ProgressStatus:
    """How far a pass over the weights is."""

    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FirstTokenStatus:
    """A user's last first token: the forecast, by the state of the model, and the time that it took."""

    temperature: str = ""
    forecast_s: float | None = None
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ForecastStatus:
    """The next first token.

    Attributes:
        temperature: how it will find the model: hot, warm, cold or unknown.
        first_token_s: how long it will take.
        last: how the last forecast compared.
    """

    temperature: str = "unknown"
    first_token_s: float | None = None
    last: FirstTokenStatus | None = None


@dataclass(frozen=True, slots=True)
class ReuseStatus:
    """This engine's counts of its prompt cache.

    Attributes:
        last_turn: a user's last turn.
        last_replay: the last replay.
        replays: replays with counts. misses: those of them that missed.
        wasted_tokens: processed by the replays that missed.
        lost_turns: turns of users that did not find what replays had kept.
        barred: kinds of turns that are not replayed again.
    """

    last_turn: PromptCounts = UNTOLD
    last_replay: PromptCounts = UNTOLD
    replays: int = 0
    misses: int = 0
    wasted_tokens: int = 0
    lost_turns: int = 0
    barred: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CostStatus:
    """What keeping warm has cost.

    Attributes:
        passes: that did something.
        read_bytes: brought back from the disk by the toucher.
        engine_s: the engine's time for replays.
        cpu_s: processor time of the engine and the toucher.
        processed_tokens: tokens of prompts that replays made the engine compute.
    """

    passes: int = 0
    read_bytes: int = 0
    engine_s: float = 0.0
    cpu_s: float = 0.0
    processed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GivenBackStatus:
    """What a cool spell gave back. Resident memory is the engine's, locked memory the engine's and emberd's.

    Attributes:
        seconds: how long it took.
        engine_stopped: the engine was stopped; otherwise only emberd's own lock was let go.
        resident_before_bytes: resident before. resident_after_bytes: after.
        locked_before_bytes: locked before. locked_after_bytes: after.
    """

    seconds: float = 0.0
    engine_stopped: bool = False
    resident_before_bytes: int | None = None
    resident_after_bytes: int | None = None
    locked_before_bytes: int | None = None
    locked_after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class WarmthStatus:
    """How the model is kept warm.

    Attributes:
        mode: warmth.mode of the settings.
        hold: how much of the model the thrash guard lets emberd hold; `all` unless the computer swaps.
        is_helpless: the computer swaps, and nothing that emberd may let go would help.
        relief: how letting go has helped.
        is_storming: the computer takes memory from its programs now.
        is_locked_outside: the outside lock holds.
        paused_for_s: seconds left of `emberd pause`.
        cool_for_s: seconds left of `emberd cool`, or of `warmth.cool_hours`.
        given_back: by the last cool spell, None if it had no lock to let go of.
        interval_s: between two looks.
        over_budget_for_s: until keeping warm is within its budget again; 0 if it is.
        next_look_in_s: until the next look.
        warm_for_s: seconds since everything was warmed.
        last: what was done last.
        progress: of the pass that runs, None while none does.
        hot_replay_s: the fastest replay so far.
        forecast: of the next first token.
        reuse: of the prompt cache.
        cost: since emberd's start.
        cost_today: of the calendar day.
    """

    mode: str = ""
    hold: str = "all"
    is_helpless: bool = False
    relief: ReliefStatus = ReliefStatus()
    is_storming: bool = False
    is_locked_outside: bool = False
    paused_for_s: float | None = None
    cool_for_s: float | None = None
    given_back: GivenBackStatus | None = None
    interval_s: float | None = None
    over_budget_for_s: float = 0.0
    next_look_in_s: float | None = None
    warm_for_s: float | None = None
    last: PassStatus | None = None
    progress: ProgressStatus | None = None
    hot_replay_s: float | None = None
    forecast: ForecastStatus = ForecastStatus()
    reuse: ReuseStatus = ReuseStatus()
    cost: CostStatus = CostStatus()
    cost_today: CostStatus = CostStatus()


@dataclass(frozen=True, slots=True)
class SwapStatus:
    """Bytes written to swap today.

    Attributes:
        written_today_bytes: by everybody.
        engine_idle_bytes: charged to the engine while it was idle. engine_busy_bytes: the same, while it worked
            or loaded.
        other_bytes: by everybody else.
        unknown_bytes: by unknown programs.
        share_of_endurance: of the SSD's rated endurance; 1 is all of it.
        endurance_bytes: the SSD's rated endurance, by the settings.
    """

    written_today_bytes: int = 0
    engine_idle_bytes: int = 0
    engine_busy_bytes: int = 0
    other_bytes: int = 0
    unknown_bytes: int = 0
    share_of_endurance: float = 0.0
    endurance_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """A request for text that has not ended.

    Attributes:
        age_s: seconds since it came.
        state: waits (for the engine or a place), reads (the engine has it, and no word has come) or writes.
        tokens: events of its streamed reply so far, in most engines one a token; None if it is not streamed.
    """

    age_s: float = 0.0
    state: str = ""
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """The whole status. An emberd that stands by has `remedy`, `exit_code` and `failures`, and no engine.

    Attributes:
        version: of the daemon.
        pid: its process.
        uptime_s: seconds since its start, or since it replaced another one.
        endpoint: where clients connect; None if the port is not held.
        endpoints: the same by each address, IPv4 first.
        endpoint_lacks: why it does not listen on one of the two loopback addresses, empty if nothing is wrong.
        model: model.path of the settings, may be empty.
        serving: what the ready engine serves, which can be another model.
        files: all files that it works with.
        settings_file: its path.
        state: of the engine, a name of `lifecycle.State`; STANDBY if emberd stands by.
        state_for_s: seconds in this state.
        reason: why, may be empty.
        remedy: what a person can do. exit_code: of the failed start.
        failures: the errors of the last starts, the oldest first.
        crashes_in_a_row: of the engine.
        next_start_in_s: until the next start or try, None if none is planned.
        starts: engines started by this daemon; -1 if it stands by.
        last_exit: how the last engine ended.
        requests_in_flight: requests that the engine works on.
        requests_held: requests that wait until it is ready.
        loading: the step of loading.
        engine: its process.
        lock: the verdict about its own lock.
        context: its context and KV cache.
        metal_heartbeat: the verdict about Metal's heartbeat, None where the engine says nothing of Metal.
        notices: what its owner should know of the settings.
        output_file: where the engine's output is.
        requests_waiting: requests that wait for one of the engine's places, or for the engine.
        longest_wait_s: of the one that has waited longest.
        requests: those for text, the oldest first; never what they say.
        seconds_since_knock: since the last knock.
        remembers_turn: a user's last turn is remembered for replays.
        memory: of the engine and the computer.
        prevents_sleep: the computer is kept awake.
        residency: of the model.
        warmth: how it is kept warm.
        swap: today's account, None if the system tells nothing.
        log: names of the log's sinks.
    """

    version: str = ""
    pid: int | None = None
    uptime_s: float = 0.0
    endpoint: str | None = None
    endpoints: tuple[str, ...] = ()
    endpoint_lacks: str = ""
    model: str = ""
    serving: ServingStatus | None = None
    files: tuple[FileStatus, ...] = ()
    settings_file: str = ""
    state: str = ""
    state_for_s: float = 0.0
    reason: str = ""
    remedy: str | None = None
    exit_code: int | None = None
    failures: tuple[str, ...] = ()
    crashes_in_a_row: int = 0
    next_start_in_s: float | None = None
    starts: int = 0
    last_exit: str | None = None
    requests_in_flight: int = 0
    requests_held: int = 0
    loading: LoadProgress | None = None
    engine: EngineStatus | None = None
    lock: LockVerdict | None = None
    context: ContextStatus | None = None
    metal_heartbeat: KeepAliveVerdict | None = None
    notices: tuple[Notice, ...] = ()
    output_file: str | None = None
    requests_waiting: int = 0
    longest_wait_s: float = 0.0
    requests: tuple[RequestStatus, ...] = ()
    seconds_since_knock: float | None = None
    remembers_turn: bool = False
    memory: MemoryStatus | None = None
    prevents_sleep: bool = False
    residency: ResidencyStatus | None = None
    warmth: WarmthStatus | None = None
    swap: SwapStatus | None = None
    log: tuple[str, ...] = ()

    @property
    def state_words(self) -> str:
        """The state and the loading progress: `LOADING tensors 12/40`."""
        loading = (self.loading.phase, self.loading.detail) if self.loading else ()
        return " ".join(filter(None, (self.state, *loading)))


def to_plain(part: DataclassInstance) -> dict[str, Any]:
    """Return the status, or a part of it, as plain values for JSON."""
    return {each.name: _plain(getattr(part, each.name)) for each in fields(part)}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value


def from_plain(kind: type[T], plain: Mapping[str, Any]) -> T:
    """Return the status, or a part of it, from the plain values of a daemon of any version."""
    hints = _hints(kind)
    return kind(
        **{
            each.name: _read(hints[each.name], plain.get(each.name))
            for each in fields(kind)
            if each.name in plain or each.default is MISSING
        }
    )


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """Return the types of a part's attributes; to read them anew took most of a live view's processor time."""
    return get_type_hints(kind)


def _read(hint: Any, value: Any) -> Any:
    """Return a plain value as an attribute of that type; a word that is new to an enum becomes unknown."""
    if get_origin(hint) is UnionType:
        return None if value is None else _read(get_args(hint)[0], value)
    if get_origin(hint) is tuple:
        return tuple(_read(get_args(hint)[0], each) for each in value or ())
    if is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value if isinstance(value, Mapping) else {})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next((each for each in hint if each.value == value), getattr(hint, "UNKNOWN", None))
    return value
