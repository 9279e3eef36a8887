"""The state directory that an emberd of commit 21eed80 left behind when it was killed, its engine running on.

`state_of_21eed80/` holds what it wrote, with placeholders (@MODEL@) where the paths and the process were:

    engine.json               format 1: the running engine
    starts.json               format 1: two starts that failed, one that was ready; seconds before the kill
    engine-answers.json       no format number: what the engine's program said of itself
    history.db                user_version 2, as SQL, which a person can read: accounts of one day
    engine.log, emberd.log    text, and JSON lines
    environment.json          not emberd's: what it had set in the engine's environment

To record it anew: python tests/old_emberd.py CHECKOUT, with a checkout of that commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from daemon_process import Daemon
from engine_process import free_port
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Mapping

RECORDED = Path(__file__).parent / "state_of_21eed80"
STANDIN = Path(__file__).parent / "koboldcpp_standin"
SETTINGS = {"engine.context_size": 1024, "warmth.mode": "auto", "log.sink": "file"}
MANAGED = {"XPC_SERVICE_NAME": "io.github.emberd.test"}
"""Starts are counted under a service manager only."""
_WRITES = "engine_idle=1, engine_busy=2, other_idle=4, other_busy=8, unknown_idle=16, unknown_busy=32"
_COST = "passes=3, read_bytes=4096, engine_ms=1500, cpu_ms=2500"
_ACCOUNT = f"""
import sys
from datetime import datetime
from pathlib import Path
from emberd.core.swap_account import SwapWrites
from emberd.core.warmth_cost import WarmthCost
from emberd.services.history import History
history, day = History(Path(sys.argv[1]), None), datetime.now().astimezone().date()
assert history.add(day, SwapWrites({_WRITES})) and history.add(day, WarmthCost({_COST}))
history.close()
"""


def sha256(*words: str) -> str:
    """Return the digest by which that emberd told command lines and programs apart."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def plan_digest(command: list[str], environment: Mapping[str, str], port: int) -> str:
    """Return its digest of what an engine is started with, without its port and emberd's own Python before it."""
    words = [word for word in command[1:] if word != str(port)]
    return sha256(*words, *(f"{name}={value}" for name, value in sorted(environment.items())))


def start_token(pid: int) -> str:
    """Return its text that tells a process from a later one with the same pid: boot and start time (Linux)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return f"{boot}:{fields[19]}"  # the 22nd, of which two stand before the bracket


def answer_key(command: list[str], question: list[str], program: Path) -> str:
    """Return its name for the answer of a program to a question."""
    facts = program.stat()
    return sha256(*command, *question, str(facts.st_size), str(facts.st_mtime_ns))


# --- recording ----------------------------------------------------------------------------------------------


def record(checkout: Path) -> None:
    """Run the emberd of a checkout, kill it, and write down what it left."""
    RECORDED.mkdir(exist_ok=True)
    os.environ["PYTHONPATH"] = str(checkout / "daemon")
    os.environ.pop("PYTHONUNBUFFERED", None)  # else it is not seen that emberd sets it
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_gguf(model := folder / "small-model.gguf")
        daemon = Daemon(folder, {"engine.path": str(STANDIN), **SETTINGS, "warmth.mode": "off"}, MANAGED)
        daemon.settings["model.path"] = str(folder / "late.gguf")
        for _ in range(2):
            daemon.start()
            assert daemon.end() == 66
        daemon.write_settings(model__path=str(model))
        daemon.start()
        engine = daemon.wait_ready()["engine"]
        daemon.complete()
        environment = _set_by_emberd(engine["pid"], daemon)
        daemon.kill()
        killed_s = time.monotonic()
        subprocess.run([sys.executable, "-c", _ACCOUNT, daemon.state.history], check=True)
        places = {
            str(model): "@MODEL@",
            str(daemon.state.directory): "@STATE@",
            str(folder): "@FOLDER@",
            str(STANDIN): "@STANDIN@",
            sys.executable: "@PYTHON@",
            str(engine["pid"]): "@PID@",
            str(engine["port"]): "@PORT@",
            str(daemon.port): "@ENDPOINT@",
        }
        _write_down(daemon, environment, killed_s, places)
        daemon.close()


def _set_by_emberd(pid: int, daemon: Daemon) -> dict[str, str]:
    """Return what the engine's environment has that emberd's had not."""
    own = {**os.environ, **daemon.environment}
    of_engine = psutil.Process(pid).environ()
    return {name: value for name, value in of_engine.items() if own.get(name) != value and name != "LC_CTYPE"}


def _write_down(daemon: Daemon, environment: dict[str, str], killed_s: float, places: Mapping[str, str]) -> None:
    state = daemon.state
    engine = json.loads(state.record.read_text())
    pid = engine["pid"]
    # What `leave` will compute must be what that emberd computed.
    assert engine["plan_digest"] == plan_digest(engine["command"], environment, engine["port"])
    assert engine["start_token"] == start_token(pid)
    assert engine["command_digest"] == sha256(*psutil.Process(pid).cmdline())
    engine |= {"pid": "@PID@", "port": "@PORT@", "start_token": "", "command_digest": "", "plan_digest": ""}
    starts = json.loads(state.starts.read_text())
    assert starts["boot"] == start_token(1)
    starts["boot"] = ""
    for run in starts["runs"]:
        run["began_s"] = round(run["began_s"] - killed_s, 3)
    answers = json.loads(state.answers.read_text())
    (key,) = answers
    assert key == answer_key(engine["command"][:2], ["--help"], Path(engine["command"][1]))
    connection = sqlite3.connect(state.history)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = "\n".join([*connection.iterdump(), f"PRAGMA user_version = {version};", ""])
    connection.close()
    texts = {
        "engine.json": json.dumps(engine, indent=1),
        "starts.json": json.dumps(starts, indent=1),
        "engine-answers.json": json.dumps({"@KEY@": answers[key]}, indent=1),
        "history.sql": tables.replace(datetime.now().astimezone().date().isoformat(), "@TODAY@"),
        "engine.log": state.output.read_text(),
        "emberd.log": (state.directory / "emberd.log").read_text(),
        "environment.json": json.dumps(environment, indent=1),
    }
    any_of_them = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, places))})(?!\w)")
    for name, text in texts.items():
        with_places = any_of_them.sub(lambda found: places[found[0]], text)
        (RECORDED / name).write_text(with_places.rstrip("\n") + "\n")


# --- leaving it to a test -------------------------------------------------------------------------------------


def leave(daemon: Daemon) -> subprocess.Popen[bytes]:
    """Put the recorded state where that daemon will look, with its engine running; return the engine."""
    state, port, now_s = daemon.state, free_port(), time.monotonic()
    state.directory.mkdir(mode=0o700)
    places = {
        "@MODEL@": daemon.settings["model.path"],
        "@STATE@": str(state.directory),
        "@FOLDER@": str(daemon.folder),
        "@STANDIN@": daemon.settings["engine.path"],
        "@PYTHON@": sys.executable,
        "@PORT@": str(port),
        "@ENDPOINT@": str(daemon.port),
        "@TODAY@": datetime.now().astimezone().date().isoformat(),
    }

    def text(name: str) -> str:
        filled = (RECORDED / name).read_text()
        for place, value in places.items():
            filled = filled.replace(place, value)
        return filled

    record, environment = json.loads(text("engine.json")), json.loads(text("environment.json"))
    state.scratch.mkdir(mode=0o700)
    state.output.write_text(text("engine.log"))
    with state.output.open("ab") as output:
        engine = subprocess.Popen(
            record["command"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **daemon.environment, **environment},
            start_new_session=True,
        )
    daemon.engine_pids.add(engine.pid)
    places["@PID@"] = str(engine.pid)
    record |= {
        "pid": engine.pid,
        "port": port,
        "start_token": start_token(engine.pid),
        "command_digest": sha256(*record["command"]),
        "plan_digest": plan_digest(record["command"], environment, port),
    }
    starts = json.loads(text("starts.json"))
    starts["boot"] = start_token(1)
    for run in starts["runs"]:
        run["began_s"] += now_s
    key = answer_key(record["command"][:2], ["--help"], Path(record["command"][1]))
    files: dict[Path, Any] = {
        state.record: json.dumps(record),
        state.starts: json.dumps(starts),
        state.answers: json.dumps({key: json.loads(text("engine-answers.json"))["@KEY@"]}),
        state.directory / "emberd.log": text("emberd.log"),
    }
    for path, content in files.items():
        path.write_text(content)
    connection = sqlite3.connect(state.history)
    connection.executescript(text("history.sql"))
    connection.close()
    return engine


if __name__ == "__main__":
    record(Path(sys.argv[1]).absolute())
