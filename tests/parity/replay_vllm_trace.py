"""Replays recorded decisions of vLLM's scheduler through Quire's, and reports the first that differs.

    python tests/parity/replay_vllm_trace.py FILE...

A trace is a file of JSON lines, plain or compressed (.xz, .gz, .bz2). The first line has `cfg` and
`requests`, every further line is one step: requests that arrive, then those that are aborted, then
`schedule()`, then the outputs of this step (sync) or of the step before (async). Prints `N traces equal`
and exits 0, or prints trace, step, field and both values of the first divergence and exits 1.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire.scheduling.scheduler_output import SchedulerOutput

JsonObject = dict[str, Any]

OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
UNORDERED_FIELDS = ("preempted", "finished")
"""Sets in vLLM, so recorded in no particular order."""


class DivergenceError(Exception):
    """The scheduler decided something else than the trace says."""

    def __init__(self, step: int, field: str, expected: object, got: object) -> None:
        super().__init__(f"step {step}, {field}:\n  expected {expected}\n  got      {got}")


def read_trace(path: Path) -> tuple[JsonObject, list[JsonObject]]:
    """The header and the steps of a trace."""
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        header, *steps = [json.loads(line) for line in file if line.strip()]
    return header, steps


def sampled_token(request_number: int, output_index: int) -> int:
    """The token that the recorded runs' model sampled."""
    return 3 + (request_number * 7919 + output_index * 104729) % 31990


class Replay:
    """One trace on the way through a scheduler."""

    def __init__(self, header: JsonObject) -> None:
        recorded = header["cfg"]
        self.async_scheduling: bool = recorded["async_"]
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=recorded["num_blocks"],
                block_size=recorded["block_size"],
                max_num_batched_tokens=recorded["budget"],
                max_num_seqs=recorded["max_num_seqs"],
                max_model_len=recorded["max_model_len"],
                policy=recorded["policy"],
                enable_prefix_caching=recorded["prefix"],
                long_prefill_token_threshold=recorded["long_prefill_token_threshold"],
                async_scheduling=self.async_scheduling,
            )
        )
        self.arrivals: list[JsonObject] = header["requests"]
        self.numbers = {recorded["id"]: number for number, recorded in enumerate(self.arrivals)}
        self.last_step = SchedulerOutput()

    def step(self, number: int) -> JsonObject:
        """Do what one line of a trace describes, and describe what was decided in the same way."""
        self._arrive_and_abort(number)
        scheduled = self.scheduler.schedule()
        decided = describe(scheduled)
        if self.async_scheduling:
            processed, self.last_step = self.last_step, scheduled
        else:
            processed = scheduled
        decided["outputs"] = self._process(processed)
        self.scheduler.check_integrity()
        decided["free"] = self.scheduler.num_free_blocks
        decided["running"] = [request.request_id for request in self.scheduler.running_requests]
        decided["waiting"] = [request.request_id for request in self.scheduler.waiting_requests]
        return decided

    def _arrive_and_abort(self, step: int) -> None:
        for number, recorded in enumerate(self.arrivals):
            if recorded["arrive"] == step:
                self.scheduler.add_request(
                    Request(
                        recorded["id"],
                        recorded["prompt"],
                        SamplingParams(max_tokens=recorded["max_tokens"]),
                        priority=recorded["priority"],
                        arrival_order=number,
                        cache_salt=recorded["salt"],
                    )
                )
            if recorded["abort"] == step:
                self.scheduler.abort_requests([recorded["id"]])

    def _process(self, step: SchedulerOutput) -> list[list[object]]:
        # A preempted request's token arrives without a placeholder, so the index is that of the next output.
        sampled = [
            sampled_token(self.numbers[request.request_id], request.num_output_tokens)
            for request in (step.requests[index] for index in step.sampling)
        ]
        return [
            [output.request.request_id, [output.token_id], output.finish_reason]
            for output in self.scheduler.update_from_output(step, sampled)
        ]


def describe(scheduled: SchedulerOutput) -> JsonObject:
    """A scheduled step in the words of a trace."""
    new = {request.request_id for request in scheduled.new_requests}
    resumed = {request.request_id for request in scheduled.resumed_requests}
    decided: JsonObject = {"num": [], "new": [], "cached": []}
    for request, num_scheduled, num_computed in zip(
        scheduled.requests, scheduled.num_scheduled_tokens, scheduled.num_computed_tokens, strict=True
    ):
        name = request.request_id
        block_ids = scheduled.new_block_ids.get(name)
        decided["num"].append([name, num_scheduled])
        if name in new:
            decided["new"].append([name, block_ids, num_computed])
        else:
            decided["cached"].append([name, block_ids, num_computed, name in resumed])
    decided["preempted"] = [request.request_id for request in scheduled.preempted_requests]
    decided["finished"] = scheduled.finished_request_ids
    return decided


def compare(recorded: JsonObject, decided: JsonObject) -> None:
    """Compare what was recorded of a step (the first of an async trace has no outputs) with what was decided.

    Raises:
        DivergenceError: a field differs.
    """
    for field, expected in recorded.items():
        if field == "step":
            continue
        got = decided[field]
        if field in UNORDERED_FIELDS:
            expected, got = sorted(expected), sorted(got)
        if expected != got:
            raise DivergenceError(recorded["step"], field, expected, got)


def replay(path: Path) -> int:
    """Replay one trace; returns its number of steps.

    Raises:
        DivergenceError: a decision differs from the recorded one.
        ValueError: the trace has no steps.
    """
    header, steps = read_trace(path)
    if not steps:
        raise ValueError(f"{path} has no steps")
    run = Replay(header)
    for recorded in steps:
        compare(recorded, run.step(recorded["step"]))
    return len(steps)


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        return 2
    for argument in arguments:
        try:
            replay(Path(argument))
        except DivergenceError as divergence:
            print(f"{argument}: {divergence}")
            return 1
    print(f"{len(arguments)} traces equal")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
