"""A long generation is no hang, and a hang is no long generation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emberd.core.liveness import Verdict, begin, judge, pause_s
from emberd.core.settings import LifecycleSettings
from emberd.core.types import Activity

SETTINGS = LifecycleSettings(hang_after_s=60, generation_silence_s=1800)


def verdicts(probes: list[Activity], every_s: float = 10.0) -> list[Verdict]:
    watch, found = begin(0.0), []
    for number, seen in enumerate(probes, 1):
        watch, verdict = judge(watch, seen, number * every_s, SETTINGS)
        found.append(verdict)
    return found


def test_an_idle_engine_that_answers_is_alive():
    idle = Activity(answered=True, is_generating=False)
    assert set(verdicts([idle] * 1000)) == {Verdict.ALIVE}


@given(
    st.sampled_from(Verdict),
    st.booleans(),
    st.builds(LifecycleSettings, probe_interval_s=st.floats(0.1, 600), hang_after_s=st.floats(1, 86_400)),
)
def test_only_an_idle_engine_that_lives_is_asked_less_often(
    verdict: Verdict, is_idle: bool, settings: LifecycleSettings
):
    pause = pause_s(verdict, settings, is_idle=is_idle)
    assert settings.probe_interval_s <= pause <= 3 * settings.probe_interval_s
    if verdict is not Verdict.ALIVE or not is_idle:
        assert pause == settings.probe_interval_s
    assert pause <= max(settings.hang_after_s / 2, settings.probe_interval_s), "a request may have come meanwhile"


def test_an_idle_engine_is_asked_a_third_as_often():
    assert pause_s(Verdict.ALIVE, LifecycleSettings(), is_idle=True) == 30


def test_silence_without_work_becomes_a_hang_after_its_limit():
    silent = Activity(answered=False, cpu_seconds=5.0)
    assert verdicts([silent] * 6) == [Verdict.SILENT] * 5 + [Verdict.HUNG]


def test_silence_with_rising_cpu_time_is_a_long_prompt():
    busy = [Activity(answered=False, cpu_seconds=float(20 * n)) for n in range(100)]
    assert Verdict.HUNG not in verdicts(busy)


def test_a_generation_that_uses_the_cpu_and_never_produces_anything_is_a_hang_in_the_end():
    spinning = [
        Activity(answered=True, is_generating=True, generated_units=7, cpu_seconds=float(20 * n))
        for n in range(300)
    ]
    found = verdicts(spinning)
    assert found.index(Verdict.HUNG) * 10 >= SETTINGS.generation_silence_s - 20


def test_a_long_generation_that_produces_text_is_alive():
    writing = [Activity(answered=True, is_generating=True, generated_units=n, cpu_seconds=0.0) for n in range(1000)]
    assert set(verdicts(writing)) == {Verdict.ALIVE}


def test_a_generation_that_does_nothing_at_all_is_a_hang():
    stuck = Activity(answered=True, is_generating=True, generated_units=7, cpu_seconds=3.0)
    assert verdicts([stuck] * 10)[-1] is Verdict.HUNG


def test_an_answer_ends_a_silence():
    silent, idle = Activity(answered=False), Activity(answered=True, is_generating=False)
    assert Verdict.HUNG not in verdicts(([silent] * 5 + [idle]) * 10)


def test_unknown_cpu_time_counts_as_no_evidence():
    assert verdicts([Activity(answered=False, cpu_seconds=None)] * 6)[-1] is Verdict.HUNG
