"""The metrics of emberd for Prometheus. Imported at the first scrape: prometheus-client takes some 3 MiB.

Names and units by prometheus.io/docs/practices/naming: base units, `_total` for what only grows. What is unknown
has no sample. Each label has a fixed set of values.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    StateSetMetricFamily,
)
from prometheus_client.exposition import choose_encoder

from emberd.core.lifecycle import State
from emberd.core.minute import PRESSURES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.core import Metric

    from emberd.core.status import Status
    from emberd.core.swap_account import SwapWrites
    from emberd.core.tally import Tally

_ANY = "*/*"
_OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def render(
    status: Status, counts: Mapping[str, int], tally: Tally, swap: SwapWrites, accept: str
) -> tuple[str, str]:
    """Return the metrics and their content type: OpenMetrics, or the older text for who asks for that alone.

    Args:
        status: of the daemon.
        counts: of the history's columns, since the daemon's start.
        tally: has the first tokens.
        swap: written since the daemon's start.
        accept: the header of the request, may be empty.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(list(_metrics(status, counts, tally, swap))))
    is_any = not accept or _ANY in accept.replace(" ", "").split(";")[0].split(",")
    encode, content_type = choose_encoder(_OPEN_METRICS if is_any and "openmetrics" not in accept else accept)
    return encode(registry).decode(), content_type


class _Collector:
    """What a registry asks for; `prometheus_client` has no class for metrics that are made elsewhere."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _metrics(status: Status, counts: Mapping[str, int], tally: Tally, swap: SwapWrites) -> Iterator[Metric]:
    yield InfoMetricFamily("emberd_build", "The version of emberd that runs.", {"version": status.version})
    started_s = round(time.time() - status.uptime_s, 3)
    yield _gauge("emberd_start_time_seconds", "When this emberd began, since the epoch.", started_s)
    states = {state.value: state.value == status.state for state in State}
    yield StateSetMetricFamily("emberd_engine_state", "The state of the engine.", states)
    yield from _memory(status)
    yield from _warmth(status)
    for name, value, text in (
        ("emberd_requests_in_flight", status.requests_in_flight, "Requests that the engine works on."),
        ("emberd_requests_waiting", status.requests_waiting, "Requests that wait for the engine or a place."),
        ("emberd_tasks", len(asyncio.all_tasks()), "Tasks of emberd's event loop."),
    ):
        yield _gauge(name, text, value)
    for name, column, text in _COUNTERS:
        yield _counter(name, text, counts[column])
    for name, column, text in _SECONDS:
        yield _counter(name, text, counts[column] / 1000)
    tokens = {"reused": tally.reused_tokens, "processed": tally.processed_tokens}
    yield _labelled("emberd_prompt_tokens", "Tokens of users' prompts, by where they came from.", "source", tokens)
    if status.swap is not None:
        unknown = swap.unknown_idle + swap.unknown_busy
        by = {"engine": swap.engine, "other": swap.other_idle + swap.other_busy, "unknown": unknown}
        yield _labelled("emberd_swap_written_bytes", "Bytes written to swap, by whom.", "by", by)
    buckets = [
        (f"{bound:g}" if bound < float("inf") else "+Inf", count) for bound, count in tally.first_token_buckets()
    ]
    text = "Seconds from a user's request to the first words of a streamed reply."
    yield HistogramMetricFamily("emberd_first_token_seconds", text, buckets, tally.first_tokens_s)


_COUNTERS = (
    ("emberd_engine_starts", "starts", "Engines started."),
    ("emberd_engine_state_changes", "state_changes", "Changes of the engine's state."),
    ("emberd_requests", "requests", "Requests sent to the engine."),
    ("emberd_replies_cut", "cuts", "Replies that were cut by the end of an engine."),
    ("emberd_replies_continued", "continuations", "Cut replies of which the rest was asked for."),
    ("emberd_passes", "passes", "Passes of keep-warm that did something."),
    ("emberd_pass_read_bytes", "pass_read_bytes", "Bytes that passes brought back from the disk."),
    ("emberd_pass_tokens", "pass_tokens", "Tokens of prompts that replays made the engine compute."),
    ("emberd_lettings_go", "lettings_go", "How often memory was let go of for the computer or by the owner."),
)
_SECONDS = (
    ("emberd_pass_seconds", "pass_ms", "Seconds that passes took."),
    ("emberd_pass_cpu_seconds", "pass_cpu_ms", "Processor seconds of engine and toucher in passes."),
)


def _memory(status: Status) -> Iterator[Metric]:
    memory = status.memory
    if memory is None:
        return
    level = PRESSURES.index(memory.system.pressure) if memory.system.pressure in PRESSURES else None
    system = memory.system
    yield from _known(
        ("emberd_engine_resident_bytes", memory.engine.resident_bytes, "Of the engine, in memory."),
        ("emberd_engine_locked_bytes", memory.engine.locked_bytes, "Of the engine, locked."),
        ("emberd_engine_swapped_bytes", memory.engine.swapped_bytes, "Of the engine, in swap or compressed."),
        ("emberd_memory_total_bytes", system.total_bytes, "Memory of the computer."),
        ("emberd_memory_available_bytes", system.available_bytes, "Memory that programs can get."),
        ("emberd_memory_stall_ratio", system.stall_some_share, "Share of 10 s in which a task waited for memory."),
        ("emberd_memory_pressure_level", level, "Memory pressure: 0 normal, 1 warn, 2 critical."),
    )


def _warmth(status: Status) -> Iterator[Metric]:
    if status.residency is not None:
        yield from _known(
            ("emberd_weights_bytes", status.residency.total_bytes, "Size of the model's weights."),
            (
                "emberd_weights_resident_bytes",
                status.residency.resident_bytes,
                "Of the weights, in memory (estimate).",
            ),
        )
    if status.warmth is not None:
        forecast_s = status.warmth.forecast.first_token_s
        yield from _known(
            ("emberd_first_token_forecast_seconds", forecast_s, "How long the next first token will take."),
            ("emberd_warm_age_seconds", status.warmth.warm_for_s, "Seconds since everything was warmed."),
        )


def _known(*rows: tuple[str, float | None, str]) -> Iterator[Metric]:
    return (_gauge(name, text, value) for name, value, text in rows if value is not None)


def _gauge(name: str, text: str, value: float) -> Metric:
    family: Metric = _with_unit(GaugeMetricFamily, name, text, value=value)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    family: Metric = _with_unit(CounterMetricFamily, name, text, value=value)
    return family


def _labelled(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family: CounterMetricFamily = _with_unit(CounterMetricFamily, name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _with_unit(kind: Any, name: str, text: str, **options: Any) -> Any:
    """Return a family with its unit, which OpenMetrics names beside the metric."""
    unit = name.rpartition("_")[2]
    return kind(name, text, unit=unit if unit in {"bytes", "seconds", "ratio"} else "", **options)
