"""The control socket: how the command line talks to the daemon.

One connection, one line of JSON each way: `{"verb": "status"}` is answered by an object. The socket has mode
0600 in a folder of mode 0700, so the kernel keeps other users out.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import socket
from typing import TYPE_CHECKING, Any

from emberd.core.errors import EmberdError, NotRunning
from emberd.host.files import PRIVATE_FILE_MODE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    Verb = Callable[..., dict[str, Any] | Awaitable[dict[str, Any]]]
    """What a verb does; its result is the answer."""

_LONGEST_LINE_BYTES = 1024 * 1024
_REQUEST_LIMIT_S = 5.0
ASK_LIMIT_S = 10.0
SLOW_ASK_LIMIT_S = 180.0
"""A reload may ask an engine's program about itself, which may take 120 s."""


class ControlServer:
    """Serves verbs on a Unix socket; a bug in one of them is logged."""

    def __init__(self, path: Path, verbs: Mapping[str, Verb], log: FilteringBoundLogger) -> None:
        self._log = log
        self._path = path
        self._verbs = verbs
        self._server: asyncio.Server | None = None
        self._inode = 0

    async def keep(self) -> None:
        """Serve again if the socket has been removed, or could not be made before.

        Raises:
            OSError: it cannot be made now.
        """
        try:
            is_there = self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            is_there = False
        if not is_there:
            if self._server is not None:
                self._server.close()
                self._server = None
            await self.start()

    async def start(self) -> None:
        """Begin to serve. The instance lock is held, so a socket left by a killed daemon is stale."""
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        except BaseException:
            listener.close()
            raise
        finally:
            os.umask(mask)
        self._path.chmod(PRIVATE_FILE_MODE)
        self._inode = self._path.stat().st_ino
        self._server = await asyncio.start_unix_server(self._answer, sock=listener, limit=_LONGEST_LINE_BYTES)

    async def close(self) -> None:
        """Stop serving and remove the socket."""
        if self._server is not None:
            self._server.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_LIMIT_S):
                line = await reader.readline()
            answer = await self._do(line)
            writer.write(json.dumps(answer).encode() + b"\n")
            async with asyncio.timeout(_REQUEST_LIMIT_S):
                await writer.drain()
        except (TimeoutError, ConnectionError, ValueError):
            pass
        except asyncio.CancelledError:
            # The daemon ends. Passed on, Python 3.11 reports it as an exception of its own (asyncio/streams.py).
            pass
        finally:
            writer.close()

    async def _do(self, line: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(line)
            name, arguments = asked["verb"], asked.get("arguments", {})
            verb = self._verbs[name]
        except (ValueError, KeyError, TypeError):
            return {"error": f"not a verb of this emberd; it knows {', '.join(self._verbs)}"}
        try:
            answer = verb(**arguments)
            return await answer if inspect.isawaitable(answer) else answer
        except EmberdError as error:
            return {"error": error.message, "remedy": error.remedy, "exit_code": error.exit_code}
        except Exception as error:  # noqa: BLE001  # a bug is answered too: the asker waits
            self._log.exception("control_bug", verb=name)
            return {"error": f"internal error: {error!r}", "remedy": "Look at emberd's log."}


def ask(path: Path, verb: str, timeout_s: float = ASK_LIMIT_S, **arguments: Any) -> dict[str, Any]:
    """Ask the daemon and return its answer; for the command line.

    Raises:
        NotRunning: nothing listens there.
        EmberdError: the daemon refused, or broke off.
    """
    answer = b""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(json.dumps({"verb": verb, "arguments": arguments}).encode() + b"\n")
            while not answer.endswith(b"\n") and (part := connection.recv(65536)):
                answer += part
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotRunning("emberd is not running", "Start it: emberd run") from error
    except OSError as error:
        raise EmberdError(f"emberd does not answer on {path}: {error}", "Is it stopped or very busy?") from error
    content: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        content = json.loads(answer)
    if not content:
        raise EmberdError("emberd broke off its answer", "Look at its log.")
    if "error" in content:
        raise _revived(content)
    return content


def _revived(content: dict[str, Any]) -> EmberdError:
    error = EmberdError(content["error"], content.get("remedy", ""))
    error.exit_code = content.get("exit_code", 1)  # type: ignore[misc]
    return error
