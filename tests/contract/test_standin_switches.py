"""The misbehaviour that the stand-in plays on demand; other tests rely on it."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from contract.targets import request, standin
from engine_process import free_port, is_answering, wait_until

if TYPE_CHECKING:
    from pathlib import Path

STANDIN = standin("1.104")
PROMPTLY_S = 5.0


@pytest.mark.parametrize(("how", "code"), [("7", 7), ("SIGSEGV", -11), ("SIGKILL", -9)])
def test_it_crashes_at_the_start_as_told(model: Path, how: str, code: int) -> None:
    with STANDIN.start("--model", model, "--port", str(free_port()), STANDIN_CRASH_AT_START=how) as process:
        assert process.wait_for_exit(within_s=PROMPTLY_S) == code


@pytest.mark.parametrize(("how", "code"), [("7", 7), ("SIGSEGV", -11)])
def test_it_crashes_in_the_middle_of_a_stream(model: Path, how: str, code: int) -> None:
    switches = {"STANDIN_CRASH_AFTER_TOKENS": "5", "STANDIN_CRASH_WITH": how}
    with STANDIN.serving(model, **switches) as server:
        text = ""
        with server.streaming("ba ke", 50) as stream:
            for event in stream:
                text += event["token"]
                assert event["finish_reason"] is None
        assert len(text.split()) == 5
        assert server.process.wait_for_exit(within_s=PROMPTLY_S) == code


def test_misbehaviour_with_a_once_file_happens_in_one_process_only(model: Path, tmp_path: Path) -> None:
    switches = {"STANDIN_CRASH_AT_START": "7", "STANDIN_ONCE_FILE": str(tmp_path / "once")}
    with STANDIN.start("--model", model, "--port", str(free_port()), **switches) as process:
        assert process.wait_for_exit(within_s=PROMPTLY_S) == 7
    with STANDIN.serving(model, **switches) as server:
        assert server.generate("ba ke", 1)


def test_hung_requests_are_accepted_and_never_answered(model: Path) -> None:
    port = free_port()
    words = ("--model", model, "--host", "127.0.0.1", "--port", str(port))
    with STANDIN.start(*words, STANDIN_HANG="requests", STANDIN_HANG_CPU="1") as process:
        process.wait_for_output("IPv6 Socket Failed to Bind.")
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"http://127.0.0.1:{port}/api/v1/model", timeout=0.3, trust_env=False)
        child = psutil.Process(process.pid)
        before = sum(child.cpu_times()[:2])
        wait_until(lambda: sum(child.cpu_times()[:2]) > before + 0.3)


def test_a_hung_generation_leaves_the_counters_answering(model: Path) -> None:
    with STANDIN.serving(model, STANDIN_HANG="generation", STANDIN_HANG_AFTER="1") as server:
        assert server.generate("ba ke", 2)
        wait_until(server.is_idle)
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/api/v1/generate", json=request("ba ke", 2), timeout=0.3)
        assert server.perf()["idle"] == 0
        assert server.perf()["total_gens"] == 1


def test_it_ignores_the_signals_it_is_told_to(model: Path) -> None:
    with STANDIN.serving(model, STANDIN_IGNORE_SIGTERM="1", STANDIN_IGNORE_SIGINT="1") as server:
        server.process.send(signal.SIGTERM)
        server.process.send(signal.SIGINT)
        assert is_answering(f"{server.client.base_url}/api/v1/model")
        server.process.send(signal.SIGKILL)
        assert server.process.wait_for_exit(within_s=PROMPTLY_S) == -9


def test_loading_takes_as_long_as_told(model: Path) -> None:
    with STANDIN.serving(model, STANDIN_LOAD_SECONDS="0.6") as server:
        assert server.perf()["uptime"] > 0.6


def test_a_vanished_file_of_the_single_file_binary_breaks_generations(model: Path, tmp_path: Path) -> None:
    with STANDIN.serving(model, STANDIN_FROZEN="1", TMPDIR=str(tmp_path)) as server:
        (unpacked,) = tmp_path.glob("_MEI*")
        assert server.generate("ba ke", 1)
        (marker,) = unpacked.iterdir()
        marker.unlink()
        assert server.client.post("/api/v1/generate", json=request("ba ke", 1)).status_code == 500


def test_an_orderly_end_removes_the_unpacked_files(model: Path, tmp_path: Path) -> None:
    with STANDIN.serving(model, STANDIN_FROZEN="1", TMPDIR=str(tmp_path)) as server:
        os.kill(server.process.pid, signal.SIGINT)
        assert server.process.wait_for_exit(within_s=PROMPTLY_S) == 0
    assert not list(tmp_path.iterdir())


def test_a_reply_ends_by_itself_at_its_natural_length(model: Path) -> None:
    with STANDIN.serving(model, STANDIN_REPLY_TOKENS="4") as server:
        result = server.client.post("/api/v1/generate", json={"prompt": "ba ke"}).json()["results"][0]
        assert len(result["text"].split()) == 4
        assert result["finish_reason"] == "stop"
        assert server.perf()["stop_reason"] == 1


def test_a_refused_lock_can_be_played(model: Path) -> None:
    with STANDIN.serving(model, "--usemlock", STANDIN_MLOCK_FAILS="1") as server:
        size = model.stat().st_size
        warning = f"warning: failed to mlock {size}-byte buffer (after previously locking 0 bytes): Cannot allocate"
        assert warning in server.process.stderr
