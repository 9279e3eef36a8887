"""Makes the services of an emberd that serves, and reloads their settings."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.core.access import AccessRules, own_names
from emberd.core.errors import EmberdError
from emberd.engine.choose import choose_engine
from emberd.engine.http import EngineHttp
from emberd.host import config_file
from emberd.host.api_key import read_api_key
from emberd.services.accounts import Accounts, Spending
from emberd.services.engine_run import Paths
from emberd.services.forecaster import Forecaster
from emberd.services.keepwarm import KeepWarm
from emberd.services.logs import configure_for, logger
from emberd.services.model_use import ModelUse
from emberd.services.observer import Observer
from emberd.services.pressure_watch import PressureWatch
from emberd.services.proxy import Proxy
from emberd.services.recall import Recall
from emberd.services.recorder import Recorder
from emberd.services.replays import Replays
from emberd.services.residency_meter import ResidencyMeter
from emberd.services.sleep_blocker import SleepBlocker
from emberd.services.supervisor import Supervisor
from emberd.services.swap_meter import SwapMeter
from emberd.services.turns import Knocks, Turns
from emberd.services.warming import Warming
from emberd.services.weights import Weights

if TYPE_CHECKING:
    from emberd.core.settings import Settings
    from emberd.host import ThisHost
    from emberd.host.paths import StatePaths
    from emberd.services.gate import Gate

_FIXED = ("endpoint.host", "endpoint.port", "state.directory")
"""Settings that cannot change while emberd runs."""


class SettingsInForce:
    """The services ask for a setting each time they need it, so a reload reaches them."""

    def __init__(self, settings: Settings, path: Path, key: str) -> None:
        self.now = settings
        self._rules = AccessRules()
        self._known_by: tuple[Settings, str, str] | None = None
        self._key = key
        self.path = path
        self._first = settings
        self._option = str(path) if path.exists() else None

    @property
    def rules(self) -> AccessRules:
        """Whom to let in. The computer's name can change with the network, so it is asked for each time."""
        known_by = (self.now, self._key, socket.gethostname())
        if known_by != self._known_by:
            names = (*self.now.endpoint.names, *own_names(known_by[2]))
            self._rules = AccessRules(names, self.now.endpoint.origins, self._key)
            self._known_by = known_by
        return self._rules

    @property
    def identity(self) -> str:
        """Text that differs between two engines, models, or settings of them; an engine keeps its names as long."""
        files = (self.now.model.path, self.now.engine.path, self.now.engine.kcpps)
        return repr((self.now.model, self.now.engine, [_mark(each) for each in files]))

    async def reload(self, supervisor: Supervisor, host: ThisHost, paths: StatePaths) -> dict[str, Any]:
        """Read the file again and return what the new settings restart.

        Raises:
            EmberdError: the file is wrong, or the engine cannot run with it; nothing has changed.
        """
        log = logger("daemon")
        try:
            settings, _ = config_file.load(self._option)
            key = read_api_key(settings, self.path)
            restarts = await supervisor.reload(settings, choose_engine(settings, host, paths))
        except EmberdError as error:
            log.error("reload_refused", error=error.message, remedy=error.remedy)  # noqa: TRY400  # no bug
            raise
        self.now, self._key = settings, key
        configure_for(settings, host)
        fixed = [key for key in _FIXED if attrgetter(key)(settings) != attrgetter(key)(self._first)]
        if fixed:
            log.warning("reload_incomplete", keys=fixed, remedy="restart emberd to change these")
        log.info("reloaded", engine_restarts=restarts)
        return {"ok": True, "engine_restarts": restarts, "needs_emberd_restart": fixed}


@dataclass(frozen=True, slots=True)
class Services:
    """The services of an emberd that serves; the caller runs those that have a `run`."""

    supervisor: Supervisor
    proxy: Proxy
    turns: Turns
    knocks: Knocks
    observer: Observer
    accounts: Accounts
    swap: SwapMeter
    residency: ResidencyMeter
    keepwarm: KeepWarm
    recorder: Recorder
    sleep: SleepBlocker
    recall: Recall

    async def close(self) -> None:
        """Save what is not yet on disk, and end the toucher."""
        await self.recorder.close()
        await self.residency.close()


def build(settings: SettingsInForce, host: ThisHost, paths: StatePaths) -> Services:
    """Return the services. Logging must be set up before."""
    engine = choose_engine(settings.now, host, paths)
    run_paths = Paths(paths.record, paths.output, paths.scratch)
    supervisor = Supervisor(settings.now, engine, host, run_paths, logger("supervisor"))
    gate = supervisor.gate
    knocks = Knocks()
    turns = Turns(lambda: settings.now.endpoint.remember_kib * 1024, lambda: gate.room, gate.tally)
    recall = Recall(
        gate,
        EngineHttp(),
        paths.told,
        lambda: " ".join((settings.identity, *engine_switch(gate))),
        lambda: gate.engine.password if settings.rules.key else "",
    )
    proxy = Proxy(
        gate,
        lambda: settings.now.endpoint,
        lambda: settings.rules,
        turns,
        knocks,
        logger("endpoint"),
        recall.answer,
    )
    observer = Observer(host, logger("memory"), gate.sample)
    accounts = Accounts(paths.history, logger("history"))
    swap = SwapMeter(observer, accounts)
    residency = ResidencyMeter(host.paging, logger("residency"), observer)
    log = logger("keepwarm")
    use = ModelUse(gate, proxy.places)
    forecaster = Forecaster(logger("forecast"), observer, turns, residency.status)
    spending = Spending(accounts)
    weights = Weights(host, log, gate, residency.toucher, use, forecaster, spending)
    replays = Replays(log, gate, turns, use, forecaster, spending)
    watch = PressureWatch(host, log, lambda: settings.now.warmth, gate, observer, weights, use)
    warming = Warming(log, gate, use, weights, replays, forecaster, spending)
    keepwarm = KeepWarm(log, lambda: settings.now.warmth, gate, observer, warming, watch, knocks)
    recorder = Recorder(logger("history"), swap, gate, forecaster, spending, turns, lambda: keepwarm.is_warm)
    sleep = SleepBlocker(host, logger("power"), lambda: settings.now, gate)
    return Services(
        supervisor, proxy, turns, knocks, observer, accounts, swap, residency, keepwarm, recorder, sleep, recall
    )


def _mark(path: str) -> tuple[int, int] | None:
    """Return a value that changes when a file is replaced, None if there is none."""
    try:
        found = Path(path).expanduser().stat()
    except (OSError, RuntimeError):  # no home
        return None
    return found.st_mtime_ns, found.st_size


def engine_switch(gate: Gate) -> tuple[str, ...]:
    """Return what the engine was switched to, nothing if it serves the settings' model."""
    switch = gate.engine.switch
    return () if switch is None else (switch.config, switch.base, switch.model)
