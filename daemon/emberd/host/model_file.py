"""Is this file a model that an engine of this user can read?"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

from emberd.core.errors import ModelError

_GGUF_MAGIC = b"GGUF"
"""First bytes of every GGUF file, all versions (ggml-org/ggml, docs/gguf.md)."""
_LEAST_BYTES = 24
"""magic, version, tensor count, metadata count: the fixed part of a GGUF header."""


def check_model(text: str) -> Path:
    """Return the model's absolute path.

    The file is opened and read, not only looked at: macOS lets an agent `stat` a file in a protected folder and
    refuses the read.

    Raises:
        ModelError: missing, a folder, unreadable, or not a GGUF.
    """
    if not text:
        raise ModelError("no model is set", "Set model.path to the GGUF file.")
    path = Path(text).expanduser().absolute()
    try:
        with path.open("rb") as file:
            head = file.read(_LEAST_BYTES)
    except FileNotFoundError as error:
        raise ModelError(f"model not found: {path}", "Set model.path to the GGUF file.") from error
    except IsADirectoryError as error:
        raise ModelError(
            f"the model is a folder: {path}",
            "Set model.path to the GGUF file in it (the first part, if split).",
        ) from error
    except PermissionError as error:
        raise ModelError(f"cannot read the model: {path} ({error.strerror})", _permission_remedy(error)) from error
    except OSError as error:
        raise ModelError(f"cannot read the model: {path} ({error.strerror})", "Is its volume mounted?") from error
    if not head.startswith(_GGUF_MAGIC):
        raise ModelError(
            f"not a GGUF model: {path} (it begins with {head[:4]!r})",
            "Download it again, or convert it; a page saved instead of the file begins with '<'.",
        )
    if len(head) < _LEAST_BYTES:
        raise ModelError(f"the model is truncated: {path} ({len(head)} bytes)", "Download it again.")
    return path


def _permission_remedy(error: PermissionError) -> str:
    """Tell a privacy denial (EPERM) from file permissions (EACCES)."""
    if sys.platform == "darwin" and error.errno == errno.EPERM:
        return (
            "macOS denies background programs this folder (Documents, Desktop, Downloads, iCloud Drive, external "
            "volumes). Move the model, say to ~/Models, or give Python Full Disk Access in System Settings."
        )
    return "Give yourself read permission: chmod u+r on the file, and x on the folders above it."
