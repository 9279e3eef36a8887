"""From settings to an engine adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.engine.http import EngineHttp
from emberd.engine.koboldcpp import KoboldCpp
from emberd.engine.llama_server import EmbeddedServer, ExternalServer
from emberd.engine.program import Asker

if TYPE_CHECKING:
    from emberd.core.ports import Engine, Host
    from emberd.core.settings import Settings
    from emberd.host.paths import StatePaths


def choose_engine(settings: Settings, host: Host, paths: StatePaths) -> Engine:
    """Return the adapter that engine.kind names."""
    http = EngineHttp()
    match settings.engine.kind:
        case "koboldcpp":
            return KoboldCpp(settings, host, http, Asker(paths.answers), paths.scratch, paths.kcpps)
        case "llama-server":
            return ExternalServer(settings, host, http, Asker(paths.answers), paths.engine_keys)
        case "embedded":
            return EmbeddedServer(settings, host, http)
