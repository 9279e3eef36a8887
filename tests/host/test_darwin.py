"""Readings of macOS through the real ctypes code, from a stand-in with the documented layouts and failures."""

from __future__ import annotations

import ctypes
import errno
import os
import types
from typing import TYPE_CHECKING

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.engine_files import MappedFile
from emberd.core.memory import EngineMemory, GpuLimits, Power, PowerSource, Pressure, SystemMemory
from emberd.host import darwin
from emberd.host.darwin import DarwinHost, read_power
from emberd.host.darwin_calls import (
    DarwinCalls,
    ProcRegionInfo,
    ProcRegionWithPathInfo,
    RusageInfoV4,
    VinfoStat,
    VmStatistics64,
    XswUsage,
)

if TYPE_CHECKING:
    from pathlib import Path

    from darwin_standin import DarwinStandin

PAGE = 16384
GIB = 1 << 30
MIB = 1 << 20
QUARANTINE = "com.apple.quarantine"
STRUCTURES = {
    "rusage_info_v4": (RusageInfoV4, 296),
    "vm_statistics64": (VmStatistics64, 152),
    "xsw_usage": (XswUsage, 32),
    "proc_regioninfo": (ProcRegionInfo, 96),
    "vinfo_stat": (VinfoStat, 136),
    "proc_regionwithpathinfo": (ProcRegionWithPathInfo, 1272),
}
WIDTHS = {4: st.integers(0, 2**32 - 1), 8: st.integers(0, 2**64 - 1)}


def fields(structure: type[ctypes.Structure]) -> list[tuple[str, int, int]]:
    """Return name, offset and size of each field, as ctypes laid them out."""
    return [
        (name, getattr(structure, name).offset, ctypes.sizeof(kind))
        for name, kind in structure._fields_  # type: ignore[misc]  # no bit fields here
    ]


def values(structure: type[ctypes.Structure]) -> st.SearchStrategy[dict[str, int]]:
    """Any value in each field."""
    return st.fixed_dictionaries({name: WIDTHS[size] for name, _, size in fields(structure) if size in WIDTHS})


def host(macos: DarwinStandin) -> DarwinHost:
    return DarwinHost(DarwinCalls(macos.library), pmset="/nonexistent")


def test_the_mapped_files_of_processes_are_told_with_their_locks(macos: DarwinStandin):
    macos.process(7)
    macos.process(8)
    macos.region(7, "/usr/lib/dyld", 0x1000, PAGE)
    macos.region(7, "/opt/lib/libggml.dylib", 0x10000, 64 * MIB)
    macos.region(7, "/models/a.gguf", 0x10000000, GIB, wired=1, identity=(3, 11))
    macos.region(7, "/models/a.gguf", 0x90000000, MIB, identity=(3, 11))
    macos.region(8, "/models/d.gguf", 0x1000, MIB, identity=(3, 12))
    seen = host(macos).mapped_files([7, 8, 999])
    assert seen is not None
    assert [each for each in seen if each.path.endswith(".gguf")] == [
        MappedFile("/models/a.gguf", (3, 11), GIB, GIB),
        MappedFile("/models/a.gguf", (3, 11), MIB, 0),
        MappedFile("/models/d.gguf", (3, 12), MIB, 0),
    ]
    assert not any("dylib" in each.path for each in seen)


def test_the_files_of_another_users_process_are_unknown(macos: DarwinStandin):
    macos.process(7, errno.EPERM)
    macos.region(7, "/models/a.gguf", 0x1000, GIB)
    assert host(macos).mapped_files([7, 999]) is None
    assert host(macos).mapped_files([]) is None


# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_each_field_is_where_the_headers_put_it(libsystem: DarwinStandin, name: str):
    structure, size = STRUCTURES[name]
    described, described_size = libsystem.layout(name)
    assert fields(structure) == described
    assert ctypes.sizeof(structure) == described_size == size


@pytest.mark.parametrize(
    ("structure", "name", "offset"),
    [
        (RusageInfoV4, "ri_pageins", 48),
        (RusageInfoV4, "ri_wired_size", 56),
        (RusageInfoV4, "ri_resident_size", 64),
        (RusageInfoV4, "ri_phys_footprint", 72),
        (RusageInfoV4, "ri_child_user_time", 96),
        (RusageInfoV4, "ri_diskio_bytesread", 144),
        (RusageInfoV4, "ri_cpu_time_qos_default", 160),
        (RusageInfoV4, "ri_logical_writes", 232),
        (VmStatistics64, "wire_count", 12),
        (VmStatistics64, "purgeable_count", 88),
        (VmStatistics64, "swapouts", 120),
        (VmStatistics64, "compressor_page_count", 128),
        (VmStatistics64, "total_uncompressed_pages_in_compressor", 144),
    ],
)
def test_the_fields_that_older_programs_count_by_hand_are_where_they_count_them(
    structure: type[ctypes.Structure], name: str, offset: int
):
    """Ends of the revisions of both structures, and the fields that are read: a slip in both declarations shows."""
    assert getattr(structure, name).offset == offset


# --- the engine's processes ---------------------------------------------------------------------------------


@given(seen=values(RusageInfoV4))
def test_each_counter_of_a_process_becomes_the_right_reading(libsystem: DarwinStandin, seen: dict[str, int]):
    libsystem.reset()
    libsystem.process(7, **seen)
    assert host(libsystem).engine_memory([7]) == EngineMemory(
        resident_bytes=seen["ri_resident_size"],
        locked_bytes=seen["ri_wired_size"],
        is_swap_estimated=True,
        swapped_bytes=max(seen["ri_phys_footprint"] - seen["ri_resident_size"], 0),
        footprint_bytes=seen["ri_phys_footprint"],
        major_faults=seen["ri_pageins"],
        read_bytes=seen["ri_diskio_bytesread"],
    )


def test_processes_are_summed_and_those_that_cannot_be_asked_left_out(macos: DarwinStandin):
    """Of another user: EPERM. Gone: ESRCH."""
    macos.process(100, ri_wired_size=7 * GIB, ri_resident_size=8 * GIB, ri_pageins=5)
    macos.process(101, ri_wired_size=MIB, ri_resident_size=2 * MIB, ri_pageins=2)
    macos.process(102, errno.EPERM, ri_wired_size=64 * GIB)
    memory = host(macos).engine_memory([100, 101, 102, 999])
    assert (memory.locked_bytes, memory.resident_bytes, memory.major_faults) == (
        7 * GIB + MIB,
        8 * GIB + 2 * MIB,
        7,
    )
    assert (memory.anonymous_bytes, memory.file_bytes) == (None, None)


@pytest.mark.parametrize("pids", [[], [102], [999], [102, 999]])
def test_without_a_readable_process_all_is_unknown(macos: DarwinStandin, pids: list[int]):
    macos.process(102, errno.EPERM, ri_wired_size=64 * GIB)
    assert host(macos).engine_memory(pids) == EngineMemory()


def test_a_resident_process_does_not_hide_what_another_has_in_swap(macos: DarwinStandin):
    macos.process(1, ri_phys_footprint=GIB, ri_resident_size=5 * GIB)
    macos.process(2, ri_phys_footprint=3 * GIB, ri_resident_size=GIB)
    assert host(macos).engine_memory([1, 2]).swapped_bytes == 2 * GIB


def test_buffers_of_the_gpu_do_not_pass_for_swapped(macos: DarwinStandin):
    """They are footprint and not resident; but no more is compressed than the compressor holds of all processes."""
    macos.process(1, ri_phys_footprint=60 * GIB, ri_resident_size=GIB)
    macos.sysctl("vm.pagesize", PAGE, 4)
    macos.statistics(total_uncompressed_pages_in_compressor=3, compressor_page_count=1)
    assert host(macos).engine_memory([1]).swapped_bytes == 3 * PAGE
    macos.statistics(total_uncompressed_pages_in_compressor=0)
    assert host(macos).engine_memory([1]).swapped_bytes == 0


def test_macos_knows_no_proportional_size(macos: DarwinStandin):
    macos.process(1, ri_resident_size=GIB)
    assert host(macos).proportional_bytes([1]) is None


# --- the computer -------------------------------------------------------------------------------------------


@given(seen=values(VmStatistics64), swap=values(XswUsage), total=WIDTHS[8], page=st.sampled_from([4096, PAGE]))
def test_each_counter_of_the_system_becomes_the_right_reading(
    libsystem: DarwinStandin, seen: dict[str, int], swap: dict[str, int], total: int, page: int
):
    libsystem.reset()
    libsystem.statistics(**seen)
    libsystem.swap(**swap)
    libsystem.sysctl("hw.memsize", total)
    libsystem.sysctl("vm.pagesize", page, 4)
    libsystem.sysctl("kern.memorystatus_vm_pressure_level", 2, 4)
    assert host(libsystem).system_memory() == SystemMemory(
        total_bytes=total,
        available_bytes=(seen["free_count"] + seen["inactive_count"]) * page,
        wired_bytes=seen["wire_count"] * page,
        compressed_bytes=seen["compressor_page_count"] * page,
        swap_total_bytes=swap["xsu_total"],
        swap_used_bytes=swap["xsu_used"],
        swapped_in_bytes=seen["swapins"] * page,
        swapped_out_bytes=seen["swapouts"] * page,
        pressure=Pressure.WARN,
    )


def test_a_system_that_tells_nothing_is_unknown_and_not_zero(macos: DarwinStandin):
    macos.kernel(38, fails_with=5)
    assert host(macos).system_memory() == SystemMemory()
    assert host(macos).gpu_limits() is None
    assert host(macos).wire_refusals() is None


@pytest.mark.parametrize("level", range(10))
def test_only_the_documented_pressure_levels_are_believed(macos: DarwinStandin, level: int):
    macos.sysctl("kern.memorystatus_vm_pressure_level", level, 4)
    known = {1: Pressure.NORMAL, 2: Pressure.WARN, 4: Pressure.CRITICAL}
    assert host(macos).system_memory().pressure is known.get(level, Pressure.UNKNOWN)


def test_pages_are_of_the_kernels_size_also_for_a_translated_python(macos: DarwinStandin):
    """hw.pagesize is that of the calling process: 4 KiB under Rosetta, where the kernel counts in 16 KiB."""
    macos.sysctl("hw.pagesize", 4096)
    macos.statistics(wire_count=3)
    assert host(macos).system_memory().wired_bytes is None
    macos.sysctl("vm.pagesize", PAGE, 4)
    assert host(macos).system_memory().wired_bytes == 3 * PAGE


@pytest.mark.parametrize(
    ("ints", "is_strict", "calls"),
    [(38, False, 1), (38, True, 1), (40, False, 1), (40, True, 2), (62, False, 1), (62, True, 2), (256, True, 2)],
)
def test_older_and_newer_kernels_are_read_and_the_length_remembered(
    macos: DarwinStandin, ints: int, is_strict: bool, calls: int
):
    """Up to macOS 15 a kernel counts 38 integers; newer ones count more and refuse a shorter buffer (-307)."""
    macos.sysctl("vm.pagesize", PAGE, 4)
    macos.statistics(wire_count=11, swapouts=12)
    macos.kernel(ints, is_strict=is_strict)
    this = host(macos)
    for reading in range(3):
        memory = this.system_memory()
        assert (memory.wired_bytes, memory.swapped_out_bytes) == (11 * PAGE, 12 * PAGE)
        assert macos.library.standin_statistics_calls() == calls + reading
    assert macos.library.standin_last_count() == (ints if calls == 2 else 38)


def test_a_kernel_that_refuses_now_and_then_is_read_each_time(macos: DarwinStandin):
    macos.sysctl("vm.pagesize", PAGE, 4)
    macos.statistics(wire_count=11)
    this = host(macos)
    for is_strict in (False, True, False, True, True):
        macos.kernel(40, is_strict=is_strict)
        assert this.system_memory().wired_bytes == 11 * PAGE


@pytest.mark.parametrize(
    ("ints", "is_strict", "fails_with"),
    [(15, False, 0), (37, False, 0), (257, True, 0), (2**32 - 1, True, 0), (38, False, 5), (38, False, -307)],
    ids=["rev0", "short", "too long", "nonsense", "fails", "refuses without a length"],
)
def test_counters_that_cannot_be_had_are_unknown_after_two_calls_at_most(
    macos: DarwinStandin, ints: int, is_strict: bool, fails_with: int
):
    macos.sysctl("vm.pagesize", PAGE, 4)
    macos.statistics(wire_count=11)
    macos.kernel(ints, is_strict=is_strict, fails_with=fails_with)
    this = host(macos)
    assert this.system_memory().wired_bytes is None
    assert macos.library.standin_statistics_calls() <= 2
    assert macos.library.standin_last_count() <= 256, "never more than the buffer holds"
    macos.kernel(38)
    assert this.system_memory().wired_bytes == 11 * PAGE, "a failure spoils nothing"


def test_many_readings_take_one_reference_to_the_hosts_port(macos: DarwinStandin):
    this = host(macos)
    for _ in range(5):
        this.system_memory()
    assert macos.library.standin_port_references() == 1


@pytest.mark.parametrize(
    ("width", "read"), [(4, 0x04030201), (8, 0x0807060504030201), (1, None), (2, None), (6, None), (16, None)]
)
def test_a_number_is_as_wide_as_the_kernel_says(macos: DarwinStandin, width: int, read: int | None):
    """Anything else is not a number; a longer value is refused (ENOMEM)."""
    macos.sysctl("hw.memsize", 0x0807060504030201, width)
    assert host(macos).system_memory().total_bytes == read


@pytest.mark.parametrize("width", [8, 24, 31, 40])
def test_swap_usage_of_another_layout_is_unknown(macos: DarwinStandin, width: int):
    macos.sysctl("vm.swapusage", 5 * GIB, width)
    assert host(macos).system_memory().swap_total_bytes is None


def test_psutil_may_fail_on_macos_26(macos: DarwinStandin, monkeypatch: pytest.MonkeyPatch):
    """psutil issue 2853: RuntimeError from host_statistics64 up to 7.2.2."""

    def fails(*_: object) -> None:
        raise RuntimeError("host_statistics64(HOST_VM_INFO64) syscall failed: (ipc/mig) array not large enough")

    for name in ("virtual_memory", "swap_memory", "sensors_battery"):
        monkeypatch.setattr(psutil, name, fails, raising=False)
    monkeypatch.setattr(psutil.Process, "create_time", fails)
    macos.sysctl("hw.memsize", 36 * GIB)
    macos.sysctl("vm.pagesize", PAGE, 4)
    macos.statistics(free_count=2, inactive_count=1)
    memory = host(macos).system_memory()
    assert (memory.total_bytes, memory.available_bytes) == (36 * GIB, 3 * PAGE)
    assert host(macos).power() == Power()
    assert host(macos).start_token(os.getpid()) is None


def test_a_library_without_the_calls_leaves_all_unknown(tmp_path: Path):
    this = DarwinHost(DarwinCalls(types.SimpleNamespace()), pmset="/nonexistent")  # type: ignore[arg-type]
    assert this.engine_memory([os.getpid()]) == EngineMemory()
    assert this.system_memory() == SystemMemory()
    assert this.gpu_limits() is None
    assert this.quarantine(tmp_path) is None


# --- limits -------------------------------------------------------------------------------------------------


def test_the_limits_of_locking_are_told(macos: DarwinStandin):
    macos.sysctl("vm.user_wire_limit", 12 * GIB)
    macos.sysctl("vm.add_wire_count_over_user_limit", 3)
    limits = host(macos).lock_limits(None)
    assert (limits.system, limits.user_wire_bytes, limits.global_wire_bytes) == ("darwin", 12 * GIB, None)
    assert host(macos).wire_refusals() is None
    macos.sysctl("vm.add_wire_count_over_global_limit", 5, 4)
    refusals = host(macos).wire_refusals()
    assert refusals is not None
    assert (refusals.over_user_limit, refusals.over_global_limit) == (3, 5)


@pytest.mark.parametrize(
    ("sysctls", "limits"),
    [
        ({}, None),
        ({"iogpu.wired_limit_mb": 0}, GpuLimits(0, None)),
        ({"iogpu.wired_limit_mb": 28672, "iogpu.disable_wired_collector": 0}, GpuLimits(28 * GIB, False)),
        ({"iogpu.wired_limit_mb": 1, "iogpu.disable_wired_collector": 1}, GpuLimits(MIB, True)),
        ({"debug.iogpu.wired_limit": 3 * GIB}, GpuLimits(3 * GIB, None)),
        ({"debug.iogpu.wired_limit": 3 * GIB, "iogpu.wired_limit_mb": 2}, GpuLimits(2 * MIB, None)),
        ({"iogpu.disable_wired_collector": 1}, GpuLimits(None, True)),
    ],
)
def test_the_limits_of_the_gpu_are_told_by_either_name(
    macos: DarwinStandin, sysctls: dict[str, int], limits: GpuLimits | None
):
    """MiB since macOS 14, bytes before; 0 is the system's default."""
    for name, value in sysctls.items():
        macos.sysctl(name, value, 8 if value >= 2**32 or name.startswith("debug") else 4)
    assert host(macos).gpu_limits() == limits


# --- quarantine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "mark"),
    [
        (b"0081;65f0;Safari;ABC", "0081;65f0;Safari;ABC"),
        (b"0081;65f0;Safari;ABC\n", "0081;65f0;Safari;ABC"),
        ("0081;;Düsseldorf;".encode(), "0081;;Düsseldorf;"),
        (b"0081;\xff", "0081;\ufffd"),
        (b"x" * 200, "x" * 200),
        (b"", None),
    ],
)
def test_the_quarantine_mark_of_a_file_is_told(
    macos: DarwinStandin, tmp_path: Path, value: bytes, mark: str | None
):
    engine = tmp_path / "koboldcpp ü"
    macos.attribute(engine, QUARANTINE, value)
    assert host(macos).quarantine(engine) == mark


def test_a_file_without_a_mark_has_none(macos: DarwinStandin, tmp_path: Path):
    """getxattr fails with ENOATTR, for another name as for another file."""
    macos.attribute(tmp_path / "engine", "com.apple.provenance", b"1")
    assert host(macos).quarantine(tmp_path / "engine") is None
    assert host(macos).quarantine(tmp_path / "other") is None


# --- power --------------------------------------------------------------------------------------------------

CHARGING = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=12345678)\t97%; charging; 0:35 remaining present: true
"""
DISCHARGING = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=12345678)\t9%; discharging; (no estimate) present: true
"""
DESKTOP = "Now drawing from 'AC Power'\n"
DESKTOP_ON_UPS = """Now drawing from 'UPS Power'
 -Back-UPS ES 850G2 (id=40370176)\t83%; discharging; 0:21 remaining present: true
"""
LAPTOP_BEHIND_UPS = """Now drawing from 'AC Power'
 -Back-UPS ES 850G2 (id=40370176)\t100%; charging present: true
 -InternalBattery-0 (id=12345678)\t50%; charging; 1:02 remaining present: true
"""
SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 sleep                1 (sleep prevented by powerd, lowpowermode 7)
 {name}         {value}
 womp                 0
"""


@pytest.mark.parametrize(
    ("text", "source", "share"),
    [
        (CHARGING, PowerSource.MAINS, 0.97),
        (DISCHARGING, PowerSource.BATTERY, 0.09),
        (DESKTOP, PowerSource.MAINS, None),
        (DESKTOP_ON_UPS, PowerSource.BATTERY, None),
        (LAPTOP_BEHIND_UPS, PowerSource.MAINS, 0.5),
        ("Now drawing from 'Fusion'\n", PowerSource.UNKNOWN, None),
        ("", PowerSource.UNKNOWN, None),
        (None, PowerSource.UNKNOWN, None),
    ],
)
def test_source_and_charge_are_read_from_pmset(text: str | None, source: PowerSource, share: float | None):
    assert read_power(text, None) == Power(source, share, None)


@pytest.mark.parametrize(
    ("name", "value", "is_low"),
    [
        ("lowpowermode", 1, True),
        ("lowpowermode", 0, False),
        ("powermode", 0, False),
        ("powermode", 1, True),
        ("powermode", 2, False),
        ("displaysleep", 1, None),
    ],
)
def test_low_power_mode_is_read_under_either_name(name: str, value: int, is_low: bool | None):
    """Computers that also have a High Power Mode (2) print powermode."""
    assert read_power(None, SETTINGS.format(name=name, value=value)).is_low_power is is_low


def pmset_standin(folder: Path, *, settings_exit: int = 0) -> str:
    path = folder / "pmset_standin"
    path.write_text(f"""#!/bin/sh
case "$*" in
"-g batt") printf "Now drawing from 'Battery Power'\\n -InternalBattery-0 (id=1)\\t40%%; discharging\\n" ;;
"-g") printf ' lowpowermode 1\\n'; exit {settings_exit} ;;
*) exit 64 ;;
esac
""")
    path.chmod(0o755)
    return str(path)


def test_power_is_asked_of_pmset(tmp_path: Path):
    this = DarwinHost(pmset=pmset_standin(tmp_path))
    assert this.power() == Power(PowerSource.BATTERY, 0.4, is_low_power=True)


def test_a_pmset_that_fails_leaves_only_its_part_unknown(tmp_path: Path):
    this = DarwinHost(pmset=pmset_standin(tmp_path, settings_exit=1))
    assert this.power() == Power(PowerSource.BATTERY, 0.4, is_low_power=None)


def test_a_pmset_that_is_missing_or_hangs_leaves_power_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert DarwinHost(pmset=str(tmp_path / "missing")).power() == Power()
    monkeypatch.setattr(darwin, "_PMSET_TIMEOUT_S", 0.05)
    hanging = tmp_path / "pmset_standin"
    hanging.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    hanging.chmod(0o755)
    assert DarwinHost(pmset=str(hanging)).power() == Power()
