"""The status as a type, and as plain values between a daemon and a command line of different versions."""

from __future__ import annotations

import json

from emberd.core.load_facts import KeepAliveState, KeepAliveVerdict
from emberd.core.lock import LockState, LockVerdict
from emberd.core.lock_limits import LockReason
from emberd.core.memory import GpuLimits, Power, PowerSource, Pressure
from emberd.core.status import (
    EngineMemoryStatus,
    EngineStatus,
    FirstTokenStatus,
    ForecastStatus,
    MemoryStatus,
    PassStatus,
    ProgressStatus,
    ResidencyStatus,
    ReuseStatus,
    Status,
    SwapStatus,
    SystemMemoryStatus,
    WarmthStatus,
    from_plain,
    to_plain,
)
from emberd.core.turn import PromptCounts
from emberd.core.types import LoadProgress, Notice

FULL = Status(
    version="9.9",
    pid=1,
    state="LOADING",
    failures=("once", "twice"),
    loading=LoadProgress("tensors", "12/40"),
    engine=EngineStatus("koboldcpp", 2, 20000, True, 1.5, ("koboldcpp", "--quiet")),
    lock=LockVerdict(LockState.PARTIAL, 1, 2, LockReason.MEMLOCK_LIMIT, "too low", "raise it", ("a note",)),
    metal_heartbeat=KeepAliveVerdict(KeepAliveState.SHORT, 180),
    notices=(Notice("public_host", "it listens everywhere"),),
    memory=MemoryStatus(
        EngineMemoryStatus(resident_bytes=3, proportional_bytes=2),
        SystemMemoryStatus(pressure=Pressure.WARN, swap_out_bytes_per_s=0.5),
        Power(PowerSource.BATTERY, 0.5),
        GpuLimits(0),
    ),
    residency=ResidencyStatus(0.5, 0.4, 0.6, 5, 10, "mincore", age_s=1),
    warmth=WarmthStatus(
        last=PassStatus("due", ("touch", "replay")),
        progress=ProgressStatus(1, 2),
        forecast=ForecastStatus("hot", 0.1, FirstTokenStatus("cold", None, 3.5)),
        reuse=ReuseStatus(PromptCounts(1, 2, 3), barred=("llama",)),
    ),
    swap=SwapStatus(7),
    log=("stderr",),
)


def test_it_comes_back_through_json_as_it_was():
    assert from_plain(Status, json.loads(json.dumps(to_plain(FULL)))) == FULL
    assert from_plain(Status, json.loads(json.dumps(to_plain(Status())))) == Status()


def test_plain_values_are_words_and_lists():
    plain = to_plain(FULL)
    assert plain["lock"]["state"] == "PARTIAL"
    assert plain["memory"]["system"]["pressure"] == "warn"
    assert plain["warmth"]["last"]["steps"] == ["touch", "replay"]
    assert (plain["engine"]["pid"], plain["residency"]["age_s"], plain["swap"]["engine_idle_bytes"]) == (2, 1, 0)


def test_what_an_older_daemon_does_not_tell_has_its_default():
    told = {"state": "READY", "engine": {"pid": 5}, "warmth": {"mode": "auto"}, "memory": {}, "lock": {}}
    seen = from_plain(Status, told)
    assert seen.engine is not None
    assert (seen.engine.pid, seen.engine.port, seen.engine.command) == (5, None, ())
    assert seen.warmth == WarmthStatus(mode="auto")
    assert seen.memory == MemoryStatus(EngineMemoryStatus(), SystemMemoryStatus(), Power(), None)
    assert seen.lock == LockVerdict(LockState.UNKNOWN, None, None)
    assert (seen.swap, seen.requests_waiting, seen.notices) == (None, 0, ())


def test_what_a_newer_daemon_tells_besides_is_left_out_and_a_new_word_is_unknown():
    plain = to_plain(FULL) | {"weather": "fine"}
    plain["engine"]["colour"] = "red"
    plain["lock"] |= {"state": "BETTER", "reason": "moon"}
    plain["memory"]["system"]["pressure"] = "odd"
    plain["warmth"]["hold"] = "half"
    seen = from_plain(Status, plain)
    assert seen.engine == FULL.engine
    assert seen.lock is not None
    assert (seen.lock.state, seen.lock.reason, seen.lock.message) == (LockState.UNKNOWN, None, "too low")
    assert seen.memory is not None
    assert seen.memory.system.pressure is Pressure.UNKNOWN
    assert seen.warmth is not None
    assert seen.warmth.hold == "half"


def test_a_start_says_how_far_it_is():
    assert FULL.state_words == "LOADING tensors 12/40"
    assert Status(state="READY").state_words == "READY"
