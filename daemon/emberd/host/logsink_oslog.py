"""macOS' unified log, by pyoslog (the extra `emberd[macos]`).

os_log is a macro whose format must stand in the program's image: ctypes cannot call it, pyoslog is the small C
module that can. Its format is `%{public}s`: macOS hides nothing of what it is given.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from emberd.core.log_lines import SUBSYSTEM, line, os_log_type

if TYPE_CHECKING:
    from collections.abc import Mapping


class OsLogSink:
    """Writes each event as a line of the subsystem, under the category of its service.

    Args:
        pyoslog: the module, which says that it is supported.
    """

    name = "unified"

    def __init__(self, pyoslog: Any) -> None:
        self._pyoslog = pyoslog
        self._logs: dict[str, Any] = {}
        self.lost = 0
        self.error = ""

    def write(self, event: Mapping[str, Any]) -> bool:
        """Log an event; tells whether pyoslog took it."""
        category = str(event.get("category") or "daemon")
        kind = os_log_type(str(event.get("level", "info")), str(event["event"]))
        try:
            log = self._logs.get(category)
            if log is None:
                log = self._logs[category] = self._pyoslog.os_log_create(SUBSYSTEM, category)
            self._pyoslog.os_log_with_type(log, int(kind), line(event))
        except Exception as error:  # noqa: BLE001  # a C module's refusal is not worth the daemon
            self.lost += 1
            self.error = str(error)
            return False
        return True

    def close(self) -> None:
        """Let go of the log objects."""
        self._logs.clear()


def load_os_log() -> OsLogSink | None:
    """Return the unified log if pyoslog is installed and says that it can; else it has none of its names."""
    try:
        pyoslog = importlib.import_module("pyoslog")
        return OsLogSink(pyoslog) if pyoslog.is_supported() else None
    except Exception:  # noqa: BLE001  # not there, built for another macOS, or broken: the file log is there
        return None
