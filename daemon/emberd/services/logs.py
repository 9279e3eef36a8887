"""Structured logs: an event name and fields, on their way to standard error, the system's log and a file.

`core/log_lines.py` decides where, in which form, and how often.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING, Any

from emberd.core import log_lines
from emberd.core.errors import EmberdError
from emberd.core.log_lines import RateLimit
from emberd.host.log_sinks import RotatingFile
from emberd.host.paths import instance_name, log_file

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from emberd.core.ports import Host, SystemLog
    from emberd.core.settings import LogSettings, Settings

# structlog.dev imports rich: 5 MiB (PSS, Linux, CPython 3.11), of which 3.7 are saved even with uvicorn and
# starlette, which share modules with it. The command line needs rich, so it is installed, and hidden only here.
_hides_rich = "rich" not in sys.modules
if _hides_rich:
    sys.modules["rich"] = None  # type: ignore[assignment]  # makes the import fail, as documented
try:
    import structlog
finally:
    if _hides_rich:
        del sys.modules["rich"]

_EVENT_WIDTH = 20
_TELL_S = 10.0
"""After a flood, the longest time until the log says what was left out."""
_TRACEBACK_FRAMES = 30
_REMEMBERED = 40
"""Events that the page can still show: some 30 KiB."""
_COMMON = frozenset({"engine_line", "engine_loading"})
"""They come in hundreds, and would push out everything else."""


class _StandardError:
    """Standard error; a full disk or a lost terminal costs lines, not the daemon."""

    name = "stderr"
    lost = 0
    error = ""

    def __init__(self, log_format: str) -> None:
        self._is_console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
        self._render = structlog.dev.ConsoleRenderer(
            colors=self._is_console and sys.stderr.isatty(),
            pad_event_to=_EVENT_WIDTH,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )

    def write(self, event: Mapping[str, Any]) -> bool:
        if self._is_console:
            shown = {name: value for name, value in event.items() if name not in {"category", "instance"}}
            text = self._render(None, "", {**shown, "timestamp": time.strftime("%H:%M:%S")})
        else:
            text = log_lines.json_line(event)
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
        return True

    def close(self) -> None:
        """Leave it open: it is not ours."""


class _Log:
    """Hands each event to every sink, from any thread, unless it comes too often; says what was left out."""

    def __init__(self) -> None:
        self.sinks: list[SystemLog] = []
        self._instance = ""
        self._lost: dict[str, int] = {}
        self._rate = RateLimit(0)
        self._lock = threading.Lock()
        self._is_telling = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.recent: deque[Mapping[str, Any]] = deque(maxlen=_REMEMBERED)

    def open(self, settings: LogSettings, instance: str, sinks: list[SystemLog]) -> None:
        self._instance, self._lost, self._is_telling = instance, {}, False
        self._rate = RateLimit(settings.events_per_minute, {"engine_line": settings.engine_lines_per_minute})
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self.sinks = sinks

    def limit(self, _: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Stop what comes too often; the first processor."""
        name = event["event"]
        if name == "log_lines_suppressed":
            return event
        with self._lock:
            is_allowed = self._rate.allows(name, event.get("category", "daemon"), time.monotonic())
        if is_allowed:
            return event
        if not self._is_telling and self._loop is not None:
            self._is_telling = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the daemon ends
                self._loop.call_soon_threadsafe(self._loop.call_later, _TELL_S, self._tell_later)
        raise structlog.DropEvent

    def _tell_later(self) -> None:
        self._is_telling = False
        self.tell()
        if self._rate.has_suppressed and self._loop is not None:
            self._is_telling = True
            self._loop.call_later(_TELL_S, self._tell_later)

    def tell(self, *, all_of_it: bool = False) -> None:
        """Log what was left out, if it is time."""
        with self._lock:
            told = self._rate.told(time.monotonic(), all_of_it=all_of_it)
        for each in told:
            logger(each.category).warning(
                "log_lines_suppressed", of=each.event, count=each.count, seconds=round(each.seconds, 1)
            )

    def write(self, event: MutableMapping[str, Any]) -> None:
        if self._instance:
            event["instance"] = self._instance
        if event["event"] not in _COMMON:
            self.recent.append(event)
        with self._lock:
            for sink in self.sinks:
                missing = sink.lost - self._lost.get(sink.name, 0)
                if not sink.write(event) or not missing:
                    continue
                self._lost[sink.name] = sink.lost
                sink.write(
                    {
                        "event": "log_lines_lost",
                        "category": "log",
                        "level": "warning",
                        "timestamp": event["timestamp"],
                        "count": missing,
                        "reason": sink.error,
                        **({"instance": self._instance} if self._instance else {}),
                    }
                )

    debug = info = warning = error = critical = exception = msg = write

    def close(self) -> None:
        self.tell(all_of_it=True)
        with self._lock:
            for sink in self.sinks:
                sink.close()
            self.sinks = []


_log = _Log()


class _ForwardToStructlog(logging.Handler):
    """Takes over what libraries log through the standard module, from WARNING on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._log = logger("library")

    def emit(self, record: logging.LogRecord) -> None:
        report = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        report(
            "library_message",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info or None,
        )


def logger(category: str) -> FilteringBoundLogger:
    """Return the logger of a service; it follows every later `configure`."""
    log: FilteringBoundLogger = structlog.get_logger(category=category)
    return log


def configure_for(settings: Settings, host: Host) -> None:
    """Set up logging as the settings say, with the sinks of this emberd."""
    configure(settings.log, host, log_file(settings, host.name), instance_name(settings))


def configure(settings: LogSettings, host: Host, file: Path, instance: str) -> None:
    """Set up logging; called again, it takes over new settings.

    `instance` names this emberd in a shared log, and is empty for the usual one.
    """
    close()
    system = host.system_log() if settings.sink in {"auto", "system"} else None
    chosen = log_lines.choose_sinks(
        settings.sink,
        host.name,
        is_terminal=sys.stderr.isatty(),
        is_journals=host.stderr_is_journal(),
        is_launchds=host.stderr_is_launchds(),
        has_system_log=system is not None,
    )
    sinks: list[SystemLog] = [_StandardError(settings.format)] if "stderr" in chosen else []
    if system is not None and "system" in chosen:
        sinks.append(system)
    elif system is not None:
        system.close()
    if "file" in chosen:
        sinks.append(RotatingFile(file, settings.file_mib << 20, settings.files))
    _log.open(settings, instance, sinks)
    structlog.configure(
        processors=[
            _log.limit,
            structlog.processors.add_log_level,
            _complete,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _hand_over,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=lambda *_: _log,
        cache_logger_on_first_use=False,
    )
    logging.getLogger().handlers = [_ForwardToStructlog()]


def places() -> list[str]:
    """Return the names of the sinks in use: stderr, file, unified, journal, syslog."""
    return [sink.name for sink in _log.sinks]


def recent() -> list[Mapping[str, Any]]:
    """Return the last events, the oldest first, whichever sinks are in use."""
    return list(_log.recent)


def close() -> None:
    """Log what was left out, and close the sinks."""
    _log.close()


def _complete(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event.setdefault("category", "daemon")
    found = event.pop("exc_info", None)
    if found is True:
        found = sys.exc_info()
    error = found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        event["exception"] = _traceback_of(error)
    log_lines.withhold(event)
    return event


def _hand_over(_: object, __: str, event: MutableMapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (event,), {}


def _traceback_of(error: BaseException) -> str:
    """Return a traceback without text that may quote a request.

    `invalid literal for int()` quotes its input, and a client's text must not be logged. So only the messages of
    emberd's own errors and the system's remain, and lines of code without the values of variables.
    """
    parts: list[str] = []
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        message = f": {each}" if isinstance(each, EmberdError | OSError) else ""
        frames = "".join(traceback.format_tb(each.__traceback__, -_TRACEBACK_FRAMES))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(each).__qualname__}{message}")
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return "\n\nwhich was caused by\n\n".join(parts)
