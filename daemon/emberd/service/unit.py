"""The systemd units of emberd: filled in from the templates, compared with the installed ones.

Pure. The syntax is that of systemd.syntax(7); words in command lines and variables are quoted as systemd.service(5)
and systemd.exec(5) say.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from emberd.service.wanted import DEFAULT_LABEL, LABEL_VARIABLE, Installed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emberd.service.wanted import WantedService

_ASSIGNMENT = re.compile(r"^([A-Z]\w*)=(.*)$")
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


def unit_name(label: str) -> str:
    """Return the unit of a label, without its type: emberd, emberd-small, or a foreign label as it is."""
    if label == DEFAULT_LABEL:
        return "emberd"
    return label if not label.startswith(f"{DEFAULT_LABEL}.") else f"emberd-{label[len(DEFAULT_LABEL) + 1 :]}"


def fill_service(template: str, wanted: WantedService) -> str:
    """Return the service unit with program, times, label and environment of `wanted`; comments stay.

    One that starts on demand has no WantedBy.
    """
    socket = f"{unit_name(wanted.label)}.socket"
    environment = {**wanted.environment, LABEL_VARIABLE: wanted.label}
    values = {
        "Description": "emberd keeps a local LLM warm" + _instance(wanted.label),
        "Requires": socket,
        "After": socket,
        "ExecStart": " ".join(_quoted(word, is_command=True) for word in wanted.program),
        "Environment": " ".join(_quoted(f"{name}={value}") for name, value in sorted(environment.items())),
        "TimeoutStopSec": str(wanted.stop_limit_s),
    }
    text = _filled(template, values)
    if wanted.starts_at_login:
        return text
    # Without it the unit cannot be enabled by mistake; the socket starts it.
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("WantedBy="))


def starts_at_login(text: str) -> bool:
    """Return True if a service unit is made to start at login."""
    return "Install.WantedBy" in assignments(text)


def fill_socket(template: str, wanted: WantedService) -> str:
    """Return the socket unit with the endpoint of `wanted`."""
    text = _filled(template, {"Description": "Endpoint of emberd" + _instance(wanted.label)})
    addresses = [f"[{each}]" if ":" in each else each for each in wanted.addresses]
    lines = "".join(f"ListenStream={address}:{wanted.port}\n" for address in addresses)
    return re.sub(r"(?m)(^ListenStream=.*\n)+", lambda _: lines, text)


def _instance(label: str) -> str:
    return "" if label == DEFAULT_LABEL else f" ({label})"


def _filled(template: str, values: Mapping[str, str]) -> str:
    lines = []
    for line in template.splitlines():
        found = _ASSIGNMENT.match(line)
        lines.append(f"{found[1]}={values[found[1]]}" if found and found[1] in values else line)
    return "\n".join(lines) + "\n"


def _quoted(word: str, *, is_command: bool = False) -> str:
    """Return a word as systemd reads it back: no specifier (%), no variable ($), no split at a space."""
    word = word.replace("%", "%%")
    if is_command:
        word = word.replace("$", "$$")
    if _PLAIN.fullmatch(word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def assignments(text: str) -> dict[str, tuple[str, ...]]:
    """Return the values of each `Section.Key` of a unit, in order; comments and blank lines left out."""
    section, found = "", dict[str, tuple[str, ...]]()
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[] \t")
        elif entry := _ASSIGNMENT.match(line):
            key = f"{section}.{entry[1]}"
            found[key] = (*found.get(key, ()), entry[2].strip())
    return found


def differences(installed: str, wanted: str) -> tuple[str, ...]:
    """Return the `Section.Key`s in which an installed unit differs from the wanted one, sorted."""
    old, new = assignments(installed), assignments(wanted)
    return tuple(sorted(key for key in {*old, *new} if old.get(key) != new.get(key)))


def words(text: str) -> list[str]:
    """Return the words of a command line or of variables, unquoted, as `fill_service` has written them."""
    found = []
    for quoted, plain in re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', text):
        word = re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], quoted) or plain
        found.append(word.replace("%%", "%").replace("$$", "$"))
    return found


def variable(values: Mapping[str, tuple[str, ...]], name: str) -> str | None:
    """Return the value of an environment variable in a service unit's assignments, None if it is not set."""
    for line in values.get("Service.Environment", ()):
        for word in words(line):
            if word.startswith(f"{name}="):
                return word[len(name) + 1 :]
    return None


def installed(text: str) -> Installed:
    """Return what a service unit says that is installed."""
    values = assignments(text)
    program = words(values.get("Service.ExecStart", ("",))[-1])
    return Installed(variable(values, LABEL_VARIABLE), tuple(program), starts_at_login(text))


def read_show(text: str) -> dict[str, str]:
    """Read the output of `systemctl show UNIT`: one `Key=value` a line."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
