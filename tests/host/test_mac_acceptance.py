"""The comparison with macOS' own tools, on output as those tools print it; and that a disagreement is noticed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from emberd.host.darwin import DarwinHost
from emberd.host.darwin_calls import DarwinCalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from darwin_standin import DarwinStandin

SCRIPT = Path(__file__).parents[2] / "scripts" / "mac-acceptance"
MIB = 1 << 20
GIB = 1 << 30
PAGE = 16384
PID = os.getpid()


def load() -> Any:
    loader = importlib.machinery.SourceFileLoader("mac_acceptance", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    wrote, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = wrote
    return module


mac = load()
Verdict = mac.Verdict

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                4518.
Pages active:                            194947.
Pages inactive:                          191193.
Pages speculative:                         3014.
Pages throttled:                              0.
Pages wired down:                        159117.
Pages purgeable:                            630.
"Translation faults":                 574921966.
Pages copy-on-write:                   38671927.
Pages zero filled:                    320571840.
Pages reactivated:                     75978152.
Pages purged:                          16666917.
File-backed pages:                       141843.
Anonymous pages:                         247311.
Pages stored in compressor:             1022243.
Pages occupied by compressor:            454496.
Decompressions:                        73011127.
Compressions:                          92304380.
Pageins:                                7854456.
Pageouts:                                320741.
Swapins:                                 470789.
Swapouts:                                929703.
"""
MEMORY_PRESSURE = """The system has 17179869184 (1048576 pages with a page size of 16384).

Stats:\x20
Pages free: 4490\x20
Pages purgeable: 630\x20
Pages purged: 16666917\x20

Swap I/O:
Swapins: 470789\x20
Swapouts: 929703\x20

Page Q counts:
Pages active: 194990\x20
Pages inactive: 191194\x20
Pages speculative: 3014\x20
Pages throttled: 0\x20
Pages wired down: 159117\x20

Compressor Stats:
Pages used by compressor: 454496\x20
Pages decompressed: 73011127\x20
Pages compressed: 92304380\x20

File I/O:
Pageins: 7854457\x20
Pageouts: 320741\x20

System-wide memory free percentage: 38%
"""
SWAP = "total = 2048.00M  used = 512.25M  free = 1535.75M  (encrypted)\n"
FOOTPRINT = """======================================================================
python3.12 [4711]: 64-bit    Footprint: 62914560 B (16384 bytes per page)
======================================================================

  Dirty      Clean  Reclaimable    Regions    Category
    ---        ---          ---        ---    ---
62914560 B     0 B          0 B        411    TOTAL

Auxiliary data:
    phys_footprint: 62914560 B
    phys_footprint_peak: 72914560 B
"""
TOP = f"""Processes: 512 total, 2 running, 510 sleeping, 2601 threads\x20
2026/03/24 10:11:12
Load Avg: 1.81, 1.92, 1.95\x20
CPU usage: 3.17% user, 6.34% sys, 90.47% idle\x20
PhysMem: 15G used (2485M wired, 7101M compressor), 72M unused.
VM: 251T vsize, 5709M framework vsize, 470789(0) swapins, 929703(0) swapouts.

PID    MEM  CMPRS
{PID:<6} 60M+ 2048K
"""
LSTART = time.strftime("%a %b %d %H:%M:%S %Y\n", time.localtime(psutil.Process().create_time()))
MARK = "0081;00000000;emberd;\n"
PMSET_BATTERY = "Now drawing from 'Battery Power'\\n -InternalBattery-0 (id=1)\\t40%%; discharging\\n"
SYSCTLS = {
    "hw.memsize": 16 * GIB,
    "vm.pagesize": PAGE,
    "kern.memorystatus_vm_pressure_level": 2,
    "iogpu.wired_limit_mb": 12288,
    "iogpu.disable_wired_collector": 1,
    "vm.user_wire_limit": 12 * GIB,
    "vm.global_user_wire_limit": 13 * GIB,
    "vm.add_wire_count_over_user_limit": 3,
    "vm.add_wire_count_over_global_limit": 4,
}


class Tools:
    """macOS' tools as they answer on the computer that the stand-in plays; answers can be replaced."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, ...], str | None] = {
            ("vm_stat",): VM_STAT,
            ("memory_pressure",): MEMORY_PRESSURE,
            ("sysctl", "-n", "vm.swapusage"): SWAP,
            ("ps", "-o", "rss=", "-p", str(PID)): "  51200\n",
            ("ps", "-o", "lstart=", "-p", str(PID)): LSTART,
            ("footprint", "-f", "bytes", "-p", str(PID)): FOOTPRINT,
            ("top", "-l", "1", "-pid", str(PID), "-stats", "pid,mem,cmprs"): TOP,
            ("osascript", "-l", "JavaScript", "-e", mac.LOW_POWER_SCRIPT): "false\n",
        }
        self.answers |= {("sysctl", "-n", name): f"{value}\n" for name, value in SYSCTLS.items()}

    def ask(self, *command: str) -> str | None:
        if command[0] == "xattr":
            is_marked = command[-1].endswith("/marked")
            return "" if command[1] == "-w" or not is_marked else MARK
        return self.answers.get(command)


@pytest.fixture
def computer(macos: DarwinStandin) -> DarwinStandin:
    """The computer whose tools print the above."""
    macos.statistics(
        free_count=7532, inactive_count=191193, wire_count=159117, compressor_page_count=454496, swapins=470789
    )
    macos.statistics(swapouts=929703, total_uncompressed_pages_in_compressor=1022243)
    macos.swap(xsu_total=2 * GIB, xsu_used=512 * MIB + 256 * 1024)
    for name, value in SYSCTLS.items():
        macos.sysctl(name, value, 4 if value < 2**32 else 8)
    macos.process(PID, ri_resident_size=50 * MIB, ri_phys_footprint=60 * MIB, ri_pageins=10)
    return macos


@pytest.fixture
def compared(
    computer: DarwinStandin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Tools], dict[tuple[str, str], Any]]:
    """Everything compared but the lock, by reading and tool."""
    battery = types.SimpleNamespace(percent=40, power_plugged=False)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    pmset = tmp_path / "pmset_standin"
    pmset.write_text(f"""#!/bin/sh
if [ "$*" = "-g batt" ]; then printf "{PMSET_BATTERY}"; else printf ' lowpowermode 0\\n'; fi
""")
    pmset.chmod(0o755)
    calls = DarwinCalls(computer.library)
    host = DarwinHost(calls, pmset=str(pmset))

    def compare(tools: Tools) -> dict[tuple[str, str], Any]:
        computer.attribute(tmp_path / "marked", mac.QUARANTINE, MARK.strip().encode())
        checks = mac.all_checks(host, calls, PID, tmp_path, tools.ask)[:-1]
        return {(row.reading, row.tool): row for check in checks for row in check()}

    return compare


# --- what the tools print -----------------------------------------------------------------------------------


def test_counters_of_pages_are_read_in_bytes():
    assert mac.in_bytes(VM_STAT, "Pages free", "Pages speculative", "Pages inactive") == 198725 * PAGE
    assert mac.in_bytes(VM_STAT.replace("16384", "4096"), "Swapouts") == 929703 * 4096
    assert mac.in_bytes(MEMORY_PRESSURE, "Pages used by compressor") == 454496 * PAGE
    assert mac.counters(VM_STAT)["Translation faults"] == 574921966
    assert mac.total_bytes(MEMORY_PRESSURE) == 16 * GIB


@pytest.mark.parametrize("text", [None, "", "Pages free: 5.\n", "(page size of 16384 bytes)\nPages free: many\n"])
def test_counters_that_cannot_be_read_are_unknown(text: str | None):
    assert mac.in_bytes(text, "Pages free") is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512.25M", (512.25 * MIB, MIB)),
        ("12K+", (12 * 1024, 1024)),
        ("0B", (0, 1)),
        ("3G-", (3 * GIB, GIB)),
        ("1T", (1024 * GIB, 1024 * GIB)),
        ("12", None),
        ("-", None),
    ],
)
def test_sizes_are_read_with_their_unit(text: str, size: tuple[float, int] | None):
    assert mac.size_bytes(text) == size


def test_swap_footprint_and_top_are_read():
    assert mac.swap_bytes(SWAP, "total") == 2 * GIB
    assert mac.swap_bytes(SWAP, "used") == 512.25 * MIB
    assert mac.footprint_bytes(FOOTPRINT) == 60 * MIB
    assert mac.top_size(TOP, PID, "MEM") == (60 * MIB, MIB)
    assert mac.top_size(TOP, PID, "CMPRS") == (2 * MIB, 1024)


def test_what_is_not_there_is_unknown():
    assert mac.swap_bytes("", "total") is None
    assert mac.footprint_bytes(FOOTPRINT.replace("phys_footprint: 62914560 B\n", "")) is None
    assert mac.top_size(TOP, PID + 1, "MEM") is None
    assert mac.top_size(TOP, PID, "PURG") is None
    assert mac.top_size(None, PID, "MEM") is None
    assert mac.start_s("yesterday") is None
    assert mac.whole_number("12 34") is None
    assert mac.yes_or_no("undefined\n") is None


# --- comparisons --------------------------------------------------------------------------------------------


def test_all_readings_agree_with_the_tools_of_the_same_computer(
    compared: Callable[[Tools], dict[Any, Any]], monkeypatch: pytest.MonkeyPatch
):
    """psutil tells no page-ins of a process on Linux: it is told to, as on macOS."""
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: types.SimpleNamespace(pageins=12))
    rows = compared(Tools())
    assert {key: row.verdict for key, row in rows.items()} == dict.fromkeys(rows, Verdict.AGREES)
    assert len(rows) == 30
    assert mac.exit_code(list(rows.values())) == 0


def test_other_page_ins_are_noticed(compared: Callable[[Tools], dict[Any, Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: types.SimpleNamespace(pageins=500))
    assert compared(Tools())["page-ins", "psutil"].verdict is Verdict.DIFFERS


PS = ("ps", "-o", "rss=", "-p", str(PID))
PS_START = ("ps", "-o", "lstart=", "-p", str(PID))
FOOTPRINT_TOOL = ("footprint", "-f", "bytes", "-p", str(PID))
TOP_TOOL = ("top", "-l", "1", "-pid", str(PID), "-stats", "pid,mem,cmprs")


@pytest.mark.parametrize(
    ("command", "answer", "reading"),
    [
        (("vm_stat",), VM_STAT.replace("191193", "231193"), "available"),
        (("vm_stat",), VM_STAT.replace("159117", "119117"), "wired"),
        (("vm_stat",), VM_STAT.replace("454496", "554496"), "compressed"),
        (("vm_stat",), VM_STAT.replace("470789", "490789"), "swapped in"),
        (("vm_stat",), VM_STAT.replace("929703", "999703"), "swapped out"),
        (("vm_stat",), VM_STAT.replace("16384", "4096"), "wired"),
        (("memory_pressure",), MEMORY_PRESSURE.replace("17179869184", "17179869185"), "total"),
        (("memory_pressure",), MEMORY_PRESSURE.replace("159117", "119117"), "wired"),
        (("memory_pressure",), MEMORY_PRESSURE.replace("454496", "554496"), "compressed"),
        (("sysctl", "-n", "hw.memsize"), "17179869183\n", "total"),
        (("sysctl", "-n", "vm.pagesize"), "4096\n", "kernel's page"),
        (("sysctl", "-n", "vm.swapusage"), SWAP.replace("2048", "4096"), "swap total"),
        (("sysctl", "-n", "vm.swapusage"), SWAP.replace("512.25", "12.25"), "swap used"),
        (("sysctl", "-n", "kern.memorystatus_vm_pressure_level"), "4\n", "pressure"),
        (("sysctl", "-n", "iogpu.wired_limit_mb"), "0\n", "GPU's wired limit"),
        (("sysctl", "-n", "iogpu.disable_wired_collector"), "0\n", "GPU's collector is off"),
        (("sysctl", "-n", "vm.user_wire_limit"), "1\n", "user wire limit"),
        (("sysctl", "-n", "vm.global_user_wire_limit"), "1\n", "global wire limit"),
        (("sysctl", "-n", "vm.add_wire_count_over_user_limit"), "4\n", "refused locks, by user limit"),
        (("sysctl", "-n", "vm.add_wire_count_over_global_limit"), "3\n", "refused locks, by global limit"),
        (PS, " 65000\n", "resident"),
        (PS_START, "Tue Mar 24 10:11:12 2020\n", "start"),
        (FOOTPRINT_TOOL, FOOTPRINT.replace("phys_footprint: 62914560", "phys_footprint: 82914560"), "footprint"),
        (TOP_TOOL, TOP.replace(" 60M+", " 90M+"), "footprint"),
        (TOP_TOOL, TOP.replace("2048K", "  90M"), "compressed or swapped"),
        (("osascript", "-l", "JavaScript", "-e", mac.LOW_POWER_SCRIPT), "true\n", "Low Power Mode"),
    ],
)
def test_each_disagreement_is_noticed(
    compared: Callable[[Tools], dict[Any, Any]], command: tuple[str, ...], answer: str, reading: str
):
    tools = Tools()
    assert tools.answers[command] != answer
    tools.answers[command] = answer
    rows = compared(tools)
    assert rows[reading, command[0]].verdict is Verdict.DIFFERS
    assert mac.exit_code(list(rows.values())) == 1


@pytest.mark.parametrize(
    ("battery", "reading"),
    [
        (types.SimpleNamespace(percent=40, power_plugged=True), "power source"),
        (types.SimpleNamespace(percent=50, power_plugged=False), "charge"),
        (None, "power source"),
    ],
)
def test_another_power_source_or_charge_is_noticed(
    compared: Callable[[Tools], dict[Any, Any]], monkeypatch: pytest.MonkeyPatch, battery: Any, reading: str
):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert compared(Tools())[reading, "psutil"].verdict is Verdict.DIFFERS


def test_another_quarantine_mark_is_noticed(
    compared: Callable[[Tools], dict[Any, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(DarwinHost, "quarantine", lambda *_: "0081;00000000;Safari;")
    rows = compared(Tools())
    assert rows["quarantine, marked", "xattr"].verdict is Verdict.DIFFERS
    assert rows["quarantine, unmarked", "xattr"].verdict is Verdict.DIFFERS


def test_a_missing_tool_is_not_available_and_no_failure(compared: Callable[[Tools], dict[Any, Any]]):
    tools = Tools()
    tools.answers = {}
    rows = compared(tools)
    assert {row.verdict for (_, tool), row in rows.items() if tool not in {"psutil", "xattr"}} == {
        Verdict.NOT_AVAILABLE
    }
    assert mac.exit_code(list(rows.values())) == 0


def test_a_reading_that_emberd_lacks_and_a_tool_has_differs():
    assert mac.compare("total", None, "sysctl", 5).verdict is Verdict.DIFFERS
    assert mac.compare("total", None, "sysctl", None).verdict is Verdict.NOT_AVAILABLE


@pytest.mark.parametrize(
    ("ours", "theirs", "agrees"),
    [(40, 50, True), (39, 50, False), (61, 50, False), (900, 1000, True), (899, 1000, False), (1101, 1000, False)],
)
def test_a_tolerance_is_the_larger_of_an_amount_and_a_share(ours: int, theirs: int, agrees: bool):
    assert mac.Tolerance(10, 0.1).allows(ours, theirs) is agrees


def test_without_a_tolerance_values_must_be_equal():
    assert mac.compare("total", 5, "sysctl", 5).verdict is Verdict.AGREES
    assert mac.compare("total", 5, "sysctl", 6).verdict is Verdict.DIFFERS


# --- repeating ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right_at", "tries", "verdict"), [(1, 1, "agrees"), (3, 3, "agrees"), (9, 5, "differs")])
def test_a_difference_is_looked_at_again_and_the_last_look_counts(right_at: int, tries: int, verdict: str):
    looks: list[int] = []
    pauses: list[int] = []

    def check() -> list[Any]:
        looks.append(len(looks) + 1)
        return [mac.compare("total", right_at, "sysctl", min(looks[-1], right_at))]

    rows = mac.settled(check, lambda: pauses.append(1), tries=5)
    assert [row.verdict.value for row in rows] == [verdict]
    assert (len(looks), len(pauses)) == (tries, tries - 1)


# --- locking ------------------------------------------------------------------------------------------------


def locked_on_linux(pid: int) -> int | None:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; on a Mac the script itself does this")
@pytest.mark.parametrize(
    ("reading", "verdict"), [(locked_on_linux, "agrees"), (lambda _: 0, "differs"), (lambda _: None, "differs")]
)
def test_a_lock_must_show_in_the_process_that_holds_it(
    tmp_path: Path, reading: Callable[[int], int | None], verdict: str
):
    rise, in_core = mac.lock_rows(reading, tmp_path, 2 * MIB)
    if rise.theirs is None:
        pytest.skip("this user may not lock 2 MiB")
    assert (rise.verdict.value, in_core.verdict.value) == (verdict, "agrees")
    assert in_core.ours == 2 * MIB


@pytest.mark.parametrize(("after", "verdict"), [(7 * MIB, "agrees"), (2 * MIB, "differs")])
def test_the_rise_counts_and_not_what_was_locked_before(tmp_path: Path, after: int, verdict: str):
    readings = iter([5 * MIB, after])
    rise, _ = mac.lock_rows(lambda _: next(readings), tmp_path, 2 * MIB)
    if rise.theirs is None:
        pytest.skip("this user may not lock 2 MiB")
    assert rise.verdict.value == verdict


def test_what_nobody_has_read_of_a_file_is_not_in_core(tmp_path: Path):
    path = tmp_path / "holes"
    path.touch()
    os.truncate(path, MIB)
    assert mac.in_core_bytes(path) == 0


def test_a_lock_that_is_refused_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mac, "LOCKER", 'print("mapped\\nrefused", flush=True); input(); input()')
    assert [row.verdict for row in mac.lock_rows(lambda _: 0, tmp_path, MIB)] == [Verdict.NOT_AVAILABLE] * 2


# --- running ------------------------------------------------------------------------------------------------


def test_the_table_tells_each_reading_and_the_json_too(compared: Callable[[Tools], dict[Any, Any]]):
    rows = list(compared(Tools()).values())
    table = mac.as_table(rows).splitlines()
    assert len(table) == len(rows) + 1
    assert "± 256.0 MiB or 5%" in next(line for line in table if line.startswith("available"))
    assert json.loads(mac.as_json(rows))["rows"][0] == {
        "reading": "available",
        "ours": 198725 * PAGE,
        "tool": "vm_stat",
        "theirs": 198725 * PAGE,
        "tolerance": {"amount": 256 * MIB, "share": 0.05},
        "unit": "bytes",
        "verdict": "agrees",
    }


def test_a_tool_is_run_and_one_that_fails_tells_nothing():
    assert mac.ask_tool("echo", "5") == "5\n"
    assert mac.ask_tool("false") is None
    assert mac.ask_tool("no-such-tool-here") is None


@pytest.mark.skipif(sys.platform == "darwin", reason="it would run there")
def test_on_another_system_it_says_so_in_one_line_and_exits_with_2():
    ran = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert "macOS" in ran.stderr
