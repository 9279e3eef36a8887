"""Every error that emberd shows a person, each with its exit code and its remedy.

A leaf module, so that any room can raise without an import loop::

    EmberdError                 1
    ├── NotRunning              3   no daemon answers the control socket
    ├── AlreadyRunning          4   another emberd holds this state directory
    ├── EngineFailed            5   the engine failed, or did not do what was asked in time
    ├── ModelError             66   the model is missing, unreadable or not a GGUF
    ├── PortTaken              69   another program listens on emberd's port
    ├── ServiceManagerFailed   71   launchd or systemd refused, or cannot be reached
    ├── EngineNotUsable        72   engine not found, not executable, quarantined
    ├── StateUnusable          73   the state directory cannot be created or written
    └── ConfigError            78   the settings file or the engine's arguments are wrong

The numbers from 64 on are those of sysexits(3). click's own usage errors exit with 2.
"""

from __future__ import annotations

from typing import ClassVar


class EmberdError(Exception):
    """An error that a person can mend.

    Args:
        message: what is wrong, with the name of the thing (a key, a path, a port).
        remedy: what to do about it; one sentence, or empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class NotRunning(EmberdError):
    """No daemon answers the control socket."""

    exit_code = 3


class AlreadyRunning(EmberdError):
    """Another emberd holds this state directory."""

    exit_code = 4


class EngineFailed(EmberdError):
    """The engine or emberd did not do what was asked: it failed, ended by itself, or not in time."""

    exit_code = 5


class ModelError(EmberdError):
    """The model is missing, unreadable or not a GGUF."""

    exit_code = 66


class PortTaken(EmberdError):
    """Another program listens on the port that emberd was told to use."""

    exit_code = 69


class ServiceManagerFailed(EmberdError):
    """launchd or systemd refused, cannot be reached, or knows no such service."""

    exit_code = 71


class EngineNotUsable(EmberdError):
    """The engine is not found, not executable, quarantined, or not what it is said to be."""

    exit_code = 72


class StateUnusable(EmberdError):
    """The state directory cannot be created or written."""

    exit_code = 73


class ConfigError(EmberdError):
    """The settings file or the engine's arguments are wrong."""

    exit_code = 78


class NotReady(Exception):
    """No engine takes this request in time; not a person's mistake, so not an EmberdError.

    Attributes:
        state: name of the engine's state.
        message: why, for a person.
        retry_after_s: when to ask again, in whole seconds.
    """

    def __init__(self, state: str, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.state = state
        self.message = message
        self.retry_after_s = retry_after_s


class RequestRefused(Exception):
    """The engine refused a request of emberd's own, with this HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
