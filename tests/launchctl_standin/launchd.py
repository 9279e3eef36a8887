"""The process that plays launchd for one state directory: it owns the jobs and their sockets. One thread, one loop.

`launchctl` starts it when it is not there. In the state directory:

launchd.sock     where it is asked: one line of JSON each way
launchd.pid      its pid
launchd.log      why something was refused: what macOS keeps in the unified log
disabled.json    overrides of `enable` and `disable` by user; they outlive this process, as they outlive a boot
switches.json    what a test sets, read before each request; see `DEFAULTS`

It ends when told so (`launchctl standin-end`), with its state directory, or after a quarter of an hour without a
request; its jobs end before it. If it is killed, the kernel kills its jobs (Linux).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import plistlib
import selectors
import signal
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any

import schema
import texts
from job import NOT_RUNNING, RUNNING, SCHEDULED, Job, wants_restart

DEFAULTS: dict[str, Any] = {
    "gui_absent": 0,  # 112 or 125: there is no GUI login, and this is what its domain answers
    "speed": 1.0,  # divides ThrottleInterval and ExitTimeOut
    "bootout_lingers_s": 0.2,  # how long a job stays known after its process has ended
    "bootout_code": 0,  # 36: what the first bootout of a running job answers on some systems
    "loaded_code": texts.INPUT_OUTPUT,  # bootstrap of what is loaded or being removed: 5 or 37
    "disabled_code": texts.INPUT_OUTPUT,  # bootstrap of what is disabled: 5 or 119
    "bootstrap_fails": 0,  # so many more bootstraps fail with 5, without a cause that anybody can see
}
LONGEST_IDLE_S = 900.0
LONGEST_LOOK_S = 1.0
REQUEST_S = 10.0
SOCKET, PID, LOG, DISABLED, SWITCHES = (
    "launchd.sock",
    "launchd.pid",
    "launchd.log",
    "disabled.json",
    "switches.json",
)
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_SESSION = {"gui": "Aqua", "user": "Background"}

Answer = tuple[int, str, str]
"""Exit code, standard output, standard error."""


class Refused(Exception):
    """A verb failed: its exit code and what it prints on standard error."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code, self.words = code, words


class Launchd:
    """Domains, jobs, overrides and the loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[tuple[str, str], Job] = {}
        self.switches = dict(DEFAULTS)
        self.is_ending = False
        self.selector = selectors.DefaultSelector()
        self.asked_s = time.monotonic()
        self.connection: socket.socket | None = None

    # --- the loop -------------------------------------------------------------------------------------------

    def run(self, listener: socket.socket) -> None:
        """Serve until told to end, and until the last job is gone."""
        reader, writer = socket.socketpair()
        for each in (reader, writer, listener):
            each.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self.end(is_at_once=False))
        self.selector.register(listener, selectors.EVENT_READ)
        self.selector.register(reader, selectors.EVENT_READ)
        while self.jobs or not self.is_ending:
            for key, _ in self.selector.select(self._rest_s()):
                if key.fileobj is listener:
                    self._accept(listener)
                elif key.fileobj is reader:
                    reader.recv(4096)
            self._advance()
            if not self.folder.exists() or time.monotonic() > self.asked_s + LONGEST_IDLE_S:
                self.end(is_at_once=True)

    def _rest_s(self) -> float:
        due = [
            each
            for job in self.jobs.values()
            for each in (job.spawn_due_s, job.kill_due_s, job.gone_due_s)
            if each is not None
        ]
        return max(0.0, min([LONGEST_LOOK_S, *(each - time.monotonic() for each in due)]))

    def _advance(self) -> None:
        """Do what is due."""
        for key, job in list(self.jobs.items()):
            now_s = time.monotonic()
            if job.has_ended():
                self._note(f"{job.label}: ended, wait status {job.last_status}")
                self._after_end(job)
            if job.kill_due_s is not None and now_s >= job.kill_due_s:
                self._note(f"{job.label}: still there after exit timeout, sending SIGKILL")
                job.kill()
            if job.is_leaving and job.pid is None and job.gone_due_s is None:
                self._close(job)
                job.gone_due_s = now_s + self.switches["bootout_lingers_s"]
            if job.gone_due_s is not None and now_s >= job.gone_due_s:
                self._answer_waiting(job, (texts.NO_SERVICE, "", self._not_found(job.domain, job.label)))
                del self.jobs[key]
                continue
            if job.spawn_due_s is not None and now_s >= job.spawn_due_s:
                self._watch(job, is_watched=False)
                job.start()
                self._note(f"{job.label}: started, pid {job.pid}, {job.reason}")
                self._answer_waiting(job, (0, str(job.pid), ""))
            elif job.state == NOT_RUNNING and not job.is_leaving:
                self._wait_for_connection(job)

    def _after_end(self, job: Job) -> None:
        if job.is_leaving:
            return
        if job.is_to_restart:
            job.is_to_restart = False
            job.schedule("kickstart", throttled=False)
        elif wants_restart(job.plist, job.last_status or 0, self._is_loaded):
            job.schedule("inefficient", throttled=True)

    def _wait_for_connection(self, job: Job) -> None:
        """Start a job whose socket has somebody waiting; until then have the loop woken by it."""
        if not job.sockets:
            return
        self._watch(job, is_watched=True)
        with selectors.DefaultSelector() as look:
            for _, each in job.sockets:
                look.register(each, selectors.EVENT_READ)
            if look.select(0):
                self._watch(job, is_watched=False)
                job.schedule("non-ipc demand", throttled=True)

    def _watch(self, job: Job, *, is_watched: bool) -> None:
        known = self.selector.get_map()
        for _, each in job.sockets:
            if is_watched and each not in known:
                self.selector.register(each, selectors.EVENT_READ)
            elif not is_watched and each in known:
                self.selector.unregister(each)

    def _close(self, job: Job) -> None:
        self._watch(job, is_watched=False)
        job.close_sockets()

    def end(self, *, is_at_once: bool) -> None:
        """Shut down: stop all jobs, as a logout does, or kill them."""
        self.is_ending = True
        self.switches["bootout_lingers_s"] = 0
        for job in self.jobs.values():
            self._remove(job)
            if is_at_once:
                job.kill()

    # --- requests -------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(REQUEST_S)
        self.asked_s = time.monotonic()
        self.connection = connection
        try:
            with connection.makefile("rb") as lines:
                request = json.loads(lines.readline())
            self._read_switches()
            answer = self._answer(request["verb"], request["arguments"])
        except (OSError, ValueError):
            connection.close()
            return
        if answer is not None:
            reply(connection, answer)

    def _answer(self, verb: str, arguments: list[str]) -> Answer | None:
        """Carry out a verb; None if it is answered later."""
        self._note(" ".join([verb, *arguments]))
        if self.switches["gui_absent"]:
            for job in self.jobs.values():
                if job.domain.startswith("gui/"):
                    self._remove(job)  # the jobs of a GUI login end with it
        try:
            answer: Answer | None = getattr(self, "do_" + verb.replace("-", "_"))(*arguments)
        except Refused as refused:
            self._note(f"{verb}: {refused.code}: {refused.words.splitlines()[0]}")
            return refused.code, "", refused.words
        return answer

    def _answer_waiting(self, job: Job, answer: Answer) -> None:
        for connection, wants_pid in job.waiting:
            reply(connection, answer if wants_pid or answer[0] else (0, "", ""))
        job.waiting = []

    def _domain(self, domain: str, what: str) -> str:
        """Return the domain if it is there."""
        kind, _, owner = domain.partition("/")
        absent = self.switches["gui_absent"] if kind == "gui" else 0
        if kind not in _SESSION or owner != str(os.getuid()):
            absent = absent or texts.NO_DOMAIN
        if absent == texts.NO_DOMAIN:
            raise Refused(absent, f"Could not find domain for {self._domain_words(domain)}")
        if absent:
            raise Refused(absent, texts.failed(what, absent))
        return domain

    @staticmethod
    def _domain_words(domain: str) -> str:
        kind, _, owner = domain.partition("/")
        return f"user gui: {owner}" if kind == "gui" else f"{kind}: {owner}"

    def _not_found(self, domain: str, label: str) -> str:
        return f'Could not find service "{label}" in domain for {self._domain_words(domain)}'

    def _job(self, domain: str, label: str, what: str) -> Job:
        """Return a loaded job."""
        job = self.jobs.get((self._domain(domain, what), label))
        if job is None:
            raise Refused(texts.NO_SERVICE, self._not_found(domain, label))
        return job

    def _is_loaded(self, label: str) -> bool:
        return any(each.label == label and not each.is_leaving for each in self.jobs.values())

    # --- loading --------------------------------------------------------------------------------------------

    def do_bootstrap(self, domain: str, *paths: str) -> Answer:
        """Load each list; the first that fails ends it."""
        what = "Bootstrap"
        self._domain(domain, what)
        for path in paths:
            self._load(domain, path, what)
        return 0, "", ""

    def _load(self, domain: str, path: str, what: str, *, is_forced: bool = False) -> None:
        left = self.switches["bootstrap_fails"]
        if left:
            self.switches["bootstrap_fails"] = left - 1
            (self.folder / SWITCHES).write_text(json.dumps(self.switches))
            raise Refused(texts.INPUT_OUTPUT, texts.failed(what, texts.INPUT_OUTPUT))
        plist, why = self._read(path, domain.partition("/")[0])
        if plist is None:
            self._note(f"{path}: {why}")
            raise Refused(texts.INPUT_OUTPUT, texts.failed(what, texts.INPUT_OUTPUT))
        label = plist["Label"]
        if not is_forced and self._is_disabled(label, is_by_list=plist.get("Disabled", False)):
            code = self.switches["disabled_code"]
            raise Refused(code, texts.failed(what, code))
        if (domain, label) in self.jobs:
            code = self.switches["loaded_code"]
            raise Refused(code, texts.failed(what, code))
        job = Job(plist, path, domain, lambda: float(self.switches["speed"]))
        for failure in job.load():
            self._note(f"{label}: {failure}")
        self.jobs[domain, label] = job

    @staticmethod
    def _read(path: str, kind: str) -> tuple[dict[str, Any] | None, str]:
        """Return a list that may be loaded, else why it may not."""
        try:
            status = Path(path).stat()
            if not stat.S_ISREG(status.st_mode):
                return None, "is no file"
            plist = plistlib.loads(Path(path).read_bytes())
        except OSError as error:
            return None, str(error.strerror)
        except Exception as error:  # noqa: BLE001  # plistlib raises what its parsers raise
            return None, f"no property list: {error}"
        wrong = schema.errors(plist)
        if status.st_uid != os.getuid() or status.st_mode & _WRITABLE_BY_OTHERS:
            wrong.append(f"bad ownership or permissions: owner {status.st_uid}, mode {status.st_mode & 0o7777:o}")
        if not wrong:
            sessions = plist.get("LimitLoadToSessionType", schema.DEFAULT_SESSION_TYPE)
            if _SESSION[kind] not in (sessions if isinstance(sessions, list) else [sessions]):
                wrong.append(f"LimitLoadToSessionType {sessions} is not for {kind}/")
        return (None, "; ".join(wrong)) if wrong else (plist, "")

    def do_bootout(self, domain: str, label: str) -> Answer:
        """Begin to remove a job; it is gone later. The label may be the path of its list."""
        what = "Boot-out"
        self._domain(domain, what)
        if label.startswith("/"):
            label = next((each.label for each in self.jobs.values() if each.path == label), label)
        job = self.jobs.get((domain, label))
        if job is None:
            raise Refused(texts.NO_SUCH_PROCESS, texts.failed(what, texts.NO_SUCH_PROCESS))
        if job.is_leaving:
            raise Refused(texts.NOW_IN_PROGRESS, texts.failed(what, texts.NOW_IN_PROGRESS))
        was_running = job.pid is not None
        self._remove(job)
        code = self.switches["bootout_code"] if was_running else 0
        return code, "", texts.failed(what, code) if code else ""

    def _remove(self, job: Job) -> None:
        if not job.is_leaving:
            job.is_leaving, job.is_to_restart = True, False
            job.stop()

    def _own_domain(self) -> str:
        """Where the old verbs act: the domain of the caller's session."""
        return f"{'user' if self.switches['gui_absent'] else 'gui'}/{os.getuid()}"

    def do_load(self, is_forced: str, *paths: str) -> Answer:
        """Load; what fails is printed, and the exit code is 0 all the same."""
        said = []
        for path in paths:
            try:
                if is_forced:
                    plist, _ = self._read(path, self._own_domain().partition("/")[0])
                    if plist is not None:
                        self._override(plist["Label"], is_disabled=False)
                self._load(self._own_domain(), path, "Load", is_forced=bool(is_forced))
            except Refused as refused:
                words = texts.RICHER_LOAD.format(verb="bootstrap")
                said.append(refused.words.replace(texts.RICHER, words))
        return 0, "", "\n".join(said)

    def do_unload(self, is_forced: str, *paths: str) -> Answer:
        """Unload; as `load`, never a failure. With -w the job stays disabled."""
        said = []
        for path in paths:
            job = next((each for each in self.jobs.values() if each.path == path and not each.is_leaving), None)
            if job is None:
                words = texts.RICHER_LOAD.format(verb="bootout")
                said.append(f"Unload failed: {texts.INPUT_OUTPUT}: {texts.text_of(texts.INPUT_OUTPUT)}\n{words}")
            else:
                self._remove(job)
            label = job.label if job is not None else self._label_in(path)
            if is_forced and label:
                self._override(label, is_disabled=True)
        return 0, "", "\n".join(said)

    @staticmethod
    def _label_in(path: str) -> str:
        try:
            return str(plistlib.loads(Path(path).read_bytes())["Label"])
        except Exception:  # noqa: BLE001  # whatever it is, it has no label
            return ""

    def do_standin_login(self, folder: str) -> Answer:
        """Load what a login loads: all agents of a folder that are not disabled. The stand-in's own verb."""
        said = []
        for path in sorted(Path(folder).glob("*.plist")):
            try:
                self._load(self._own_domain(), str(path), "Bootstrap")
            except Refused as refused:
                said.append(f"{path.name}: {refused.words}")
        return 0, "", "\n".join(said)

    # --- running --------------------------------------------------------------------------------------------

    def do_kickstart(self, is_killing: str, wants_pid: str, domain: str, label: str) -> Answer | None:
        """Start now, whatever the conditions; with -k kill what runs, with SIGKILL, first."""
        job = self._job(domain, label, "Kickstart")
        if job.is_leaving:
            raise Refused(texts.ALREADY_IN_PROGRESS, texts.failed("Kickstart", texts.ALREADY_IN_PROGRESS))
        if self._is_disabled(label, is_by_list=False):
            raise Refused(texts.DISABLED, texts.failed("Kickstart", texts.DISABLED))
        if job.state == RUNNING and not is_killing:
            return 0, str(job.pid) if wants_pid else "", ""
        if self.connection is not None:
            job.waiting.append((self.connection, bool(wants_pid)))
        if job.pid is None:
            job.schedule("kickstart", throttled=False)
        else:
            job.is_to_restart = True
            if is_killing:
                job.kill()
        return None

    def do_kill(self, number: str, domain: str, label: str) -> Answer:
        """Send a signal; KeepAlive may start it again."""
        job = self._job(domain, label, "Kill")
        if job.pid is None:
            raise Refused(texts.NO_SUCH_PROCESS, "No process to signal.")
        job.send(int(number))
        return 0, "", ""

    def do_start(self, label: str) -> Answer:
        """Start by label, in the caller's domain (the old verb)."""
        job = self.jobs.get((self._own_domain(), label))
        if job is None:
            return texts.NO_SUCH_PROCESS, "", ""
        if job.pid is None and not job.is_leaving:
            job.schedule("start", throttled=False)
        return 0, "", ""

    def do_stop(self, label: str) -> Answer:
        """Stop by label (the old verb); KeepAlive may start it again."""
        job = self.jobs.get((self._own_domain(), label))
        if job is None:
            return texts.NO_SUCH_PROCESS, "", ""
        if job.pid is not None or job.state == SCHEDULED:
            job.stop()
        return 0, "", ""

    # --- overrides ------------------------------------------------------------------------------------------

    def _overrides(self) -> dict[str, dict[str, bool]]:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, dict[str, bool]] = json.loads((self.folder / DISABLED).read_text())
            return found
        return {}

    def _override(self, label: str, *, is_disabled: bool) -> None:
        overrides = self._overrides()
        overrides.setdefault(str(os.getuid()), {})[label] = is_disabled
        temporary = self.folder / (DISABLED + ".new")
        temporary.write_text(json.dumps(overrides))
        temporary.replace(self.folder / DISABLED)

    def _is_disabled(self, label: str, *, is_by_list: bool) -> bool:
        return self._overrides().get(str(os.getuid()), {}).get(label, is_by_list)

    def do_enable(self, domain: str, label: str) -> Answer:
        """Let it be loaded; says nothing of whether there is such a job."""
        self._domain(domain, "Enable")
        self._override(label, is_disabled=False)
        return 0, "", ""

    def do_disable(self, domain: str, label: str) -> Answer:
        """Keep it from being loaded from now on; what runs goes on."""
        self._domain(domain, "Disable")
        self._override(label, is_disabled=True)
        return 0, "", ""

    def do_print_disabled(self, domain: str) -> Answer:
        """List the overrides of the user, the same in both domains."""
        self._domain(domain, "Print-disabled")
        known = self._overrides().get(str(os.getuid()), {})
        lines = [f'\t\t"{label}" => {"disabled" if known[label] else "enabled"}' for label in sorted(known)]
        return 0, "\n".join(["\tdisabled services = {", *lines, "\t}"]), ""

    # --- looking --------------------------------------------------------------------------------------------

    def do_print(self, domain: str, label: str) -> Answer:
        """Print a job, or a domain if there is no label."""
        if label:
            try:
                return 0, self._job(domain, label, "Print").printed(), ""
            except Refused as refused:
                if refused.code != texts.NO_SERVICE:
                    raise
                raise Refused(refused.code, f"Bad request.\n{refused.words}") from None
        self._domain(domain, "Print")
        lines = [
            f"\t\t{job.pid or 0:8} {job.list_status:>6} \t{job.label}"
            for job in self.jobs.values()
            if job.domain == domain
        ]
        kind = "user gui" if domain.startswith("gui") else "user"
        return 0, "\n".join([f"{domain} = {{", f"\ttype = {kind}", "\tservices = {", *lines, "\t}", "}"]), ""

    def do_list(self, label: str) -> Answer:
        """List the jobs of the caller's domain, or one."""
        domain = self._own_domain()
        if label:
            job = self.jobs.get((domain, label))
            if job is None:
                raise Refused(texts.NO_SERVICE, f'Could not find service "{label}" in domain for port')
            return 0, job.listed(), ""
        jobs = [job for job in self.jobs.values() if job.domain == domain]
        lines = [f"{'-' if job.pid is None else job.pid}\t{job.list_status}\t{job.label}" for job in jobs]
        return 0, "\n".join(["PID\tStatus\tLabel", *lines]), ""

    def do_managername(self) -> Answer:
        """Name the caller's session."""
        return 0, _SESSION[self._own_domain().partition("/")[0]], ""

    def do_standin_end(self, is_at_once: str) -> Answer:
        """End, as at a shutdown. The stand-in's own verb."""
        self.end(is_at_once=bool(is_at_once))
        return 0, "", ""

    # --- files ----------------------------------------------------------------------------------------------

    def _read_switches(self) -> None:
        if not self.is_ending:
            with contextlib.suppress(OSError, ValueError):
                self.switches = DEFAULTS | json.loads((self.folder / SWITCHES).read_text())

    def _note(self, words: str) -> None:
        with contextlib.suppress(OSError), (self.folder / LOG).open("a") as log:
            log.write(f"{time.monotonic():.3f} {words}\n")


def reply(connection: socket.socket, answer: Answer) -> None:
    """Answer, and forget the caller."""
    code, out, error = answer
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps({"code": code, "out": out, "error": error}).encode() + b"\n")
    connection.close()


def main(folder: Path) -> None:
    """Take the state directory, say so by closing standard output, and serve."""
    lock = os.open(folder / PID, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # another one was faster
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("launchd")  # the name under which others see who holds the sockets
    os.chdir(folder)  # the path of a socket may have 104 bytes; a relative one has few
    Path(SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(SOCKET)
    Path(SOCKET).chmod(0o600)
    listener.listen(64)
    os.chdir("/")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    Launchd(folder).run(listener)
    with contextlib.suppress(OSError):
        (folder / SOCKET).unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
