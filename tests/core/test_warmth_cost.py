"""What keep-warm may take of a processor while no memory is taken from the model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emberd.core.warmth_cost import BUDGET_SHARE, BUDGET_WINDOW_S, WarmthCost, budget_wait_s

ALLOWED_S = BUDGET_SHARE * BUDGET_WINDOW_S


def test_within_the_budget_nothing_waits():
    assert budget_wait_s([], 1000) == 0
    assert budget_wait_s([(900, ALLOWED_S / 2), (990, ALLOWED_S / 2)], 1000) == 0


def test_what_is_too_much_waits_until_it_is_ten_minutes_ago():
    assert budget_wait_s([(900, ALLOWED_S + 1)], 1000) == BUDGET_WINDOW_S - 100
    assert budget_wait_s([(900, 2), (950, ALLOWED_S)], 1000) == BUDGET_WINDOW_S - 100
    assert budget_wait_s([(900, 2), (950, ALLOWED_S + 1)], 1000) == BUDGET_WINDOW_S - 50
    assert budget_wait_s([(1000 - BUDGET_WINDOW_S, 1000)], 1000) == 0


@given(st.lists(st.tuples(st.floats(0.01, 60), st.floats(0.01, 30)), min_size=1, max_size=200))
def test_whatever_a_pass_costs_no_ten_minutes_take_more_than_the_budget_and_one_pass(
    course: list[tuple[float, float]],
):
    now_s, spent = 0.0, list[tuple[float, float]]()
    for pause_s, cpu_s in course:
        now_s += max(pause_s, budget_wait_s(spent, now_s))
        spent.append((now_s, cpu_s))
        recent = [each for when_s, each in spent if now_s - when_s < BUDGET_WINDOW_S - 1e-6]
        assert sum(recent[:-1]) <= ALLOWED_S + 1e-6


def test_costs_add_up_in_every_part():
    cost = WarmthCost(1, 2, 3, 4, 5)
    assert cost + cost == WarmthCost(2, 4, 6, 8, 10)
    assert cost.total == 15
    assert not WarmthCost().total
