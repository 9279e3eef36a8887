"""How KoboldCPP is switched to another model while it runs (--admin, --routermode), and what it then loads.

A supervising process ends the worker that serves and starts another one, with the options of a file in --admindir
and hardly any of its own command line (koboldcpp.py, main; 1.104 and 1.115).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from emberd.core.engine_files import anchored_file
from emberd.core.errors import ConfigError
from emberd.core.types import Switch

if TYPE_CHECKING:
    from emberd.core.wishes import OwnerWishes

INITIAL = "initial_model"
RESTARTS = "Restarting KoboldCpp..."
"""It says so when the old worker has ended."""
_MODEL_SUFFIX = ".gguf"
_PATH = "/api/admin/reload_config"
_SWITCH = re.compile(
    r"^Reloading new (?:model/config|config): (?P<config>.+?)"
    r"(?: with override config (?P<base>.+?))?(?: with model (?P<model>.+))?$"
)
_RECOVERY = "launching known-good config"
"""After a model that could not be loaded it loads that of its start."""


def read_line(line: str) -> Switch | None:
    """Return the switch that a line of the log tells of, None for any other line."""
    found = _SWITCH.search(line)
    if found is not None:
        return Switch(found["config"].strip(), (found["base"] or "").strip(), (found["model"] or "").strip())
    return Switch(INITIAL) if _RECOVERY in line else None


def read_request(path: str, body: bytes) -> Switch | None:
    """Return the switch that a POST asks for, None for any other one."""
    if not path.startswith(_PATH):
        return None
    try:
        asked = json.loads(body)
    except ValueError:
        return None
    asked = asked if isinstance(asked, dict) else {}
    words = [asked.get(key) for key in ("filename", "baseconfig", "overrideconfig", "modelName")]
    config, base, override, model = (word if isinstance(word, str) else "" for word in words)
    return Switch(config, base or override, model) if config else None


def content(switch: Switch, wishes: OwnerWishes) -> dict[str, object]:
    """Return what a switch loads, as one .kcpps file: later values win over those of its base.

    Relative paths belong to the engine's working folder, which is this process's: so KoboldCPP has read them.

    Args:
        switch: what it is.
        wishes: those of the settings, which tell the folders.

    Raises:
        ConfigError: a file cannot be read.
    """
    folder = Path(wishes.switch_folder).expanduser().absolute()
    found: dict[str, object] = {}
    for name in (switch.base, switch.config):
        if name.endswith(_MODEL_SUFFIX):
            found |= {"model_param": str(folder / name), "model": None}
        elif name and not (switch.unloads or switch.is_to_settings):
            said = read_kcpps(folder / name, "the model switch's file", Path.cwd())
            found |= {key: value for key, value in said.items() if value or key not in found}
    if switch.model and wishes.switch_models:
        models = Path(wishes.switch_models).expanduser().absolute()
        found |= {"model_param": str(models / switch.model), "model": None}
    return found


def read_kcpps(path: Path, name: str, folder: Path) -> dict[str, object]:
    """Return what a .kcpps file says, its paths absolute; bytes that are no UTF-8 are left out, as KoboldCPP does.

    Args:
        path: the file.
        name: whose it is, for messages.
        folder: to which relative paths belong.

    Raises:
        ConfigError: it cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig", errors="ignore"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {name} {path}: {error.strerror}", "Mend the path or its permissions."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{name} {path} is not JSON: {error}", "Save it again from KoboldCPP's launcher."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name} {path} is not a JSON object", "Save it again from KoboldCPP's launcher.")
    return anchored_file(content, str(folder), str(Path.home()))
