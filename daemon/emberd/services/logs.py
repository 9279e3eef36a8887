"""Structured logs: an event name and fields; a console for people, JSON lines for everything else."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from structlog.typing import FilteringBoundLogger

    from emberd.core.settings import LogSettings


_EVENT_WIDTH = 20


class _Sink:
    """Standard error, except that a full disk or a terminal that went away loses lines, not the daemon."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


class _ForwardToStructlog(logging.Handler):
    """Carries what libraries say through the standard logging module, from WARNING on."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        report = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        report(
            "library_message",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info or None,
        )


def _with_category(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event.setdefault("category", "daemon")
    return event


def configure(settings: LogSettings) -> FilteringBoundLogger:
    """Set up logging to standard error and return the logger; called again, it takes over new settings."""
    is_console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    shared: list[Any] = [structlog.processors.add_log_level]
    if is_console:
        # Plain tracebacks: the rich ones show local variables, which may hold a prompt.
        renderer: list[Any] = [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                pad_event_to=_EVENT_WIDTH,
                sort_keys=False,
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    else:
        renderer = [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _with_category,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Sink())),
        cache_logger_on_first_use=False,
    )
    log: FilteringBoundLogger = structlog.get_logger()
    root = logging.getLogger()
    root.handlers = [_ForwardToStructlog(log)]
    return log
