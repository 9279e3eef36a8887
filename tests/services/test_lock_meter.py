"""The lock is believed when the kernel says so: real engines, real locks, real limits."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from emberd.core.load_facts import KeepAliveState, LoadFacts
from emberd.core.lock import LockState
from emberd.core.memory import EngineMemory, SystemMemory
from emberd.core.reuse import CacheRoom
from emberd.core.settings import EngineSettings, ModelSettings, Settings
from emberd.core.wishes import OwnerWishes
from emberd.engine.wishes import of_koboldcpp
from emberd.host import ThisHost
from emberd.host.model_file import ModelInfo
from emberd.services.lock_meter import LockMeter, kv_cache_bytes
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

may_lock = pytest.mark.skipif(
    os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] not in {-1, resource.RLIM_INFINITY},
    reason="this user may not lock a model",
)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def start(daemon: Daemon) -> dict[str, Any]:
    daemon.start()
    lock: dict[str, Any] = daemon.wait_ready()["lock"]
    return lock


@may_lock
@on_linux
def test_a_lock_that_holds_is_proved_by_the_kernel(make_daemon: MakeDaemon):
    daemon = make_daemon({"lifecycle.probe_interval_s": 10})
    lock = start(daemon)
    assert lock["state"] == "HELD"
    assert lock["locked_bytes"] >= lock["needed_bytes"] * 0.95
    assert daemon.wait_event("engine_lock")["state"] == "HELD"
    assert "HELD" in daemon.verb("status").stdout


@on_linux
def test_a_lock_that_the_engine_was_refused_is_absent_with_its_reason(make_daemon: MakeDaemon):
    lock = start(make_daemon(STANDIN_MLOCK_FAILS="1"))
    assert lock["state"] == "ABSENT"
    assert lock["message"]
    assert lock["notes"]


@on_linux
def test_a_lock_that_nobody_asked_for_is_absent_and_no_warning(make_daemon: MakeDaemon):
    daemon = make_daemon({"engine.lock": "never"})
    lock = start(daemon)
    assert (lock["state"], lock["reason"]) == ("ABSENT", "not_asked")
    assert daemon.wait_event("engine_lock")["level"] == "info"


@may_lock
@on_linux
def test_the_lock_of_an_adopted_engine_is_proved_again(make_daemon: MakeDaemon):
    daemon = make_daemon()
    start(daemon)
    daemon.kill()
    assert start(daemon)["state"] == "HELD"
    assert daemon.status()["engine"]["adopted"]


def test_a_change_of_the_policy_restarts_the_engine(make_daemon: MakeDaemon):
    daemon = make_daemon()
    start(daemon)
    first = daemon.status()["engine"]["pid"]
    daemon.write_settings(engine__lock="never")
    assert json.loads(daemon.verb("reload", "--json").stdout)["engine_restarts"]
    assert "--usemlock" not in daemon.wait_ready(other_than=first)["engine"]["command"]


class SmallHost(ThisHost):
    """This computer with so much memory as a test says."""

    total: int = 0

    def system_memory(self) -> SystemMemory:
        return SystemMemory(total_bytes=self.total, available_bytes=self.total)


def asking(words: tuple[str, ...], model: Path) -> Any:
    """Return an adapter of KoboldCPP with these arguments, whose program tells nothing."""

    async def ask_build() -> None:
        return None

    answers = {"ask_build": ask_build, "wishes": lambda: of_koboldcpp(words, {}), "model_path": lambda: model}
    return SimpleNamespace(**answers)


@pytest.mark.parametrize(
    ("ram_mib", "policy", "words", "locks"),
    [
        (64 * 1024, "auto", (), True),
        (256, "auto", (), False),
        (256, "always", (), True),
        (256, "auto", ("--usemlock",), True),
        (256, "auto", ("--mlock",), True),
        (64 * 1024, "never", (), False),
    ],
)
async def test_auto_locks_where_enough_remains_and_an_owners_own_flag_decides(
    tmp_path: Path, ram_mib: int, policy: Any, words: tuple[str, ...], locks: bool
):
    model = tmp_path / "m.gguf"
    write_gguf(model)
    host = SmallHost()
    host.total = ram_mib << 20
    settings = Settings(
        model=ModelSettings(path=str(model)), engine=EngineSettings(lock=policy, extra_args=words, context_size=512)
    )
    decision = await LockMeter(host).decide(settings, asking(words, model))
    assert decision.will_lock is locks
    if policy == "auto" and not locks:
        assert decision.reasons


@pytest.mark.parametrize(
    ("ram_gib", "wishes", "size_mib"),
    [
        (None, OwnerWishes(default_context_tokens=0, least_context_tokens=4096), 33024 / 64),
        (64, OwnerWishes(default_context_tokens=0), 33024 / 64),
        (64, OwnerWishes(default_context_tokens=0, least_context_tokens=4096), 33024 / 64),
        (2, OwnerWishes(default_context_tokens=0, least_context_tokens=4096), 448),
        (1, OwnerWishes(default_context_tokens=0, least_context_tokens=4096), 4352 / 64),
        (1, OwnerWishes(default_context_tokens=0), 33024 / 64),
        (1, OwnerWishes(context_tokens=8192), 8448 / 64),
        (1, OwnerWishes(default_context_tokens=16384), 16640 / 64),
    ],
)
def test_a_server_that_fits_its_context_to_memory_is_not_counted_with_the_whole(
    ram_gib: int | None, wishes: OwnerWishes, size_mib: float
):
    """A cell takes 16 KiB; weights and buffers 576 MiB."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 8,
        "llama.embedding_length": 512,
        "llama.context_length": 32768,
        "llama.attention.head_count": 8,
    }
    info = ModelInfo((512 << 20) - 1000 * 4 * 512, metadata, 1000)
    ram_bytes = None if ram_gib is None else ram_gib << 30
    settings = Settings(engine=EngineSettings(kind="llama-server"))
    assert kv_cache_bytes(info, settings, wishes, ram_bytes) == size_mib * (1 << 20)


@pytest.mark.parametrize("version", ["1.76", "1.104", "1.115.1"])
def test_the_running_engine_tells_its_context_and_an_adopted_one_has_told_it(make_daemon: MakeDaemon, version: str):
    daemon = make_daemon(STANDIN_VERSION=version)
    daemon.start()
    context = daemon.wait_ready()["context"]
    default = {"1.76": 4096, "1.104": 8192, "1.115.1": 16384}[version]
    assert default <= context["tokens"] <= default + 256
    assert context["is_measured"]
    assert context["kv_cache_bytes"] > 0
    assert "KV cache" in daemon.verb("status").stdout
    daemon.kill()
    daemon.start()
    assert daemon.wait_ready()["context"] == context


async def test_a_model_that_cannot_be_read_leaves_the_verdict_unknown(tmp_path: Path):
    meter = LockMeter(ThisHost())
    await meter.adopt(tmp_path / "missing.gguf", LoadFacts())
    assert meter.judge([os.getpid()], is_asked=True)
    assert meter.verdict is not None
    assert meter.verdict.state is LockState.UNKNOWN
    assert not meter.judge([os.getpid()], is_asked=True), "nothing has changed"


@on_linux
def test_locked_bytes_are_those_of_the_processes():
    code = """
import ctypes, mmap, sys
area = mmap.mmap(-1, 1 << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
print(ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(1 << 20)), flush=True)
sys.stdin.read()
"""
    host = ThisHost()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as locker:
        assert locker.stdout is not None
        assert locker.stdout.readline().strip() == "0"
        assert host.engine_memory([locker.pid, os.getpid()]).locked_bytes == 1 << 20
        limits = host.lock_limits(locker.pid)
        soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        assert limits.memlock_bytes == soft
        assert limits.can_ignore_memlock is (os.geteuid() == 0)
        locker.communicate("")
    assert host.engine_memory([locker.pid]) == EngineMemory()


def test_metals_heartbeat_is_read_from_the_engines_log():
    meter = LockMeter(ThisHost())
    assert meter.heartbeat(3600) is None, "no word of Metal"
    meter.note("ggml_metal_device_init: creating a residency set collection (keep_alive = 180 s)")
    short = meter.heartbeat(3600)
    assert short is not None
    assert (short.state, short.seconds, "180 s" in short.message) == (KeepAliveState.SHORT, 180, True)
    held = meter.heartbeat(180)
    assert held is not None
    assert held.state is KeepAliveState.HELD


async def test_the_estimate_of_the_cache_is_that_of_the_model_that_is_served_now(model: Path):
    meter, room = LockMeter(ThisHost()), CacheRoom(1, 4096)
    await meter.adopt(model, LoadFacts())
    assert meter.context(room).kv_cache_bytes is None, "nothing is known yet of how it was started"
    await meter.follow(model, (), OwnerWishes())
    adopted = meter.context(room)
    assert adopted.kv_cache_bytes
    assert not adopted.is_measured
    await meter.follow(None, ())
    assert meter.context(room).kv_cache_bytes is None, "an unknown model is not estimated by the one before"
