"""Requests over the step times of a GPU, without one: what limits of the scheduler are worth there.

    python tests/benchmarks/simulated_requests.py RESULTS.json SHAPE [--requests 1024 128 128]
        [--max-num-seqs 256 1024] [--max-num-batched-tokens 8192]

The scheduler decides as ever. A step takes what stage SHAPE (8b or 7b) of gpu_check.py measured: the KV that
it reads at the bandwidth between decode steps of 200 and of 2,000 tokens, the attention of its prompts at the
speed of the kernel alone, and what is left of the steps in RESULTS.json by the number of its tokens. Prints
JSON, a row for each pair of limits; `measured` stands beside it where RESULTS.json has the same requests with
the same limits.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gpu_plan import BLOCK_SIZE, DTYPES, LIMITS, SHAPES

from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire.scheduling.scheduler_output import SchedulerOutput

ATTENTION_FLOP_S = 310e12
"""Of a prompt of 8,192 tokens, docs/tensorrt.md."""


class StepTimes:
    """What a step takes, in milliseconds."""

    def __init__(self, shape: str, rows: list[dict[str, Any]]) -> None:
        config = SHAPES[shape].decoder_config
        self._token_bytes = config.kv_elements_per_token * DTYPES[SHAPES[shape].precision].itemsize
        self._pair_flop = 4 * config.num_layers * config.num_heads * config.head_dim
        decode: dict[tuple[int, int], float] = {
            tuple(row["decode"]): row["ms"] for row in rows if "ms" in row and "decode" in row
        }
        contexts = sorted({context for _, context in decode})
        if len(contexts) != 2:
            raise SystemExit(f"the decode steps have contexts of {contexts} tokens; two are needed")
        short, long = contexts
        most = max(batch for batch, context in decode if context == long)
        read = most * (long - short) * self._token_bytes
        self.kv_bytes_per_ms: float = read / (decode[most, long] - decode[most, short])
        linear = {
            batch: time_ms - self._attention_ms(batch * short, 0)
            for (batch, context), time_ms in decode.items()
            if context == short
        }
        for row in rows:
            tokens = row.get("prefill", 0)
            if tokens > max(linear):
                prompt = min(tokens, LIMITS.max_model_len)
                linear[tokens] = row["ms"] - self._attention_ms(0, tokens * prompt / 2)
        self._tokens = sorted(linear)
        self._linear_ms = [linear[tokens] for tokens in self._tokens]

    def _attention_ms(self, kv_tokens: float, pairs: float) -> float:
        reading_ms = kv_tokens * self._token_bytes / self.kv_bytes_per_ms
        return reading_ms + 1e3 * pairs * self._pair_flop / ATTENTION_FLOP_S

    def of(self, step: SchedulerOutput) -> float:
        """Time of a step."""
        kv_tokens = pairs = 0.0
        for before, now in zip(step.num_computed_tokens, step.num_scheduled_tokens, strict=True):
            kv_tokens += before + now
            if now > 1:
                pairs += now * (before + now / 2)
        linear_ms = np.interp(step.total_num_scheduled_tokens, self._tokens, self._linear_ms)
        return float(linear_ms) + self._attention_ms(kv_tokens, pairs)


def simulate(
    times: StepTimes, num_blocks: int, requests: tuple[int, int, int], seqs: int, tokens: int
) -> dict[str, Any]:
    """Requests that arrive together, each of a prompt of its own, run to their end."""
    count, prompt_tokens, output_tokens = requests
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        max_model_len=LIMITS.max_model_len,
    )
    scheduler = Scheduler(config)
    for number in range(count):
        prompt = [number, *range(1, prompt_tokens)]  # the first block differs, so no prompt is shared
        parameters = SamplingParams(max_tokens=output_tokens, temperature=0)
        scheduler.add_request(Request(str(number), prompt, parameters))
    time_ms, steps, computed = 0.0, 0, 0
    while scheduler.num_waiting or scheduler.running_requests:
        step = scheduler.schedule()
        time_ms += times.of(step)
        steps += 1
        computed += step.total_num_scheduled_tokens
        scheduler.update_from_output(step, [7] * len(step.sampling))
    return {
        "tokens_per_s": round(1e3 * count * output_tokens / time_ms),
        "steps": steps,
        "computed_tokens": computed,
        "preemptions": scheduler.statistics.num_preemptions,
    }


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The machine that the times are of, then a row for each pair of limits."""
    measured = json.loads(options.results.read_text())
    if isinstance(measured, dict):  # several stages', as in docs/benchmarks
        measured = measured[options.shape]
    times = StepTimes(options.shape, measured)
    num_blocks = next(row["kv_blocks"] for row in measured if "kv_blocks" in row)
    yield {
        "gpu": measured[0]["gpu"],
        "kv_blocks": num_blocks,
        "kv_gb_s": round(times.kv_bytes_per_ms / 1e6),
    }
    count, prompt, output = options.requests
    name = f"{count} x {prompt}/{output}"
    rates = {
        (row["requests"], row["max_num_seqs"]): row["tokens_per_s"]
        for row in measured
        if "max_num_seqs" in row
    }
    for seqs, tokens in itertools.product(options.max_num_seqs, options.max_num_batched_tokens):
        row = {"requests": name, "max_num_seqs": seqs, "max_num_batched_tokens": tokens}
        row |= simulate(times, num_blocks, (count, prompt, output), seqs, tokens)
        if tokens == LIMITS.max_num_batched_tokens and (name, seqs) in rates:
            row["measured"] = rates[name, seqs]
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, help="of gpu-check")
    parser.add_argument("shape", choices=("8b", "7b"))
    parser.add_argument("--requests", type=int, nargs=3, default=(1024, 128, 128))
    parser.add_argument("--max-num-seqs", type=int, nargs="+", default=(256, 1024))
    parser.add_argument("--max-num-batched-tokens", type=int, nargs="+", default=(8192,))
    print(json.dumps(list(rows(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
