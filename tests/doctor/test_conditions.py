"""Every condition that emberd doctor knows, provoked by facts; test_examine.py does it for real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from emberd.core.host_health import HostHealth
from emberd.core.lock import LockState
from emberd.core.lock_limits import LockLimits
from emberd.core.memory import GpuLimits, Power, PowerSource, Pressure, SystemMemory
from emberd.core.settings import EngineSettings, Settings, WarmthSettings
from emberd.doctor.catalogue import CATALOGUE, diagnose, visible
from emberd.doctor.condition import Condition, Severity
from emberd.doctor.facts import (
    DaemonHealth,
    EngineHealth,
    EngineProblem,
    Facts,
    FreeSpace,
    MemoryHealth,
    ModelHealth,
    ModelProblem,
    OwnHealth,
    Program,
    ServiceHealth,
    Volume,
)

GIB = 1 << 30


def model(**facts: Any) -> Facts:
    return Facts("darwin", model=ModelHealth("/models/model.gguf", **facts))


def engine(**facts: Any) -> Facts:
    return Facts("linux", engine=EngineHealth(**facts))


def settings(**tables: Any) -> Facts:
    return Facts("linux", Settings(**tables))


def host(**facts: Any) -> Facts:
    return Facts("linux", host=HostHealth(**facts))


def daemon(**facts: Any) -> Facts:
    return Facts("linux", daemon=DaemonHealth(**facts))


def own(**facts: Any) -> Facts:
    return Facts("linux", own=OwnHealth(**facts))


def memory(**facts: Any) -> Facts:
    return Facts("linux", memory=MemoryHealth(**facts))


def service(**facts: Any) -> Facts:
    return Facts("linux", service=ServiceHealth(**facts))


def needs(gib: int, **facts: Any) -> MemoryHealth:
    return MemoryHealth(needed_bytes=gib * GIB, **facts)


GPU = Settings(engine=EngineSettings(gpu_layers=99))
SMALL_LIMIT = replace(
    Facts(
        "linux", memory=MemoryHealth(limits=LockLimits("linux", memlock_bytes=8 << 20, can_ignore_memlock=False))
    ),
    model=ModelHealth("/models/model.gguf", weights_bytes=GIB),
)
PROVOKED: dict[str, Facts] = {
    "SETTINGS_OPEN": service(open_secret="/home/me/key", open_secret_mode=0o644),
    "ONE_FAMILY_TAKEN": daemon(endpoint_lacks="port 5001 on ::1 is taken by ollama (pid 42)"),
    "SETTINGS_NOT_IN_FORCE": service(are_settings_newer=True, settings_path="/home/me/config.toml"),
    "ENDPOINT_OPEN": service(open_address="0.0.0.0"),  # what is told
    "ADDRESS_UNUSABLE": own(address_problem="cannot listen on 192.0.2.1"),
    "CLOCK_BEHIND": own(clock_behind_s=7200.0),
    "FEW_OPEN_FILES": own(most_open_files=128),
    "SETTINGS_WRONG": service(settings_problem="endpoint.prot is not a setting"),
    "STATE_UNUSABLE": own(state_problem="cannot make /var/lib/x"),
    "DISK_FULL": own(free_spaces=(FreeSpace("the log", "/var/log", 1 << 20), FreeSpace("the state", "/", GIB))),
    "PORT_TAKEN": own(port_owner=Program("koboldcpp", 42)),
    "NOT_RUNNING": service(is_running=False),
    "WAITS": service(waits_because="the model is missing"),
    "DAEMON_SILENT": service(silence="emberd does not answer"),
    "SERVICE_DISABLED": service(is_disabled=True),
    "SERVICE_PROGRAM_MISSING": service(missing_program="/opt/emberd/bin/python3"),
    "SERVICE_FILE": service(file_problem="others may write it"),
    "SERVICE_STALE": service(stale="ProgramArguments differ"),
    "SERVICE_MISSING": service(is_installed=False),
    "DAEMON_OLD": service(version="0.2.0", daemon_version="0.1.0"),
    "THROTTLED": service(is_throttled=True),
    "NO_LINGER": host(lingers=False),
    "LOGS_NOT_KEPT": replace(host(logs_persist=False), daemon=DaemonHealth(log_sinks=("journal",))),
    "LOG_HUGE": own(engine_log_bytes=2 * GIB),
    "HISTORY_UNREADABLE": own(history_problem="file is not a database"),
    "PSUTIL_TOO_OLD": own(psutil_failure="7.2.2: host_statistics64(HOST_VM_INFO64) syscall failed"),
    "PYTHON_TRANSLATED": host(is_translated=True),
    "ENGINE_MISSING": engine(problem=EngineProblem.MISSING, message="so it is"),
    "ENGINE_NOT_EXECUTABLE": engine(problem=EngineProblem.NOT_EXECUTABLE, message="so it is"),
    "ENGINE_QUARANTINED": engine(problem=EngineProblem.QUARANTINED, message="so it is"),
    "ENGINE_WRONG_ARCHITECTURE": engine(problem=EngineProblem.WRONG_ARCHITECTURE, message="so it is"),
    "ENGINE_REFUSES": engine(problem=EngineProblem.REFUSES, message="so it is"),
    "ENGINE_FAILED": daemon(has_failed=True, last_words="ended by SIGSEGV"),
    "ENGINE_CRASHING": daemon(crashes=2, last_words="ended by SIGSEGV"),
    "ENGINE_GPU_OFF": Facts("darwin", Settings(engine=EngineSettings(gpu_layers=0))),
    "ENGINE_HEARTBEAT_LOST": daemon(heartbeat_problem="this build has no heartbeat", heartbeat_remedy="another"),
    "ENGINE_SWAPPED": daemon(swapped_bytes=GIB),
    "ENGINE_ORPHANED": engine(orphan_pid=42),
    "ENGINE_TOO_OLD": engine(lacks=("--usemlock",)),
    "ENGINE_LOST_GPU": replace(engine(has_gpu=False), settings=GPU),
    "ENGINE_SWITCHED": daemon(switched_to="/m/other.gguf"),
    "ENGINE_FILES_COPIED": daemon(copied=("projector /m/p.gguf",)),
    "ENGINE_FILE_REPLACED": daemon(replaced=("draft /m/d.gguf",)),
    "ENGINE_UNLOADS_WHEN_IDLE": engine(unloads_when_idle="--adminunloadtimeout"),
    **{
        f"MODEL_{problem.name}": model(problem=problem, message="so it is", remedy="do this")
        for problem in ModelProblem
    },
    "MODEL_DATALESS": model(is_dataless=True),
    "MODEL_ON_NETWORK_VOLUME": model(volume=Volume.NETWORK),
    "MODEL_ON_EXTERNAL_VOLUME": model(volume=Volume.EXTERNAL),
    "MODEL_IN_PROTECTED_FOLDER": model(is_in_protected_folder=True),
    "MODEL_IN_CLOUD_FOLDER": model(is_synced=True),
    "MODEL_REPLACED": model(changed_after_start_s=60.0),
    "RAM_TOO_SMALL": Facts("linux", memory=needs(80, system=SystemMemory(total_bytes=64 * GIB))),
    "CGROUP_TOO_SMALL": replace(host(cgroup_limit_bytes=4 * GIB), memory=needs(8)),
    "GPU_LIMIT_TOO_SMALL": Facts("linux", GPU, memory=needs(40, gpu=GpuLimits(wired_limit_bytes=24 * GIB))),
    "PRESSURE_CRITICAL": memory(system=SystemMemory(pressure=Pressure.CRITICAL)),
    "SWAP_NEARLY_FULL": memory(system=SystemMemory(swap_total_bytes=100, swap_used_bytes=95)),
    "OTHER_MODEL_SERVER": memory(others=(Program("ollama", 7, 3 * GIB),)),
    "MODELS_OVERCOMMIT": Facts(
        "linux",
        memory=needs(8, others=(Program("ollama", 7, 9 * GIB),), system=SystemMemory(total_bytes=16 * GIB)),
    ),
    "RAM_SHORT": memory(short="the engine needs 8 GiB, and 4 GiB are available"),
    "SWAPPINESS_HIGH": host(swappiness=100),
    "WARMTH_STRETCHED": memory(power=Power(PowerSource.BATTERY)),
    "LOCK_OFF": settings(engine=EngineSettings(lock="never")),
    "LOCK_WOULD_CHOKE": memory(choking="1 GiB would remain of 16"),
    "LOCK_LIMIT": SMALL_LIMIT,
    "LOCK_NOT_HELD": daemon(lock=LockState.ABSENT, lock_message="nothing is locked"),
    "LOCK_PARTIAL": daemon(lock=LockState.PARTIAL, lock_message="a half is locked"),
    "WEIGHTS_COPIED": engine(is_mapped=False),
    "LET_GO": daemon(hold="no_warming"),
    "RELIEF_IMPOSSIBLE": daemon(is_helpless=True),
    "WARMTH_WASTED": daemon(barred=("chat",), replays=1, misses=1, wasted_tokens=900),
    "WARMTH_OFF": settings(warmth=WarmthSettings(mode="off")),
    "WARMTH_PAUSED": daemon(paused_for_s=60.0),
    "MODEL_COLD": daemon(resident_share=0.5),
}
"""The smallest facts that make each condition, and no other one."""


@pytest.mark.parametrize("code", CATALOGUE)
def test_each_condition_is_provoked_by_its_own_facts_alone(code: str):
    found = visible(diagnose(PROVOKED[code]))
    assert [each.code for each in found] == [code]
    assert found[0].evidence


def test_nothing_is_provoked_that_the_catalogue_does_not_have():
    assert set(PROVOKED) == set(CATALOGUE)


@pytest.mark.parametrize("system", ["darwin", "linux"])
def test_what_is_not_known_is_no_condition(system: str):
    assert diagnose(Facts(system)) == []


def test_a_healthy_computer_has_no_condition():
    healthy = Facts(
        "linux",
        GPU,
        HostHealth(cgroup_limit_bytes=32 * GIB, lingers=True, logs_persist=True),
        ModelHealth("/models/model.gguf", weights_bytes=GIB, volume=Volume.INTERNAL, is_dataless=False),
        EngineHealth(has_gpu=True, is_mapped=True),
        DaemonHealth(
            answers=True,
            has_failed=False,
            lock=LockState.HELD,
            resident_share=1.0,
            hold="all",
            log_sinks=("journal",),
        ),
        needs(
            2,
            system=SystemMemory(64 * GIB, pressure=Pressure.NORMAL, swap_total_bytes=100, swap_used_bytes=10),
            limits=LockLimits("linux", memlock_bytes=8 << 20, can_ignore_memlock=False),  # it is held all the same
        ),
        OwnHealth(free_spaces=(FreeSpace("the log", "/", GIB),), most_open_files=4096, clock_behind_s=-5.0),
        ServiceHealth(is_running=True, version="1", daemon_version="1", is_disabled=False, is_installed=True),
    )
    assert diagnose(healthy) == []


def two_models(resident_gib: int, total_gib: int) -> Facts:
    others = (Program("ollama", 7, resident_gib * GIB), Program("LM Studio", 8, GIB))
    return Facts("linux", memory=needs(8, others=others, system=SystemMemory(total_bytes=total_gib * GIB)))


def test_two_models_that_fit_together_are_told_one_by_one():
    assert [each.code for each in visible(diagnose(two_models(4, 16)))] == ["OTHER_MODEL_SERVER"] * 2


def test_the_processes_of_one_server_are_told_together():
    others = (Program("ollama", 7, GIB), Program("ollama", 8, 2 * GIB))
    [found] = diagnose(Facts("linux", memory=MemoryHealth(others=others)))
    assert found.evidence == "ollama (pid 7, 8), 3.0 GiB resident"


def test_two_models_that_do_not_fit_together_are_one_condition_that_names_them_all():
    [found] = visible(diagnose(two_models(8, 16)))
    assert found.code == "MODELS_OVERCOMMIT"
    assert "ollama (pid 7), LM Studio (pid 8) hold 9.0 GiB" in found.evidence


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (LockLimits("linux", memlock_bytes=8 << 20, can_ignore_memlock=False), "RLIMIT_MEMLOCK is 8,192 KiB"),
        (LockLimits("linux", memlock_bytes=0, can_ignore_memlock=False), "RLIMIT_MEMLOCK is 0"),
        (LockLimits("darwin", user_wire_bytes=1 << 29, global_wire_bytes=8 * GIB), "vm.user_wire_limit is 512 MiB"),
        (LockLimits("darwin", user_wire_bytes=8 * GIB, global_wire_bytes=1 << 29), "vm.global_user_wire_limit is"),
    ],
    ids=["memlock", "none at all", "of the process", "of the system"],
)
def test_a_lock_that_is_refused_names_the_limit_and_how_it_is_raised(limits: LockLimits, named: str):
    facts = Facts(
        limits.system, model=ModelHealth("/m.gguf", weights_bytes=GIB), memory=MemoryHealth(limits=limits)
    )
    [found] = diagnose(facts)
    assert found.code == "LOCK_LIMIT"
    assert named in found.evidence
    assert found.remedy


@pytest.mark.parametrize(
    ("symptom", "cause"),
    [
        ("NOT_RUNNING", "SETTINGS_OPEN"),
        ("NOT_RUNNING", "PORT_TAKEN"),
        ("NOT_RUNNING", "SERVICE_PROGRAM_MISSING"),
        ("NOT_RUNNING", "DAEMON_SILENT"),
        ("ENGINE_FAILED", "MODEL_TRUNCATED"),
        ("ENGINE_CRASHING", "ENGINE_FAILED"),
        ("MODEL_COLD", "ENGINE_SWAPPED"),
        ("LOCK_PARTIAL", "LOCK_LIMIT"),
        ("MODEL_IN_PROTECTED_FOLDER", "MODEL_DENIED"),
        ("SERVICE_STALE", "SERVICE_PROGRAM_MISSING"),
    ],
)
def test_a_symptom_is_hidden_by_its_cause_and_shown_without_it(symptom: str, cause: str):
    both = [Condition(symptom, "seen"), Condition(cause, "seen")]
    assert [each.code for each in visible(both)] == [cause]
    assert [each.code for each in visible(both[:1])] == [symptom]


@pytest.mark.parametrize("code", CATALOGUE)
def test_each_cause_that_hides_a_condition_exists_and_is_not_hidden_by_it(code: str):
    for cause in CATALOGUE[code].hidden_by:
        assert cause in CATALOGUE
        assert code not in CATALOGUE[cause].hidden_by


def test_a_symptom_is_not_shown_beside_its_cause():
    facts = replace(
        daemon(lock=LockState.ABSENT, has_failed=True, resident_share=0.1),
        memory=needs(80, system=SystemMemory(total_bytes=GIB)),
    )
    assert {each.code for each in visible(diagnose(facts))} == {"ENGINE_FAILED", "RAM_TOO_SMALL"}
    assert {each.code for each in diagnose(facts)} >= {"MODEL_COLD", "LOCK_NOT_HELD"}


def test_the_worst_is_shown_first():
    found = [Condition(code, "seen") for code in ("WARMTH_OFF", "MODEL_COLD", "NOT_RUNNING", "THROTTLED")]
    severities = [CATALOGUE[each.code].severity for each in visible(found)]
    assert severities == sorted(severities, key=list(Severity).index)


def test_each_condition_names_its_section_of_the_documentation():
    assert Condition("MODEL_COLD", "seen").page == "docs/doctor.md#model_cold"


def test_a_remedy_names_a_command_where_there_is_one():
    assert diagnose(PROVOKED["WARMTH_PAUSED"])[0].remedy == "emberd resume"
