"""Time that the scheduler takes: per decode step, and for a request whose prompt is cached.

    python tests/benchmarks/scheduler.py [--peer-python PYTHON] [--rounds N]

With a Python that can import vllm 0.33, vLLM's scheduler is measured in the same run, in turns with
Quire's, and the ratios of the medians are printed beside the limits that Quire holds itself to. Prints
JSON; times are medians over rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
from typing import Any

import scheduler_workload as workload
from peer import Peer

from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire.scheduling.scheduler_output import SchedulerOutput

RUNNING_REQUESTS = (1, 32, 128, 256, 512)
CACHED_PROMPTS = (2048, 8192)
WINDOWS_PER_ROUND = 3


class QuireContender:
    """Quire's scheduler, in the way EngineCore drives it."""

    def start(
        self, *, num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int, async_scheduling: bool
    ) -> None:
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=num_blocks,
                block_size=workload.BLOCK_SIZE,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
                max_model_len=16384,
                async_scheduling=async_scheduling,
            )
        )

    def arrive(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        parameters = SamplingParams(max_tokens=max_tokens, stop_token_ids=(2,))
        self._scheduler.add_request(Request(request_id, prompt, parameters))

    def schedule(self) -> SchedulerOutput:
        return self._scheduler.schedule()

    def sampled(self, step: SchedulerOutput) -> list[int]:
        return [7] * len(step.sampling)

    def update(self, step: SchedulerOutput, sampled: list[int]) -> None:
        self._scheduler.update_from_output(step, sampled)

    def abort(self, request_id: str) -> None:
        self._scheduler.abort_requests([request_id])


class Comparison:
    """One row of the result: figures of both contenders, gathered in turns."""

    def __init__(self, limit: float, **row: object) -> None:
        self.row = row
        self.limit = limit
        self.quire: list[float] = []
        self.vllm: list[float] = []

    def result(self) -> dict[str, object]:
        quire_us = statistics.median(self.quire)
        result = {**self.row, "quire_us": round(quire_us, 1)}
        if self.vllm:
            vllm_us = statistics.median(self.vllm)
            ratio = quire_us / vllm_us
            result |= {"vllm_us": round(vllm_us, 1), "ratio": round(ratio, 3)}
            result |= {"limit": round(self.limit, 3), "held": ratio <= self.limit}
        return result


def compare_decoding(peer: Peer | None, rounds: int) -> list[dict[str, object]]:
    """Schedule + update per decode step: at most 1/5 of vLLM's, and no more than vLLM's at one request."""
    rows = []
    for num_running, overlapped in itertools.product(RUNNING_REQUESTS, (False, True)):
        limit = 1.0 if num_running == 1 else 1 / 5
        comparison = Comparison(limit, running=num_running, scheduling="async" if overlapped else "sync")
        arguments: dict[str, Any] = {
            "num_running": num_running,
            "async_scheduling": overlapped,
            "windows": WINDOWS_PER_ROUND,
        }
        for _ in range(rounds):
            comparison.quire += workload.decode_step_us(QuireContender(), **arguments)
            if peer is not None:
                comparison.vllm += peer.measure("decode_step_us", **arguments)
        rows.append(comparison.result())
    return rows


def compare_cached_prompts(peer: Peer | None, rounds: int) -> list[dict[str, object]]:
    """Arrival and admission of a request whose prompt is cached: each at most 1/3 of vLLM's."""
    rows = []
    for num_tokens in CACHED_PROMPTS:
        parts = {
            part: Comparison(1 / 3, prompt_tokens=num_tokens, part=part) for part in ("arrive", "schedule")
        }
        for _ in range(rounds):
            arguments = {"num_tokens": num_tokens, "rounds": 10}
            ours = workload.cached_prompt_us(QuireContender(), **arguments)
            theirs = peer.measure("cached_prompt_us", **arguments) if peer is not None else {}
            for part, comparison in parts.items():
                comparison.quire += ours[part]
                comparison.vllm += theirs.get(part, [])
        rows += [comparison.result() for comparison in parts.values()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer-python", help="a Python that can import vllm 0.33")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    peer = Peer(options.peer_python, "vllm_scheduler.py") if options.peer_python else None
    result = {
        "python": platform.python_version(),
        "vllm": peer.description if peer is not None else None,
        "decode_step": compare_decoding(peer, options.rounds),
        "cached_prompt": compare_cached_prompts(peer, options.rounds),
    }
    if peer is not None:
        peer.close()
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
