"""What an engine's counts say of its prompt cache: hits and misses, and what is replayed after them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberd.core.reuse import (
    MOST_PROCESSED_TOKENS,
    CacheRoom,
    Conversation,
    ReuseLedger,
    Verdict,
    found_what_was_kept,
    judge_replay,
    to_replay,
)
from emberd.core.turn import UNTOLD, PromptCounts, Turn

STORY = Turn("/completion", {"prompt": "Once upon"}, " a time", PromptCounts(0, 1000, 200))
HELD = Conversation(STORY, 1200)
HIT = PromptCounts(1199, 1, 1)
MISS = PromptCounts(0, 1200, 1)


def talk(name: str, tokens: int | None, **more: Any) -> Conversation:
    return Conversation(Turn("/completion", {"prompt": name}, ""), tokens, **more)


def names(held: list[Conversation]) -> list[str]:
    return [each.turn.body["prompt"] for each in held]


# --- a replay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processed", "is_replayed", "verdict"),
    [
        (1, True, Verdict.HIT),
        (MOST_PROCESSED_TOKENS, True, Verdict.HIT),
        (MOST_PROCESSED_TOKENS + 1, True, Verdict.MISS),
        (MOST_PROCESSED_TOKENS + 200, False, Verdict.HIT),
        (MOST_PROCESSED_TOKENS + 201, False, Verdict.MISS),
        (None, True, Verdict.UNKNOWN),
    ],
)
def test_a_replay_may_process_a_few_tokens_and_at_first_the_reply_once_more(
    processed: int | None, is_replayed: bool, verdict: Verdict
):
    held = replace(HELD, is_replayed=is_replayed)
    assert judge_replay(held, PromptCounts(0, processed, 1), may_be_gone=False) is verdict


def test_the_reply_of_an_engine_that_did_not_count_it_has_no_more_tokens_than_bytes():
    held = Conversation(replace(STORY, counts=UNTOLD))
    most = MOST_PROCESSED_TOKENS + len(" a time")
    assert judge_replay(held, PromptCounts(0, most, 1), may_be_gone=False) is Verdict.HIT
    assert judge_replay(held, PromptCounts(0, most + 1, 1), may_be_gone=False) is Verdict.MISS


def test_what_may_be_gone_is_no_miss():
    assert judge_replay(HELD, MISS, may_be_gone=True) is Verdict.PRIMED


def test_of_a_turn_that_was_cut_it_is_not_known_how_much_is_there():
    cut = replace(HELD, turn=replace(STORY, was_cut=True))
    assert judge_replay(cut, MISS, may_be_gone=False) is Verdict.PRIMED
    assert judge_replay(replace(cut, is_replayed=True), MISS, may_be_gone=False) is Verdict.MISS
    new = Turn("/completion", {"prompt": "Once upon a time"}, "", PromptCounts(0, 10, 5))
    assert found_what_was_kept(cut, new) is None


# --- a user's next turn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "reused", "has_found"),
    [
        ("Once upon a time there", 1199, True),
        ("Once upon", 999, True),
        ("Once upon a time there", 500, True),
        ("Once upon a time there", 499, False),
        ("Twice upon", 0, None),
        ("Once upon a time there", None, None),
    ],
)
def test_the_next_turn_must_find_the_prompt_of_the_last_one(
    prompt: str, reused: int | None, has_found: bool | None
):
    processed = None if reused is None else max(1210 - reused, 1)
    new = Turn("/completion", {"prompt": prompt}, "", PromptCounts(reused, processed, 5))
    assert found_what_was_kept(HELD, new) is has_found


def test_a_prompt_that_the_engine_had_to_cut_may_begin_elsewhere():
    new = Turn("/completion", {"prompt": "Once upon a time there"}, "", PromptCounts(0, 900, 5))
    assert found_what_was_kept(HELD, new) is None


def chat(*contents: str, **more: Any) -> Turn:
    return Turn("/v1/chat/completions", {"messages": [{"content": each} for each in contents], **more}, "")


@pytest.mark.parametrize(
    ("before", "new", "goes_on"),
    [
        (chat("a"), chat("a", "b", "c"), True),
        (chat("a", "b"), chat("a", "c"), False),
        (chat("a", "b"), chat("a"), False),
        (chat("a"), chat("a", "b", tools=[1]), False),
        (chat("a"), STORY, False),
        (STORY, replace(STORY, body={"prompt": "Once upon", "memory": "x"}), False),
    ],
)
def test_a_turn_goes_on_where_its_prompt_begins_with_the_whole_of_the_last_one(
    before: Turn, new: Turn, goes_on: bool
):
    assert new.continues(before) is goes_on


# --- what fits together -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "sent"),
    [
        (CacheRoom(4, 4096), ["c", "b", "c"]),
        (CacheRoom(4, 4096, is_shared=False), ["c", "a", "b", "c"]),
        (CacheRoom(4, 8192), ["c", "a", "b", "c"]),
        (CacheRoom(2, 8192), ["c", "b", "c"]),
        (CacheRoom(1, 8192), ["c"]),
        (CacheRoom(4, None), ["c"]),
        (CacheRoom(4, 1500), ["c"]),
    ],
)
def test_the_latest_comes_first_and_last_and_others_only_into_room_that_is_left(room: CacheRoom, sent: list[str]):
    assert names(to_replay([talk("a", 3400), talk("b", 700), talk("c", 1100)], room)) == sent


def test_what_does_not_fit_keeps_those_before_it_out_too():
    held = [talk("a", 100), talk("b", 3400), talk("c", 1100)]
    assert names(to_replay(held, CacheRoom(4, 4096))) == ["c"], "b has pushed a out"


@pytest.mark.parametrize("unknown", [talk("b", None), talk("b", 5, is_gone=True)])
def test_of_others_it_must_be_known_that_they_are_there(unknown: Conversation):
    assert names(to_replay([unknown, talk("c", 10)], CacheRoom(4, 4096))) == ["c"]


def test_without_a_size_of_the_latest_there_is_no_room_for_others():
    assert names(to_replay([talk("b", 5), talk("c", None)], CacheRoom(4, 4096))) == ["c"]
    assert to_replay([], CacheRoom()) == []


@given(
    st.lists(st.builds(talk, st.text(max_size=3), st.none() | st.integers(1, 5000)), max_size=8),
    st.builds(CacheRoom, st.integers(1, 6), st.none() | st.integers(1, 9000), st.just(True)),
)
def test_what_is_sent_together_fits_into_the_cells_that_slots_share(held: list[Conversation], room: CacheRoom):
    sent = to_replay(held, room)
    if held:
        assert sent[0] is sent[-1] is held[-1]
    others = sent[1:-1]
    assert len(others) < room.conversations
    if others:
        assert sum(each.tokens or 0 for each in (held[-1], *others)) <= (room.cells or 0)


# --- the ledger ---------------------------------------------------------------------------------------------------


def replays(*verdicts: Verdict, is_latest: bool = True) -> ReuseLedger:
    ledger = ReuseLedger()
    for verdict in verdicts:
        counts = MISS if verdict is Verdict.MISS else HIT
        ledger = ledger.after_replay("chat", verdict, counts, is_latest=is_latest)
    return ledger


def test_a_kind_that_never_hit_is_barred_by_its_first_miss():
    ledger = replays(Verdict.PRIMED, Verdict.MISS)
    assert ledger.barred == {"chat"}
    assert (ledger.replays, ledger.misses, ledger.wasted_tokens) == (1, 1, 1200)


def test_a_kind_that_did_hit_has_lost_one_conversation_and_must_find_it_again():
    assert replays(Verdict.HIT, Verdict.MISS, Verdict.HIT, Verdict.MISS, Verdict.HIT).barred == set()
    assert replays(Verdict.HIT, Verdict.MISS, Verdict.MISS).barred == {"chat"}


def test_what_another_conversation_misses_says_nothing_of_its_kind():
    ledger = replays(Verdict.MISS, Verdict.MISS, is_latest=False)
    assert (ledger.barred, ledger.misses) == (set(), 2)


def test_what_is_not_told_is_no_evidence():
    assert replays(Verdict.UNKNOWN, Verdict.PRIMED) == ReuseLedger()


def test_two_users_in_a_row_who_did_not_find_what_replays_kept_bar_a_kind():
    def turns(*found: bool) -> ReuseLedger:
        ledger = replays(Verdict.HIT)
        for has_found in found:
            ledger = ledger.after_turn("chat", has_found=has_found, is_replayed=True)
            ledger = ledger.after_replay("chat", Verdict.HIT, HIT, is_latest=True)
        return ledger

    assert turns(False, True, False).barred == set()
    assert turns(False, False).barred == {"chat"}
    assert turns(False, False).lost_turns == 2


def test_what_no_replay_has_kept_may_be_lost():
    assert ReuseLedger().after_turn("chat", has_found=False, is_replayed=False) == ReuseLedger()
