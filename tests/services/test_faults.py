"""Nothing that is full, broken or gone stops the service: real daemons on small disks and lost files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from daemon_process import group_members
from emberd.host.paths import StatePaths
from small_disk import CAN_MOUNT, SmallDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemon_process import Daemon

    MakeDaemon = Callable[..., Daemon]

needs_disk = pytest.mark.skipif(not CAN_MOUNT, reason="mounting a file system needs root on Linux")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    try:
        small = SmallDisk(tmp_path / "disk")
    except OSError as error:
        pytest.skip(str(error))
    with small:
        yield small


def on_disk(make_daemon: MakeDaemon, disk: SmallDisk, **settings: Any) -> Daemon:
    """Return a daemon whose state directory is on the small disk."""
    state = disk.folder / "state"
    daemon = make_daemon({"state.directory": str(state), "log.sink": "file", **settings})
    daemon.state = StatePaths(state)
    return daemon


def kill_engine(daemon: Daemon) -> int:
    """Kill the engine and return its pid."""
    pid: int = daemon.wait_ready()["engine"]["pid"]
    os.kill(pid, signal.SIGKILL)
    return pid


@needs_disk
def test_a_full_disk_loses_no_request_however_often_the_engine_dies(make_daemon: MakeDaemon, disk: SmallDisk):
    daemon = on_disk(make_daemon, disk)
    daemon.start()
    daemon.wait_ready()
    disk.fill()
    for _ in range(3):
        old = kill_engine(daemon)
        assert daemon.complete()
        status = daemon.wait_ready(other_than=old)
        # The record on the full disk is of this engine: the next emberd would find it.
        assert json.loads(daemon.state.record.read_text())["pid"] == status["engine"]["pid"]
    daemon.kill()
    daemon.start()
    assert daemon.wait_ready()["engine"]["adopted"]
    assert daemon.complete()


@needs_disk
def test_emberd_starts_and_serves_on_a_disk_without_room_and_without_inodes(
    make_daemon: MakeDaemon, disk: SmallDisk
):
    daemon = on_disk(make_daemon, disk)
    (disk.folder / "state").mkdir()
    disk.fill()
    disk.fill_inodes()
    daemon.start()
    deadline_s = time.monotonic() + 40
    said = ""
    while not said and time.monotonic() < deadline_s:
        try:
            said = daemon.complete()
        except httpx.ConnectError:
            time.sleep(0.05)
    assert said
    disk.make_room()
    # Now that there is room, the control socket, the state file and the log are there.
    status = daemon.wait_ready()
    assert daemon.wait_for(lambda _: daemon.state.record.exists(), "the state file")
    assert json.loads(daemon.state.record.read_text())["pid"] == status["engine"]["pid"]
    daemon.log = daemon.state.directory / "emberd.log"
    assert daemon.wait_event("output_lost")["remedy"]
    kept_not = {event["what"] for event in daemon.events("state_not_kept")}
    assert "the control socket" in kept_not
    assert "the state file" in kept_not or daemon.events("state_not_saved")
    kept = daemon.wait_event("state_kept_again", count=2)
    assert kept


@needs_disk
def test_a_full_disk_does_not_keep_an_engine_from_its_merged_settings(
    make_daemon: MakeDaemon, disk: SmallDisk, tmp_path: Path
):
    kcpps = tmp_path / "own.kcpps"
    kcpps.write_text(json.dumps({"contextsize": 2048, "password": "sesame"}))
    daemon = on_disk(make_daemon, disk, **{"engine.kcpps": str(kcpps)})
    (disk.folder / "state").mkdir()
    disk.fill()
    daemon.start()
    engine = daemon.wait_ready()["engine"]
    assert any(word.startswith("/dev/fd/") for word in engine["command"])
    key = {"authorization": "Bearer sesame"}
    body = {"prompt": "ba", "max_length": 2}
    for _ in range(2):
        url = f"{daemon.url}/api/v1/generate"
        answer = httpx.post(url, json=body, headers=key, trust_env=False, timeout=40)
        assert answer.status_code == httpx.codes.OK, answer.text
        killed = kill_engine(daemon)
    disk.make_room()
    # The status says READY until the end of the killed one is seen.
    daemon.wait_ready(other_than=killed)
    killed = kill_engine(daemon)
    command = daemon.wait_ready(other_than=killed)["engine"]["command"]
    assert str(daemon.state.directory / "merged.kcpps") in command


def test_a_state_directory_that_is_deleted_is_made_again_and_nobody_notices(make_daemon: MakeDaemon):
    daemon = make_daemon()
    daemon.start()
    pid = daemon.wait_ready()["engine"]["pid"]
    # In one step, because emberd may write to it just now.
    shutil.rmtree(daemon.state.directory.rename(daemon.folder / "deleted"))
    assert daemon.complete()
    assert daemon.wait_event("output_lost")["error"].endswith("engine.log was removed")
    os.kill(pid, signal.SIGKILL)
    assert daemon.complete()
    # Asked by a signal: the socket is made again within 30 s, and a restart of emberd does not wait for that.
    daemon.kill()
    daemon.start()
    assert daemon.wait_ready()["engine"]["adopted"]


def test_an_engine_that_prints_more_than_can_be_read_keeps_no_request_waiting(
    make_daemon: MakeDaemon, standin: Path, tmp_path: Path
):
    program = tmp_path / "koboldcpp.sh"
    flood = tmp_path / "flood.py"
    flood.write_text(
        "import os, time\n"
        "for _ in range(100):\n"
        "    os.write(1, b'decode: failed to find a memory slot for batch of size 1\\n' * 40_000)\n"
        "    time.sleep(0.05)\n"
    )
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *--model*) {sys.executable} {flood} & ;; esac\n'
        f'exec {sys.executable} {standin}/koboldcpp.py "$@"\n'
    )
    program.chmod(0o755)
    daemon = make_daemon({"engine.path": str(program)})
    daemon.start()
    daemon.wait_ready()
    daemon.wait_event("output_lost")
    for _ in range(5):
        assert daemon.complete(timeout_s=5)
    assert (daemon.state.directory / "engine.log").stat().st_size < 32 << 20
    lost = daemon.events("output_lost")
    assert [event["error"] for event in lost] == ["the engine prints faster than emberd can read"]


def test_an_emberd_that_ends_while_it_asks_a_program_leaves_nothing_of_it(make_daemon: MakeDaemon, tmp_path: Path):
    program, pid = tmp_path / "koboldcpp.sh", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\nsleep 100 &\necho $$ > {pid}.new; mv {pid}.new {pid}\nwait\n")
    program.chmod(0o755)
    daemon = make_daemon({"engine.path": str(program)})
    daemon.start()
    daemon.wait_for(lambda _: pid.exists(), "the question")
    group = int(pid.read_text())
    assert group_members(group)
    daemon.signal(signal.SIGTERM)
    assert daemon.end() == 0
    assert not group_members(group)


def test_a_model_that_went_away_and_came_back_is_served_within_seconds(
    make_daemon: MakeDaemon, tmp_path: Path, model: Path
):
    own = tmp_path / "volume" / "model.gguf"
    own.parent.mkdir()
    shutil.copy(model, own)
    daemon = make_daemon({"model.path": str(own)})
    daemon.start()
    daemon.wait_ready()
    own.parent.rename(tmp_path / "away")
    kill_engine(daemon)
    status = daemon.wait_for(lambda status: status["state"] == "FAILED", "FAILED")
    assert f"model not found: {own}" in status["reason"]
    assert status["remedy"]
    assert status["next_start_in_s"] is not None
    refused = httpx.post(f"{daemon.url}/api/v1/generate", json={"prompt": "x"}, trust_env=False, timeout=40)
    assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert "model not found" in refused.text
    assert status["remedy"] in refused.text
    assert int(refused.headers["retry-after"]) <= 5
    (tmp_path / "away").rename(own.parent)
    daemon.wait_ready()
    assert daemon.wait_event("obstacle_gone")["cause"] == "files"
    assert daemon.complete()


@pytest.mark.parametrize("fault", ["away", "garbage"])
def test_an_adapter_or_settings_of_the_engine_that_are_mended_are_served_within_seconds(
    make_daemon: MakeDaemon, tmp_path: Path, model: Path, fault: str
):
    kcpps, lora = tmp_path / "own.kcpps", tmp_path / "volume" / "adapter.gguf"
    lora.parent.mkdir()
    shutil.copy(model, lora)
    whole = json.dumps({"lora": [str(lora)], "contextsize": 2048})
    kcpps.write_text(whole)
    daemon = make_daemon({"engine.kcpps": str(kcpps)})
    daemon.start()
    daemon.wait_ready()
    if fault == "away":
        lora.parent.rename(tmp_path / "away")
    else:
        kcpps.write_text(whole[:-5])
    kill_engine(daemon)
    status = daemon.wait_for(lambda status: status["state"] == "FAILED", "FAILED")
    assert ("adapter.gguf: not found" if fault == "away" else "own.kcpps") in status["reason"]
    assert (status["remedy"], status["next_start_in_s"]) != (None, None)
    if fault == "away":
        (tmp_path / "away").rename(lora.parent)
    else:
        kcpps.write_text(whole)
    daemon.wait_ready()
    assert daemon.wait_event("obstacle_gone")["cause"] == "files", "it did not wait for its next try"


def test_a_model_that_was_a_beginning_only_is_served_when_it_is_whole(
    make_daemon: MakeDaemon, tmp_path: Path, model: Path
):
    own, content = tmp_path / "own.gguf", model.read_bytes()
    own.write_bytes(content)
    daemon = make_daemon({"model.path": str(own)})
    daemon.start()
    daemon.wait_ready()
    own.write_bytes(content[:100])
    kill_engine(daemon)
    status = daemon.wait_for(lambda status: status["state"] == "FAILED", "FAILED")
    assert status["remedy"]
    own.write_bytes(content)
    daemon.wait_ready()
    assert daemon.complete()
