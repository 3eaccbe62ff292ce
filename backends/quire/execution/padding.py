"""Padding a step to one of the sizes that a TensorRT plan is run in.

A size is a number of tokens. A step of that size has as many sequences and rows of logits as it can have at
most, so that one CUDA graph serves every step that is no larger, whatever it is made of. TensorRT must not
see other shapes either: it loads the kernels of a plan anew, and keeps the old ones, whenever they change.

Padding is tokens of no sequence, in slot 0 of the null block; sequences without tokens; and rows of logits
that read the step's first token and are greedy. The plan is told how many tokens and rows are none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.execution.engine_state import STEP_ELEMENTS, STEP_MARK
from quire.execution.model_inputs import NUM_SAMPLING_COLUMNS, ModelInputs


def step_size(sizes: Sequence[int], inputs: ModelInputs) -> int:
    """The smallest of `sizes`, which ascend, that holds a step; the last one must be large enough."""
    return sizes[bisect_left(sizes, max(len(inputs.input_ids), len(inputs.logits_indices)))]


def sized_shapes(size: int, max_num_seqs: int, table_width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a plan's inputs, but for pool and state, in a step of `size` tokens.

    Args:
        size: of the step.
        max_num_seqs: sequences in any step, at most.
        table_width: blocks of a sequence, at most.
    """
    num_seqs = min(size, max_num_seqs)
    return {
        "step": (STEP_ELEMENTS,),
        **dict.fromkeys(("input_ids", "positions", "slot_mapping"), (size,)),
        "block_tables": (num_seqs, table_width),
        "query_start_loc": (num_seqs + 1,),
        **dict.fromkeys(("seq_lens", "logits_indices"), (num_seqs,)),
        "sampling": (num_seqs, NUM_SAMPLING_COLUMNS),
    }


def blank_step(size: int, max_num_seqs: int, table_width: int) -> ModelInputs:
    """Room for a step of `size` tokens, with `table_width` blocks for each sequence, for `pad_into`."""
    shapes = sized_shapes(size, max_num_seqs, table_width)
    del shapes["step"]
    arrays: dict[str, NDArray[Any]] = {
        name: np.zeros(shape, np.float32 if name == "sampling" else np.int32)
        for name, shape in shapes.items()
    }
    return ModelInputs(step=0, **arrays)


def step_row(inputs: ModelInputs, epoch: int) -> tuple[int, ...]:
    """The plan's input `step`: number, candidate for the epoch, mark, tokens and rows that are no padding."""
    return inputs.step, epoch, STEP_MARK, len(inputs.input_ids), len(inputs.logits_indices)


def pad_into(inputs: ModelInputs, padded: ModelInputs) -> None:
    """Copy a step into arrays that are as long or longer, and fill up what is left with padding.

    Block tables may have more columns than the step's. Tables of padding, and blocks behind those of a
    sequence, are left as they are: nothing reads them.
    """
    for name in ("input_ids", "positions", "slot_mapping", "seq_lens", "logits_indices"):
        _fill(getattr(padded, name), getattr(inputs, name), 0)
    _fill(padded.query_start_loc, inputs.query_start_loc, len(inputs.input_ids))
    num_seqs, width = inputs.block_tables.shape
    padded.block_tables[:num_seqs, :width] = inputs.block_tables
    if padded.sampling is not None:
        num_rows = len(inputs.logits_indices) if inputs.sampling is not None else 0
        padded.sampling[num_rows:] = 0
        if inputs.sampling is not None:
            padded.sampling[:num_rows] = inputs.sampling


def _fill(padded: NDArray[np.int32], values: NDArray[np.int32], rest: int) -> None:
    padded[: len(values)] = values
    padded[len(values) :] = rest
