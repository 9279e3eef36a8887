"""The command line of both personalities, and the settings file with its odd precedence."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from switches import BATCHING, OLD

DEFAULT_PORT = 5001
UNLOAD = "unload_model"
"""What a reload is asked for instead of a file."""
MOST_CONTEXT, LEAST_CONTEXT = 262144, 256


def parse(arguments: list[str], version: str) -> argparse.Namespace:
    """Parse the command line, then let the settings file speak. Exits as the original does."""
    options = build_parser(version).parse_args(arguments)
    if isinstance(options.model, str):
        options.model_param = options.model or options.model_param
    else:
        options.model_param = options.model[0] if options.model else options.model_param
    if options.model_param and options.model_param.endswith(".kcpps"):
        options.config, options.model_param = [options.model_param], None
    if options.config:
        _apply_config(options, Path(options.config[0]), arguments)
    if options.onready and not isinstance(options.onready, str):
        options.onready = options.onready[0]
    if options.port_param != DEFAULT_PORT:
        options.port = options.port_param
    if version == OLD and options.quantkv and not options.flashattention:
        sys.stdout.write("Error: quantkv wants flashattention\n")
        sys.exit(1)
    return options


def merged(options: argparse.Namespace, path: Path, version: str) -> argparse.Namespace:
    """Return the arguments after a reload: the file over the defaults, a few kept from the running process."""
    fresh = build_parser(version).parse_args([])
    for key in (
        "port",
        "port_param",
        "host",
        "admin",
        "admindir",
        "adminpassword",
        "ssl",
        "config",
        "password",
    ):
        setattr(fresh, key, getattr(options, key))
    if path.name == UNLOAD:
        fresh.nomodel = True
        return fresh
    if path.suffix == ".gguf":
        fresh.model_param = str(path)
        return fresh
    kept = {"port", "port_param", "host", "admin", "admindir", "adminpassword", "ssl", "config"}
    for key, value in _settings(path).items():
        if key not in kept:
            setattr(fresh, key, value)
    return fresh


def _settings(path: Path) -> dict[str, Any]:
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise TypeError("not a JSON object")
    if settings.get("onready"):
        settings["onready"] = ""
    model = settings.get("model")
    if model and not settings.get("model_param"):
        settings["model_param"] = model[0] if isinstance(model, list) else model
    if "noblas" in settings:
        settings["usecpu"] = settings.pop("noblas")
    return settings


def _apply_config(options: argparse.Namespace, path: Path, arguments: list[str]) -> None:
    """Overwrite what was parsed, except the keys whose exact long name stands on the command line."""
    try:
        settings = _settings(path)
    except (OSError, ValueError, TypeError):
        if options.ignoremissing:
            return
        sys.stdout.write("Specified kcpp config file invalid or not found.\n")
        sys.exit(2)
    for key, value in settings.items():
        if f"--{key}" in arguments:
            sys.stdout.write(f"Overriding Config Value: {key}\n")
        elif not (key == "model_param" and "--model" in arguments):
            setattr(options, key, value)


def _context(text: str) -> int:
    value = int(text)
    if not LEAST_CONTEXT <= value <= MOST_CONTEXT:
        raise argparse.ArgumentTypeError(f"must be within [{LEAST_CONTEXT}, {MOST_CONTEXT}]")
    return value


def build_parser(version: str) -> argparse.ArgumentParser:
    """Return the parser of one personality, with the flags that a supervisor or its user may name."""
    flags = _Flags(version)
    flags.add_exclusive_groups()
    flags.add_common()
    if version == OLD:
        flags.add_old()
    else:
        flags.add_new()
    return flags.parser


class _Flags:
    """Fills a parser. The help is one word per flag: it is there to be searched for names."""

    def __init__(self, version: str) -> None:
        self.is_old, self.can_batch = version == OLD, version == BATCHING
        self.parser = argparse.ArgumentParser(
            prog="koboldcpp.py", description=f"KoboldCpp Server - Version {version} (stand-in for tests)"
        )

    def _switch(self, *names: str, group: Any = None, shown: bool = True) -> None:
        hint = names[0].removeprefix("--") if shown else argparse.SUPPRESS
        (group or self.parser).add_argument(*names, action="store_true", help=hint)

    def _value(self, *names: str, group: Any = None, **more: Any) -> None:
        (group or self.parser).add_argument(*names, help=names[0].removeprefix("--"), **more)

    def _known(self, *names: str) -> tuple[str, ...]:
        """Return the names that this version knows; the older one has no aliases."""
        return names[:1] if self.is_old else names

    def add_exclusive_groups(self) -> None:
        """Add the flags that exclude each other in both versions."""
        model = self.parser.add_mutually_exclusive_group()
        if self.is_old:
            self._value("--model", group=model, default="")
        else:
            self._value("--model", "-m", group=model, nargs="+", default=[])
        self._value("model_param", group=model, nargs="?")
        port = self.parser.add_mutually_exclusive_group()
        self._value("--port", group=port, type=int, default=DEFAULT_PORT)
        self._value("port_param", group=port, nargs="?", type=int, default=DEFAULT_PORT)
        backend = self.parser.add_mutually_exclusive_group()
        cuda = ("--usecublas",) if self.is_old else ("--usecuda", "--usecublas", "--usehipblas")
        self._value(*cuda, group=backend, nargs="*")
        self._value("--usevulkan", group=backend, nargs="*", type=int)
        self._value("--useclblast", group=backend, nargs=2, type=int, choices=range(9))
        self._switch("--usecpu", group=backend)
        self._switch("--noblas", group=backend, shown=False)
        launcher = self.parser.add_mutually_exclusive_group()
        self._switch("--showgui", group=launcher)
        self._switch("--skiplauncher", group=launcher)

    def add_common(self) -> None:
        """Add what both versions know."""
        layers = self._known("--gpulayers", "--gpu-layers", "--n-gpu-layers", "-ngl")
        context = self._known("--contextsize", "--ctx-size", "-c")
        batch = ("--blasbatchsize",) if self.is_old else ("--batchsize", "--blasbatchsize", "--batch-size", "-b")
        self._value("--host", default="")
        self._value("--config", nargs=1)
        self._value(*self._known("--threads", "-t"), type=int, default=1)
        default = 4096 if self.is_old else 16384 if self.can_batch else 8192
        said = f"Controls the memory allocated for maximum context size. (default {default})."
        self.parser.add_argument(*context, type=_context, default=default, help=said)
        self._value(*layers, nargs="?", const=1, type=int, default=-1)
        self._value(*self._known("--tensor_split", "--tensor-split", "-ts"), nargs="+", type=float)
        self._value(*batch, type=int, default=512)
        self._value("--blasthreads", type=int, default=0)
        self._value("--lora", nargs="+")
        self._value("--ropeconfig", nargs="+", type=float, default=[0.0, 10000.0])
        self._value("--debugmode", nargs="?", const=1, type=int, default=0)
        self._value("--onready", nargs=1, default="")
        self._value("--benchmark", nargs="?", const="stdout")
        self._value(*self._known("--prompt", "-p"), default="")
        self._value("--multiuser", nargs="?", const=1, type=int, default=1)
        self._value("--ssl", nargs="+")
        self._value("--password", default=os.environ.get("KCPP_PASSWORD") if self.can_batch else None)
        self._value("--chatcompletionsadapter", default="" if self.is_old else "AutoGuess")
        levels = ["f16", "bf16", "q8_0", "q5_1", "q4_0", "0", "1", "2", "3"]
        if self.can_batch:
            self._value("--quantkv", choices=levels, default="f16")
        else:
            self._value("--quantkv", type=int, choices=[0, 1, 2], default=0)
        for name in ("preloadstory", "mmproj", "unpack"):
            self._value("--" + name, default="")
        for name in ("launch", "remotetunnel", "highpriority", "foreground", "quiet", "nocertify"):
            self._switch("--" + name)
        for name in ("ignoremissing", "noavx2", "smartcontext", "nomodel"):
            self._switch("--" + name)
        self._switch(*self._known("--noshift", "--no-context-shift"))
        self._switch(*self._known("--usemlock", "--mlock"))
        if self.can_batch:
            self._switch("--noflashattention", "--no-flash-attn", "-nofa")
            self._switch("--noswa", "--swa-full")
            self._value("--swapadding", type=int, default=0)
            self._value("--adminunloadtimeout", type=int, default=0)
            self._value("--baseconfig", default="")
            for name in ("routermode", "autoswapmode"):
                self._switch("--" + name)
        else:
            self._switch(*self._known("--flashattention", "--flash-attn", "-fa"))

    def add_old(self) -> None:
        """Add what only the older version knows."""
        self._switch("--nommap")
        self._value("--promptlimit", type=int, default=100)
        self._value("--forceversion", type=int, default=0)

    def add_new(self) -> None:
        """Add what only the newer version knows."""
        mapping = self.parser.add_mutually_exclusive_group()
        self._switch("--usemmap", group=mapping)
        self._switch("--nommap", "--no-mmap", group=mapping, shown=False)
        for name in ("version", "cli", "nofastforward", "smartcache", "failsafe", "multiplayer"):
            self._switch("--" + name)
        if not self.can_batch:
            self._switch("--useswa")
        for name in ("websearch", "singleinstance", "admin", "jinja", "nobostoken", "enableguidance"):
            self._switch("--" + name)
        self._switch("--autofit", "--fit", "-fit")
        self._switch("--lowvram", "-nkvo", "--no-kv-offload")
        self._switch("--mmprojcpu", "--no-mmproj-offload")
        for name in ("analyze", "savedatafile", "exportconfig", "exporttemplate", "admindir"):
            self._value("--" + name, default="")
        self._value("--draftmodel", "--model-draft", "-md", default="")
        self._value("--adminpassword")
        self._value("--overridekv", "--override-kv", default="")
        self._value("--overridetensors", "--override-tensor", "-ot", default="")
        self._value("--maingpu", "--main-gpu", "-mg", type=int, default=-1)
        self._value("--genlimit", "--promptlimit", type=int, default=0)
        self._value("--ratelimit", type=int, default=0)
        if self.can_batch:
            self._value("--parallelrequests", "--continuous-batching", "--contbatch", type=int, default=1)
        self._value("--defaultgenamt", type=int, default=896)
        self._value("--maxrequestsize", type=int, default=32)
        self._value("--moeexperts", type=int, default=-1)
        self._value("--moecpu", "--n-cpu-moe", "-ncmoe", nargs="?", const=999, type=int, default=0)
