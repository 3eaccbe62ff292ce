"""Steps without a scheduler, to time an executor by itself."""

from __future__ import annotations

import statistics
import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from quire.execution.executor import Executor, StepHandle, StepOutput
from quire.execution.model_inputs import NUM_SAMPLING_COLUMNS, ModelInputs

STEP_TIMEOUT_S = 120.0


class Sequences:
    """Sequences of random tokens whose blocks are drawn at random from the pool; all are sampled greedily.

    Args:
        num_seqs: how many.
        max_tokens: of each.
        num_blocks: in the pool, the null block included.
        block_size: tokens in a block.
        vocab_size: random tokens are below it.
    """

    def __init__(
        self, num_seqs: int, max_tokens: int, *, num_blocks: int, block_size: int, vocab_size: int
    ) -> None:
        random = np.random.default_rng(0)
        width = -(-max_tokens // block_size)
        blocks = random.permutation(np.arange(1, num_blocks, dtype=np.int32))[: num_seqs * width]
        if len(blocks) < num_seqs * width:
            raise ValueError(f"{num_seqs} sequences of {max_tokens} tokens do not fit {num_blocks} blocks")
        self._tables = blocks.reshape(num_seqs, width)
        self._tokens = random.integers(vocab_size, size=(num_seqs, max_tokens)).astype(np.int32)
        self._block_size = block_size
        self._step = 0

    def step(self, sequences: range, start: int, num_tokens: int, *, marked: bool = False) -> ModelInputs:
        """A step of tokens `start` to `start + num_tokens` of some sequences, each sampled once.

        Args:
            sequences: which.
            start: tokens of each that are in the cache.
            num_tokens: that the step computes of each.
            marked: whether the only token of each is the one that the step before sampled for it.
        """
        self._step += 1
        count, size = len(sequences), self._block_size
        rows = slice(sequences.start, sequences.stop)
        span = np.arange(start, start + num_tokens, dtype=np.int32)
        tables = self._tables[rows, : -(-(start + num_tokens) // size)]
        slots = tables[:, span // size] * size + span % size
        starts = np.arange(count + 1, dtype=np.int32) * num_tokens
        tokens = -1 - np.arange(count, dtype=np.int32) if marked else self._tokens[rows, span].reshape(-1)
        return ModelInputs(
            step=self._step,
            input_ids=np.ascontiguousarray(tokens),
            positions=np.tile(span, count),
            slot_mapping=np.ascontiguousarray(slots.reshape(-1)),
            block_tables=np.ascontiguousarray(tables),
            query_start_loc=starts,
            seq_lens=np.full(count, start + num_tokens, np.int32),
            logits_indices=starts[1:] - 1,
            sampling=greedy(count),
        )


def greedy(num_rows: int) -> NDArray[np.float32]:
    """The contract's `sampling` of so many greedy rows."""
    sampling = np.zeros((num_rows, NUM_SAMPLING_COLUMNS), np.float32)
    sampling[:, 2] = 1.0  # top_p
    return sampling


def run(executor: Executor, inputs: ModelInputs) -> StepOutput:
    """One step from beginning to end."""
    return executor.submit(inputs).result(STEP_TIMEOUT_S)


def fill(executor: Executor, sequences: Sequences, num_seqs: int, num_tokens: int, budget: int) -> None:
    """Compute the first tokens of sequences, as many in one step as its budget of tokens takes."""
    at_once = max(1, budget // num_tokens)
    for first in range(0, num_seqs, at_once):
        group = range(first, min(first + at_once, num_seqs))
        run(executor, sequences.step(group, 0, num_tokens))


def decode_ms(
    executor: Executor, sequences: Sequences, num_seqs: int, context: int, steps: int = 48, warm_up: int = 8
) -> float:
    """Median time between the ends of decode steps, as many in flight as the executor takes.

    The sequences hold `context` tokens at the first of them.
    """
    executor.pool_info(STEP_TIMEOUT_S)
    under_way: deque[StepHandle] = deque()
    ends: list[float] = []
    for number in range(warm_up + steps + 1):
        inputs = sequences.step(range(num_seqs), context + number, 1, marked=number > 0)
        under_way.append(executor.submit(inputs))
        if len(under_way) == executor.max_in_flight:
            under_way.popleft().result(STEP_TIMEOUT_S)
            ends.append(time.perf_counter())
    for handle in under_way:
        handle.result(STEP_TIMEOUT_S)
    return 1e3 * float(statistics.median(np.diff(ends[warm_up:]).tolist()))


def prefill_ms(executor: Executor, sequences: Sequences, num_tokens: int, longest: int) -> float:
    """Median time of a step that computes so many tokens of prompts of at most `longest` tokens."""
    count = -(-num_tokens // longest)
    inputs = [sequences.step(range(count), 0, num_tokens // count) for _ in range(5)]
    times = []
    for step in inputs:
        began = time.perf_counter()
        run(executor, step)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])
