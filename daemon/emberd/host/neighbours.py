"""Other programs on this computer that are in the way: model servers, and who listens on a port."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from emberd.core.errors import ConfigError, PortTaken
from emberd.core.health_facts import Program
from emberd.host.listener import bind

_SERVERS = re.compile(r"(koboldcpp|ollama|llama-server|lm[ -]studio|lms$|llamafile|mlx_lm)", re.IGNORECASE)
_INTERPRETER = re.compile(r"python[\d.]*$", re.IGNORECASE)
"""What it runs counts by the script's name; an editor that has the script open does not."""
_MANAGERS = frozenset({"systemd", "launchd"})
"""They hold emberd's socket themselves."""


def other_servers(own: set[int | None]) -> list[Program]:
    """Return other programs here that serve models, without `own` processes and their children."""
    found = []
    for process in psutil.process_iter(["pid", "ppid", "name", "cmdline", "memory_info"]):
        facts = process.info
        line = [Path(word).name for word in facts["cmdline"] or ()]
        words = [*line[:1], facts["name"] or ""]
        if line and _INTERPRETER.match(line[0]):
            words += line[1:4]  # options, -m and its module, or the script
        name = next((word for word in words if _SERVERS.match(word)), None)
        if name and facts["pid"] not in own and facts["ppid"] not in own:
            memory = facts["memory_info"]
            found.append(Program(name, facts["pid"], memory.rss if memory else None))
    return found


def try_port(host: str, port: int) -> tuple[Program | None, str]:
    """Bind the endpoint's port as emberd would, and let it go.

    Nothing connects to it: a connection would start an emberd whose socket a service manager holds.

    Returns:
        Who listens there already, and why the address cannot be used; None and empty if emberd could start.
        A program of another user has no name (the system does not tell it).
    """
    try:
        bind(host, port).close()
    except PortTaken:
        owner = _listener(port)
        return (None if owner.name in _MANAGERS else owner), ""
    except (ConfigError, OSError) as error:
        return None, error.message if isinstance(error, ConfigError) else f"{host}: {error}"
    return None, ""


def _listener(port: int) -> Program:
    for process in psutil.process_iter(["pid", "name"]):
        try:
            connections = process.net_connections("tcp")
        except (psutil.Error, OSError):
            continue
        if any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections):
            return Program(process.info["name"] or "a program", process.info["pid"])
    return Program("a program of another user")
