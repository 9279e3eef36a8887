"""Where emberd's files live on this system."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emberd.host.files import make_private_folder

if TYPE_CHECKING:
    from emberd.core.settings import Settings

_LONGEST_SOCKET_BYTES = 100
"""sun_path holds 104 bytes on macOS and 108 on Linux, the final NUL included (unix(4), unix(7))."""


@dataclass(frozen=True, slots=True)
class StatePaths:
    """Files in the state directory."""

    directory: Path

    @property
    def record(self) -> Path:
        """The running engine, for adoption."""
        return self.directory / "engine.json"

    @property
    def output(self) -> Path:
        """What the engine prints."""
        return self.directory / "engine.log"

    @property
    def scratch(self) -> Path:
        """The engine's private TMPDIR.

        A second KoboldCPP deletes unpacked files of its neighbours in a shared one after four hours, and macOS
        cleans the per-user one after three days.
        """
        return self.directory / "tmp"

    @property
    def kcpps(self) -> Path:
        """The merged KoboldCPP settings; may hold a password."""
        return self.directory / "merged.kcpps"

    @property
    def engine_keys(self) -> Path:
        """The keys of the owner's --api-key-file, as llama-server reads them."""
        return self.directory / "engine-keys"

    @property
    def history(self) -> Path:
        """Daily accounts of what was written to swap."""
        return self.directory / "history.db"

    @property
    def answers(self) -> Path:
        """What engine programs said about themselves."""
        return self.directory / "engine-answers.json"

    @property
    def told(self) -> Path:
        """What the last engine said of itself: model, versions, lengths."""
        return self.directory / "engine-told.json"

    @property
    def starts(self) -> Path:
        """When this daemon was started by a service manager, and how that ended."""
        return self.directory / "starts.json"

    @property
    def lock(self) -> Path:
        """Held by the one daemon that uses this directory."""
        return self.directory / "emberd.lock"

    @property
    def control(self) -> Path:
        """The control socket; elsewhere if the path is too long for a socket."""
        path = self.directory / "control.sock"
        if len(os.fsencode(path)) <= _LONGEST_SOCKET_BYTES:
            return path
        name = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]
        return Path("/tmp") / f"emberd-{os.geteuid()}" / f"{name}.sock"  # noqa: S108  # a 0700 folder of our own


def default_config() -> Path:
    """Return the platform's place of the settings file."""
    import platformdirs  # noqa: PLC0415  # not needed when --config is given

    return platformdirs.user_config_path("emberd") / "config.toml"


def state_paths(settings: Settings) -> StatePaths:
    """Return the files of the state directory without touching it."""
    if settings.state.directory:
        return StatePaths(Path(settings.state.directory).expanduser().absolute())
    import platformdirs  # noqa: PLC0415  # not needed when the directory is set

    return StatePaths(platformdirs.user_state_path("emberd"))


def prepare(paths: StatePaths) -> None:
    """Make the folders, readable by their owner only.

    Raises:
        StateUnusable: they cannot be made, or are somebody else's.
    """
    make_private_folder(paths.directory)
    if paths.control.parent != paths.directory:
        make_private_folder(paths.control.parent)


def log_file(settings: Settings, system: str) -> Path:
    """Return emberd's own log file; each state directory has another.

    Args:
        settings: where a person wants it.
        system: name of the host.
    """
    if settings.log.file:
        return Path(settings.log.file).expanduser().absolute()
    if system == "darwin" and not settings.state.directory:
        return Path("~/Library/Logs/emberd/emberd.log").expanduser()
    return state_paths(settings).directory / "emberd.log"


def instance_name(settings: Settings) -> str:
    """Return the name that tells this emberd from others in the same log; empty for the default state directory."""
    if not settings.state.directory:
        return ""
    directory = state_paths(settings).directory
    return f"{directory.name}-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:6]}"
