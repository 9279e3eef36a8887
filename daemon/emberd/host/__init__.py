"""This computer. The one platform branch of emberd stands here."""

from __future__ import annotations

import sys

if sys.platform == "darwin":
    from emberd.host.darwin import DarwinHost as ThisHost
else:
    from emberd.host.linux import LinuxHost as ThisHost

__all__ = ["ThisHost"]
