"""The settings in force, and reading them again while emberd serves."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from emberd.core.access import AccessRules
from emberd.core.errors import EmberdError
from emberd.engine.choose import choose_engine
from emberd.host import config_file
from emberd.host.api_key import read_api_key
from emberd.services import logs

if TYPE_CHECKING:
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from emberd.core.settings import Settings
    from emberd.host import ThisHost
    from emberd.host.paths import StatePaths
    from emberd.services.supervisor import Supervisor

_FIXED = ("endpoint.host", "endpoint.port", "state.directory")
"""What cannot change while emberd runs."""


class SettingsInForce:
    """The services ask for a setting each time they need it, and so hear of a reload."""

    def __init__(self, settings: Settings, path: Path, key: str) -> None:
        self.now = settings
        self.rules = _rules(settings, key)
        self.path = path
        self._first = settings
        self._option = str(path) if path.exists() else None

    async def reload(
        self, supervisor: Supervisor, host: ThisHost, paths: StatePaths, log: FilteringBoundLogger
    ) -> dict[str, Any]:
        """Read the file again and return what becomes of it.

        Raises:
            EmberdError: the file is wrong, or the engine cannot run with it; nothing has changed.
        """
        try:
            settings, _ = config_file.load(self._option)
            rules = _rules(settings, read_api_key(settings, self.path))
            restarts = await supervisor.reload(settings, choose_engine(settings, host, paths))
        except EmberdError as error:
            log.error("reload_refused", error=error.message, remedy=error.remedy)  # noqa: TRY400  # no bug
            raise
        self.now, self.rules = settings, rules
        logs.configure_for(settings, host)
        fixed = [key for key in _FIXED if attrgetter(key)(settings) != attrgetter(key)(self._first)]
        if fixed:
            log.warning("reload_incomplete", keys=fixed, remedy="restart emberd to change these")
        log.info("reloaded", engine_restarts=restarts)
        return {"ok": True, "engine_restarts": restarts, "needs_emberd_restart": fixed}


def _rules(settings: Settings, key: str) -> AccessRules:
    return AccessRules(settings.endpoint.names, settings.endpoint.origins, key)
