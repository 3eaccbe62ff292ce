"""The loop's statistics as Triton metrics."""

from __future__ import annotations

import threading

from tests.unit.triton_stand_in import inside_triton

from quire.serving.scheduler.step_loop import LoopStatistics

PATIENCE_S = 30


def test_gauges_follow_and_counters_only_grow() -> None:
    readings = [
        LoopStatistics([], False, 0, 0, running_requests=3, steps=10),
        LoopStatistics([], False, 0, 0, running_requests=1, steps=25),
        LoopStatistics([], False, 0, 0, running_requests=1, steps=4),  # a new scheduler counts anew
    ]
    with inside_triton("scheduler.metrics") as (triton, [metrics]):
        metrics.UPDATE_INTERVAL_S = 0.001
        done = threading.Event()

        def read() -> LoopStatistics:
            if not readings:
                done.set()
                return LoopStatistics([], False, 0, 0, running_requests=1, steps=4)
            return readings.pop(0)

        reporter = metrics.MetricsReporter(read)
        assert done.wait(PATIENCE_S)
        reporter.close()
        assert triton.metrics["quire_running_requests"].value == 1
        assert triton.metrics["quire_steps_total"].value == 29


def test_every_metric_is_a_statistic() -> None:
    with inside_triton("scheduler.metrics") as (_, [metrics]):
        assert {*metrics.GAUGES, *metrics.COUNTERS} <= set(LoopStatistics.__slots__)
