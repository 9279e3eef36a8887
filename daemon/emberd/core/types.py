"""Frozen values that cross rooms. Unknown is None, never zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from emberd.core.engine_files import touchable
from emberd.core.gguf import split_names

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from emberd.core.engine_files import EngineFile


@dataclass(frozen=True, slots=True)
class Notice:
    """A named warning about settings: emberd goes on, but the owner should know.

    Attributes:
        code: stable snake_case name, for filters and documentation.
        message: what was seen and what emberd does about it.
    """

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything that is needed to start one engine process.

    Attributes:
        arguments: the whole command line, the executable first.
        environment: variables set on top of emberd's own environment.
        port: loopback TCP port that the engine will listen on.
        notices: named warnings found while composing.
        hidden: values in `arguments` that must not be shown (passwords).
        files: text files to write (mode 0600) before the start, by absolute path.
        by_own_python: the executable is the Python that runs emberd, chosen because no setting names one.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    port: int
    notices: tuple[Notice, ...] = ()
    hidden: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    by_own_python: bool = False

    def shown_arguments(self) -> tuple[str, ...]:
        """Return the command line as people may see it, with secrets masked."""
        return tuple("********" if word in self.hidden else word for word in self.arguments)


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A line of the engine's log that tells how far loading is.

    Attributes:
        phase: the engine-independent name of the step.
        detail: the engine's own figure for it, or empty.
    """

    phase: str
    detail: str = ""


class Readiness(Enum):
    """What a readiness probe found."""

    REFUSED = "refused"
    """Nothing listens yet."""
    LOADING = "loading"
    """The engine says that it is still loading."""
    READY = "ready"
    """The right engine answers with the right model."""
    STRANGER = "stranger"
    """Another program answers."""


@dataclass(frozen=True, slots=True)
class Activity:
    """The result of one liveness probe.

    Attributes:
        answered: the engine answered the probe in time.
        is_generating: a generation holds the model; None if the engine cannot tell.
        generated_units: a number that grows while text is produced (of the running reply and finished replies),
            None if unknown.
        cpu_seconds: CPU time used by the whole process tree since it began, None if unknown.
        serves_for_s: how long the engine has served what it serves, None if it does not tell.
    """

    answered: bool
    is_generating: bool | None = None
    generated_units: int | None = None
    cpu_seconds: float | None = None
    serves_for_s: float | None = None


@dataclass(frozen=True, slots=True)
class Switch:
    """Another model than that of the settings, to which somebody has switched the running engine.

    Attributes:
        config: the settings file or model in the engine's folder for that; KoboldCPP's `unload_model` for none, and
            `initial_model` for that of its start.
        base: a settings file below it, empty for none.
        model: a model that it is loaded with, empty for its own.
        is_in_place: the engine loaded it by itself, without emberd's options.
    """

    config: str
    base: str = ""
    model: str = ""
    is_in_place: bool = True

    @property
    def is_to_settings(self) -> bool:
        """Whether it leads back to the model of the start."""
        return self.config == "initial_model"

    @property
    def unloads(self) -> bool:
        """Whether it leaves the engine without a model."""
        return self.config == "unload_model"


@dataclass(frozen=True, slots=True)
class Serving:
    """What an engine serves, found when it became ready.

    Attributes:
        name: the model's name in the engine's own words, empty if it has none, None if it did not tell.
        model: first file of the model, None if none is loaded or it is not known.
        files: all files that the engine works with.
        switch: how the engine came to this model, None if it is that of the settings.
        is_known: the model is that of the settings or of the switch; otherwise nobody knows how it came there.
        loads: how often this process has loaded a model in place of another one.
        may_lock: there is room to lock a model that was loaded in place.
    """

    name: str | None = None
    model: Path | None = None
    files: tuple[EngineFile, ...] = ()
    switch: Switch | None = None
    is_known: bool = True
    loads: int = 0
    may_lock: bool = True

    @property
    def is_empty(self) -> bool:
        """Whether no model is loaded."""
        return self.name == ""


@dataclass(frozen=True, slots=True)
class EngineSample:
    """The engine at this moment, for measurements.

    Attributes:
        key: text that tells this engine process from another one, None while there is none.
        pids: its processes.
        is_idle: it is ready, and no request is running.
        requests: requests sent to it so far; an unchanged number means none between.
        model: the first file of the model, None if it is not known.
        weights_bytes: size of the weights, None if unknown.
        is_mapped: the weights are pages of the file; None if the engine's log does not tell.
        keeps_state: the model keeps a state that cannot be cut back, besides or instead of a KV cache.
        files: all files that the engine works with, empty before it is ready.
    """

    key: str | None
    pids: tuple[int, ...]
    is_idle: bool
    requests: int
    model: Path | None = None
    weights_bytes: int | None = None
    is_mapped: bool | None = None
    keeps_state: bool = False
    files: tuple[EngineFile, ...] = ()

    @property
    def touchable(self) -> tuple[str, ...]:
        """Paths of the files whose pages can be counted, touched and locked: all that are mapped.

        Before the files are known those are the parts of the model.
        """
        paths = touchable(self.files)
        if paths or self.model is None:
            return paths
        return tuple(str(self.model.with_name(name)) for name in split_names(self.model.name))
