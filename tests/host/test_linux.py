"""Linux' readings beside the kernel's own words, psutil and free: memory of processes, of the computer, power."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from emberd.core.engine_files import merge
from emberd.core.memory import EngineMemory, Power, PowerSource, Pressure, SystemMemory
from emberd.host.linux import LinuxHost
from memory_holder import holding
from page_cache import MIB, evict, on_linux, write

pytestmark = on_linux

GONE_PID = 1 << 22
"""Above the largest pid (proc_sys_kernel(5): PID_MAX_LIMIT)."""
SLACK_BYTES = 4 * MIB
"""The kernel's counters lag by 64 pages a thread, and other programs go on."""


def near(value: int | None, expected: int, slack: int = SLACK_BYTES) -> bool:
    return value is not None and abs(value - expected) <= slack


# --- processes ----------------------------------------------------------------------------------------------------


def test_anonymous_memory_is_resident_and_in_the_footprint_but_not_of_files():
    with holding("anonymous", 64 * MIB) as pid, holding("anonymous", 0x1000) as other:
        seen, base = LinuxHost().engine_memory([pid]), LinuxHost().engine_memory([other])
        assert near(seen.anonymous_bytes, (base.anonymous_bytes or 0) + 64 * MIB)
        assert near(seen.footprint_bytes, (base.footprint_bytes or 0) + 64 * MIB)
        assert near(seen.file_bytes, base.file_bytes or 0)
        assert near(seen.resident_bytes, psutil.Process(pid).memory_info().rss)
        assert seen.swapped_bytes == seen.locked_bytes == 0


def test_a_mapped_files_pages_are_resident_but_not_in_the_footprint(tmp_path: Path):
    path = write(tmp_path / "weights", 64 * MIB)
    with holding("file", 64 * MIB, path) as pid, holding("anonymous", 0x1000) as other:
        seen, base = LinuxHost().engine_memory([pid]), LinuxHost().engine_memory([other])
        assert near(seen.file_bytes, (base.file_bytes or 0) + 64 * MIB)
        assert near(seen.footprint_bytes, base.footprint_bytes or 0)


def test_the_mapped_files_of_a_process_are_told_with_what_it_has_locked_of_them(tmp_path: Path):
    path = write(tmp_path / "some weights.gguf", 8 * MIB)
    host, facts = LinuxHost(), path.stat()
    with holding("locked file", 8 * MIB, path) as pid:
        seen = host.mapped_files([pid, GONE_PID])
        locked = host.mapped_files([pid], with_locks=True)
        assert seen is not None
        assert locked is not None
        (whole,) = merge((), seen)
        assert (whole.path, whole.size_bytes, whole.locked_bytes) == (str(path), 16 * MIB, None)
        assert {each.identity for each in seen if each.path == str(path)} == {(facts.st_dev, facts.st_ino)}
        assert merge((), locked)[0].locked_bytes == 4 * MIB
        assert not any("python" in Path(each.path).name for each in seen)  # a program, although it is mapped
        path.unlink()
        gone = host.mapped_files([pid])
        assert gone is not None
        assert {each.path for each in gone if "weights" in each.path} == {f"{path} (deleted)"}
    assert host.mapped_files([GONE_PID]) is None


def test_a_real_lock_shows_in_the_process_and_in_the_computer():
    host = LinuxHost()
    before = host.system_memory().wired_bytes
    assert before is not None
    with holding("locked", 64 * MIB) as pid:
        assert host.engine_memory([pid]).locked_bytes == 64 * MIB
        assert near(host.system_memory().wired_bytes, before + 64 * MIB)
    assert near(host.system_memory().wired_bytes, before)


def test_the_memory_of_several_processes_is_summed_and_the_dead_are_left_out():
    host = LinuxHost()
    with holding("anonymous", 32 * MIB) as first, holding("anonymous", 16 * MIB) as second:
        alone = [host.engine_memory([pid]) for pid in (first, second)]
        together = host.engine_memory([first, GONE_PID, second])
        assert near(together.resident_bytes, sum(one.resident_bytes or 0 for one in alone))
        assert near(together.footprint_bytes, sum(one.footprint_bytes or 0 for one in alone))
    assert host.engine_memory([GONE_PID]) == EngineMemory()
    assert host.engine_memory([]) == EngineMemory()


def test_shared_pages_are_divided_among_their_users_in_the_proportional_size(tmp_path: Path):
    path = write(tmp_path / "weights", 64 * MIB)
    host = LinuxHost()
    with holding("file", 64 * MIB, path) as first:
        alone = host.proportional_bytes([first])
        with holding("file", 64 * MIB, path) as second:
            shared = host.proportional_bytes([first])
            both = host.proportional_bytes([first, second])
        assert near(shared, (alone or 0) - 32 * MIB)
        assert near(both, (alone or 0) + 10 * MIB, 10 * MIB), "the file counts once"
    assert near(host.proportional_bytes([os.getpid()]), psutil.Process().memory_full_info().pss)
    assert host.proportional_bytes([GONE_PID]) is None


def test_reads_from_the_disk_are_major_faults_and_read_bytes(tmp_path: Path):
    path = write(tmp_path / "cold", 32 * MIB)
    evict(path)
    with holding("file", 32 * MIB, path) as pid:
        seen = LinuxHost().engine_memory([pid])
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if not seen.read_bytes:
        pytest.skip("this file system is in memory")
    assert seen.read_bytes >= 32 * MIB
    assert seen.major_faults == int(stat[9])
    assert seen.major_faults > 0


def test_a_name_with_brackets_and_blanks_does_not_shift_the_fields(tmp_path: Path):
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "stat").write_text("7 (kobold) 1 (x) S 1 7 7 0 -1 4194304 500 0 42 0 9 9\n")
    assert LinuxHost(proc=tmp_path).engine_memory([7]) == EngineMemory(major_faults=42)


def test_what_another_users_process_hides_is_unknown_and_the_rest_is_told(tmp_path: Path):
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "status").write_text("Name:\tengine\nVmRSS:\t100 kB\nVmSwap:\t20 kB\nRssAnon:\t60 kB\n")
    assert LinuxHost(proc=tmp_path).engine_memory([7]) == EngineMemory(
        resident_bytes=100 << 10, anonymous_bytes=60 << 10, swapped_bytes=20 << 10, footprint_bytes=80 << 10
    )


# --- the computer -------------------------------------------------------------------------------------------------


def test_the_computers_memory_is_what_free_and_psutil_say():
    seen, theirs, swap = LinuxHost().system_memory(), psutil.virtual_memory(), psutil.swap_memory()
    assert seen.total_bytes == theirs.total
    assert near(seen.available_bytes, theirs.available, 256 * MIB)
    assert seen.swap_total_bytes == swap.total
    assert near(seen.swap_used_bytes, swap.used)
    assert near(seen.swapped_in_bytes, swap.sin)
    assert near(seen.swapped_out_bytes, swap.sout)
    if free := shutil.which("free"):
        words = subprocess.run([free, "-b"], capture_output=True, text=True, check=True).stdout.split("\n")
        assert seen.total_bytes == int(words[1].split()[1])
        assert seen.swap_total_bytes == int(words[2].split()[1])


def made_up(folder: Path, *, stalls: str | None = None, meminfo: str = "MemTotal: 1000 kB\n") -> LinuxHost:
    (folder / "pressure").mkdir()
    (folder / "meminfo").write_text(meminfo)
    if stalls is not None:
        (folder / "pressure/memory").write_text(stalls)
    return LinuxHost(proc=folder)


@pytest.mark.parametrize(
    ("available_kib", "pressure"),
    [pytest.param(900, Pressure.WARN, id="available"), pytest.param(80, Pressure.CRITICAL, id="short")],
)
def test_stalls_are_a_warning_and_critical_where_memory_is_short(
    tmp_path: Path, available_kib: int, pressure: Pressure
):
    host = made_up(
        tmp_path,
        meminfo=f"MemTotal: 1000 kB\nMemAvailable: {available_kib} kB\n",
        stalls="some avg10=34.10 avg60=9.00 avg300=2.00 total=77\nfull avg10=12.50 avg60=3.00 avg300=1.00",
    )
    seen = host.system_memory()
    assert (seen.stall_some_share, seen.stall_full_share) == (pytest.approx(0.341), pytest.approx(0.125))
    assert seen.pressure is pressure


def test_a_kernel_without_stall_information_is_judged_by_available_memory(tmp_path: Path):
    seen = made_up(tmp_path, meminfo="MemTotal: 1000 kB\nMemAvailable: 80 kB\nZswap: 3 kB\n").system_memory()
    assert (seen.pressure, seen.stall_some_share) == (Pressure.WARN, None)
    assert seen.compressed_bytes == 3 << 10


def test_a_proc_that_tells_nothing_is_unknown_not_zero(tmp_path: Path):
    host = LinuxHost(proc=tmp_path)
    assert host.system_memory() == SystemMemory()
    assert host.start_token(os.getpid()) is None


def test_garbled_lines_are_left_out(tmp_path: Path):
    host = made_up(
        tmp_path,
        meminfo="MemTotal: many kB\n\n:\nMlocked:\nSwapTotal: 10 kB\nSwapFree: 4 kB\n",
        stalls="some\nfull x\n",
    )
    assert host.system_memory() == SystemMemory(swap_total_bytes=10 << 10, swap_used_bytes=6 << 10)


# --- power --------------------------------------------------------------------------------------------------------


def supplies(folder: Path, **made: dict[str, str]) -> LinuxHost:
    """A /sys of a test's making; names and words as in sysfs-class-power."""
    (folder / "class/power_supply").mkdir(parents=True)
    for name, files in made.items():
        (folder / "class/power_supply" / name).mkdir()
        for key, value in files.items():
            (folder / "class/power_supply" / name / key).write_text(f"{value}\n")
    return LinuxHost(sys=folder)


AC_ON, AC_OFF = {"type": "Mains", "online": "1"}, {"type": "Mains", "online": "0"}
USB_C = {"type": "USB", "online": "1"}
MOUSE = {"type": "Battery", "scope": "Device", "status": "Discharging", "capacity": "12"}


def battery(status: str, capacity: str) -> dict[str, str]:
    return {"type": "Battery", "status": status, "capacity": capacity}


@pytest.mark.parametrize(
    ("made", "power"),
    [
        ({}, Power(PowerSource.MAINS)),
        ({"hidpp_battery_0": MOUSE}, Power(PowerSource.MAINS)),
        ({"AC": AC_OFF, "BAT0": battery("Discharging", "40")}, Power(PowerSource.BATTERY, 0.4)),
        ({"AC": AC_ON, "BAT0": battery("Charging", "40")}, Power(PowerSource.MAINS, 0.4)),
        ({"AC": AC_ON, "BAT0": battery("Discharging", "40")}, Power(PowerSource.MAINS, 0.4)),
        ({"AC": AC_OFF, "usbc": USB_C, "BAT0": battery("Charging", "7")}, Power(PowerSource.MAINS, 0.07)),
        (
            {"AC": AC_OFF, "BAT0": battery("Not charging", "80"), "BAT1": battery("Discharging", "60")},
            Power(PowerSource.BATTERY, 0.7),
        ),
        ({"BAT0": battery("Unknown", "50")}, Power(PowerSource.UNKNOWN, 0.5)),
        ({"AC": AC_OFF, "BAT0": battery("Full", "100")}, Power(PowerSource.MAINS, 1.0)),
        ({"AC": AC_ON, "BAT0": battery("Full", "junk")}, Power(PowerSource.MAINS)),
    ],
    ids=[
        "a desktop",
        "a desktop with a wireless mouse",
        "unplugged",
        "charging",
        "plugged in and still draining",
        "on a USB-C supply",
        "two batteries",
        "a battery that does not know",
        "full with a supply that tells nothing",
        "a charge that cannot be read",
    ],
)
def test_power_comes_from_where_the_kernel_says(tmp_path: Path, made: dict[str, dict[str, str]], power: Power):
    assert supplies(tmp_path, **made).power() == power


def test_a_sys_without_power_supplies_is_unknown(tmp_path: Path):
    assert LinuxHost(sys=tmp_path).power() == Power()


@pytest.mark.parametrize(("profile", "is_low"), [("low-power", True), ("balanced", False)])
def test_the_platform_profile_tells_of_saving(tmp_path: Path, profile: str, *, is_low: bool):
    (tmp_path / "firmware/acpi").mkdir(parents=True)
    (tmp_path / "firmware/acpi/platform_profile").write_text(f"{profile}\n")
    assert supplies(tmp_path).power() == Power(PowerSource.MAINS, None, is_low)


def test_the_page_size_of_the_counters_is_the_systems(tmp_path: Path):
    (tmp_path / "vmstat").write_text("pswpin 3\npswpout 5\n")
    seen = LinuxHost(proc=tmp_path).system_memory()
    assert (seen.swapped_in_bytes, seen.swapped_out_bytes) == (3 * mmap.PAGESIZE, 5 * mmap.PAGESIZE)
