"""emberd as a systemd user service with a socket unit, by systemctl(1)."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from emberd.core import systemd_unit
from emberd.core.errors import ServiceManagerFailed
from emberd.core.service import LABEL_VARIABLE, ServiceStatus, last_error, unit_name
from emberd.core.systemd_unit import read_show
from emberd.host.service_files import Answer, file_problems, has_leftovers, remove_files, run, template, write_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from emberd.core.service import WantedService

_PROPERTIES = (
    "LoadState,ActiveState,SubState,UnitFileState,MainPID,ExecMainStatus,ExecMainCode,Result,NeedDaemonReload"
)
_EXITED = "1"
"""CLD_EXITED (waitid(2)); the others are signals."""
_LOOK_AGAIN_S = 0.1
_START_LIMIT_S = 20.0
_BEYOND_STOP_S = 10.0
_UP = ("active", "activating", "reloading")


class Systemd:
    """The user's systemd.

    Args:
        folder: where user units live; another folder in tests.
    """

    name = "systemd"

    def __init__(self, folder: Path | None = None) -> None:
        configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        self._folder = folder or Path(configuration) / "systemd" / "user"

    def log_path(self, label: str) -> Path:  # noqa: ARG002  # as launchd's
        """Return a path that no unit uses: the journal takes what emberd prints."""
        return Path(os.devnull)

    def last_words(self, label: str) -> str:
        """Return the last error in the journal's lines of the service, empty if they cannot be read."""
        with contextlib.suppress(ServiceManagerFailed):
            lines = run("journalctl", "--user", "-u", self._path(label, "service").name, "-n", "50", "-o", "cat")
            return last_error(lines.out)
        return ""

    def _path(self, label: str, kind: str) -> Path:
        return self._folder / f"{unit_name(label)}.{kind}"

    def _paths(self, label: str) -> tuple[Path, Path]:
        return self._path(label, "socket"), self._path(label, "service")

    def files(self, wanted: WantedService) -> dict[Path, str]:
        """Return the units by path."""
        return {
            self._path(wanted.label, "socket"): systemd_unit.fill_socket(
                template("systemd", "emberd.socket"), wanted
            ),
            self._path(wanted.label, "service"): systemd_unit.fill_service(
                template("systemd", "emberd.service"), wanted
            ),
        }

    def installed_login(self, label: str) -> bool | None:
        """Tell whether the installed service starts at login, None if none is installed."""
        try:
            text = self._path(label, "service").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        return systemd_unit.starts_at_login(text)

    def labels(self, config: Path) -> tuple[str, ...]:
        """Return the labels of the installed services that run on this settings file."""
        found = []
        for path in self._folder.glob("*.service"):
            label, words = _read(path)
            if label and str(config) in words:
                found.append(label)
        return tuple(sorted(found))

    def program(self, label: str) -> tuple[str, ...]:
        """Return the command line of an installed service of emberd's, empty if there is none."""
        return _read(self._path(label, "service"))[1]

    # --- looking --------------------------------------------------------------------------------------------

    def status(self, label: str, wanted: WantedService | None = None) -> ServiceStatus:
        """Look at the units and ask systemd.

        Raises:
            ServiceManagerFailed: the user's systemd cannot be reached.
        """
        paths = self._paths(label)
        service, socket = self._show(label, "service"), self._show(label, "socket")
        pid = int(service.get("MainPID") or 0) or None
        is_up = service.get("ActiveState") in _UP
        return ServiceStatus(
            manager=self.name,
            label=label,
            files=tuple(str(path) for path in paths),
            is_installed=all(path.exists() for path in paths),
            is_loaded=is_up or socket.get("ActiveState") in _UP,
            is_running=is_up and pid is not None,
            pid=pid,
            last_exit=_last_exit(service),
            state=f"{service.get('ActiveState')} ({service.get('SubState')})",
            stale=self._stale(wanted),
            problems=tuple(problem for path in paths for problem in file_problems(path)),
            is_throttled=False,
            is_disabled=service.get("UnitFileState") == "masked" or socket.get("UnitFileState") == "masked",
        )

    def _show(self, label: str, kind: str) -> dict[str, str]:
        return read_show(self._systemctl("show", f"--property={_PROPERTIES}", self._path(label, kind).name).out)

    def _stale(self, wanted: WantedService | None) -> tuple[str, ...]:
        if wanted is None:
            return ()
        found: set[str] = set()
        for path, text in self.files(wanted).items():
            with contextlib.suppress(FileNotFoundError):
                found.update(systemd_unit.differences(path.read_text(encoding="utf-8", errors="replace"), text))
        return tuple(sorted(found))

    def _systemctl(self, *words: str, limit_s: float = 30.0) -> Answer:
        answer = run("systemctl", "--user", "--no-ask-password", "--no-pager", *words, limit_s=limit_s)
        if answer.exit_code:
            if "connect to bus" in answer.err or "connect to user" in answer.err:
                raise ServiceManagerFailed(
                    f"the user's systemd cannot be reached: {answer.words}",
                    "Log in as that user (not by su or sudo), or keep its systemd running: "
                    "sudo loginctl enable-linger USER. Without systemd: emberd run.",
                )
            raise ServiceManagerFailed(
                f"systemctl --user {' '.join(words)} ended with {answer.exit_code}: {answer.words}",
                "`journalctl --user -n 50` tells more.",
            )
        return answer

    # --- acting ---------------------------------------------------------------------------------------------

    def install(self, wanted: WantedService, tell: Callable[[str], None]) -> bool:
        """Write the units, enable and start them; False if all was so already.

        Raises:
            ServiceManagerFailed: systemd refused, or the service does not start.
            StateUnusable: the units cannot be written.
        """
        label = wanted.label
        found = self.status(label, wanted)
        is_at_work = found.is_running or (found.is_loaded and not wanted.starts_at_login)
        is_left = any(has_leftovers(path) for path in self._paths(label))
        is_right = found.is_installed and not found.is_stale
        if is_right and is_at_work and not is_left and self._is_enabled(wanted):
            return False
        # The port is the socket's: it changes only while neither unit is up.
        if not is_right and found.is_loaded:
            self.stop(label, wanted.stop_limit_s, tell)
        self.write(wanted)
        if not self._is_enabled(wanted):
            self._enable(wanted)
        self._start(label, with_service=wanted.starts_at_login)
        return True

    def _is_enabled(self, wanted: WantedService) -> bool:
        states = [self._show(wanted.label, kind).get("UnitFileState") for kind in ("socket", "service")]
        link = self._folder / "default.target.wants" / self._path(wanted.label, "service").name
        return states == ["enabled", "enabled" if wanted.starts_at_login else "static"] and (
            link.is_symlink() is wanted.starts_at_login
        )

    def _enable(self, wanted: WantedService) -> None:
        socket, service = (path.name for path in self._paths(wanted.label))
        self._systemctl("enable", socket)
        self._systemctl("enable" if wanted.starts_at_login else "disable", service)
        self._systemctl("daemon-reload")  # without a bus `enable` does not, and UnitFileState stays the old one

    def write(self, wanted: WantedService) -> bool:
        """Write the units for the next start, and have systemd read them; False if they are up to date."""
        paths = self._paths(wanted.label)
        is_right = all(path.exists() and not file_problems(path) for path in paths) and not self._stale(wanted)
        if not is_right or any(has_leftovers(path) for path in paths):
            write_files(self.files(wanted))
        units = [self._show(wanted.label, kind) for kind in ("socket", "service")]
        if not is_right or any(unit.get("NeedDaemonReload") != "no" for unit in units):
            self._systemctl("daemon-reload")
        return not is_right

    def start(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:  # noqa: ARG002  # as launchd's
        """Start socket and service; False if the service runs already.

        Raises:
            ServiceManagerFailed: it is not installed, systemd refused, or it does not start.
        """
        if not all(path.exists() for path in self._paths(label)):
            raise ServiceManagerFailed(
                f"{label} is not installed", "Install it: emberd install. Or run it in the foreground: emberd run."
            )
        if self.status(label).is_running:
            return False
        self._start(label, with_service=True)
        return True

    def _start(self, label: str, *, with_service: bool) -> None:
        socket, service = (path.name for path in self._paths(label))
        # Forgets a start limit that was hit: somebody has mended the cause, or wants to see it again.
        run("systemctl", "--user", "reset-failed", socket, service)
        self._systemctl("start", socket)
        if not with_service:
            return
        # Not waited for here: READY=1 may take long, and who waits below sees a service that fails.
        self._systemctl("start", "--no-block", service)
        deadline_s = time.monotonic() + _START_LIMIT_S
        found = self.status(label)
        while time.monotonic() < deadline_s:
            found = self.status(label)
            if found.is_running:
                return
            time.sleep(_LOOK_AGAIN_S)
        raise ServiceManagerFailed(
            f"systemd has loaded {service}, but it does not run (last exit: {found.last_exit or 'none'})",
            f"Look at: journalctl --user -u {service} -n 50",
        )

    def stop(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Stop the socket and the service, so that no connection starts it again before the next login.

        Raises:
            ServiceManagerFailed: systemd refused, or it has not ended.
        """
        if not self.status(label).is_loaded:
            return False
        tell("stopping: running requests may finish first")
        self._systemctl("stop", *(path.name for path in self._paths(label)), limit_s=stop_limit_s + _BEYOND_STOP_S)
        return True

    def uninstall(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Stop and disable the units and remove them; False if there was nothing.

        Raises:
            ServiceManagerFailed: systemd refused, or the service has not ended.
            StateUnusable: a file cannot be removed.
        """
        was_loaded = self.stop(label, stop_limit_s, tell)
        paths = self._paths(label)
        there = [path.name for path in paths if path.exists()]
        if there:
            self._systemctl("disable", *there)
        was_there = remove_files(paths)
        if was_there or was_loaded:
            self._systemctl("daemon-reload")
            run("systemctl", "--user", "reset-failed", *(path.name for path in paths))
        return was_there or was_loaded


def lingers() -> bool | None:
    """Tell whether the user's systemd goes on after logout (loginctl(1)), None if that cannot be told."""
    try:
        answer = run("loginctl", "show-user", str(os.getuid()), "--property=Linger")
    except ServiceManagerFailed:
        return None
    return {"Linger=yes": True, "Linger=no": False}.get(answer.out.strip())


def _read(path: Path) -> tuple[str | None, tuple[str, ...]]:
    """Return label and command line of a service unit of emberd's; None and nothing if it is none."""
    try:
        values = systemd_unit.assignments(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None, ()
    label = systemd_unit.variable(values, LABEL_VARIABLE)
    line = values.get("Service.ExecStart", ("",))[-1]
    return (label, tuple(systemd_unit.words(line))) if label else (None, ())


def _last_exit(service: dict[str, str]) -> str | None:
    code, status = service.get("ExecMainCode", "0"), service.get("ExecMainStatus", "0")
    if code in {"0", ""} or service.get("MainPID") not in {"0", None}:
        return None
    words = status if code == _EXITED else f"signal {status}"
    result = service.get("Result", "success")
    return words if result in {"success", "exit-code", "signal"} else f"{words} ({result})"
