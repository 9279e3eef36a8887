"""syslog(3): where there is neither pyoslog nor a journal.

On macOS its lines reach the unified log, without subsystem and category.
"""

from __future__ import annotations

import syslog
from typing import TYPE_CHECKING, Any

from emberd.core.log_lines import IDENTIFIER, priority, syslog_line

if TYPE_CHECKING:
    from collections.abc import Mapping


class SyslogSink:
    """Writes each event as a line with its category. syslog(3) does not say whether anybody took it."""

    name = "syslog"
    lost = 0
    error = ""

    def __init__(self) -> None:
        syslog.openlog(IDENTIFIER, syslog.LOG_PID, syslog.LOG_USER)

    def write(self, event: Mapping[str, Any]) -> bool:  # the SystemLog protocol
        """Log an event."""
        syslog.syslog(int(priority(str(event.get("level", "info")))), syslog_line(event))
        return True

    def close(self) -> None:  # the SystemLog protocol
        """Close the connection."""
        syslog.closelog()
