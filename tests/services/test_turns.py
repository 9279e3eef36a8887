"""The memory of the last turns: one of each conversation that the engine's cache holds, within bounds."""

from __future__ import annotations

from typing import Any

import pytest

from emberd.core.reuse import CacheRoom, Verdict
from emberd.core.turn import PromptCounts, Turn, is_of_same_conversation
from emberd.core.warmth import Cache
from emberd.services.turns import Turns

ENGINE = "1:a"
MANY = 1 << 20
SEA = "A tale of the sea and of the ships that went down in it. "
HILLS = "Nobody lives in the hills any more, they say in town. "


def turn(prompt: str, reply: str = " Yes.") -> Turn:
    return Turn("/completion", {"prompt": prompt}, reply)


def after(turns: Turns, *told: Turn | None) -> tuple[Turn, ...]:
    for each in told:
        turns.begin(ENGINE)
        turns.end(ENGINE, lambda each=each: each)  # type: ignore[misc]  # the default binds the loop's variable
    return turns.all


def test_one_slot_keeps_the_last_turn_only():
    turns = Turns(lambda: MANY)
    assert after(turns, turn(SEA), turn(HILLS)) == (turn(HILLS),)
    assert turns.cache(ENGINE, is_adopted=False) is Cache.KNOWN


def test_several_slots_keep_one_turn_of_each_conversation_the_latest_last():
    turns = Turns(lambda: MANY, lambda: CacheRoom(3, 4096))
    second = turn(SEA + " Yes. And then?")
    assert after(turns, turn(SEA), turn(HILLS), second) == (turn(HILLS), second)
    assert turns.last == second


def test_the_oldest_conversation_goes_when_the_slots_are_full_or_the_bytes_are():
    prompts = [f"{number}{number} is how it begins" for number in range(5)]
    assert after(Turns(lambda: MANY, lambda: CacheRoom(2, 4096)), *map(turn, prompts)) == tuple(
        map(turn, prompts[-2:])
    )
    size = 2 * len('{"prompt": "00 is how it begins"}') + 2 * len(" Yes.")
    assert after(Turns(lambda: size, lambda: CacheRoom(4, 4096)), *map(turn, prompts)) == tuple(
        map(turn, prompts[-2:])
    )


def test_what_is_not_known_may_have_taken_any_slot():
    turns = Turns(lambda: MANY, lambda: CacheRoom(4, 4096))
    assert after(turns, turn(SEA), turn(HILLS), None) == ()
    assert turns.cache(ENGINE, is_adopted=False) is Cache.UNKNOWN


def test_a_reply_is_taken_apart_only_when_somebody_wants_it():
    turns, asked = Turns(lambda: MANY), []

    def tell() -> Turn:
        asked.append(1)
        return turn(SEA)

    for _ in range(3):
        turns.begin(ENGINE)
        turns.end(ENGINE, tell)
    assert not asked
    assert turns.last == turn(SEA)
    assert turns.last == turn(SEA)
    assert len(asked) == 1


def test_what_is_forgotten_is_gone_also_what_nobody_has_looked_at():
    turns = Turns(lambda: MANY, lambda: CacheRoom(2, 4096))
    turns.begin(ENGINE)
    turns.end(ENGINE, lambda: turn(SEA))
    assert turns.forget()
    assert turns.last is None
    assert not turns.forget()


@pytest.mark.parametrize(
    ("new", "old", "same"),
    [
        ({"prompt": "abcdefghij"}, {"prompt": "ab"}, True),
        ({"prompt": "abcdefghij"}, {"prompt": "ax"}, False),
        ({"messages": [{"content": "Hi"}]}, {"messages": [{"content": "Hi"}]}, True),
        ({"prompt": ["several"]}, {"prompt": "one"}, False),
        ({"prompt": ""}, {"prompt": "one"}, False),
    ],
)
def test_a_conversation_is_told_by_how_its_prompt_begins(new: dict[str, Any], old: dict[str, Any], same: bool):
    assert is_of_same_conversation(Turn("/completion", new, ""), Turn("/completion", old, "")) is same


def test_a_generation_that_was_refused_leaves_what_others_left():
    turns = Turns(lambda: MANY)
    after(turns, turn(SEA))
    turns.begin(ENGINE)
    turns.end_unheard()
    assert turns.cache(ENGINE, is_adopted=False) is Cache.KNOWN
    turns.begin(ENGINE)
    turns.begin(ENGINE)
    turns.end(ENGINE, lambda: turn(HILLS))
    assert turns.cache(ENGINE, is_adopted=False) is Cache.UNKNOWN, "the other may still replace it"
    turns.end_unheard()
    assert turns.cache(ENGINE, is_adopted=False) is Cache.KNOWN
    assert turns.last == turn(HILLS)


def test_what_ends_late_on_an_engine_that_died_tells_nothing_of_the_next_one():
    turns, second = Turns(lambda: MANY), "2:b"
    turns.begin(ENGINE)
    turns.begin(ENGINE)
    turns.end(ENGINE, lambda: turn(SEA))
    turns.begin(second)
    turns.end(ENGINE, lambda: turn(HILLS))
    assert turns.cache(second, is_adopted=False) is Cache.UNKNOWN
    turns.end_unheard()
    assert turns.cache(second, is_adopted=False) is Cache.EMPTY, "it refused the only one"
    assert turns.last == turn(SEA)
    turns.begin(ENGINE)
    turns.begin(second)
    turns.end(second, lambda: turn(HILLS))
    turns.end(ENGINE, lambda: turn(SEA))
    assert turns.cache(second, is_adopted=False) is Cache.KNOWN
    assert turns.last == turn(HILLS)


# --- what replays are made of -------------------------------------------------------------------------------------

HIT, MISS = PromptCounts(500, 1, 1), PromptCounts(0, 501, 1)


def told(prompt: str, reused: int = 0, path: str = "/completion") -> Turn:
    return Turn(path, {"prompt": prompt}, "", PromptCounts(reused, 500, 0))


def prompts(turns: Turns, engine_key: str = ENGINE) -> list[str]:
    return [each.turn.body["prompt"] for each in turns.to_replay(engine_key)]


def test_two_conversations_that_push_each_other_out_bar_nothing():
    turns = Turns(lambda: MANY, lambda: CacheRoom(4, 4096))
    for number in range(4):
        for tale in (SEA, HILLS):
            latest = told(tale + "more " * number)
            after(turns, latest)
            turns.replayed(ENGINE, latest, HIT)
    assert turns.ledger(ENGINE).barred == set()
    assert turns.ledger(ENGINE).lost_turns == 0


def test_what_another_engine_held_is_gone_when_a_user_comes_before_the_first_pass():
    turns = Turns(lambda: MANY, lambda: CacheRoom(4, 4096))
    after(turns, told(SEA), told(HILLS))
    assert prompts(turns) == [HILLS, SEA, HILLS]
    turns.begin("2:b")
    turns.end("2:b", lambda: told(HILLS + "more"))
    assert prompts(turns, "2:b") == [HILLS + "more"]


def test_a_kind_that_saves_nothing_is_not_sent_beside_another_one_either():
    turns = Turns(lambda: MANY, lambda: CacheRoom(4, 4096))
    text, chat = told(SEA), told(HILLS, path="/v1/completions")
    after(turns, text)
    assert turns.replayed(ENGINE, text, MISS) is Verdict.MISS
    after(turns, chat)
    assert turns.ledger(ENGINE).barred == {"llama"}
    assert prompts(turns) == [HILLS]
