"""Reading the key that clients must send: never from an argument, which everybody on the computer can see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from emberd.core.access import is_loopback
from emberd.core.errors import ConfigError

if TYPE_CHECKING:
    from emberd.core.settings import Settings

ENVIRONMENT = "EMBERD_API_KEY"
_OTHERS = 0o077


def read_api_key(settings: Settings, config_path: Path) -> str:
    """Return the key (EMBERD_API_KEY, then endpoint.api_key_file, then endpoint.api_key), empty for none.

    Raises:
        ConfigError: its file cannot be read or can be read by others; or others can reach the endpoint and there is
            no key.
    """
    endpoint = settings.endpoint
    key = os.environ.get(ENVIRONMENT, "").strip()
    if not key and endpoint.api_key_file:
        key = read_secret(Path(endpoint.api_key_file).expanduser(), "endpoint.api_key_file")
    if not key and endpoint.api_key:
        _check_mode(config_path, "endpoint.api_key is in it")
        key = endpoint.api_key
    if not key and not is_loopback(endpoint.host):
        raise ConfigError(
            f"endpoint.host {endpoint.host} can be reached by other computers, and there is no API key",
            "Set endpoint.api_key_file, or listen on 127.0.0.1 and use a tunnel (ssh -L).",
        )
    return key


def read_secret(path: Path, setting: str) -> str:
    """Return the text of a file that only its owner may read.

    Raises:
        ConfigError: it cannot be read, is empty, or can be read by others.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read {setting} {path}: {reason}", "Mend the path or its permissions.") from error
    if not text:
        raise ConfigError(f"{setting} {path} is empty", "Write the key into it.")
    _check_mode(path, f"{setting} names it")
    return text


def _check_mode(path: Path, why: str) -> None:
    if path.exists() and path.stat().st_mode & _OTHERS:
        raise ConfigError(f"{path} can be read by others, and {why}", f"Run: chmod 600 {path}")
