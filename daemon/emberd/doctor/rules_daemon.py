"""Conditions of emberd's settings, port, files and process, and of its service. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emberd.core.access import ONE_FAMILY_REMEDY
from emberd.doctor import rules_engine
from emberd.doctor.condition import Kinds

if TYPE_CHECKING:
    from emberd.doctor.condition import Seen
    from emberd.doctor.facts import Facts

LEAST_FREE_BYTES = 512 << 20
"""The engine's log, its rotated copies and the history need some 100 MiB; below this a disk is as good as full."""
HUGE_LOG_BYTES = 1 << 30
CLOCK_SLACK_S = 300.0
"""A network volume's clock may differ from ours by as much."""
LEAST_OPEN_FILES = 256
"""64 of emberd's own and two for each of 96 connections: beyond the 24 that KoboldCPP serves, with room to wait."""

KINDS = Kinds()


# --- settings, port and files -----------------------------------------------------------------------------------


@KINDS.error("SETTINGS_OPEN", "Others can read a file that holds a key")
def _(facts: Facts) -> Seen:
    secret = facts.service.open_secret
    if secret:
        yield (
            f"{secret} has mode {facts.service.open_secret_mode:04o}, and emberd refuses such a file",
            f"chmod 600 {secret}, and choose a new key.",
        )


@KINDS.error("SETTINGS_WRONG", "The settings cannot be used", ("SETTINGS_OPEN", "ENDPOINT_OPEN"))
def _(facts: Facts) -> Seen:
    if facts.service.settings_problem:
        yield facts.service.settings_problem, facts.service.settings_remedy


@KINDS.error("ENDPOINT_OPEN", "Others could reach the model, and no key is asked for")
def _(facts: Facts) -> Seen:
    if facts.service.open_address:
        yield (
            f"endpoint.host is {facts.service.open_address}; emberd does not start like this",
            "Set endpoint.api_key_file, or endpoint.host to 127.0.0.1 and use a tunnel (ssh -L).",
        )


@KINDS.error("ADDRESS_UNUSABLE", "The endpoint's address cannot be used", ("SETTINGS_WRONG",))
def _(facts: Facts) -> Seen:
    if facts.own.address_problem:
        yield (
            facts.own.address_problem,
            "Set endpoint.host to an address of this computer and endpoint.port to 1024 or more.",
        )


@KINDS.error("PORT_TAKEN", "Another program listens on emberd's port", ("SETTINGS_WRONG",))
def _(facts: Facts) -> Seen:
    owner = facts.own.port_owner
    if owner is not None:
        whom, end = (
            (owner.name, "") if owner.pid is None else (f"{owner.name} (pid {owner.pid})", f": kill {owner.pid}")
        )
        yield f"{whom} listens on {facts.settings.endpoint.port}", f"End it{end}, or set endpoint.port."


@KINDS.error("STATE_UNUSABLE", "The state directory cannot be used", ("SETTINGS_WRONG", "DISK_FULL"))
def _(facts: Facts) -> Seen:
    if facts.own.state_problem:
        yield facts.own.state_problem, "Make it yours (chown, chmod 700), or set state.directory."


@KINDS.error("DISK_FULL", "A disk is full")
def _(facts: Facts) -> Seen:
    for space in facts.own.free_spaces:
        if space.free_bytes < LEAST_FREE_BYTES:
            yield (
                f"{space.free_bytes >> 20} MiB free for {space.what} ({space.path})",
                "Make room; macOS needs it for swap files as well.",
            )


@KINDS.warning("ONE_FAMILY_TAKEN", "emberd listens on one of two loopback addresses")
def _(facts: Facts) -> Seen:
    if facts.daemon.endpoint_lacks:
        yield facts.daemon.endpoint_lacks, ONE_FAMILY_REMEDY


@KINDS.warning("SETTINGS_NOT_IN_FORCE", "The settings have changed since emberd read them")
def _(facts: Facts) -> Seen:
    if facts.service.are_settings_newer:
        yield f"{facts.service.settings_path} says something else than what emberd runs with", "emberd reload"


@KINDS.warning("HISTORY_UNREADABLE", "The history cannot be read", ("STATE_UNUSABLE", "DISK_FULL"))
def _(facts: Facts) -> Seen:
    if facts.own.history_problem:
        yield facts.own.history_problem, "Move history.db away; emberd begins a new one."


@KINDS.warning("LOG_HUGE", "The engine's log is very large")
def _(facts: Facts) -> Seen:
    size = facts.own.engine_log_bytes
    if size is not None and size > HUGE_LOG_BYTES:
        yield f"engine.log has {size / 1e9:.1f} GB", "emberd restart rotates it; look at what the engine repeats."


@KINDS.note("CLOCK_BEHIND", "The computer's clock was set back")
def _(facts: Facts) -> Seen:
    behind_s = facts.own.clock_behind_s
    if behind_s is not None and behind_s > CLOCK_SLACK_S:
        yield (
            f"files of emberd are {behind_s / 3600:.1f} h younger than now",
            "Set the clock; emberd waits by another one, only dates in the history and the logs are wrong.",
        )


@KINDS.warning("FEW_OPEN_FILES", "emberd may open only few files")
def _(facts: Facts) -> Seen:
    most = facts.own.most_open_files
    if most is not None and most < LEAST_OPEN_FILES:
        yield (
            f"the hard limit is {most}, and a request takes two",
            "Raise it: LimitNOFILE= of the unit, HardResourceLimits of the property list, or ulimit -Hn.",
        )


# --- the daemon and its service manager -------------------------------------------------------------------------

_KEEPS_IT_DOWN = KINDS.errors
"""All that is wrong so far."""
_NOT_STARTED = ("SERVICE_FILE", "SERVICE_DISABLED", "SERVICE_PROGRAM_MISSING")


@KINDS.error("NOT_RUNNING", "emberd is not running", (*_KEEPS_IT_DOWN, "DAEMON_SILENT", *_NOT_STARTED))
def _(facts: Facts) -> Seen:
    service = facts.service
    if service.is_running is False:
        said = f"; the last one ended so: {service.last_words}" if service.last_words else ""
        yield (
            f"nothing answers the control socket{said}",
            "emberd start, or emberd run to see what it says."
            if service.is_installed
            else "emberd install, or emberd run.",
        )


@KINDS.error("DAEMON_SILENT", "emberd is there and does not answer")
def _(facts: Facts) -> Seen:
    if facts.service.silence:
        pid = "PID" if facts.service.daemon_pid is None else facts.service.daemon_pid
        yield (
            facts.service.silence,
            f"kill -CONT {pid} if it is stopped; else kill -9 {pid}: the next emberd takes over its engine.",
        )


@KINDS.error("SERVICE_DISABLED", "The service is switched off")
def _(facts: Facts) -> Seen:
    if facts.service.is_disabled:
        yield (
            "it was disabled by hand, or in System Settings under Login Items",
            "emberd start" if facts.is_mac else "systemctl --user unmask emberd.service emberd.socket",
        )


@KINDS.error("SERVICE_PROGRAM_MISSING", "The service's program does not exist")
def _(facts: Facts) -> Seen:
    if facts.service.missing_program:
        yield (
            f"{facts.service.missing_program} is gone: its Python was updated, or its environment moved",
            "emberd install, with the emberd that you want to run.",
        )


@KINDS.error("SERVICE_FILE", "The service manager refuses emberd's service file")
def _(facts: Facts) -> Seen:
    if facts.service.file_problem:
        yield facts.service.file_problem, "emberd install writes it again."


@KINDS.warning("SERVICE_STALE", "The installed service file is not this version's", ("SERVICE_PROGRAM_MISSING",))
def _(facts: Facts) -> Seen:
    if facts.service.stale:
        yield facts.service.stale, "emberd upgrade"


@KINDS.note("SERVICE_MISSING", "No service manager starts emberd")
def _(facts: Facts) -> Seen:
    if facts.service.is_installed is False:
        yield "it was started by hand, or not at all", "emberd install"


@KINDS.warning("DAEMON_OLD", "The running daemon is another version")
def _(facts: Facts) -> Seen:
    own, other = facts.service.version, facts.service.daemon_version
    if other and other != own:
        yield (
            f"the daemon is {other}, this program {own}",
            "emberd upgrade, or emberd restart --daemon; no connection is refused.",
        )


@KINDS.warning("THROTTLED", "The system throttles emberd and its engine", ("SERVICE_STALE",))
def _(facts: Facts) -> Seen:
    if facts.service.is_throttled:
        yield (
            "its priority is that of a background program; Metal then decodes at an eighth of its speed",
            "emberd install writes ProcessType Interactive; then emberd stop and emberd start.",
        )


@KINDS.warning("NO_LINGER", "emberd ends when you log out")
def _(facts: Facts) -> Seen:
    if facts.host.lingers is False:
        yield "systemd ends your services with your last session", "loginctl enable-linger"


@KINDS.warning("LOGS_NOT_KEPT", "What emberd says is not kept")
def _(facts: Facts) -> Seen:
    sinks = facts.daemon.log_sinks or ()
    if "file" in sinks or ("journal" in sinks and facts.host.logs_persist is not False):
        return
    if "journal" in sinks or "unified" in sinks:  # info messages of macOS' log do not survive a restart
        yield (
            "the unified log keeps only part of it" if facts.is_mac else "the journal is kept in memory only",
            'Set log.sink = "auto"; see docs/logs.md.'
            if facts.is_mac
            else "sudo mkdir /var/log/journal && sudo systemctl restart systemd-journald",
        )


@KINDS.warning("PSUTIL_TOO_OLD", "psutil is too old for this system")
def _(facts: Facts) -> Seen:
    if facts.own.psutil_failure:
        yield f"psutil {facts.own.psutil_failure}", "pip install --upgrade psutil in emberd's environment."


@KINDS.error("WAITS", "emberd waits, because it could not start", (*_KEEPS_IT_DOWN, *rules_engine.KINDS.errors))
def _(facts: Facts) -> Seen:
    if facts.service.waits_because:
        yield facts.service.waits_because, "Mend the cause; it tries again by itself, or now: emberd restart."
