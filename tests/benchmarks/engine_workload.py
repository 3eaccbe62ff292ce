"""What `engine.py` measures, whoever's engine it is: requests run to their end, in one process.

This module imports nothing but the standard library, because the peer's half runs in the peer's Python.
"""

from __future__ import annotations

import gc
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128
PROMPT_IDS = range(300, 1000)
"""Ordinary tokens in any vocabulary that a language model would have."""


class Contender(Protocol):
    """An engine with everything that schedules and samples for it."""

    def generate(self, prompts: list[list[int]], max_tokens: int) -> int:
        """Run requests that arrive together, greedy and past any end token; returns the tokens generated."""
        ...


def generation(contender: Contender, num_requests: int, seed: int) -> dict[str, float]:
    """Tokens per second, prompts included in the time, and processor time per 1,000 tokens."""
    prompts = [_prompt(PROMPT_TOKENS, seed + index) for index in range(num_requests)]
    spent = _generate(contender, prompts, OUTPUT_TOKENS)
    num_tokens = num_requests * OUTPUT_TOKENS
    return {
        "tokens_per_s": num_tokens / spent.seconds,
        "cpu_s_per_1000_tokens": 1000 * spent.cpu_s / num_tokens,
        "taken_by_others": spent.taken_by_others,
    }


def first_token(contender: Contender, prompt_tokens: int, seed: int) -> dict[str, float]:
    """Milliseconds to the first token of a prompt that is new, and of the same prompt when it is cached."""
    prompt = _prompt(prompt_tokens, seed)
    cold = _generate(contender, [prompt], max_tokens=1)
    cached = _generate(contender, [prompt], max_tokens=1)
    return {
        "cold_ms": 1e3 * cold.seconds,
        "cached_ms": 1e3 * cached.seconds,
        "taken_by_others": cold.taken_by_others,
    }


@dataclass
class _Spent:
    """What a run took."""

    seconds: float
    cpu_s: float
    """Processor time of this process, all threads."""
    taken_by_others: float
    """Share of the machine that other processes (or, on a virtual machine, other machines) used meanwhile."""


def _prompt(num_tokens: int, seed: int) -> list[int]:
    """A prompt that shares no block with one of another seed."""
    return random.Random(seed).choices(PROMPT_IDS, k=num_tokens)


def _generate(contender: Contender, prompts: list[list[int]], max_tokens: int) -> _Spent:
    gc.collect()
    began, cpu_began, busy_began = time.perf_counter(), time.process_time(), _busy_s()
    num_tokens = contender.generate(prompts, max_tokens)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    others_s = max(0.0, _busy_s() - busy_began - cpu_s)
    expected = len(prompts) * max_tokens
    if num_tokens != expected:
        raise RuntimeError(f"{num_tokens} tokens were generated instead of {expected}")
    return _Spent(seconds, cpu_s, others_s / seconds / (os.cpu_count() or 1))


def _busy_s() -> float:
    """Seconds of processor time used so far by everything on the machine, in steps of 10 ms per core."""
    times = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle, waiting_for_disk = times[3], times[4]
    return (sum(times) - idle - waiting_for_disk) / os.sysconf("SC_CLK_TCK")
