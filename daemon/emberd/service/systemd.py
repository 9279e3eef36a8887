"""emberd as a systemd user service with a socket unit, by systemctl(1)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from emberd.core.errors import ServiceManagerFailed
from emberd.service import unit
from emberd.service.files import remove_files, run, said, template
from emberd.service.manager import START_LIMIT_S, ServiceManager, wait_until
from emberd.service.wanted import ServiceStatus, last_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from emberd.service.wanted import Installed, WantedService

_PROPERTIES = (
    "LoadState,ActiveState,SubState,UnitFileState,MainPID,ExecMainStatus,ExecMainCode,Result,NeedDaemonReload"
)
_EXITED = "1"
"""CLD_EXITED (waitid(2)); the others are signals."""
_BEYOND_STOP_S = 10.0
_UP = ("active", "activating", "reloading")


class Systemd(ServiceManager):
    """The user's systemd."""

    name = "systemd"
    _kinds = ("socket", "service")

    def __init__(self) -> None:
        configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        super().__init__(Path(configuration) / "systemd" / "user")

    def log_path(self, label: str) -> Path:  # noqa: ARG002  # as launchd's
        """Return a path that no unit uses: the journal takes what emberd prints."""
        return Path(os.devnull)

    def where_it_says(self, label: str) -> str:
        """Return a command of journalctl(1)."""
        return f"journalctl --user -u {unit.unit_name(label)} -n 50"

    def last_words(self, label: str) -> str:
        """Return the last error in the journal's lines of the service, empty if they cannot be read."""
        with contextlib.suppress(ServiceManagerFailed):
            lines = run("journalctl", "--user", "-u", self._units(label)[-1], "-n", "50", "-o", "cat")
            return last_error(lines.stdout)
        return ""

    def search_path(self, wanted: WantedService) -> str:  # noqa: ARG002  # as launchd's
        """Return systemd's own."""
        return os.defpath

    def notices(self) -> list[str]:
        """Return what becomes of the service after logout (loginctl(1))."""
        with contextlib.suppress(ServiceManagerFailed):
            if run("loginctl", "show-user", str(os.getuid()), "--property=Linger").stdout.strip() == "Linger=no":
                return [
                    "emberd ends when you log out; `loginctl enable-linger` keeps it running and starts it at boot"
                ]
        return []

    def _stem(self, label: str) -> str:
        return unit.unit_name(label)

    def _units(self, label: str) -> list[str]:
        return [path.name for path in self._paths(label)]

    def files(self, wanted: WantedService) -> dict[Path, str]:
        """Return the units."""
        socket, service = self._paths(wanted.label)
        return {
            socket: unit.fill_socket(template("systemd", "emberd.socket"), wanted),
            service: unit.fill_service(template("systemd", "emberd.service"), wanted),
        }

    def _installed(self, content: bytes, stem: str) -> Installed:  # noqa: ARG002  # as launchd's
        return unit.installed(content.decode(errors="replace"))

    def _differences(self, content: bytes, wanted: str) -> Sequence[str]:
        return unit.differences(content.decode(errors="replace"), wanted)

    # --- looking --------------------------------------------------------------------------------------------

    def status(self, label: str, wanted: WantedService | None = None) -> ServiceStatus:
        """Look at the units and ask systemd."""
        socket, service = self._show(label)
        pid = int(service.get("MainPID") or 0) or None
        is_up = service.get("ActiveState") in _UP
        return ServiceStatus(
            files=tuple(map(str, self._paths(label))),
            is_installed=self._is_there(label),
            is_loaded=is_up or socket.get("ActiveState") in _UP,
            is_running=is_up and pid is not None,
            pid=pid,
            last_exit=_last_exit(service),
            stale=self._stale(wanted),
            problems=self._problems(label),
            is_throttled=False,
            is_disabled=any(each.get("UnitFileState") == "masked" for each in (socket, service)),
        )

    def _show(self, label: str) -> list[dict[str, str]]:
        """Return what systemd says of the socket and of the service."""
        ask = ("show", f"--property={_PROPERTIES}")
        return [unit.read_show(self._systemctl(*ask, name)) for name in self._units(label)]

    def _systemctl(self, *words: str, limit_s: float = 30.0) -> str:
        """Run systemctl and return what it prints."""
        ran = run("systemctl", "--user", "--no-ask-password", "--no-pager", *words, limit_s=limit_s)
        if ran.returncode:
            if "connect to bus" in ran.stderr or "connect to user" in ran.stderr:
                raise ServiceManagerFailed(
                    f"the user's systemd cannot be reached: {said(ran)}",
                    "Log in as that user (not by su or sudo), or keep its systemd running: "
                    "sudo loginctl enable-linger USER. Without systemd: emberd run.",
                )
            raise ServiceManagerFailed(
                f"systemctl --user {' '.join(words)} ended with {ran.returncode}: {said(ran)}",
                "`journalctl --user -n 50` tells more.",
            )
        return ran.stdout

    # --- acting ---------------------------------------------------------------------------------------------

    def install(self, wanted: WantedService, tell: Callable[[str], None]) -> bool:
        """Write the units, enable and start them."""
        label = wanted.label
        found = self.status(label, wanted)
        is_right = found.is_installed and not found.is_stale
        if is_right and found.is_at_work(wanted) and not self._has_leftovers(label) and self._is_enabled(wanted):
            return False
        # The port is the socket's: it changes only while neither unit is up.
        if not is_right and found.is_loaded:
            self.stop(label, wanted.stop_limit_s, tell)
        self.write(wanted)
        if not self._is_enabled(wanted):
            self._enable(wanted)
        self._bring_up(label, with_service=wanted.starts_at_login)
        return True

    def _is_enabled(self, wanted: WantedService) -> bool:
        states = [each.get("UnitFileState") for each in self._show(wanted.label)]
        link = self._folder / "default.target.wants" / self._units(wanted.label)[-1]
        return states == ["enabled", "enabled" if wanted.starts_at_login else "static"] and (
            link.is_symlink() is wanted.starts_at_login
        )

    def _enable(self, wanted: WantedService) -> None:
        socket, service = self._units(wanted.label)
        self._systemctl("enable", socket)
        self._systemctl("enable" if wanted.starts_at_login else "disable", service)
        self._systemctl("daemon-reload")  # without a bus `enable` does not, and UnitFileState stays the old one

    def write(self, wanted: WantedService) -> bool:
        """Write the units, and have systemd read them."""
        has_changed = super().write(wanted)
        if has_changed or any(each.get("NeedDaemonReload") != "no" for each in self._show(wanted.label)):
            self._systemctl("daemon-reload")
        return has_changed

    def _start(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:  # noqa: ARG002  # as launchd's
        if self.status(label).is_running:
            return False
        self._bring_up(label, with_service=True)
        return True

    def _bring_up(self, label: str, *, with_service: bool) -> None:
        socket, service = self._units(label)
        # Forgets a start limit that was hit: somebody has mended the cause, or wants to see it again.
        run("systemctl", "--user", "reset-failed", socket, service)
        self._systemctl("start", socket)
        if not with_service:
            return
        # Not waited for here: READY=1 may take long, and who waits below sees a service that fails.
        self._systemctl("start", "--no-block", service)
        if not wait_until(lambda: self.status(label).is_running, START_LIMIT_S):
            raise ServiceManagerFailed(
                f"systemd has loaded {service}, but it does not run "
                f"(last exit: {self.status(label).last_exit or 'none'})",
                f"Look at: journalctl --user -u {service} -n 50",
            )

    def stop(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Stop the socket and the service, so that no connection starts it again before the next login."""
        if not self.status(label).is_loaded:
            return False
        tell("stopping: running requests may finish first")
        self._systemctl("stop", *self._units(label), limit_s=stop_limit_s + _BEYOND_STOP_S)
        return True

    def uninstall(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Stop and disable the units and remove them."""
        was_loaded = self.stop(label, stop_limit_s, tell)
        paths = self._paths(label)
        if there := [path.name for path in paths if path.exists()]:
            self._systemctl("disable", *there)
        was_there = remove_files(paths)
        if was_there or was_loaded:
            self._systemctl("daemon-reload")
            run("systemctl", "--user", "reset-failed", *self._units(label))
        return was_there or was_loaded


def _last_exit(service: dict[str, str]) -> str | None:
    code, status = service.get("ExecMainCode", "0"), service.get("ExecMainStatus", "0")
    if code in {"0", ""} or service.get("MainPID") not in {"0", None}:
        return None
    words = status if code == _EXITED else f"signal {status}"
    result = service.get("Result", "success")
    return words if result in {"success", "exit-code", "signal"} else f"{words} ({result})"
