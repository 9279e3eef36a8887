"""What the services expect of the outside: engines, processes, the computer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from signal import Signals

    from emberd.core.engine_files import MappedFile
    from emberd.core.generation import Generation, Rest
    from emberd.core.host_health import HostHealth
    from emberd.core.lock_limits import LockLimits, WireRefusals
    from emberd.core.memory import EngineMemory, GpuLimits, Power, SystemMemory
    from emberd.core.questions import Questions
    from emberd.core.replay import Replay
    from emberd.core.residency import Paging
    from emberd.core.reuse import CacheRoom
    from emberd.core.turn import PromptCounts, Turn
    from emberd.core.types import Activity, LaunchPlan, LoadProgress, Readiness, Switch
    from emberd.core.wishes import OwnerWishes


class Engine(Protocol):
    """One kind of engine: how to start it, ask it, and read its log."""

    @property
    def name(self) -> str:
        """Its name in engine.kind."""
        ...

    @property
    def questions(self) -> Questions:
        """What its server answers besides its work."""
        ...

    @property
    def most_connections(self) -> int:
        """How many requests it can take at once, with room left for emberd's own questions."""
        ...

    @property
    def refusals(self) -> frozenset[int]:
        """Statuses, besides 4xx and 503, which mean that it has not begun to work on a request."""
        ...

    def wishes(self) -> OwnerWishes:
        """Return what the owner asks of the engine besides emberd's settings."""
        ...

    async def ask_build(self) -> None:
        """Ask the program for what it does unless told, which `wishes` then tells. Never raises."""
        ...

    @property
    def room(self) -> CacheRoom:
        """How much its KV cache holds."""
        ...

    @property
    def most_at_work(self) -> int:
        """How many requests it takes at once of those for which `is_work` is true."""
        ...

    def is_work(self, method: str, path: str) -> bool:
        """Return True if a request waits for the model, unlike a question that is answered at once."""
        ...

    @property
    def password(self) -> str:
        """The bearer token that the engine wants, empty for none. Never shown."""
        ...

    @property
    def stop_signals(self) -> tuple[Signals, ...]:
        """Signals in the order of a stop, without SIGKILL."""
        ...

    switch: Switch | None
    """What the engine was switched to; `wishes` and `model_path` follow it. None for the settings' model."""

    def model_path(self) -> Path | None:
        """Return the model that would be served, None if none is named that can be read."""
        ...

    async def served_name(self, port: int, timeout_s: float) -> str | None:
        """Return the name of the served model, empty if none is loaded, None if unknown. Never raises; bounded."""
        ...

    def calls_it(self, model: Path, name: str) -> bool:
        """Return True if the engine may call this model so."""
        ...

    def switch_in_line(self, line: str) -> Switch | None:
        """Return the switch that the engine's log tells of, None for any other line."""
        ...

    def switch_in_request(self, method: str, path: str, body: bytes) -> Switch | None:
        """Return the switch that a request asks for, None for any other request."""
        ...

    def loads_again(self, line: str) -> bool:
        """Return True if a line of the log shows that a loaded engine loads in place."""
        ...

    async def plan(self, port: int, *, will_lock: bool, switch: Switch | None = None) -> LaunchPlan:
        """Compose the command line; without a `switch` that of the settings.

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
        """Ask what the engine is doing, without using the model. Never raises; bounded by `timeout_s`."""
        ...

    async def abort(self, port: int, key: str, timeout_s: float) -> bool:
        """End the generation with this key; with an empty key, whatever runs.

        Returns:
            True if the engine heard it; False also if it has no call for this: close the connection. Never
            raises; bounded by `timeout_s`.
        """
        ...

    async def count_tokens(self, port: int, text: str, timeout_s: float) -> int | None:
        """Return how many tokens a text is, None if the engine does not tell. Never raises; bounded."""
        ...

    async def took_whole(self, port: int, turn: Turn, timeout_s: float) -> bool | None:
        """Return True if a turn's prompt is in the cache as a whole; None if not known. Never raises; bounded."""
        ...

    async def send(self, port: int, request: Replay, timeout_s: float) -> Mapping[str, Any] | None:
        """Send a request of emberd's own; return the reply's object, None if none came. Bounded by `timeout_s`.

        Raises:
            RequestRefused: the engine answered with another status than 200.
        """
        ...

    def counts_in_reply(self, told: Mapping[str, Any]) -> PromptCounts:
        """Return the counts that a reply, or the end of a streamed one, tells."""
        ...

    def counts_in_line(self, line: str) -> PromptCounts | None:
        """Return the counts of the generation that ended from a line of the log, None for any other line."""
        ...

    async def rest(
        self, port: int, generation: Generation, text: str, used_tokens: int, timeout_s: float
    ) -> Rest | None:
        """Return the request for the rest of a cut reply, None if it cannot be continued. Never raises; bounded.

        Args:
            port: the engine's.
            generation: the client's request, without an obstacle.
            text: the reply so far.
            used_tokens: tokens of this text.
            timeout_s: for each question.
        """
        ...

    def read_progress(self, line: str) -> LoadProgress | None:
        """Recognise a line of the engine's log that tells of loading."""
        ...

    def is_private(self, line: str) -> bool:
        """Return True if a log line can hold a prompt, a reply or a password."""
        ...

    def is_fatal(self, line: str) -> bool:
        """Return True if the line says that the engine will never be ready although it stays alive."""
        ...


class EventWatch(Protocol):
    """Wakes when the kernel reports something (a process ended, a file was written)."""

    async def wait(self) -> None:
        """Return when there is news."""
        ...

    def close(self) -> None:
        """Stop watching; idempotent."""
        ...


class SystemLog(Protocol):
    """The log that the system keeps."""

    lost: int
    """Events that it did not take: none is worth waiting or failing for."""
    error: str
    """Why it did not take the last of them."""

    @property
    def name(self) -> str:
        """`unified`, `journal` or `syslog`."""
        ...

    def write(self, event: Mapping[str, Any]) -> bool:
        """Write an event without waiting; return True if it was taken. Never raises."""
        ...

    def close(self) -> None:
        """Close it; idempotent."""
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
        """Return the listening sockets that this process was given, if any.

        Raises:
            ConfigError: something else was given.
        """
        ...

    def forbid_core_dumps(self) -> None:
        """Keep this process from writing a core dump when it crashes."""
        ...

    def share_heap(self) -> None:
        """Keep the heap of this process small, however many threads it has; before the first one."""
        ...

    def recall_own_memory(self) -> None:
        """Bring this process back from swap, and mark its memory as used. Takes some milliseconds."""
        ...

    def watch_exit(self, pid: int) -> EventWatch:
        """Watch for the end of `pid`, also if it is no child.

        Raises:
            ProcessLookupError: the process has ended already.
        """
        ...

    def watch_file(self, path: Path) -> EventWatch:
        """Watch a file; `wait` returns at each write.

        Raises:
            OSError: the file is missing or cannot be watched.
        """
        ...

    def reserve_room(self, descriptor: int, size_bytes: int) -> None:
        """Reserve room on the disk until a file has this size; what it has now does not change.

        Raises:
            OSError: the disk is full (ENOSPC, EDQUOT), or its file system cannot reserve.
        """
        ...

    def watch_stalls(self, longest_s: int) -> EventWatch | None:
        """Watch for programs that wait for memory; None if the system does not tell.

        `wait` also returns every `longest_s` seconds, and when the computer wakes from sleep.
        """
        ...

    def start_token(self, pid: int) -> str | None:
        """Return a text that differs between two processes that had the same pid, None if `pid` is gone."""
        ...

    def engine_memory(self, pids: Sequence[int]) -> EngineMemory:
        """Read the memory of these processes, summed; a process that cannot be read is left out."""
        ...

    def mapped_files(self, pids: Sequence[int], *, with_locks: bool = False) -> tuple[MappedFile, ...] | None:
        """Return the files that may be weights and that these processes map; None if they cannot be asked.

        With the locks of each, the kernel walks page tables, which takes tens of milliseconds for a large model.
        """
        ...

    def proportional_bytes(self, pids: Sequence[int]) -> int | None:
        """Return the memory of these processes, each shared page divided by the number of its users (PSS).

        Walks page tables, which takes tens of milliseconds for a large model. None if unknown of all of them.
        """
        ...

    def system_memory(self) -> SystemMemory:
        """Read the computer's memory, swap and memory pressure."""
        ...

    def power(self) -> Power:
        """Read where power comes from. Can take some 10 ms."""
        ...

    def sleep_blockers(self) -> Sequence[tuple[str, ...]]:
        """Return command lines that keep the computer from sleeping while they run, the best first.

        Each ends with this process, or when its standard input is closed.
        """
        ...

    def gpu_limits(self) -> GpuLimits | None:
        """Return how much the GPU may hold wired, None if the system has no such limits."""
        ...

    def lock_limits(self, pid: int | None) -> LockLimits:
        """Return how much `pid` may lock; for None, how much a child of this process may."""
        ...

    def wire_refusals(self) -> WireRefusals | None:
        """Return the kernel's counters of refused locks, None if there are none."""
        ...

    def health(self, pid: int) -> HostHealth:
        """Return what only this system knows of itself and of a process. Can take some 10 ms."""
        ...

    def quarantine(self, path: Path) -> str | None:
        """Return the quarantine mark of a downloaded file, None if it has none."""
        ...

    def engine_environment(self, metal_keep_alive_s: int) -> Mapping[str, str]:
        """Return environment variables for this system's engine builds."""
        ...

    def system_log(self) -> SystemLog | None:
        """Return the system's log, None if there is none."""
        ...

    def log_program(self) -> str | None:
        """Return the program that reads the system's log back, None if it is missing."""
        ...

    def stderr_is_journal(self) -> bool:
        """Return True if standard error leads into the journal of systemd."""
        ...

    def stderr_is_launchds(self) -> bool:
        """Return True if launchd writes standard error to a file, which is not rotated."""
        ...

    def listeners(self, pids: Sequence[int]) -> frozenset[int] | None:
        """Return the TCP ports that these processes listen on, None if unknown."""
        ...
