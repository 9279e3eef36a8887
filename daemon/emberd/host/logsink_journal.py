"""The journal of systemd, in its native protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.

Own code: the protocol is one datagram, and systemd-python, the library, has no wheels and needs a compiler.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
from typing import TYPE_CHECKING, Any

from emberd.core.log_lines import journal_datagram, journal_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"
_linux_os: Any = os
_linux_fcntl: Any = fcntl
"""typeshed knows memfd and seals on Linux only."""


class JournalSink:
    """Sends each event as one entry. It never waits: when journald is behind or away, entries are lost and counted.

    Args:
        path: journald's socket; another in tests.
    """

    name = "journal"

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self.lost = 0
        self.error = ""

    def write(self, event: Mapping[str, Any]) -> bool:
        """Send an event; tells whether journald has it."""
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
    """Tell whether a descriptor is the journal's: $JOURNAL_STREAM is its device and inode (systemd.exec(5))."""
    try:
        seen = os.fstat(descriptor)
    except OSError:
        return False
    return stream == f"{seen.st_dev}:{seen.st_ino}"
