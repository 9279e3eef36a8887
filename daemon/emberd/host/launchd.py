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
from xml.parsers.expat import ExpatError

from emberd.core import launch_agent
from emberd.core.errors import ConfigError, ServiceManagerFailed
from emberd.core.service import (
    LABEL_VARIABLE,
    Outcome,
    PrintedJob,
    ServiceStatus,
    is_disabled,
    is_headless,
    is_throttled,
    judge,
    last_error,
    read_print,
)
from emberd.host.files import make_private_folder
from emberd.host.service_files import file_problems, has_leftovers, remove_files, run, template, write_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from emberd.core.service import WantedService
    from emberd.host.service_files import Answer

_LOOK_AGAIN_S = 0.1
_LONGEST_PAUSE_S = 5.0
_FIRST_PAUSE_S = 0.25
_TEARDOWN_S = 10.0
"""What launchd needs beyond ExitTimeOut until a label is free again: 3 to 5 s are seen."""
_START_LIMIT_S = 20.0
"""Above ThrottleInterval: a job that ended just now is not started before."""
_LAST_WORDS_BYTES = 8192
_CONSOLE = Path("/dev/console")
_HEAD = (
    "<!-- Written by `emberd install`: change the settings and run it again. `emberd uninstall` removes it. -->\n"
)


class Launchd:
    """The user's launchd.

    Args:
        home: the home directory; another folder in tests.
    """

    name = "launchd"

    def __init__(self, home: Path | None = None) -> None:
        self._home = home or Path.home()

    def log_path(self, label: str) -> Path:
        """Return the file for what emberd prints before its log is set up."""
        return self._home / "Library" / "Logs" / "emberd" / f"{label}.log"

    def last_words(self, label: str) -> str:
        """Return the last error in the job's log, empty if there is none."""
        try:
            with self.log_path(label).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
                return last_error(log.read().decode(errors="replace"))
        except OSError:
            return ""

    def files(self, wanted: WantedService) -> dict[Path, str]:
        """Return the property list.

        Raises:
            ConfigError: launchd would refuse it.
        """
        text = plistlib.dumps(self._job(wanted), sort_keys=False).decode()
        head, opening, rest = text.partition('<plist version="1.0">')
        return {self._path(wanted.label): head + _HEAD + opening + rest}

    def _job(self, wanted: WantedService) -> dict[str, Any]:
        pattern = plistlib.loads(template("launchd", "io.github.emberd.plist").encode())
        job = launch_agent.fill(pattern, wanted)
        if found := launch_agent.problems(job):
            raise ConfigError(f"the property list would not be valid: {'; '.join(found)}", "Mend the settings.")
        return job

    def _path(self, label: str) -> Path:
        return self._home / "Library" / "LaunchAgents" / f"{label}.plist"

    def installed_login(self, label: str) -> bool | None:
        """Tell whether the installed job starts at login, None if none is installed."""
        job = _read(self._path(label))
        return None if job is None else launch_agent.starts_at_login(job)

    def labels(self, config: Path) -> tuple[str, ...]:
        """Return the labels of the installed jobs that run on this settings file."""
        labels = [path.stem for path in self._path("x").parent.glob("*.plist")]
        return tuple(sorted(label for label in labels if str(config) in self.program(label)))

    def program(self, label: str) -> tuple[str, ...]:
        """Return the command line of an installed job of emberd's, empty if there is none."""
        job = _read(self._path(label)) or {}
        variables, words = job.get("EnvironmentVariables"), job.get("ProgramArguments")
        is_ours = isinstance(variables, dict) and LABEL_VARIABLE in variables
        return tuple(map(str, words)) if is_ours and isinstance(words, list) else ()

    # --- looking --------------------------------------------------------------------------------------------

    def status(self, label: str, wanted: WantedService | None = None) -> ServiceStatus:
        """Look at the property list and ask launchd.

        Raises:
            ServiceManagerFailed: launchctl is not there or does not answer.
        """
        path = self._path(label)
        domain, job = self._find(label) or (None, PrintedJob())
        disabled = run("launchctl", "print-disabled", domain or self._domains()[0])
        return ServiceStatus(
            manager=self.name,
            label=label,
            files=(str(path),),
            is_installed=path.exists(),
            is_loaded=domain is not None,
            is_running=job.pid is not None,
            pid=job.pid,
            last_exit=job.last_exit,
            state=job.state,
            domain=domain,
            stale=self._stale(path, wanted),
            is_broken=path.exists() and _read(path) is None,
            problems=self._problems(path),
            is_throttled=is_throttled(job.process_type),
            is_disabled=is_disabled(disabled.out, label) if disabled.exit_code == 0 else None,
        )

    def _stale(self, path: Path, wanted: WantedService | None) -> tuple[str, ...]:
        installed = _read(path)
        if wanted is None or installed is None:
            return ()
        return launch_agent.differences(installed, self._job(wanted))

    def _problems(self, path: Path) -> tuple[str, ...]:
        if not path.exists():
            return ()
        installed = _read(path)
        content = (f"{path} is no property list",) if installed is None else launch_agent.problems(installed)
        return (*file_problems(path), *content)

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
        answer = run("launchctl", "print", gui)
        return (user, gui) if _outcome(answer) is Outcome.NO_DOMAIN else (gui, user)

    def _find(self, label: str) -> tuple[str, PrintedJob] | None:
        """Return the domain in which the job is loaded, and what launchd prints of it."""
        for domain in self._domains():
            job = self._printed(domain, label)
            if job is not None:
                return domain, job
        return None

    def _printed(self, domain: str, label: str) -> PrintedJob | None:
        answer = run("launchctl", "print", f"{domain}/{label}")
        outcome = _outcome(answer)
        if outcome is Outcome.DONE:
            return read_print(answer.out)
        if outcome in {Outcome.NOT_LOADED, Outcome.NO_DOMAIN}:
            return None
        raise ServiceManagerFailed(f"launchctl print: {answer.words}", "Try again.")

    # --- acting ---------------------------------------------------------------------------------------------

    def install(self, wanted: WantedService, tell: Callable[[str], None]) -> bool:
        """Write the property list, load it, wait until the job runs; False if all was so already.

        Raises:
            ServiceManagerFailed: launchd refused, or the job does not start.
            StateUnusable: the file cannot be written.
        """
        path, label = self._path(wanted.label), wanted.label
        found = self.status(label, wanted)
        is_at_work = found.is_running or (found.is_loaded and not wanted.starts_at_login)
        if found.is_installed and not found.is_stale and is_at_work and not found.is_disabled:
            if not has_leftovers(path):
                return False
            write_files(self.files(wanted))
            return True
        make_private_folder(Path(wanted.log).parent)
        self.write(wanted)
        domain = self._load(label, wanted.stop_limit_s, tell)
        if wanted.starts_at_login:
            self._wait_until_running(domain, label)
        return True

    def write(self, wanted: WantedService) -> bool:
        """Write the property list for the next login; False if it is up to date."""
        path = self._path(wanted.label)
        is_right = path.exists() and not self._stale(path, wanted) and not self._problems(path)
        if is_right and not has_leftovers(path):
            return False
        make_private_folder(Path(wanted.log).parent)
        write_files(self.files(wanted))
        return not is_right

    def start(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Load the job if it is not loaded, and start it; False if it runs already.

        Raises:
            ServiceManagerFailed: it is not installed, launchd refused, or the job does not start.
        """
        if not self._path(label).exists():
            raise _not_installed(label)
        found = self._find(label)
        if found is not None and found[1].pid is not None and found[1].state == "running":
            return False
        domain = found[0] if found is not None else self._load(label, stop_limit_s, tell)
        self._kickstart(domain, label, stop_limit_s)
        self._wait_until_running(domain, label)
        return True

    def stop(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Unload the job, so that neither its socket nor a crash starts it again before the next login.

        Raises:
            ServiceManagerFailed: launchd refused, or the job has not ended.
        """
        was_loaded = False
        while (found := self._find(label)) is not None:
            if not was_loaded:
                tell("stopping: running requests may finish first")
            self._unload(found[0], label, stop_limit_s)
            was_loaded = True
        return was_loaded

    def uninstall(self, label: str, stop_limit_s: int, tell: Callable[[str], None]) -> bool:
        """Unload the job and remove its property list; False if there was nothing.

        Raises:
            ServiceManagerFailed: launchd refused, or the job has not ended.
            StateUnusable: the file cannot be removed.
        """
        was_loaded = self.stop(label, stop_limit_s, tell)
        return remove_files([self._path(label)]) or was_loaded

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

    def _run_known(self, verb: str, *words: str) -> Outcome:
        answer = run("launchctl", verb, *words)
        outcome = _outcome(answer)
        if outcome is Outcome.REFUSED:
            raise ServiceManagerFailed(
                f"launchctl {verb} ended with {answer.exit_code}: {answer.words}",
                f"`launchctl error {answer.exit_code}` explains the number.",
            )
        return outcome

    def _unload(self, domain: str, label: str, stop_limit_s: int) -> None:
        """Unload the job and wait until launchd knows it no more."""
        self._run_known("bootout", f"{domain}/{label}")
        deadline_s = time.monotonic() + stop_limit_s + _TEARDOWN_S
        while self._printed(domain, label) is not None:
            if time.monotonic() > deadline_s:
                raise ServiceManagerFailed(
                    f"launchd has not ended {label} within {stop_limit_s + _TEARDOWN_S:.0f} s",
                    "Try again; a restart of the computer ends it for certain.",
                )
            time.sleep(_LOOK_AGAIN_S)

    def _bootstrap(self, domain: str, label: str, limit_s: float, tell: Callable[[str], None]) -> bool:
        """Load the job; False if there is no such domain."""
        deadline_s, pause_s, has_told = time.monotonic() + limit_s, _FIRST_PAUSE_S, False
        while True:
            answer = run("launchctl", "bootstrap", domain, str(self._path(label)))
            outcome = _outcome(answer)
            if outcome is Outcome.DONE:
                return True
            if outcome is Outcome.NO_DOMAIN:
                return False
            if outcome is Outcome.BUSY and self._printed(domain, label) is not None:
                return True  # somebody else has loaded it meanwhile
            if outcome in {Outcome.REFUSED, Outcome.NOT_LOADED} or time.monotonic() + pause_s > deadline_s:
                raise ServiceManagerFailed(
                    f"launchd does not load {self._path(label)}: {answer.words or answer.exit_code}",
                    "Is it switched off in System Settings, General, Login Items? Then allow emberd (or python3) "
                    "there and try again.",
                )
            if outcome is Outcome.DISABLED:
                self._run_known("enable", f"{domain}/{label}")
            if not has_told:
                tell(f"launchd is not ready yet ({answer.words}); trying for up to {limit_s:.0f} s")
                has_told = True
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _kickstart(self, domain: str, label: str, stop_limit_s: int) -> None:
        deadline_s, pause_s = time.monotonic() + stop_limit_s + _TEARDOWN_S, _FIRST_PAUSE_S
        while True:
            outcome = self._run_known("kickstart", f"{domain}/{label}")
            if outcome is not Outcome.BUSY:
                return
            job = self._printed(domain, label)
            if job is not None and job.state == "running":
                return
            if time.monotonic() + pause_s > deadline_s:
                raise ServiceManagerFailed(f"launchd does not start {label}", "Try again: emberd start.")
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _wait_until_running(self, domain: str, label: str) -> None:
        deadline_s = time.monotonic() + _START_LIMIT_S
        job: PrintedJob | None = None
        while time.monotonic() < deadline_s:
            job = self._printed(domain, label)
            if job is not None and job.pid is not None:
                return
            time.sleep(_LOOK_AGAIN_S)
        last_exit = job.last_exit if job is not None else None
        raise ServiceManagerFailed(
            f"launchd has loaded {label}, but it does not run"
            + (f" (last exit: {last_exit})" if last_exit else ""),
            f"Look at {self.log_path(label)}. 78 without a word there: the log itself could not be opened.",
        )


def _outcome(answer: Answer) -> Outcome:
    return judge(answer.exit_code, answer.words)


def _owns_console() -> bool:
    try:
        return _CONSOLE.stat().st_uid == os.getuid()
    except OSError:
        return False


def _read(path: Path) -> dict[str, Any] | None:
    """Return an installed job, None if there is none or it cannot be read."""
    try:
        content = plistlib.loads(path.read_bytes())
    except (OSError, ValueError, ExpatError, plistlib.InvalidFileException):
        return None
    return content if isinstance(content, dict) else None


def _not_installed(label: str) -> ServiceManagerFailed:
    return ServiceManagerFailed(
        f"{label} is not installed", "Install it: emberd install. Or run it in the foreground: emberd run."
    )
