"""The way to the engine: what it tells of it, and who is let in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emberd.core import lifecycle
from emberd.core.errors import NotReady
from emberd.core.lifecycle import Lifecycle, State
from emberd.core.reuse import CacheRoom
from emberd.core.types import Readiness, Serving
from emberd.engine.record import EngineRecord
from emberd.services.gate import EngineNow, Gate

RECORD = EngineRecord(
    pid=7,
    start_token="a",
    command_digest=None,
    command=(),
    plan_digest="",
    port=20001,
    engine="llama-server",
    started_at=0.0,
    will_lock=True,
)


class Adapter:
    """An adapter that has not asked its engine yet."""

    room = CacheRoom()

    def model_path(self) -> None:
        return None


class Meter:
    """Knows what the engine's log told."""

    verdict = weights_bytes = is_mapped = is_cache_shared = None
    keeps_state = False


def gate_at(state: State, **changes: Any) -> tuple[Gate, Meter, list[lifecycle.Event]]:
    meter, posted = Meter(), list[lifecycle.Event]()
    life = replace(Lifecycle(since_s=0.0), state=state, reason="it crashed\nand more")
    adapter: Any = Adapter()
    gate = Gate(adapter, EngineNow(life, **changes), meter, None, posted.append)  # type: ignore[arg-type]
    return gate, meter, posted


def test_what_the_cache_holds_outlasts_a_reload_of_the_settings():
    gate, meter, _ = gate_at(State.READY, record=RECORD, room=CacheRoom(4, 4096))
    adapter: Any = Adapter()
    gate.engine = adapter
    assert gate.room == CacheRoom(4, 4096, is_shared=True)
    meter.is_cache_shared = False  # type: ignore[assignment]
    assert gate.room == CacheRoom(4, 4096, is_shared=False)


async def test_a_ready_engine_lets_in_and_a_failed_one_says_why():
    assert await gate_at(State.READY, record=RECORD)[0].ensure_ready(0) == RECORD.port
    with pytest.raises(NotReady, match=r"^it crashed$"):
        await gate_at(State.FAILED, has_begun=True)[0].ensure_ready(60)
    with pytest.raises(NotReady, match="not ready within"):
        await gate_at(State.FAILED)[0].ensure_ready(0)
    with pytest.raises(NotReady, match="shutting down"):
        await gate_at(State.LOADING, record=RECORD, is_closing=True)[0].ensure_ready(60)


async def test_nobody_is_let_in_to_a_ready_engine_while_emberd_ends():
    with pytest.raises(NotReady, match="shutting down"):
        await gate_at(State.READY, record=RECORD, is_closing=True)[0].ensure_ready(60)


def test_the_last_request_of_a_drain_says_that_it_was_the_last():
    gate, _, posted = gate_at(State.DRAINING, record=RECORD)
    with gate.admitted() as flowed, gate.admitted():
        flowed(5)
        assert not gate.sample().is_idle
    assert posted == [lifecycle.Drained()]
    assert (gate.requests, gate.in_flight, gate.flowed_bytes) == (2, 0, 5)


def test_only_the_engine_of_that_port_is_doubted():
    gate, _, posted = gate_at(State.READY, record=RECORD)
    gate.doubt(1)
    gate.doubt(RECORD.port)
    assert posted == [lifecycle.LostReadiness()]


def test_a_key_is_that_of_a_process_and_a_port_of_a_ready_one():
    gate, _, _ = gate_at(State.LOADING, record=RECORD, pids=(7, 8))
    assert (gate.engine_key, gate.port, gate.sample().pids) == ("7:a", None, (7, 8))
    gate, _, _ = gate_at(State.BACKOFF, record=RECORD, pids=(7, 8))
    assert (gate.engine_key, gate.port, gate.sample().pids) == (None, None, ())


def test_a_model_that_was_loaded_in_place_is_another_engine_to_all_who_remember():
    """Its prompt cache is empty, whoever started the process."""
    serving = Serving("koboldcpp/b", Path("/m/b.gguf"), loads=1)
    gate, _, _ = gate_at(State.READY, record=RECORD, is_adopted=True, serving=serving)
    assert (gate.engine_key, gate.is_adopted) == ("7:a:1", False)
    assert gate.sample().touchable == ("/m/b.gguf",)
    gate.change(serving=replace(serving, may_lock=False))
    assert not gate.will_lock


def test_an_engine_without_a_model_has_nothing_to_keep_warm():
    gate, _, _ = gate_at(State.READY, record=RECORD, serving=Serving("", loads=1))
    assert gate.is_empty
    assert (gate.sample().model, gate.sample().touchable) == (None, ())
    assert not gate_at(State.READY, record=RECORD)[0].is_empty


# --- whether an engine outlived a reply ---------------------------------------------------------------------------


class Answering(Adapter):
    """An adapter whose engine answers probes as it is told; the last answer is repeated."""

    def __init__(self, *answers: Readiness) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def probe_readiness(self, port: int, _: float) -> Readiness:
        assert port == RECORD.port
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def answering(*answers: Readiness) -> tuple[Gate, Answering]:
    gate, _, _ = gate_at(State.READY, record=RECORD)
    adapter = Answering(*answers)
    gate.engine = adapter  # type: ignore[assignment]
    return gate, adapter


@pytest.mark.parametrize(
    ("answers", "is_alive", "asked"),
    [
        ((Readiness.READY,), True, 1),
        ((Readiness.REFUSED,), False, 1),
        ((Readiness.LOADING, Readiness.REFUSED), False, 2),
        ((Readiness.LOADING, Readiness.READY), True, 2),
    ],
)
async def test_only_an_answer_proves_that_an_engine_outlived_its_reply_and_a_closed_port_that_it_did_not(
    answers: tuple[Readiness, ...], is_alive: bool, asked: int
):
    """The engine's first process can live on: KoboldCPP's with `--admin` starts another worker."""
    gate, adapter = answering(*answers)
    assert await gate.is_alive(RECORD.port, gate.engine_key) is is_alive
    assert adapter.asked == asked


async def test_an_engine_that_has_loaded_again_meanwhile_did_not_outlive_the_reply():
    gate, adapter = answering(Readiness.READY)
    before = gate.engine_key
    gate.change(serving=Serving("koboldcpp/a", loads=1))
    assert not await gate.is_alive(RECORD.port, before)
    assert not adapter.asked
