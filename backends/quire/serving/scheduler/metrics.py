"""The scheduler's state and counters as Triton metrics, next to the server's own on its metrics port.

A metric update is a round trip to the server's process, so they are made by a thread of their own, once a
second and only for values that have changed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from quire.serving.scheduler.step_loop import LoopStatistics

UPDATE_INTERVAL_S = 1.0

GAUGES = {
    "running_requests": "Requests that own blocks of the KV pool",
    "waiting_requests": "Requests that wait to be scheduled, preempted ones included",
    "blocks": "Blocks of the KV pool that can hold tokens",
    "free_blocks": "Blocks of the KV pool that no running request owns",
}
COUNTERS = {
    "steps": "Engine steps",
    "failed_steps": "Engine steps that failed",
    "computed_tokens": "Tokens computed, of prompts and outputs",
    "generated_tokens": "Tokens sampled",
    "looked_up_tokens": "Tokens of admitted requests that were looked up in the prefix cache",
    "cached_tokens": "Tokens that were found in the prefix cache",
    "preemptions": "Requests that had to give up their blocks",
}
"""Fields of `LoopStatistics` with their descriptions; the metrics are called `quire_` and the field."""

_log = logging.getLogger(__name__)


class MetricsReporter:
    """Reports what `read` returns until it is closed."""

    def __init__(self, read: Callable[[], LoopStatistics]) -> None:
        self._read = read
        self._reported = dict.fromkeys((*GAUGES, *COUNTERS), 0)
        self._families: list[Any] = []
        self._metrics = {
            **{name: self._metric(name, text, pb_utils.MetricFamily.GAUGE) for name, text in GAUGES.items()},
            **{
                name: self._metric(f"{name}_total", text, pb_utils.MetricFamily.COUNTER)
                for name, text in COUNTERS.items()
            },
        }
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quire-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reporting."""
        self._closing.set()
        self._thread.join(UPDATE_INTERVAL_S)

    def _metric(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=f"quire_{name}", description=description, kind=kind)
        self._families.append(family)
        return family.Metric(labels={})

    def _run(self) -> None:
        while not self._closing.wait(UPDATE_INTERVAL_S):
            try:
                self._report(self._read())
            except pb_utils.TritonModelException as error:
                _log.warning("the metrics could not be updated: %s", error)

    def _report(self, statistics: LoopStatistics) -> None:
        for name, metric in self._metrics.items():
            value, reported = getattr(statistics, name), self._reported[name]
            if value == reported:
                continue
            if name in GAUGES:
                metric.set(value)
            else:
                # A counter that went back began anew, with a new scheduler.
                metric.increment(value - reported if value > reported else value)
            self._reported[name] = value
