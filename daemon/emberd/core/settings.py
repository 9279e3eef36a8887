"""Every setting of emberd: key, default, unit, range and meaning, each written once.

The settings file is TOML. Parsing takes two steps, so that syntax errors and wrong settings are distinguished:
`tomllib` makes a plain tree, and `read` makes settings of it. The example file, `emberd config show` and
docs/settings.md come from the same declarations.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from emberd.core.errors import ConfigError
from emberd.core.hours import read_hours
from emberd.core.origins import name_pattern, origin_pattern

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

EngineKind = Literal["koboldcpp", "llama-server", "embedded"]
LockPolicy = Literal["auto", "always", "never"]
WarmthMode = Literal["auto", "off"]
OnBattery = Literal["stretch", "off", "same"]
Priority = Literal["auto", "machine-first", "model-first"]
LogSink = Literal["auto", "system", "file", "stderr"]
LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def setting(
    default: Any,
    help_text: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    is_secret: bool = False,
) -> Any:
    """Declare one setting; low and high are inclusive. A secret is never printed."""
    metadata = {"help": help_text, "unit": unit, "low": low, "high": high, "is_secret": is_secret}
    if isinstance(default, list):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which model is served."""

    path: str = setting(
        "",
        "The GGUF file. The first part of a split model. ~ is your home; a relative path belongs to the folder of "
        "the settings. Empty: the one named in engine.kcpps.",
    )


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Which program serves it, and how it is started."""

    kind: EngineKind = setting(
        "koboldcpp",
        "koboldcpp, llama-server, or embedded (llama.cpp's server in a child process; needs the extra "
        "emberd[demo]).",
    )
    path: str = setting(
        "",
        "The program: KoboldCPP's binary, koboldcpp.py or its folder; or llama-server. "
        "Empty: found on PATH by its usual names.",
    )
    python: str = setting("", "The Python that runs koboldcpp.py. Empty: the one that runs emberd.")
    kcpps: str = setting("", "A KoboldCPP settings file (.kcpps) to merge. Empty: none.")
    extra_args: tuple[str, ...] = setting(
        [], "More arguments for the engine, one word an entry. They win over the .kcpps file."
    )
    context_size: int = setting(
        0, "Length of the context. 0: the engine's own default.", unit="tokens", low=0, high=16_777_216
    )
    gpu_layers: int = setting(
        -1, "Layers on the GPU. -1: the engine's own choice; 0: none.", unit="layers", low=-1, high=10_000
    )
    lock: LockPolicy = setting(
        "auto",
        "Ask the engine to lock the model in memory: auto (if enough memory remains for everything else), always "
        "or never.",
    )
    metal_keep_alive_s: int = setting(
        2_592_000,
        "macOS: how long the engine keeps the model resident for the GPU after its last use.",
        unit="s",
        low=1,
        # llama.cpp counts 5 ms steps in a 32-bit int: above this the counter wraps (PR 24074).
        high=10_000_000,
    )


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """The port that clients use."""

    host: str = setting(
        "127.0.0.1",
        "Address of the endpoint. 127.0.0.1 or localhost: this computer alone, by IPv4 and IPv6. One that other "
        "computers can reach needs an API key.",
    )
    port: int = setting(5001, "TCP port of the endpoint. 5001 is KoboldCPP's own.", low=1, high=65535)
    hold_timeout_s: float = setting(
        120.0,
        "How long a request waits for an engine that is not ready before it gets 503.",
        unit="s",
        low=0,
        high=3600,
    )
    max_concurrent: int = setting(
        16,
        "How many requests the engine is given at once; others wait their turn. KoboldCPP is given 16 at most.",
        low=1,
        high=1000,
    )
    max_waiting: int = setting(
        64,
        "How many requests may wait for an engine or for their turn; further ones get 503 at once.",
        low=0,
        high=10_000,
    )
    names: tuple[str, ...] = setting(
        [],
        "Names under which clients may ask for this computer, besides localhost, IP addresses, its own name and "
        'those that containers use; "*.example.org" for all below one.',
    )
    origins: tuple[str, ...] = setting(
        [],
        'Pages of other computers that may use the model, such as "https://lite.koboldai.net", '
        '"https://*.example.org" or "chrome-extension://*"; "null" for pages opened from a file, "*" for every '
        "page.",
    )
    api_key_file: str = setting(
        "", "A file (mode 0600) with the key that clients must send. Empty: EMBERD_API_KEY, else no key."
    )
    api_key: str = setting("", "The key itself; the settings file must then have mode 0600.", is_secret=True)
    remember_kib: int = setting(
        8192,
        "The last request and its reply are kept in memory, to keep the prompt cache and to process them again "
        "after a crash. Larger ones are not kept. 0: nothing is kept.",
        unit="KiB",
        low=0,
        high=1_048_576,
    )


@dataclass(frozen=True, slots=True)
class LifecycleSettings:
    """How the engine is watched, restarted and stopped."""

    load_timeout_s: float = setting(
        1800.0,
        "Longest time from start to ready before the engine is restarted.",
        unit="s",
        low=1,
        high=86_400,
    )
    drain_timeout_s: float = setting(
        30.0, "How long running requests may finish before the engine is stopped.", unit="s", low=0, high=3600
    )
    stop_timeout_s: float = setting(
        20.0, "How long the engine may take to end before it is killed.", unit="s", low=0.1, high=600
    )
    backoff_initial_s: float = setting(
        1.0,
        "Wait after the second crash in a row; the first restart is immediate.",
        unit="s",
        low=0,
        high=600,
    )
    backoff_max_s: float = setting(60.0, "Longest wait between two starts.", unit="s", low=0, high=86_400)
    backoff_jitter: float = setting(
        0.2, "Share by which each wait is varied at random, up and down.", unit="share", low=0, high=1
    )
    stable_after_s: float = setting(
        60.0, "Being ready for this long forgets earlier crashes.", unit="s", low=0, high=86_400
    )
    crash_limit: int = setting(
        6, "Crashes in a row, without a stable spell between, after which emberd gives up.", low=1, high=1000
    )
    probe_interval_s: float = setting(
        10.0,
        "How often a ready engine is asked whether it lives; a third as often while it is idle.",
        unit="s",
        low=0.1,
        high=600,
    )
    hang_after_s: float = setting(
        60.0, "No answer and no progress for this long counts as a hang.", unit="s", low=1, high=86_400
    )
    generation_silence_s: float = setting(
        1800.0,
        "A generation that produces nothing for this long counts as a hang even while it uses the CPU.",
        unit="s",
        low=10,
        high=86_400,
    )


@dataclass(frozen=True, slots=True)
class WarmthSettings:
    """How the idle model is kept in memory."""

    mode: WarmthMode = setting("auto", "auto keeps the idle model warm; off leaves it to the system.")
    replay: bool = setting(
        True,
        "Send the last request and its reply once more, with one token: it keeps the KV cache. "
        "Request and reply are kept in memory only.",
    )
    lock_outside: bool = setting(
        True, "Where the engine's own lock does not hold but one is allowed, emberd locks the model's pages itself."
    )
    priority: Priority = setting(
        "auto",
        "What to give up when holding the model makes the rest of the computer swap: auto (the model, above "
        "512 MiB a minute), machine-first (above 64 MiB, or when unlocked memory of the model is taken) or "
        "model-first (never).",
    )
    reprime: bool = setting(
        True, "After a restart of the engine, process the last request and its reply again in the background."
    )
    cool_hours: tuple[str, ...] = setting(
        [],
        "Hours of the day in which the model's memory is given to other work until somebody asks, such as "
        '["01:00-07:30"].',
    )
    may_restart: bool = setting(
        False, "Whether the engine may be restarted without its lock when nothing else stops the swapping."
    )
    on_battery: OnBattery = setting(
        "stretch", "On battery or in low power mode: stretch (six times less often), off, or same."
    )
    min_interval_s: float = setting(
        5.0, "Shortest time between two passes over the model.", unit="s", low=1, high=86_400
    )
    max_interval_s: float = setting(
        900.0, "Longest time between two passes over the model.", unit="s", low=1, high=86_400
    )


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What emberd writes about itself."""

    level: LogLevel = setting("info", "Least important level that is written.")
    sink: LogSink = setting(
        "auto",
        "Where it goes: system (the unified log of macOS, the journal of systemd, else syslog), file, stderr, or "
        "auto (macOS: system, file; Linux: the journal if systemd connects emberd to it, else stderr and file).",
    )
    format: LogFormat = setting(
        "auto", "On standard error: console, json, or auto (console on a terminal, else json)."
    )
    file: str = setting(
        "",
        "The log file. Empty: ~/Library/Logs/emberd/emberd.log on macOS; else, or if state.directory is set, "
        "emberd.log in the state directory.",
    )
    file_mib: int = setting(4, "Size at which the log file is rotated.", unit="MiB", low=1, high=4096)
    files: int = setting(3, "Rotated log files that are kept beside the current one.", low=0, high=100)
    events_per_minute: int = setting(
        120,
        "How often an event of one name may be logged; the others are counted, and the count is logged. "
        "0: any number.",
        low=0,
        high=1_000_000,
    )
    engine_lines_per_minute: int = setting(
        1200,
        "The same for what the engine prints; engine.log has all of it. 0: any number.",
        low=0,
        high=1_000_000,
    )
    engine_file_mib: int = setting(
        8, "Size at which engine.log, where the engine prints, is rotated.", unit="MiB", low=1, high=4096
    )
    engine_files: int = setting(
        3, "Rotated files of engine.log that are kept beside the current one.", low=0, high=100
    )


@dataclass(frozen=True, slots=True)
class MachineSettings:
    """What emberd cannot measure of this computer."""

    ssd_endurance_tb: float = setting(
        600.0,
        "Rated endurance of the SSD that holds the swap space; what is written to swap is shown as a share of it. "
        "600 is usual for 1 TB.",
        unit="TB written",
        low=1,
        high=1_000_000,
    )


@dataclass(frozen=True, slots=True)
class PowerSettings:
    """What emberd does about the computer's sleep."""

    prevent_sleep: bool = setting(
        False,
        "Keep the computer from going to sleep by itself while the model is ready; only on mains, and not in low "
        "power mode.",
    )


@dataclass(frozen=True, slots=True)
class StateSettings:
    """Where emberd keeps what it must remember."""

    directory: str = setting(
        "", "State file, control socket and engine log live here. Empty: the platform's place."
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, by table of the file."""

    model: ModelSettings = field(default_factory=ModelSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)
    lifecycle: LifecycleSettings = field(default_factory=LifecycleSettings)
    warmth: WarmthSettings = field(default_factory=WarmthSettings)
    log: LogSettings = field(default_factory=LogSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)
    power: PowerSettings = field(default_factory=PowerSettings)
    state: StateSettings = field(default_factory=StateSettings)


@dataclass(frozen=True, slots=True)
class Declaration:
    """One setting as declared, for documentation and for the parser.

    Attributes:
        key: dotted name, table first.
        table: the table it stands in.
        name: its name within the table.
        type: the Python type of the value.
        default: the value when the file is silent.
        unit: unit of a number, or empty.
        low: least value allowed, None if unbounded.
        high: greatest value allowed, None if unbounded.
        help: what it means, for a person.
        is_secret: its value is never printed.
    """

    key: str
    table: str
    name: str
    type: Any
    default: Any
    unit: str
    low: float | None
    high: float | None
    help: str
    is_secret: bool

    def choices(self) -> tuple[str, ...]:
        """Return the allowed words of a choice, empty for other types."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def range_text(self) -> str:
        """Return the allowed values in words, empty if anything of the type goes."""
        if self.choices():
            return " | ".join(self.choices())
        if self.low is not None and self.high is not None:
            return f"{_plain(self.low)} to {_plain(self.high)}"
        return ""


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def declarations() -> Iterator[Declaration]:
    """Yield every setting in the order of the file."""
    defaults = Settings()
    for table in dataclasses.fields(Settings):
        section = getattr(defaults, table.name)
        hints = get_type_hints(type(section))
        for entry in dataclasses.fields(section):
            yield Declaration(
                key=f"{table.name}.{entry.name}",
                table=table.name,
                name=entry.name,
                type=hints[entry.name],
                default=getattr(section, entry.name),
                unit=entry.metadata["unit"],
                low=entry.metadata["low"],
                high=entry.metadata["high"],
                help=entry.metadata["help"],
                is_secret=entry.metadata["is_secret"],
            )


def table_help(table: str) -> str:
    """Return the one-line meaning of a table of the file."""
    return (type(getattr(Settings(), table)).__doc__ or "").splitlines()[0]


def read(tree: Mapping[str, Any], source: str) -> Settings:
    """Return the settings in a parsed file.

    Args:
        tree: what tomllib made of the file.
        source: the file's name, for messages.

    Raises:
        ConfigError: naming every wrong key at once, each with what was expected.
    """
    settings, problems = _read_tables(tree)
    if problems:
        raise ConfigError(
            f"{source}: " + "; ".join(problems),
            "`emberd config show` lists every setting with its range; `emberd config check` tries a file.",
        )
    _check_together(settings, source)
    return settings


def read_what_is_right(tree: Mapping[str, Any]) -> Settings:
    """Return the usable part of a wrong settings file, which may say where emberd is."""
    return _read_tables(tree)[0]


def _read_tables(tree: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Return the settings, with defaults for wrong values, and the errors."""
    known = {declaration.key: declaration for declaration in declarations()}
    tables = {declaration.table for declaration in known.values()}
    problems: list[str] = []
    values: dict[str, dict[str, Any]] = {table: {} for table in tables}
    for table, content in tree.items():
        if table not in tables:
            problems.append(f"[{table}] is not a table of emberd's settings{_nearest(table, tables)}")
            continue
        if not isinstance(content, dict):
            problems.append(f"{table} must be a table: write [{table}] on a line of its own")
            continue
        for name, value in content.items():
            key = f"{table}.{name}"
            if key not in known:
                names = {declaration.name for declaration in known.values() if declaration.table == table}
                problems.append(f"{key} is not a setting{_nearest(name, names)}")
                continue
            try:
                values[table][name] = _checked(known[key], value)
            except ValueError as wrong:
                problems.append(f"{key}: {wrong}")
    settings = Settings(
        **{
            entry.name: dataclasses.replace(getattr(Settings(), entry.name), **values[entry.name])
            for entry in dataclasses.fields(Settings)
        }
    )
    return settings, problems


def _nearest(word: str, known: set[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _checked(declaration: Declaration, value: Any) -> Any:
    """Return `value` as the declared type, or raise ValueError with what was expected."""
    wanted, choices = declaration.type, declaration.choices()
    if choices:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}")
        return value
    if get_origin(wanted) is tuple:
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise ValueError(f'must be a list of strings such as ["--threads", "4"], not {value!r}')
        return tuple(value)
    if wanted is bool:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, not {value!r}")
        return value
    if wanted is str:
        if not isinstance(value, str):
            raise ValueError(f"must be a string in quotes, not {value!r}")
        return value
    return _number(declaration, value)


def _number(declaration: Declaration, value: Any) -> int | float:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if declaration.type is int and not is_whole:
        raise ValueError(f"must be a whole number, not {value!r}")
    if not is_whole and not isinstance(value, float):
        raise ValueError(f"must be a number, not {value!r}")
    number: int | float = declaration.type(value)
    low, high = declaration.low, declaration.high
    if (low is not None and not number >= low) or (high is not None and not number <= high):
        unit = f" {declaration.unit}" if declaration.unit else ""
        raise ValueError(f"must be {declaration.range_text()}{unit}, not {value!r}")
    return number


def _check_together(settings: Settings, source: str) -> None:
    """Refuse settings that are each valid and contradict each other."""
    if settings.lifecycle.backoff_initial_s > settings.lifecycle.backoff_max_s:
        raise ConfigError(
            f"{source}: lifecycle.backoff_initial_s ({settings.lifecycle.backoff_initial_s:g} s) is more than "
            f"lifecycle.backoff_max_s ({settings.lifecycle.backoff_max_s:g} s)",
            "Raise backoff_max_s or lower backoff_initial_s.",
        )
    for key, texts, understand, remedy in (
        ("warmth.cool_hours", settings.warmth.cool_hours, read_hours, "Mend the hours, or remove them."),
        ("endpoint.names", settings.endpoint.names, name_pattern, "Mend the name, or remove it."),
        ("endpoint.origins", settings.endpoint.origins, origin_pattern, "Mend the origin, or remove it."),
    ):
        for text in texts:
            try:
                understand(text)
            except ValueError as error:
                raise ConfigError(f"{source}: {key}: {error}", remedy) from None
    if settings.warmth.min_interval_s > settings.warmth.max_interval_s:
        raise ConfigError(
            f"{source}: warmth.min_interval_s ({settings.warmth.min_interval_s:g} s) is more than "
            f"warmth.max_interval_s ({settings.warmth.max_interval_s:g} s)",
            "Raise max_interval_s or lower min_interval_s.",
        )


def to_toml(settings: Settings, *, with_help: bool = True) -> str:
    """Write settings as the text of a settings file; `read` of it gives the same settings back."""
    lines: list[str] = []
    table = ""
    for declaration in declarations():
        if declaration.table != table:
            table = declaration.table
            lines += ["", f"[{table}]" + (f"  # {table_help(table)}" if with_help else "")]
        if with_help:
            facts = ", ".join(
                part
                for part in (
                    declaration.range_text() + (f" {declaration.unit}" if declaration.unit else ""),
                    f"default {_toml_value(declaration.default)}",
                )
                if part.strip()
            )
            lines += ["", f"# {declaration.help}", f"# ({facts})"]
        value = getattr(getattr(settings, table), declaration.name)
        lines.append(f"{declaration.name} = {_toml_value(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def masked(settings: Settings) -> Settings:
    """Return the settings as people may see them."""
    for declaration in declarations():
        section = getattr(settings, declaration.table)
        if declaration.is_secret and getattr(section, declaration.name):
            hidden = dataclasses.replace(section, **{declaration.name: "********"})
            settings = dataclasses.replace(settings, **{declaration.table: hidden})
    return settings


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(word) for word in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    return repr(value)
