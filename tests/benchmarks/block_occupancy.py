"""How much of the KV pool's owned memory holds tokens, by running the scheduler without an engine."""

from __future__ import annotations

import random
from typing import Any

from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig

NUM_STEPS = 20_000
POOL_IN_MEAN_REQUESTS = 64
"""The pool holds so many requests of mean length; more than that wait, so that it is always full."""


def block_occupancy(mean_length: int, block_size: int) -> dict[str, Any]:
    """Tokens held over slots of owned blocks, summed over the steps of a pool under pressure.

    Prompts have 1 to L tokens and outputs 1 to 3L/2, uniformly: averaged over its life a request then has
    L/2 of the one and, long outputs living longer, L/2 of the other.

    Args:
        mean_length: L, tokens of a running request.
        block_size: tokens per block.
    """
    config = SchedulerConfig(
        num_blocks=1 + POOL_IN_MEAN_REQUESTS * mean_length // block_size,
        block_size=block_size,
        max_num_batched_tokens=2048,
        max_num_seqs=4 * POOL_IN_MEAN_REQUESTS,
        max_model_len=4 * mean_length,
    )
    scheduler = Scheduler(config)
    rng = random.Random(1)
    tokens = slots = requests = num_arrived = 0
    for step in range(NUM_STEPS):
        while scheduler.num_waiting < POOL_IN_MEAN_REQUESTS:
            prompt = rng.choices(range(300, 1000), k=rng.randint(1, mean_length))
            parameters = SamplingParams(max_tokens=rng.randint(1, 3 * mean_length // 2))
            scheduler.add_request(Request(str(num_arrived), prompt, parameters))
            num_arrived += 1
        scheduled = scheduler.schedule()
        if (
            step >= NUM_STEPS // 4
        ):  # Until then the first requests, which all began together, are still there.
            running = scheduler.running_requests
            tokens += sum(request.num_computed_tokens for request in running)
            slots += (config.num_blocks - 1 - scheduler.num_free_blocks) * block_size
            requests += len(running)
        scheduler.update_from_output(scheduled, [7] * len(scheduled.sampling))
    counted_steps = NUM_STEPS - NUM_STEPS // 4
    return {
        "block_size": block_size,
        "mean_length": round(tokens / requests),
        "mean_running": round(requests / counted_steps, 1),
        "pool_owned": round(slots / counted_steps / (config.num_blocks - 1) / block_size, 3),
        "preemptions": scheduler.statistics.num_preemptions,
        "tokens_over_slots": round(tokens / slots, 4),
    }
