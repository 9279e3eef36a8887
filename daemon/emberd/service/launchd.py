"""emberd as a LaunchAgent, by launchctl(1).

The sequence and the exit codes are those of the reference, section 7.3: enable, bootout, wait until `print` knows
the job no more (bootout does not wait), bootstrap until it is taken.
"""

from __future__ import annotations

import os
import plistlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emberd.core.errors import ConfigError, ServiceManagerFailed
from emberd.host.files import make_private_folder
from emberd.service import plist
from emberd.service.files import remove_files, run, said, template, write_files
from emberd.service.launchctl import (
    Outcome,
    PrintedJob,
    is_disabled,
    is_headless,
    is_throttled,
    judge,
    read_print,
)
from emberd.service.manager import START_LIMIT_S, ServiceManager, wait_until
from emberd.service.wanted import ServiceStatus, last_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from subprocess import CompletedProcess

    from emberd.service.wanted import Installed, WantedService

_LONGEST_PAUSE_S = 5.0
_FIRST_PAUSE_S = 0.25
_TEARDOWN_S = 10.0
"""What launchd needs beyond ExitTimeOut until a label is free again: 3 to 5 s are seen."""
_LAST_WORDS_BYTES = 8192
_CONSOLE = Path("/dev/console")


class Launchd(ServiceManager):
    """The user's launchd."""

    name = "launchd"
    _kinds = ("plist",)

    def __init__(self) -> None:
        super().__init__(Path.home() / "Library" / "LaunchAgents")

    def log_path(self, label: str) -> Path:
        """Return the file that the job has for its output."""
        return Path.home() / "Library" / "Logs" / "emberd" / f"{label}.log"

    def where_it_says(self, label: str) -> str:
        """Return that file."""
        return str(self.log_path(label))

    def last_words(self, label: str) -> str:
        """Return the last error in it."""
        try:
            with self.log_path(label).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
                return last_error(log.read().decode(errors="replace"))
        except OSError:
            return ""

    def search_path(self, wanted: WantedService) -> str:
        """Return the PATH in the property list."""
        path: str = self._job(wanted)["EnvironmentVariables"]["PATH"]
        return path

    def files(self, wanted: WantedService) -> dict[Path, str]:
        """Return the property list."""
        [path] = self._paths(wanted.label)
        return {path: plist.write(self._job(wanted))}

    def _job(self, wanted: WantedService) -> dict[str, Any]:
        job = plist.fill(plistlib.loads(template("launchd", "io.github.emberd.plist").encode()), wanted)
        if found := plist.problems(job):
            raise ConfigError(f"the property list would not be valid: {'; '.join(found)}", "Mend the settings.")
        return job

    def _installed(self, content: bytes, stem: str) -> Installed | None:
        job = plist.read(content)
        return None if job is None else plist.installed(job, stem)

    def _differences(self, content: bytes, wanted: str) -> Sequence[str]:
        job = plist.read(content)
        return () if job is None else plist.differences(job, plistlib.loads(wanted.encode()))

    def _problems(self, label: str) -> tuple[str, ...]:
        [path] = self._paths(label)
        try:
            job = plist.read(path.read_bytes())
        except FileNotFoundError:
            return ()
        except OSError:
            job = None
        content = (f"{path} is no property list",) if job is None else plist.problems(job)
        return (*super()._problems(label), *content)

    def write(self, wanted: WantedService) -> bool:
        """Write the property list, and make the folder of the log."""
        make_private_folder(Path(wanted.log).parent)
        return super().write(wanted)

    # --- looking --------------------------------------------------------------------------------------------

    def status(self, label: str, wanted: WantedService | None = None) -> ServiceStatus:
        """Look at the property list and ask launchd."""
        domain, job = self._find(label) or (None, PrintedJob())
        disabled = run("launchctl", "print-disabled", domain or self._domains()[0])
        return ServiceStatus(
            files=tuple(map(str, self._paths(label))),
            is_installed=self._is_there(label),
            is_loaded=domain is not None,
            is_running=job.pid is not None,
            pid=job.pid,
            last_exit=job.last_exit,
            stale=self._stale(wanted),
            problems=self._problems(label),
            is_throttled=is_throttled(job.process_type),
            is_disabled=None if disabled.returncode else is_disabled(disabled.stdout, label),
        )

    def _domains(self) -> tuple[str, str]:
        """Return the domain to use, and the other one.

        gui/UID exists while the user is logged in at the screen; user/UID after a login by ssh too.
        """
        gui, user = f"gui/{os.getuid()}", f"user/{os.geteuid()}"
        if is_headless(
            has_ssh=bool(os.environ.get("SSH_TTY") or os.environ.get("SSH_CONNECTION")),
            owns_console=_owns_console(),
            is_sudo="SUDO_USER" in os.environ,
            has_other_uid=os.getuid() != os.geteuid(),
        ):
            return user, gui
        return (user, gui) if _outcome(run("launchctl", "print", gui)) is Outcome.NO_DOMAIN else (gui, user)

    def _find(self, label: str) -> tuple[str, PrintedJob] | None:
        """Return the domain in which the job is loaded, and what launchd prints of it."""
        for domain in self._domains():
            job = self._printed(domain, label)
            if job is not None:
                return domain, job
        return None

    def _printed(self, domain: str, label: str) -> PrintedJob | None:
        """Return what launchd prints of the job, None if it is not loaded."""
        ran = run("launchctl", "print", f"{domain}/{label}")
        outcome = _outcome(ran)
        if outcome is Outcome.DONE:
            return read_print(ran.stdout)
        if outcome in {Outcome.NOT_LOADED, Outcome.NO_DOMAIN}:
            return None
        raise ServiceManagerFailed(f"launchctl print: {said(ran)}", "Try again.")

    # --- acting ---------------------------------------------------------------------------------------------

    def install(self, wanted: WantedService, tell: Callable[[str], None]) -> bool:
        """Write the property list, load it, wait until the job runs."""
        label = wanted.label
        found = self.status(label, wanted)
        if found.is_installed and not found.is_stale and found.is_at_work(wanted) and not found.is_disabled:
            if not self._has_leftovers(label):
                return False
            write_files(self.files(wanted))
            return True
        self.write(wanted)
        domain = self._load(label, wanted.stop_limit_s, tell)
        if wanted.starts_at_login:
            self._wait_until_running(domain, label)
        return True

    def _start(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        found = self._find(label)
        if found is not None and found[1].pid is not None and found[1].state == "running":
            return False
        domain = found[0] if found is not None else self._load(label, stop_limit_s, tell)
        self._kickstart(domain, label, stop_limit_s)
        self._wait_until_running(domain, label)
        return True

    def stop(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Unload the job, so that neither its socket nor a crash starts it again before the next login."""
        was_loaded = False
        while (found := self._find(label)) is not None:
            if not was_loaded:
                tell("stopping: running requests may finish first")
            self._unload(found[0], label, stop_limit_s)
            was_loaded = True
        return was_loaded

    def uninstall(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Unload the job and remove its property list."""
        was_loaded = self.stop(label, stop_limit_s, tell)
        return remove_files(self._paths(label)) or was_loaded

    def _load(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> str:
        """Load the installed property list anew and return the domain."""
        domains = self._domains()
        for domain in domains:
            self._run_known("enable", f"{domain}/{label}")
            if self._printed(domain, label) is not None:
                tell("stopping what is loaded: running requests may finish first")
            self._unload(domain, label, stop_limit_s)
        for domain in domains:
            if self._bootstrap(domain, label, stop_limit_s + _TEARDOWN_S, tell):
                return domain
            tell(f"launchd has no domain {domain} here")
        raise ServiceManagerFailed(
            f"launchd has neither {domains[0]} nor {domains[1]}",
            "Log in at the screen, or by ssh as the user who is to run emberd.",
        )

    def _run_known(self, verb: str, target: str) -> Outcome:
        ran = run("launchctl", verb, target)
        outcome = _outcome(ran)
        if outcome is Outcome.REFUSED:
            raise ServiceManagerFailed(
                f"launchctl {verb} ended with {ran.returncode}: {said(ran)}",
                f"`launchctl error {ran.returncode}` explains the number.",
            )
        return outcome

    def _unload(self, domain: str, label: str, stop_limit_s: int) -> None:
        """Unload the job and wait until launchd knows it no more."""
        self._run_known("bootout", f"{domain}/{label}")
        limit_s = stop_limit_s + _TEARDOWN_S
        if not wait_until(lambda: self._printed(domain, label) is None, limit_s):
            raise ServiceManagerFailed(
                f"launchd has not ended {label} within {limit_s:.0f} s",
                "Try again; a restart of the computer ends it for certain.",
            )

    def _bootstrap(self, domain: str, label: str, limit_s: float, tell: Callable[[str], None]) -> bool:
        """Load the job; False if there is no such domain."""
        [path] = self._paths(label)
        words, has_told = "", False
        for _ in _attempts(limit_s):
            ran = run("launchctl", "bootstrap", domain, str(path))
            outcome, words = _outcome(ran), said(ran) or str(ran.returncode)
            if outcome is Outcome.DONE:
                return True
            if outcome is Outcome.NO_DOMAIN:
                return False
            if outcome is Outcome.BUSY and self._printed(domain, label) is not None:
                return True  # somebody else has loaded it meanwhile
            if outcome in {Outcome.REFUSED, Outcome.NOT_LOADED}:
                break
            if outcome is Outcome.DISABLED:
                self._run_known("enable", f"{domain}/{label}")
            if not has_told:
                tell(f"launchd is not ready yet ({said(ran)}); trying for up to {limit_s:.0f} s")
                has_told = True
        raise ServiceManagerFailed(
            f"launchd does not load {path}: {words}",
            "Is it switched off in System Settings, General, Login Items? Then allow emberd (or python3) "
            "there and try again.",
        )

    def _kickstart(self, domain: str, label: str, stop_limit_s: int) -> None:
        for _ in _attempts(stop_limit_s + _TEARDOWN_S):
            if self._run_known("kickstart", f"{domain}/{label}") is not Outcome.BUSY:
                return
            job = self._printed(domain, label)
            if job is not None and job.state == "running":
                return
        raise ServiceManagerFailed(f"launchd does not start {label}", "Try again: emberd start.")

    def _wait_until_running(self, domain: str, label: str) -> None:
        def job() -> PrintedJob:
            return self._printed(domain, label) or PrintedJob()

        if wait_until(lambda: job().pid is not None, START_LIMIT_S):
            return
        last_exit = job().last_exit
        raise ServiceManagerFailed(
            f"launchd has loaded {label}, but it does not run"
            + (f" (last exit: {last_exit})" if last_exit else ""),
            f"Look at {self.log_path(label)}. 78 without a word there: the log itself could not be opened.",
        )


def _attempts(limit_s: float) -> Iterator[None]:
    """Come again after longer and longer pauses, within the limit."""
    deadline_s, pause_s = time.monotonic() + limit_s, _FIRST_PAUSE_S
    yield
    while time.monotonic() + pause_s <= deadline_s:
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        yield


def _outcome(ran: CompletedProcess[str]) -> Outcome:
    return judge(ran.returncode, said(ran))


def _owns_console() -> bool:
    try:
        return _CONSOLE.stat().st_uid == os.getuid()
    except OSError:
        return False
