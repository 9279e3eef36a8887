"""What the services expect of the outside: engines, processes, the computer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from signal import Signals

    from emberd.core.generation import Generation
    from emberd.core.host_health import HostHealth
    from emberd.core.lock_limits import LockLimits, WireRefusals
    from emberd.core.memory import EngineMemory, GpuLimits, Power, SystemMemory
    from emberd.core.replay import Replay
    from emberd.core.residency import Paging
    from emberd.core.reuse import CacheRoom
    from emberd.core.turn import PromptCounts, Turn
    from emberd.core.types import Activity, LaunchPlan, LoadProgress, Readiness
    from emberd.core.wishes import OwnerWishes


class Engine(Protocol):
    """One kind of engine: how to start it, ask it, and read its log."""

    @property
    def name(self) -> str:
        """The adapter's name, as in engine.kind."""
        ...

    @property
    def most_connections(self) -> int:
        """How many requests it can be given at once, with room left for emberd's own questions."""
        ...

    @property
    def refusals(self) -> frozenset[int]:
        """Statuses, besides 4xx and 503, that say that it has not begun to work on a request."""
        ...

    def wishes(self) -> OwnerWishes:
        """Return what the owner asks of the engine besides emberd's settings."""
        ...

    @property
    def room(self) -> CacheRoom:
        """How much its KV cache holds."""
        ...

    @property
    def most_at_work(self) -> int:
        """How many of the requests for which `is_work` holds it takes at once."""
        ...

    def is_work(self, method: str, path: str) -> bool:
        """Tell whether a request waits for the model, unlike a question that is answered at once."""
        ...

    @property
    def password(self) -> str:
        """What the engine wants as a bearer token, empty for nothing. Never shown."""
        ...

    @property
    def stop_signals(self) -> tuple[Signals, ...]:
        """Signals in the order they are tried on a stop, SIGKILL excepted."""
        ...

    def model_path(self) -> Path | None:
        """Return the model that would be served, None if the settings name none that can be read."""
        ...

    async def plan(self, port: int, *, will_lock: bool) -> LaunchPlan:
        """Compose the command line for `port`, asking the engine to lock the model or not.

        Raises:
            ConfigError: an argument that this build refuses.
            EngineNotUsable: the program is missing or cannot run.
            ModelError: the model cannot be used.
        """
        ...

    async def probe_readiness(self, port: int, timeout_s: float) -> Readiness:
        """Ask whether the model is loaded. Never raises; bounded by `timeout_s`."""
        ...

    async def probe_activity(self, port: int, timeout_s: float) -> Activity:
        """Ask what the engine is doing, without touching the model. Never raises; bounded by `timeout_s`."""
        ...

    async def abort(self, port: int, key: str, timeout_s: float) -> bool:
        """End the generation with this key, with an empty one whatever runs.

        Returns:
            Whether the engine heard it; False, too, where it has no call for this: close the connection.
            Never raises; bounded by `timeout_s`.
        """
        ...

    async def count_tokens(self, port: int, text: str, timeout_s: float) -> int | None:
        """Return how many tokens a text is, None if the engine does not tell. Never raises; bounded."""
        ...

    async def took_whole(self, port: int, turn: Turn, timeout_s: float) -> bool | None:
        """Tell whether a turn's prompt is in the cache as a whole; None if not known. Never raises; bounded."""
        ...

    async def continues_turns(self, port: int, timeout_s: float) -> bool:
        """Tell whether the assistant's last message of a chat is continued. Never raises; bounded."""
        ...

    async def send(self, port: int, request: Replay, timeout_s: float) -> Mapping[str, Any] | None:
        """Send a request of emberd's own; return the reply's object, None if none came. Bounded by `timeout_s`.

        Raises:
            RequestRefused: the engine answered with another status than 200.
        """
        ...

    def counts_in_reply(self, told: Mapping[str, Any]) -> PromptCounts:
        """Return what a reply, or the end of a streamed one, tells of its tokens."""
        ...

    def counts_in_line(self, line: str) -> PromptCounts | None:
        """Return what a line of the engine's log tells of the generation that ended, None for any other line."""
        ...

    async def can_continue(self, port: int, generation: Generation, timeout_s: float) -> bool:
        """Tell whether the engine can take up such a reply behind its first words. Never raises; bounded."""
        ...

    def read_progress(self, line: str) -> LoadProgress | None:
        """Recognise a line of the engine's log that tells of loading."""
        ...

    def is_private(self, line: str) -> bool:
        """Tell whether a log line can hold a prompt, a reply or a password."""
        ...

    def is_fatal(self, line: str) -> bool:
        """Tell whether the line says that the engine will never be ready although it stays alive."""
        ...


class EventWatch(Protocol):
    """Wakes when the kernel has news (a process ended, a file was written)."""

    async def wait(self) -> None:
        """Return when there is news."""
        ...

    def close(self) -> None:
        """Give up watching; idempotent."""
        ...


class SystemLog(Protocol):
    """The log that the system keeps."""

    lost: int
    """Events that it did not take; None of them is worth waiting or failing for."""
    error: str
    """Why, of the last one."""

    @property
    def name(self) -> str:
        """`unified`, `journal` or `syslog`."""
        ...

    def write(self, event: Mapping[str, Any]) -> bool:
        """Write an event, without waiting; tells whether it was taken. Raises nothing."""
        ...

    def close(self) -> None:
        """Let go of it; idempotent."""
        ...


class Host(Protocol):
    """This computer: what differs between macOS and Linux."""

    @property
    def name(self) -> str:
        """The kernel: darwin or linux."""
        ...

    @property
    def paging(self) -> Paging:
        """What the system's calls about pages can do."""
        ...

    def given_sockets(self) -> list[socket.socket]:
        """Return the listening sockets that this process was given, none if it was given none.

        Raises:
            ConfigError: something else was given.
        """
        ...

    def forbid_core_dumps(self) -> None:
        """Keep this process from being written to disk when it crashes."""
        ...

    def recall_own_memory(self) -> None:
        """Bring back what of this process is in swap, and mark its memory as used. Some milliseconds."""
        ...

    def watch_exit(self, pid: int) -> EventWatch:
        """Watch for the end of `pid`, whoever its parent is.

        Raises:
            ProcessLookupError: the process has ended already.
        """
        ...

    def watch_file(self, path: Path) -> EventWatch:
        """Watch a file for writes; `wait` returns at each news.

        Raises:
            OSError: the file is missing or cannot be watched.
        """
        ...

    def watch_stalls(self, longest_s: int) -> EventWatch | None:
        """Watch for programs that wait for memory; None where the system does not tell.

        `wait` also returns every `longest_s` seconds, and when the computer wakes from sleep.
        """
        ...

    def start_token(self, pid: int) -> str | None:
        """Return a text that differs between two processes that had the same pid, None if `pid` is gone."""
        ...

    def engine_memory(self, pids: Sequence[int]) -> EngineMemory:
        """Read the memory of these processes, summed; a process that cannot be read is left out."""
        ...

    def proportional_bytes(self, pids: Sequence[int]) -> int | None:
        """Return what these processes take where shared pages are divided among their users (PSS).

        Walks page tables: tens of milliseconds for a large model. None if it cannot be told of any of them.
        """
        ...

    def system_memory(self) -> SystemMemory:
        """Read the computer's memory, swap and memory pressure."""
        ...

    def power(self) -> Power:
        """Read where power comes from. Can take some 10 ms: not for every tick."""
        ...

    def sleep_blockers(self) -> Sequence[tuple[str, ...]]:
        """Return command lines that keep the computer from sleeping while they run, the best first.

        Each ends with this process, or when its standard input is closed.
        """
        ...

    def gpu_limits(self) -> GpuLimits | None:
        """Return what the GPU may hold wired, None where the system has no such limits."""
        ...

    def lock_limits(self, pid: int | None) -> LockLimits:
        """Return what `pid` may lock; for None, what a child of this process may."""
        ...

    def wire_refusals(self) -> WireRefusals | None:
        """Return the kernel's counters of refused locks, None where there are none."""
        ...

    def health(self, pid: int) -> HostHealth:
        """Return what only this kind of system knows of itself and of a process. Can take some 10 ms."""
        ...

    def quarantine(self, path: Path) -> str | None:
        """Return the quarantine mark of a downloaded file, None if it has none."""
        ...

    def engine_environment(self, metal_keep_alive_s: int) -> Mapping[str, str]:
        """Return the variables that this system's engine builds want."""
        ...

    def system_log(self) -> SystemLog | None:
        """Return the log that this system keeps, None if there is none."""
        ...

    def log_program(self) -> str | None:
        """Return the program that reads that log back, None if it is missing."""
        ...

    def stderr_is_journal(self) -> bool:
        """Tell whether standard error leads into the journal of systemd."""
        ...

    def stderr_is_launchds(self) -> bool:
        """Tell whether launchd keeps what standard error gets, in a file that nobody rotates."""
        ...

    def listeners(self, pids: Sequence[int]) -> frozenset[int] | None:
        """Return the TCP ports that these processes listen on, None if it cannot be told."""
        ...
