"""What launchd and systemd are to emberd, and what is the same for both."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from emberd.core.errors import ServiceManagerFailed
from emberd.service.files import file_problems, has_leftovers, write_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from emberd.service.wanted import Installed, ServiceStatus, WantedService

START_LIMIT_S = 20.0
"""Above launchd's ThrottleInterval: a job that ended just now is not started before."""
_LOOK_AGAIN_S = 0.1


class ServiceManager(ABC):
    """launchd or systemd, as the user's own: what starts emberd at login and holds its socket.

    Methods run the manager's own program, each run with a time limit. `tell` is given a line for a person where
    something takes time.

    Raises:
        ServiceManagerFailed: the manager cannot be reached or refuses, or the service does not start or end.
        StateUnusable: a file cannot be written or removed.
        ConfigError: the manager would refuse what is wanted.
    """

    name: ClassVar[str]
    _kinds: ClassVar[Sequence[str]]
    """Endings of the files; the last one is that of the file with the command line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    # --- the files ------------------------------------------------------------------------------------------

    @abstractmethod
    def files(self, wanted: WantedService) -> Mapping[Path, str]:
        """Return what `install` would write, by path."""

    def _paths(self, label: str) -> list[Path]:
        return [self._folder / f"{self._stem(label)}.{kind}" for kind in self._kinds]

    def _stem(self, label: str) -> str:
        return label

    @abstractmethod
    def _installed(self, content: bytes, stem: str) -> Installed | None:
        """Return what a file says, None if it cannot be read."""

    @abstractmethod
    def _differences(self, content: bytes, wanted: str) -> Sequence[str]:
        """Return the keys in which a file differs from the wanted text."""

    def _read(self, path: Path) -> Installed | None:
        try:
            return self._installed(path.read_bytes(), path.stem)
        except OSError:
            return None

    def program(self, label: str) -> tuple[str, ...]:
        """Return the command line of the installed service, empty if there is none or it is not emberd's."""
        found = self._read(self._paths(label)[-1])
        return found.program if found and found.label else ()

    def installed_login(self, label: str) -> bool | None:
        """Return whether the installed service starts at login, None if none is installed."""
        found = self._read(self._paths(label)[-1])
        return None if found is None else found.starts_at_login

    def labels(self, config: Path) -> tuple[str, ...]:
        """Return the labels of the installed services that run on this settings file."""
        found = [self._read(path) for path in self._folder.glob(f"*.{self._kinds[-1]}")]
        return tuple(sorted(each.label for each in found if each and each.label and str(config) in each.program))

    def _stale(self, wanted: WantedService | None) -> tuple[str, ...]:
        """Return the keys that differ between what is installed and what is wanted."""
        if wanted is None:
            return ()
        found = set[str]()
        for path, text in self.files(wanted).items():
            with contextlib.suppress(OSError):
                found.update(self._differences(path.read_bytes(), text))
        return tuple(sorted(found))

    def _problems(self, label: str) -> tuple[str, ...]:
        """Return what is wrong with the files, in words."""
        return tuple(problem for path in self._paths(label) for problem in file_problems(path))

    def _is_there(self, label: str) -> bool:
        return all(path.exists() for path in self._paths(label))

    def _has_leftovers(self, label: str) -> bool:
        return any(has_leftovers(path) for path in self._paths(label))

    def write(self, wanted: WantedService) -> bool:
        """Write the files only, for the next start; False if they are up to date. Disturbs nothing that runs."""
        label = wanted.label
        is_right = self._is_there(label) and not self._stale(wanted) and not self._problems(label)
        if not is_right or self._has_leftovers(label):
            write_files(self.files(wanted))
        return not is_right

    # --- the service's words --------------------------------------------------------------------------------

    @abstractmethod
    def log_path(self, label: str) -> Path:
        """Return the file for what emberd prints before its log is set up."""

    @abstractmethod
    def where_it_says(self, label: str) -> str:
        """Return the file, or the command, by which a person reads what the service printed."""

    @abstractmethod
    def last_words(self, label: str) -> str:
        """Return the last error that an emberd of this label printed when it could not start, empty if unknown."""

    @abstractmethod
    def search_path(self, wanted: WantedService) -> str:
        """Return the PATH of the service."""

    def notices(self) -> list[str]:
        """Return what a person should know of this manager, each with its remedy."""
        return []

    # --- the service ----------------------------------------------------------------------------------------

    @abstractmethod
    def status(self, label: str, wanted: WantedService | None = None) -> ServiceStatus:
        """Look at the files and ask the manager; without `wanted` nothing counts as stale."""

    @abstractmethod
    def install(self, wanted: WantedService, tell: Callable[[str], None]) -> bool:
        """Write, load and start; False if nothing had to be done. Repairs an install that was interrupted."""

    def start(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Load and start what is installed; False if it runs already."""
        if not self._is_there(label):
            raise ServiceManagerFailed(
                f"{label} is not installed", "Install it: emberd install. Or run it in the foreground: emberd run."
            )
        return self._start(label, stop_limit_s, tell)

    @abstractmethod
    def _start(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool: ...

    @abstractmethod
    def stop(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Stop it and its socket until the next login or start; False if it was stopped."""

    @abstractmethod
    def uninstall(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Stop it and remove its files; False if there was nothing."""


def wait_until(is_so: Callable[[], bool], limit_s: float) -> bool:
    """Ask again and again; False if it was not so within the limit."""
    deadline_s = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_LOOK_AGAIN_S)
    return True
