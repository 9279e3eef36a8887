"""What emberd doctor finds on a Mac: its own questions, answered by the stand-in of macOS' C library."""

from __future__ import annotations

import asyncio
import struct
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from emberd.core.settings import EngineSettings, ModelSettings, Settings, StateSettings
from emberd.doctor.examine import examine
from emberd.host.darwin import DarwinHost
from emberd.host.darwin_calls import DarwinCalls
from synthetic_gguf import write_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from darwin_standin import DarwinStandin

GIB = 1 << 30
PAGE = 16384
OFFLOADED = "load_tensors: offloaded 29/29 layers to GPU\n"
LOADED = "llama_model_loader: loaded meta data with 30 pairs\nload_tensors: loading model tensors (mmap = true)\n"


class Mac:
    """A Mac, one emberd's settings on it, and its state directory."""

    def __init__(self, macos: DarwinStandin, folder: Path, standin: Path) -> None:
        self.standin = macos
        self.state = folder / "state"
        self.state.mkdir(mode=0o700)
        self.model = write_gguf(folder / "model.gguf", target_bytes=4 << 20).path
        self.settings = Settings(
            model=ModelSettings(str(self.model)),
            engine=EngineSettings(path=str(standin), python=sys.executable),
            state=StateSettings(str(self.state)),
        )
        macos.sysctl("hw.memsize", 16 * GIB)
        macos.sysctl("vm.pagesize", PAGE)
        macos.sysctl("hw.optional.arm64", 1, 4)
        macos.sysctl("vm.user_wire_limit", 12 * GIB)
        macos.sysctl("vm.global_user_wire_limit", 12 * GIB)
        macos.sysctl("kern.memorystatus_vm_pressure_level", 1, 4)
        macos.statistics(free_count=8 * GIB // PAGE, wire_count=2 * GIB // PAGE)

    def engine(self, **settings: Any) -> None:
        """Change settings of the engine."""
        self.settings = replace(self.settings, engine=replace(self.settings.engine, **settings))

    def log(self, text: str) -> None:
        """Write what the engine has printed."""
        (self.state / "engine.log").write_text(text)

    def examine(self, status: dict[str, Any] | None = None) -> dict[str, dict[str, str]]:
        """Look at everything, as within the daemon whose status is given."""
        host = DarwinHost(DarwinCalls(self.standin.library), pmset="/nowhere")
        content = asyncio.run(examine(host, self.settings, status))
        return {each["code"]: each for each in content["conditions"]}


@pytest.fixture
def mac(macos: DarwinStandin, tmp_path: Path, standin: Path) -> Mac:
    return Mac(macos, tmp_path, standin)


def running(**facts: Any) -> dict[str, Any]:
    """Return what a daemon with a ready engine says of itself."""
    return {"pid": 1, "version": "1", "state": "READY", "engine": {"pid": 1, "started_at": 4e9}, **facts}


def test_a_healthy_mac_lacks_the_daemon_only(mac: Mac):
    assert [code for code, each in mac.examine().items() if each["code"] != "OTHER_MODEL_SERVER"] == ["NOT_RUNNING"]


def test_a_lowered_limit_of_the_gpu_is_told_with_the_command_that_raises_it(mac: Mac):
    mac.standin.sysctl("iogpu.wired_limit_mb", 3, 4)
    assert "iogpu.wired_limit_mb=" in mac.examine()["GPU_LIMIT_TOO_SMALL"]["remedy"]
    mac.engine(gpu_layers=0)
    found = mac.examine()
    assert "GPU_LIMIT_TOO_SMALL" not in found
    assert "ENGINE_GPU_OFF" in found


@pytest.mark.parametrize("limit", ["vm.user_wire_limit", "vm.global_user_wire_limit"])
def test_the_wire_limit_that_refuses_the_lock_is_named(mac: Mac, limit: str):
    mac.standin.sysctl(limit, 1 << 20)
    assert limit in mac.examine()["LOCK_LIMIT"]["evidence"]


def test_a_python_under_rosetta_is_told_and_the_computers_own_processor_counts(mac: Mac, tmp_path: Path):
    mac.standin.sysctl("sysctl.proc_translated", 1, 4)
    program = tmp_path / "koboldcpp"
    program.write_bytes(struct.pack("<II", 0xFEEDFACF, 0x01000007) + bytes(64))
    program.chmod(0o755)
    mac.engine(path=str(program))
    found = mac.examine()
    assert "PYTHON_TRANSLATED" in found
    assert "built for x86_64, this computer is arm64" in found["ENGINE_WRONG_ARCHITECTURE"]["evidence"]
    assert "without Metal" in found["ENGINE_WRONG_ARCHITECTURE"]["evidence"]


def test_a_quarantined_engine_is_told_with_the_command_that_frees_it(mac: Mac, tmp_path: Path):
    program = tmp_path / "koboldcpp"
    program.write_bytes(struct.pack("<II", 0xFEEDFACF, 0x0100000C) + bytes(64))
    program.chmod(0o755)
    mac.engine(path=str(program))
    mac.standin.attribute(program, "com.apple.quarantine", b"0083;00000000;Safari;")
    found = mac.examine()["ENGINE_QUARANTINED"]
    assert found["remedy"] == f"xattr -d com.apple.quarantine {program}"


def test_swap_that_is_nearly_full_and_critical_pressure_are_told(mac: Mac):
    mac.standin.swap(xsu_total=GIB, xsu_used=GIB - 1, xsu_avail=1)
    mac.standin.sysctl("kern.memorystatus_vm_pressure_level", 4, 4)
    assert {"SWAP_NEARLY_FULL", "PRESSURE_CRITICAL"} <= set(mac.examine())


@pytest.mark.parametrize(
    ("log", "is_lost"),
    [
        (LOADED + OFFLOADED, False),
        (LOADED, True),  # a build without Metal prints no line about offloading
        (LOADED + OFFLOADED.replace("29/29", "0/29"), True),
        (LOADED + OFFLOADED + LOADED, True),  # the last start counts
        (LOADED + "ggml_metal_init: failed to initialize Metal backend\n" + OFFLOADED, True),
        ("", False),
    ],
    ids=["on the GPU", "no such line", "no layer", "the last start", "no shaders", "not known"],
)
def test_a_lost_gpu_is_seen_in_the_engines_log(mac: Mac, log: str, is_lost: bool):  # a parameter
    mac.log(log)
    assert ("ENGINE_LOST_GPU" in mac.examine()) is is_lost


def test_a_heartbeat_that_is_missing_swapped_memory_and_a_model_let_go_come_from_the_daemon(mac: Mac):
    heartbeat = {"state": "ABSENT", "message": "this build has no heartbeat", "remedy": "a newer build"}
    found = mac.examine(
        running(
            metal_heartbeat=heartbeat,
            memory={"engine": {"swapped_bytes": GIB}},
            warmth={"hold": "no_warming", "paused_for_s": None},
            residency={"share": 0.25},
            lock={"state": "PARTIAL", "message": "a half is locked", "remedy": ""},
        )
    )
    assert found["ENGINE_HEARTBEAT_LOST"]["remedy"] == "a newer build"
    assert "1.0 GiB of it are compressed or in swap" in found["ENGINE_SWAPPED"]["evidence"]
    assert {"LET_GO", "MODEL_COLD", "LOCK_PARTIAL"} <= set(found)
    assert "NOT_RUNNING" not in found


@pytest.mark.parametrize(
    ("sinks", "is_lost"), [(["unified"], True), (["unified", "file"], False), (["stderr"], False)]
)
def test_a_log_in_the_unified_log_alone_is_not_kept(mac: Mac, sinks: list[str], is_lost: bool):  # a parameter
    assert ("LOGS_NOT_KEPT" in mac.examine(running(log=sinks))) is is_lost
