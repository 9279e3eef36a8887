"""Finding and reading the settings file."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emberd.core import settings as settings_module
from emberd.core.engine_files import anchored
from emberd.core.errors import ConfigError
from emberd.core.settings import Settings
from emberd.host.paths import default_config

ENVIRONMENT = "EMBERD_CONFIG"
_WRONG_LINE = re.compile(r"at line (\d+)")
"""In the message of a tomllib.TOMLDecodeError."""
_MOST_WRONG_LINES = 20


def locate(option: str | None) -> tuple[Path, bool]:
    """Return the settings file and whether somebody named it (option, then EMBERD_CONFIG, then the default)."""
    named = option or os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).expanduser().absolute(), True
    return default_config(), False


def load(option: str | None) -> tuple[Settings, Path]:
    """Read the settings; without a file, and none named, every setting has its default.

    Relative paths become absolute: they belong to the folder of the file.

    Raises:
        ConfigError: the named file is missing, unreadable, not TOML, or wrong in a key.
    """
    path, is_named = locate(option)
    text = _read_text(path, is_named=is_named)
    if text is None:
        return Settings(), path
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}", "Strings need quotes; see `emberd config show`."
        ) from error
    settings = settings_module.read(tree, str(path))
    return anchored(settings, str(path.parent), str(Path.home())), path


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a settings file says, however wrong it is.

    Attributes:
        settings: what is right in it, defaults for the rest.
        path: the file.
        error: what is wrong with it, None if nothing is.
        tells_place: whether it is known which state directory and port are meant.
    """

    settings: Settings
    path: Path
    error: ConfigError | None = None
    tells_place: bool = True


def load_what_is_right(option: str | None) -> Loaded:
    """Read the settings for those who must find a daemon, or be one, although they are wrong. Raises nothing."""
    try:
        settings, path = load(option)
    except ConfigError as error:
        path, is_named = locate(option)
        try:
            text = _read_text(path, is_named=is_named)
        except ConfigError:
            return Loaded(Settings(), path, error, tells_place=False)
        tree = _parse_what_is_right(text or "")
        settings = settings_module.read_what_is_right(tree)
        # Another emberd's directory must not be taken for ours because ours cannot be read.
        return Loaded(settings, path, error, tells_place=not is_named or bool(settings.state.directory))
    return Loaded(settings, path)


def _read_text(path: Path, *, is_named: bool) -> str | None:
    """Return the file's text, None if there is none and none was named.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        if not is_named:
            return None
        raise ConfigError(
            f"settings file not found: {path}", f"Make one: emberd --config {path} config init"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the settings file {path}: {reason}", "Mend its permissions or content."
        ) from error


def _parse_what_is_right(text: str) -> dict[str, Any]:
    """Parse TOML without the lines that the parser refuses."""
    lines = text.splitlines()
    for _ in range(_MOST_WRONG_LINES):
        try:
            return tomllib.loads("\n".join(lines))
        except tomllib.TOMLDecodeError as error:
            wrong = _WRONG_LINE.search(str(error))
            number = int(wrong[1]) if wrong else len(lines)  # "at end of document"
            lines[number - 1 : number] = [""] if wrong else []
    return {}
