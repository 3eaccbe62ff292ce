"""One step's tensors, packed: the engine contract's inputs as numpy arrays, and the check that they hold it.

`ModelInputs` is what an executor gets. `InputBatch` fills it from the scheduler's decisions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.errors import EngineStepError
from quire.execution.manifest import EngineLimits

NUM_SAMPLING_COLUMNS = 5
"""Inverse temperature, top_k, top_p, min_p, uniform number."""


@dataclass(slots=True)
class ModelInputs:
    """T tokens of S sequences over a paged KV cache, with N rows of logits wanted.

    Every array is C-contiguous and, but for `sampling`, int32. The arrays may be views of buffers that the
    next step but one reuses.
    """

    step: int
    """Number of the step; an engine behind a queue returns it, so that steps cannot be confused."""
    input_ids: NDArray[np.int32]
    """[T] tokens, sequence after sequence; for an executor with token feedback also marks: -(r + 1) stands
    for the token sampled in row r of the logits of the step before."""
    positions: NDArray[np.int32]
    """[T] position of each token in its sequence."""
    slot_mapping: NDArray[np.int32]
    """[T] block id * block size + offset, where the token's keys and values go."""
    block_tables: NDArray[np.int32]
    """[S, B] block ids of each sequence, padded with 0."""
    query_start_loc: NDArray[np.int32]
    """[S + 1] where each sequence's tokens start in T."""
    seq_lens: NDArray[np.int32]
    """[S] tokens of each sequence in the cache after this step."""
    logits_indices: NDArray[np.int32]
    """[N] which of the T rows want logits."""
    sampling: NDArray[np.float32] | None = None
    """[N, 5] how the engine samples from each row of logits: inverse temperature (0 is greedy), top_k (0
    keeps all), top_p, min_p and a uniform number in [0, 1). None asks for the logits in place of tokens."""


@dataclass(frozen=True, slots=True)
class InputsCheck:
    """What the inputs of every step must keep to on one engine, checked before the engine sees them.

    A kernel follows block ids and lengths without looking: one outside the pool is a segmentation fault,
    and slots that disagree with tables and lengths are silently wrong tokens.
    """

    vocab_size: int
    block_size: int
    num_blocks: int
    limits: EngineLimits

    def __call__(self, inputs: ModelInputs, num_sampled_before: int = 0) -> None:
        """Check shapes, ranges and that positions and slots follow from tables and lengths.

        Args:
            inputs: of the step.
            num_sampled_before: rows that the step before sampled and that `input_ids` may refer to; 0 for an
                engine without token feedback.

        Raises:
            EngineStepError: naming the field, the value and the limit.
        """
        self._check_shapes(inputs)
        num_tokens = len(inputs.input_ids)
        _check_input_ids(inputs.input_ids, self.vocab_size, num_sampled_before)
        starts = inputs.query_start_loc
        if starts[0] != 0 or starts[-1] != num_tokens:
            raise EngineStepError(
                f"query_start_loc goes from {starts[0]} to {starts[-1]}; it must go from 0 to {num_tokens}"
            )
        query_lens = np.diff(starts)
        _check_range("tokens per sequence in query_start_loc", query_lens, 1, num_tokens)
        capacity = min(inputs.block_tables.shape[1] * self.block_size, self.limits.max_model_len)
        _check_range("seq_lens", inputs.seq_lens, 1, capacity)
        _check_range("block_tables", inputs.block_tables, 0, self.num_blocks - 1)
        _check_range("logits_indices", inputs.logits_indices, 0, num_tokens - 1)

        num_computed = inputs.seq_lens - query_lens
        _check_range("seq_lens less the step's tokens", num_computed, 0, capacity)
        sequence = np.repeat(np.arange(len(query_lens)), query_lens)
        positions = np.arange(num_tokens) + (num_computed - starts[:-1])[sequence]
        _check_equal("positions", inputs.positions, positions)
        blocks = inputs.block_tables[sequence, positions // self.block_size]
        _check_equal(
            "slot_mapping", inputs.slot_mapping, blocks * self.block_size + positions % self.block_size
        )

    def _check_shapes(self, inputs: ModelInputs) -> None:
        num_tokens, num_seqs = len(inputs.input_ids), len(inputs.seq_lens)
        if not 1 <= num_tokens <= self.limits.max_num_batched_tokens:
            raise EngineStepError(
                f"input_ids has {num_tokens} tokens; it must have 1 to {self.limits.max_num_batched_tokens}"
            )
        if not 1 <= num_seqs <= self.limits.max_num_seqs:
            raise EngineStepError(
                f"seq_lens has {num_seqs} sequences; it must have 1 to {self.limits.max_num_seqs}"
            )
        expected = {
            "positions": (num_tokens,),
            "slot_mapping": (num_tokens,),
            "query_start_loc": (num_seqs + 1,),
            "block_tables": (num_seqs, inputs.block_tables.shape[-1]),
        }
        if inputs.sampling is not None:
            expected["sampling"] = (len(inputs.logits_indices), NUM_SAMPLING_COLUMNS)
        for name, shape in expected.items():
            actual = getattr(inputs, name).shape
            if actual != shape:
                raise EngineStepError(f"{name} has shape {list(actual)}; it must have shape {list(shape)}")


def _check_input_ids(input_ids: NDArray[np.int32], vocab_size: int, num_sampled_before: int) -> None:
    """Refuse ids beyond the vocabulary, and marks of rows that the step before did not sample."""
    smallest, largest = input_ids.min(), input_ids.max()
    if smallest < -num_sampled_before or largest >= vocab_size:
        value = smallest if smallest < -num_sampled_before else largest
        marks = f", or -{num_sampled_before} to -1 for a row of the step before" if num_sampled_before else ""
        raise EngineStepError(f"input_ids contains {value}; it must be 0 to {vocab_size - 1}{marks}")


def _check_range(name: str, values: NDArray[np.int32], low: int, high: int) -> None:
    """Refuse values outside `low` to `high`, both included."""
    if not values.size:
        return
    smallest, largest = values.min(), values.max()
    if smallest < low or largest > high:
        value = smallest if smallest < low else largest
        raise EngineStepError(f"{name} contains {value}; it must be {low} to {high}")


def _check_equal(name: str, actual: NDArray[np.int32], expected: NDArray[np.int64]) -> None:
    """Refuse values that contradict the block tables and lengths."""
    differing = np.flatnonzero(actual != expected)
    if len(differing):
        token = differing[0]
        raise EngineStepError(
            f"{name} has {actual[token]} for token {token}; "
            f"by query_start_loc, seq_lens and block_tables it must be {expected[token]}"
        )
