"""What the engine serves now: found when it is ready, and again when it has loaded another model by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from emberd.core import lifecycle
from emberd.core.engine_files import Held, NamedFile, Role, merge, weights_of
from emberd.core.errors import EmberdError
from emberd.core.lifecycle import State
from emberd.core.status import ServingStatus
from emberd.core.types import Serving
from emberd.host.model_file import look_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from structlog.typing import FilteringBoundLogger

    from emberd.core.engine_files import EngineFile
    from emberd.core.lifecycle import Event, Lifecycle
    from emberd.core.ports import Host
    from emberd.core.settings import Settings
    from emberd.core.types import LaunchPlan, Switch
    from emberd.engine.record import EngineRecord
    from emberd.services.gate import Gate
    from emberd.services.lock_meter import LockMeter

_ASK_S = 2.0
_LOADS_AGAIN = "it loads or unloads a model by itself"


class Switching:
    """Follows one engine through its models.

    A switch is heard of in the engine's log, in the request that asks for it, or from an engine that serves for a
    shorter time than before.
    """

    def __init__(
        self, settings: Callable[[], Settings], host: Host, log: FilteringBoundLogger, meter: LockMeter
    ) -> None:
        self._settings = settings
        self._host = host
        self._log = log
        self.meter = meter
        self._is_loading = True
        self._asked: Switch | None = None
        self._pids: frozenset[int] = frozenset()
        self.gate: Gate
        """Set by the supervisor: the two know each other."""
        self.post: Callable[[Event], None] = lambda _: None

    def begin(self, gate: Gate, *, loads: bool) -> None:
        """Begin with a new process; one that was adopted does not load."""
        self._is_loading, self._asked, self._pids = loads, None, frozenset()
        gate.change(serving=Serving(switch=gate.engine.switch))

    # --- hearing of it --------------------------------------------------------------------------------------

    def note(self, line: str) -> None:
        """Note a line of the engine's log."""
        switch = self.gate.engine.switch_in_line(line)
        if switch is not None:
            self._asked = switch
        if not self._is_loading and self.gate.engine.loads_again(line):
            self.loads_again()
        self.meter.note(line)

    def asked(self, switch: Switch) -> None:
        """A client has asked for it; the engine may not do it."""
        self._asked = switch

    def loads_again(self) -> None:
        """The engine has ended what served, and loads."""
        self._is_loading = True
        self.meter.begin_again()
        self.gate.change(serving=Serving(loads=self.gate.now.serving.loads))
        self.post(lifecycle.LostReadiness(_LOADS_AGAIN))

    # --- starting it ----------------------------------------------------------------------------------------

    async def plan(self, of_settings: LaunchPlan, *, will_lock: bool) -> LaunchPlan:
        """Return the plan of a start that keeps a switch, by emberd's own options; else that of the settings."""
        engine = self.gate.engine
        if engine.switch is not None:
            try:
                return await engine.plan(of_settings.port, will_lock=will_lock, switch=engine.switch)
            except EmberdError as error:
                self._undo(error.message)
        return of_settings

    def keep(self) -> None:
        """The process has ended: the next one is to serve the same model, if there was one."""
        switch = self.gate.engine.switch
        if switch is not None:
            self.gate.engine.switch = None if switch.unloads else replace(switch, is_in_place=False)

    def judge(self, before: Lifecycle, after: Lifecycle, event: Event) -> None:
        """Undo a switch with which this process was never ready: the settings' model comes next."""
        if before.state is not State.LOADING or self._pids:
            return
        if isinstance(event, lifecycle.Exited) or after.is_stuck:
            self._undo(event.reason if isinstance(event, lifecycle.Exited) else after.reason)

    def _undo(self, reason: str) -> None:
        if self.gate.engine.switch is not None:
            self._log.warning("switch_undone", config=self.gate.engine.switch.config, reason=reason)
            self.gate.engine.switch = None

    # --- finding out ----------------------------------------------------------------------------------------

    async def find(self, record: EngineRecord, pids: Sequence[int]) -> None:
        """Find out what a ready engine serves."""
        gate, engine = self.gate, self.gate.engine
        before, now = gate.now.serving, frozenset(pids)
        has_loaded = bool(self._pids) and (self._is_loading or now != self._pids)
        loads = before.loads + has_loaded
        name = await engine.served_name(record.port, _ASK_S)
        mapped = self._host.mapped_files(pids)
        # What has just been started, by emberd, needs no proof.
        is_own = not loads and not gate.is_adopted
        model, is_known = (engine.model_path(), True) if is_own else self._recognise(name)
        if not is_known:
            others = map(Path, weights_of(mapped or ()))
            model = next((path for path in others if engine.calls_it(path, name or "")), None)
        self._is_loading, self._pids, self._asked = False, now, None
        named = [NamedFile(str(model), Role.MODEL)] if model else []
        wishes = engine.wishes() if is_known else None
        files = merge(look_up([*named, *(wishes.files if wishes else ())]), mapped)
        await self.meter.follow(model, files, wishes)
        may_lock = not has_loaded or self.meter.has_room(self._settings(), engine.wishes())
        gate.change(serving=Serving(name, model, files, engine.switch, is_known, loads, may_lock))
        if has_loaded:
            config = engine.switch.config if engine.switch else None
            self._log.info("model_switched", name=name, model=str(model) if model else None, config=config)

    def _recognise(self, name: str | None) -> tuple[Path | None, bool]:
        """Return the model, and whether it is that of a switch or of the settings; the adapter follows from now."""
        engine = self.gate.engine
        asked = [self._asked] if self._asked else []
        for switch in (*asked, engine.switch, None):
            engine.switch = None if switch is None or switch.is_to_settings else switch
            model = engine.model_path()
            if name is None or (engine.calls_it(model, name) if model else not name):
                return model, True
        engine.switch = None
        return None, False

    def status(self) -> ServingStatus:
        """Return what the ready engine serves."""
        serving = self.gate.now.serving
        switch = serving.switch
        return ServingStatus(
            name=serving.name,
            model=str(serving.model) if serving.model else None,
            is_of_settings=switch is None and serving.is_known,
            switched_by=switch.config if switch else None,
            survives_restart=serving.is_known and not (switch and switch.unloads),
        )

    def with_locks(self) -> tuple[EngineFile, ...]:
        """Return the files with what the engine has locked of each; takes tens of milliseconds."""
        serving, pids = self.gate.now.serving, self.gate.sample().pids
        mapped = self._host.mapped_files(pids, with_locks=True)
        if not serving.files or mapped is None:
            return serving.files
        named = [NamedFile(each.path, each.role) for each in serving.files]
        kept = {each.path: each for each in merge(look_up(named), mapped)}
        return tuple(
            replace(each, locked_bytes=kept[each.path].locked_bytes)
            if each.path in kept and each.held in {Held.MAPPED, Held.REPLACED}
            else each
            for each in serving.files
        )
