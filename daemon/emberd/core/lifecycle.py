"""The engine's life: named states, and one function that leads from one to the next.

`step` takes the present, one event and the time, and returns the next state with the effects to carry out. It
only decides; services/supervisor.py acts. docs/lifecycle.md has the diagram.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.causes import retry_after_s

if TYPE_CHECKING:
    from emberd.core.causes import Cause
    from emberd.core.settings import LifecycleSettings


class State(Enum):
    """Where the engine is in its life."""

    STOPPED = "STOPPED"
    """No engine, and none is wanted."""
    STARTING = "STARTING"
    """The command line is being composed and the process started."""
    LOADING = "LOADING"
    """The process lives and has not yet answered the readiness probe."""
    READY = "READY"
    """The readiness probe was answered; requests go through."""
    DRAINING = "DRAINING"
    """A stop was asked for; running requests may finish, new ones wait."""
    STOPPING = "STOPPING"
    """The process tree has been signalled."""
    BACKOFF = "BACKOFF"
    """It crashed, and the next start has to wait."""
    COOL = "COOL"
    """It was stopped to give its memory to other work; whoever needs it starts it again."""
    FAILED = "FAILED"
    """It crashed too often, or cannot start at all. A cause that can pass is waited for; else a person must act."""


HAS_PROCESS = frozenset({State.LOADING, State.READY, State.DRAINING, State.STOPPING})
AT_REST = frozenset({State.STOPPED, State.COOL, State.FAILED})
"""States that are left only when somebody asks: a person, or, of COOL, a client and the end of the cool spell."""


@dataclass(frozen=True, slots=True)
class Start:
    """Somebody wants the engine to run."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Somebody wants the engine to be gone."""


@dataclass(frozen=True, slots=True)
class Restart:
    """Somebody wants a fresh engine; running requests may finish first."""

    reason: str


@dataclass(frozen=True, slots=True)
class Cool:
    """The idle engine's memory is wanted for other work, until somebody needs the engine."""

    reason: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Somebody needs the engine although it is cool."""


@dataclass(frozen=True, slots=True)
class Launched:
    """The process exists."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """A running engine of an earlier emberd was taken over; it must still answer the readiness probe."""


@dataclass(frozen=True, slots=True)
class LaunchFailed:
    """The process could not be started."""

    reason: str
    is_permanent: bool
    """True when trying again at once cannot help (a refused argument, a missing model)."""
    cause: Cause | None = None


@dataclass(frozen=True, slots=True)
class BecameReady:
    """The readiness probe was answered."""


@dataclass(frozen=True, slots=True)
class LostReadiness:
    """The process lives and does not serve: it is loading again (KoboldCPP's admin reload)."""

    reason: str = "its port closed; it is loading again"


@dataclass(frozen=True, slots=True)
class Exited:
    """The engine's main process ended."""

    reason: str
    cause: Cause | None = None


@dataclass(frozen=True, slots=True)
class Stuck:
    """The engine lives but will not serve: it hangs, or said so itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class Drained:
    """No request is running any more."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The whole process tree has ended, and its locked memory was given back."""


@dataclass(frozen=True, slots=True)
class CauseGone:
    """What kept the engine from running has gone, as far as can be seen."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The time in `Lifecycle.deadline_s` has come."""


Event = (
    Start
    | Stop
    | Restart
    | Cool
    | Wake
    | Launched
    | Adopted
    | LaunchFailed
    | BecameReady
    | LostReadiness
    | Exited
    | Stuck
    | Drained
    | Gone
    | CauseGone
    | DeadlinePassed
)


class Effect(Enum):
    """What the supervisor must do after a step."""

    LAUNCH = "launch"
    """End leftovers of an earlier engine, compose the command line, start the process."""
    WATCH = "watch"
    """Probe readiness, then liveness; follow the log."""
    DRAIN = "drain"
    """Post Drained when no request is running any more."""
    TERMINATE = "terminate"
    """Stop the whole process tree within the stop deadline, then post Gone."""
    SWEEP = "sweep"
    """The main process ended by itself and none is wanted: end what it left behind."""


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """The present.

    Attributes:
        state: where the engine is.
        is_wanted: whether it is to run; False leads to STOPPED.
        crashes: crashes in a row, forgotten after `stable_after_s` in READY.
        since_s: when this state began, monotonic seconds.
        deadline_s: when DeadlinePassed is due, None if nothing is.
        reason: one sentence for a person on why it is in this state, or empty.
        is_stuck: the stop under way is due to a hang, and counts as a crash.
        cause: what keeps the engine from running and can pass, None if nothing is known to.
        retries: tries out of FAILED that emberd made by itself, forgotten with the crashes.
        is_cool: the stop under way, or the rest after it, gives the memory to other work.
    """

    state: State = State.STOPPED
    is_wanted: bool = False
    crashes: int = 0
    since_s: float = 0.0
    deadline_s: float | None = None
    reason: str = ""
    is_stuck: bool = False
    cause: Cause | None = None
    retries: int = 0
    is_cool: bool = False


def backoff_s(crashes: int, settings: LifecycleSettings, random_unit: float) -> float:
    """Return the wait before the next start after `crashes` crashes in a row, in seconds.

    The first restart is immediate: one crash is an accident, and a client is waiting. From the second on
    the wait doubles from `backoff_initial_s` to `backoff_max_s`.

    Args:
        crashes: crashes in a row, at least 1.
        settings: of the lifecycle.
        random_unit: a random number in [0, 1); spreads the wait by the jitter, up and down.
    """
    if crashes <= 1:
        return 0.0
    doublings = min(crashes - 2, 64)
    wait_s = min(settings.backoff_initial_s * 2.0**doublings, settings.backoff_max_s)
    return min(wait_s * (1 + settings.backoff_jitter * (2 * random_unit - 1)), settings.backoff_max_s)


def step(  # noqa: C901, PLR0911, PLR0912  # the one door: a branch an arrow
    now: Lifecycle, event: Event, now_s: float, settings: LifecycleSettings, random_unit: float = 0.5
) -> tuple[Lifecycle, tuple[Effect, ...]]:
    """Return the next state and the effects.

    An event that means nothing in this state (a late timer, an echo) changes nothing.

    Args:
        now: the present.
        event: what happened.
        now_s: monotonic seconds.
        settings: timeouts, backoff and crash limit.
        random_unit: randomness for the backoff, in [0, 1).
    """
    match event:
        case Start() | Restart() | Stop():
            return _asked(now, event, now_s, settings)
        case Cool() if now.state is State.READY:
            return replace(_enter(now, State.STOPPING, now_s, event.reason), is_cool=True), (Effect.TERMINATE,)
        case Wake() if now.state is State.COOL:
            return _enter(now, State.STARTING, now_s), (Effect.LAUNCH,)
        case Wake():
            return replace(now, is_cool=False), ()
        case Launched():
            return _launched(now, now_s, settings)
        case Adopted() if now.state is State.STOPPED:
            adopted = _enter(replace(now, is_wanted=True), State.LOADING, now_s)
            return replace(adopted, deadline_s=now_s + settings.load_timeout_s), (Effect.WATCH,)
        case LaunchFailed() if now.state is State.STARTING:
            return _launch_failed(now, event, now_s, settings, random_unit)
        case BecameReady() if now.state is State.LOADING:
            return replace(_enter(now, State.READY, now_s), deadline_s=now_s + settings.stable_after_s), ()
        case LostReadiness() if now.state is State.READY:
            loading = _enter(now, State.LOADING, now_s, event.reason)
            return replace(loading, deadline_s=now_s + settings.load_timeout_s), (Effect.WATCH,)
        case Exited() if now.state in {State.LOADING, State.READY}:
            return _crashed(now, event.reason, now_s, settings, random_unit, event.cause)
        case Exited() if now.state is State.DRAINING:
            return _after_stop(now, now_s, Effect.SWEEP)
        case Stuck() if now.state in {State.LOADING, State.READY}:
            return _stuck(now, event.reason, now_s)
        case Drained() if now.state is State.DRAINING:
            return _enter(now, State.STOPPING, now_s, now.reason), (Effect.TERMINATE,)
        case Gone() if now.state is State.STOPPING:
            if now.is_stuck and now.is_wanted:
                return _crashed(now, now.reason, now_s, settings, random_unit)
            return _after_stop(now, now_s)
        case CauseGone() if now.cause is not None and now.state in {State.BACKOFF, State.FAILED}:
            return _try_again(now, now_s, settings)
        case DeadlinePassed() if now.deadline_s is not None and now_s >= now.deadline_s:
            return _deadline(now, now_s, settings)
        case _:
            return now, ()


def _enter(now: Lifecycle, state: State, now_s: float, reason: str = "") -> Lifecycle:
    return replace(
        now,
        state=state,
        since_s=now_s,
        deadline_s=None,
        reason=reason,
        is_stuck=False,
        is_cool=False,
        cause=None,
    )


def _asked(
    now: Lifecycle, event: Start | Restart | Stop, now_s: float, settings: LifecycleSettings
) -> tuple[Lifecycle, tuple[Effect, ...]]:
    is_wanted = not isinstance(event, Stop)
    reason = event.reason if isinstance(event, Restart) else ""
    asked = replace(now, is_wanted=is_wanted)
    match now.state:
        case State.STOPPED | State.COOL | State.FAILED | State.BACKOFF if is_wanted:
            return _enter(replace(asked, crashes=0, retries=0), State.STARTING, now_s, reason), (Effect.LAUNCH,)
        case State.STOPPED | State.COOL | State.FAILED | State.BACKOFF:
            return _enter(replace(asked, crashes=0, retries=0), State.STOPPED, now_s), ()
        case State.LOADING | State.READY if isinstance(event, Start):
            return asked, ()
        case State.LOADING:
            return _enter(asked, State.STOPPING, now_s, reason), (Effect.TERMINATE,)
        case State.READY:
            draining = _enter(asked, State.DRAINING, now_s, reason)
            return replace(draining, deadline_s=now_s + settings.drain_timeout_s), (Effect.DRAIN,)
        case _:
            # STARTING, DRAINING and STOPPING run to their end; only then `is_wanted` counts.
            return replace(asked, is_stuck=now.is_stuck and is_wanted, is_cool=False), ()


def _launched(now: Lifecycle, now_s: float, settings: LifecycleSettings) -> tuple[Lifecycle, tuple[Effect, ...]]:
    if now.state is not State.STARTING:
        return now, ()
    if not now.is_wanted:
        return _enter(now, State.STOPPING, now_s), (Effect.TERMINATE,)
    loading = _enter(now, State.LOADING, now_s, now.reason)
    return replace(loading, deadline_s=now_s + settings.load_timeout_s), (Effect.WATCH,)


def _launch_failed(
    now: Lifecycle, event: LaunchFailed, now_s: float, settings: LifecycleSettings, random_unit: float
) -> tuple[Lifecycle, tuple[Effect, ...]]:
    if not now.is_wanted:
        return _enter(now, State.STOPPED, now_s), ()
    if event.is_permanent:
        return _fail(now, event.reason, now_s, event.cause), ()
    return _crashed(now, event.reason, now_s, settings, random_unit, event.cause)


def _crashed(
    now: Lifecycle,
    reason: str,
    now_s: float,
    settings: LifecycleSettings,
    random_unit: float,
    cause: Cause | None = None,
) -> tuple[Lifecycle, tuple[Effect, ...]]:
    crashed = replace(now, crashes=now.crashes + 1)
    if crashed.crashes >= settings.crash_limit:
        return _fail(crashed, reason, now_s, cause), (Effect.SWEEP,)
    wait_s = backoff_s(crashed.crashes, settings, random_unit)
    if wait_s <= 0:
        return _enter(crashed, State.STARTING, now_s, reason), (Effect.LAUNCH,)
    waiting = _enter(crashed, State.BACKOFF, now_s, reason)
    return replace(waiting, deadline_s=now_s + wait_s, cause=cause), (Effect.SWEEP,)


def _fail(now: Lifecycle, reason: str, now_s: float, cause: Cause | None) -> Lifecycle:
    failed = replace(_enter(now, State.FAILED, now_s, reason), cause=cause)
    return failed if cause is None else replace(failed, deadline_s=now_s + retry_after_s(now.retries))


def _try_again(now: Lifecycle, now_s: float, settings: LifecycleSettings) -> tuple[Lifecycle, tuple[Effect, ...]]:
    """Start once more; another crash leads back to FAILED, and to a longer wait."""
    again = replace(now, retries=now.retries + 1, crashes=min(now.crashes, settings.crash_limit - 1))
    return _enter(again, State.STARTING, now_s, now.reason), (Effect.LAUNCH,)


def _stuck(now: Lifecycle, reason: str, now_s: float) -> tuple[Lifecycle, tuple[Effect, ...]]:
    return replace(_enter(now, State.STOPPING, now_s, reason), is_stuck=True), (Effect.TERMINATE,)


def _after_stop(now: Lifecycle, now_s: float, *else_effects: Effect) -> tuple[Lifecycle, tuple[Effect, ...]]:
    if now.is_wanted and now.is_cool:
        return replace(_enter(now, State.COOL, now_s, now.reason), crashes=0, is_cool=True), else_effects
    if now.is_wanted:
        return _enter(replace(now, crashes=0), State.STARTING, now_s, now.reason), (Effect.LAUNCH,)
    return _enter(replace(now, crashes=0), State.STOPPED, now_s), else_effects


def _deadline(now: Lifecycle, now_s: float, settings: LifecycleSettings) -> tuple[Lifecycle, tuple[Effect, ...]]:
    match now.state:
        case State.LOADING:
            return _stuck(now, f"not ready {settings.load_timeout_s:g} s after its start", now_s)
        case State.READY:
            return replace(now, crashes=0, retries=0, deadline_s=None), ()
        case State.DRAINING:
            return _enter(now, State.STOPPING, now_s, now.reason), (Effect.TERMINATE,)
        case State.BACKOFF:
            return _enter(now, State.STARTING, now_s, now.reason), (Effect.LAUNCH,)
        case State.FAILED:
            return _try_again(now, now_s, settings)
        case _:
            return replace(now, deadline_s=None), ()
