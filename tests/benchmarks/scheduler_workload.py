"""What `scheduler.py` measures, whoever's scheduler it is: the timing loops, and what a scheduler must offer.

Times are the thread's own CPU time: neither side waits for anything, and what else runs on the machine does
not count. This module imports nothing but the standard library, because the peer's half runs in the peer's
Python.
"""

from __future__ import annotations

import gc
import time
from typing import Any, Protocol

BLOCK_SIZE = 16
MEAN_PROMPT = 200
STEPS_PER_WINDOW = 4 * BLOCK_SIZE
"""A window covers whole blocks, so that every window allocates equally often."""


class Contender(Protocol):
    """A scheduler under measurement. Steps are opaque: what `schedule` returned goes back to `update`."""

    def start(
        self, *, num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int, async_scheduling: bool
    ) -> None:
        """Make a fresh scheduler with prefix caching, first come first served, blocks of 16."""
        ...

    def arrive(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        """Build a request and add it."""
        ...

    def schedule(self) -> Any: ...

    def sampled(self, step: Any) -> Any:
        """Tokens for the step in the form in which `update` wants them; not timed."""
        ...

    def update(self, step: Any, sampled: Any) -> None: ...

    def abort(self, request_id: str) -> None: ...


def decode_step_us(
    contender: Contender, num_running: int, async_scheduling: bool, windows: int
) -> list[float]:
    """Mean time of schedule + update per decode step, one figure per window of steps, in microseconds."""
    lengths = [MEAN_PROMPT + index % BLOCK_SIZE for index in range(num_running)]
    num_steps = (windows + 1) * STEPS_PER_WINDOW
    blocks_each = -(-(max(lengths) + num_steps + 8) // BLOCK_SIZE)
    contender.start(
        num_blocks=num_running * blocks_each + 1,
        max_num_seqs=num_running,
        max_num_batched_tokens=sum(lengths),
        async_scheduling=async_scheduling,
    )
    for index, length in enumerate(lengths):
        prompt = [3 + (index * 7919 + position * 31) % 30000 for position in range(length)]
        contender.arrive(f"request-{index}", prompt, num_steps + 8)
    in_flight = contender.schedule()
    if not async_scheduling:
        contender.update(in_flight, contender.sampled(in_flight))

    figures = []
    for window in range(windows + 1):
        spent = 0
        gc.collect()
        for _ in range(STEPS_PER_WINDOW):
            start = time.thread_time_ns()
            scheduled = contender.schedule()
            spent += time.thread_time_ns() - start
            processed = in_flight if async_scheduling else scheduled
            in_flight = scheduled
            sampled = contender.sampled(processed)
            start = time.thread_time_ns()
            contender.update(processed, sampled)
            spent += time.thread_time_ns() - start
        if window:  # The first warms up.
            figures.append(spent / STEPS_PER_WINDOW / 1e3)
    return figures


def cached_prompt_us(contender: Contender, num_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Times of a request whose prompt is cached, in microseconds.

    `arrive` builds the request, hashes its prompt and queues it; `schedule` looks it up and admits it.
    """
    contender.start(
        num_blocks=2 * num_tokens // BLOCK_SIZE,
        max_num_seqs=8,
        max_num_batched_tokens=num_tokens + 64,
        async_scheduling=False,
    )
    prompt = [3 + position * 31 % 30000 for position in range(num_tokens)]
    figures: dict[str, list[float]] = {"arrive": [], "schedule": []}
    for round_ in range(rounds + 3):
        name = f"request-{round_}"
        gc.collect()
        start = time.thread_time_ns()
        contender.arrive(name, list(prompt), 8)
        arrived = time.thread_time_ns()
        step = contender.schedule()
        scheduled = time.thread_time_ns()
        contender.update(step, contender.sampled(step))
        contender.abort(name)
        if round_ >= 3:  # The first fills the cache, the next warm up.
            figures["arrive"].append((arrived - start) / 1e3)
            figures["schedule"].append((scheduled - arrived) / 1e3)
    return figures
