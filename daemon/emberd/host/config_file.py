"""Finding and reading the settings file."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from emberd.core import settings as settings_module
from emberd.core.errors import ConfigError
from emberd.core.settings import Settings
from emberd.host.paths import default_config

ENVIRONMENT = "EMBERD_CONFIG"


def locate(option: str | None) -> tuple[Path, bool]:
    """Return the settings file and whether somebody named it (option, then EMBERD_CONFIG, then the default)."""
    named = option or os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).expanduser().absolute(), True
    return default_config(), False


def load(option: str | None) -> tuple[Settings, Path]:
    """Read the settings; without a file, and none named, every setting has its default.

    Raises:
        ConfigError: the named file is missing, unreadable, not TOML, or wrong in a key.
    """
    path, is_named = locate(option)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not is_named:
            return Settings(), path
        raise ConfigError(
            f"settings file not found: {path}", f"Make one: emberd --config {path} config init"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the settings file {path}: {reason}", "Mend its permissions or content."
        ) from error
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}", "Strings need quotes; see `emberd config show`."
        ) from error
    return settings_module.read(tree, str(path)), path
