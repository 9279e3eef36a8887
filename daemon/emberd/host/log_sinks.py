"""Where the log is written: a rotating file, systemd's journal, macOS' unified log, syslog(3)."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import importlib
import os
import socket
import stat
import syslog
from collections import deque
from typing import TYPE_CHECKING, Any

from emberd.core.log_lines import (
    IDENTIFIER,
    SUBSYSTEM,
    journal_datagram,
    journal_fields,
    json_line,
    line,
    os_log_type,
    priority,
    syslog_line,
)
from emberd.host.files import PRIVATE_FILE_MODE, PRIVATE_FOLDER_MODE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_MOST_WAITING = 500
_MOST_WAITING_BYTES = 128 * 1024
"""What waits in memory for a disk that is full: some minutes of a usual log."""
SOCKET = "/run/systemd/journal/socket"
_linux_os: Any = os
_linux_fcntl: Any = fcntl
"""typeshed knows memfd and seals on Linux only."""


class RotatingFile:
    """Appends lines to a file that is never larger than was said, and whose owner alone may read it.

    A full disk, a folder that went away or lost its permissions: the newest lines are kept in memory and written
    with the first that can be, older ones are lost and counted in `lost`, and nothing is raised. Others may move or
    remove the file at any time.

    Args:
        path: the file; its folder is made.
        rotate_bytes: size at which it becomes `path.1`.
        kept_files: rotated files to keep.
    """

    name = "file"

    def __init__(self, path: Path, rotate_bytes: int, kept_files: int) -> None:
        self._path = path
        self._rotate_bytes = rotate_bytes
        self._kept_files = kept_files
        self._descriptor = -1
        self._is_torn = False
        self._waiting: deque[bytes] = deque()
        self.lost = 0
        self.error = ""

    def write(self, event: Mapping[str, Any]) -> bool:
        """Append an event as a line of JSON."""
        return self.append(json_line(event))

    def append(self, text: str) -> bool:
        """Append one line; return True if it is in the file, and not only in memory."""
        self._waiting.append(text.encode("utf-8", "backslashreplace") + b"\n")
        try:
            while self._waiting:
                self._put(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self.error = error.strerror or str(error)
            while len(self._waiting) > _MOST_WAITING or sum(map(len, self._waiting)) > _MOST_WAITING_BYTES:
                self._waiting.popleft()
                self.lost += 1
            return False
        return True

    def _put(self, content: bytes) -> None:
        data = (b"\n" if self._is_torn else b"") + content
        self._make_ready(len(data))
        written = os.write(self._descriptor, data)
        if written < len(data):  # the disk is full, or RLIMIT_FSIZE (write(2))
            self._is_torn = self._is_torn or written > 0
            raise OSError(errno.ENOSPC, "No space left on device")
        self._is_torn = False

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _make_ready(self, more_bytes: int) -> None:
        if self._descriptor >= 0 and not self._is_still_there(os.fstat(self._descriptor)):
            self.close()
        if self._descriptor < 0:
            self._open()
        seen = os.fstat(self._descriptor)
        if seen.st_size and seen.st_size + more_bytes > self._rotate_bytes and stat.S_ISREG(seen.st_mode):
            self.close()
            self._rotate()
            self._open()

    def _is_still_there(self, seen: os.stat_result) -> bool:
        """Return True if the name still leads to the open file: newsyslog and people move files."""
        try:
            return os.path.samestat(seen, self._path.stat())
        except FileNotFoundError:
            return False

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER_MODE)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, PRIVATE_FILE_MODE)
        if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            with contextlib.suppress(OSError):  # it may be somebody else's, who let us write
                os.fchmod(self._descriptor, PRIVATE_FILE_MODE)
        self._is_torn = False

    def _rotate(self) -> None:
        """Rename the files by one; where that is refused, give up the content: the file must not grow."""
        try:
            for number in range(self._kept_files, 1, -1):
                with contextlib.suppress(FileNotFoundError):
                    rotated(self._path, number - 1).replace(rotated(self._path, number))
            if self._kept_files:
                self._path.replace(rotated(self._path, 1))
            else:
                self._path.unlink()
        except OSError:
            os.truncate(self._path, 0)


def rotated(path: Path, number: int) -> Path:
    """Return the name of a rotated file; 1 is the newest."""
    return path.with_name(f"{path.name}.{number}") if number else path


class JournalSink:
    """The journal of systemd, in its native protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.

    Each event is one entry. It never waits: when journald is behind or away, entries are lost and counted. Own
    code: the protocol is one datagram, and systemd-python, the library, has no wheels and needs a compiler.
    """

    name = "journal"

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self.lost = 0
        self.error = ""

    def write(self, event: Mapping[str, Any]) -> bool:
        """Send an event; return True if journald has it."""
        entry = journal_datagram(journal_fields(event))
        try:
            try:
                self._socket.sendto(entry, self._path)
            except OSError as error:
                if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                    raise
                self._send_in_memory_file(entry)
        except OSError as error:
            self.lost += 1
            self.error = error.strerror or str(error)
            return False
        return True

    def _send_in_memory_file(self, entry: bytes) -> None:
        """Send what is larger than a datagram as a memfd_create(2); journald takes only a sealed one."""
        descriptor = _linux_os.memfd_create("emberd-log", _linux_os.MFD_CLOEXEC | _linux_os.MFD_ALLOW_SEALING)
        try:
            os.write(descriptor, entry)
            seals = (
                _linux_fcntl.F_SEAL_SHRINK
                | _linux_fcntl.F_SEAL_GROW
                | _linux_fcntl.F_SEAL_WRITE
                | _linux_fcntl.F_SEAL_SEAL
            )
            fcntl.fcntl(descriptor, _linux_fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
            self._socket.sendmsg([], [rights], 0, self._path)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._socket.close()


def is_connected(descriptor: int, stream: str) -> bool:
    """Return True if a descriptor is the journal's: $JOURNAL_STREAM is its device and inode (systemd.exec(5))."""
    try:
        seen = os.fstat(descriptor)
    except OSError:
        return False
    return stream == f"{seen.st_dev}:{seen.st_ino}"


class OsLogSink:
    """macOS' unified log, by pyoslog (the extra `emberd[macos]`): a line for each event, under its category.

    os_log is a macro whose format must stand in the program's image: ctypes cannot call it, pyoslog is the small C
    module that can. Its format is `%{public}s`: macOS hides nothing of what it is given.
    """

    name = "unified"

    def __init__(self, pyoslog: Any) -> None:
        self._pyoslog = pyoslog
        self._logs: dict[str, Any] = {}
        self.lost = 0
        self.error = ""

    def write(self, event: Mapping[str, Any]) -> bool:
        """Log an event; return True if pyoslog took it."""
        category = str(event.get("category") or "daemon")
        kind = os_log_type(str(event.get("level", "info")), str(event["event"]))
        try:
            log = self._logs.get(category)
            if log is None:
                log = self._logs[category] = self._pyoslog.os_log_create(SUBSYSTEM, category)
            self._pyoslog.os_log_with_type(log, int(kind), line(event))
        except Exception as error:  # noqa: BLE001  # a C module's refusal is not worth the daemon
            self.lost += 1
            self.error = str(error)
            return False
        return True

    def close(self) -> None:
        """Let go of the log objects."""
        self._logs.clear()


def load_os_log() -> OsLogSink | None:
    """Return the unified log if pyoslog is installed and says that it can; else it has none of its names."""
    try:
        pyoslog = importlib.import_module("pyoslog")
        return OsLogSink(pyoslog) if pyoslog.is_supported() else None
    except Exception:  # noqa: BLE001  # not there, built for another macOS, or broken: the file log is there
        return None


class SyslogSink:
    """syslog(3), where there is neither pyoslog nor a journal: a line with its category for each event.

    It does not say whether anybody took it. On macOS its lines reach the unified log, with no category.
    """

    name = "syslog"
    lost = 0
    error = ""

    def __init__(self) -> None:
        syslog.openlog(IDENTIFIER, syslog.LOG_PID, syslog.LOG_USER)

    def write(self, event: Mapping[str, Any]) -> bool:  # the SystemLog protocol
        """Log an event."""
        syslog.syslog(int(priority(str(event.get("level", "info")))), syslog_line(event))
        return True

    def close(self) -> None:  # the SystemLog protocol
        """Close the connection."""
        syslog.closelog()
