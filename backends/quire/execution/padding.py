"""Padding a step to a size that an engine was prepared for.

A step is padded with sequences, as the engine contract says: one token at position 0, which goes to slot 0,
length 1, a block table of zeros. Its rows of logits read the step's first token and are greedy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quire.execution.model_inputs import NUM_SAMPLING_COLUMNS, ModelInputs


def decode_size(sizes: Sequence[int], inputs: ModelInputs) -> int | None:
    """The smallest of `sizes`, which ascend, that holds all sequences of a step of one token each.

    None where a sequence has more than one token or no size is large enough.
    """
    num_seqs = len(inputs.seq_lens)
    if len(inputs.input_ids) != num_seqs:
        return None
    index = bisect_left(sizes, num_seqs)
    return sizes[index] if index < len(sizes) else None


def blank_step(num_seqs: int, table_width: int) -> ModelInputs:
    """Room for a step of `num_seqs` sequences of one token, with `table_width` blocks each, for `pad_into`.

    Block tables and sampling parameters that are not filled in are zero: the null block, and greedy.
    """
    return ModelInputs(
        step=0,
        input_ids=np.empty(num_seqs, np.int32),
        positions=np.empty(num_seqs, np.int32),
        slot_mapping=np.empty(num_seqs, np.int32),
        block_tables=np.zeros((num_seqs, table_width), np.int32),
        query_start_loc=np.empty(num_seqs + 1, np.int32),
        seq_lens=np.empty(num_seqs, np.int32),
        logits_indices=np.empty(num_seqs, np.int32),
        sampling=np.zeros((num_seqs, NUM_SAMPLING_COLUMNS), np.float32),
    )


def pad_into(inputs: ModelInputs, padded: ModelInputs) -> None:
    """Copy a step into arrays that are as long or longer, and fill up what is left with padding.

    The arrays of `padded` must have as many columns as those of `inputs`. Where they hold more sequences
    they must hold as many more tokens, one for each.
    """
    num_tokens, num_seqs, num_rows = len(inputs.input_ids), len(inputs.seq_lens), len(inputs.logits_indices)
    for name in ("input_ids", "positions", "slot_mapping"):
        _fill(getattr(padded, name), getattr(inputs, name), 0)
    padded.block_tables[:num_seqs] = inputs.block_tables
    padded.block_tables[num_seqs:] = 0
    padded.query_start_loc[: num_seqs + 1] = inputs.query_start_loc
    padded.query_start_loc[num_seqs + 1 :] = np.arange(num_tokens + 1, len(padded.input_ids) + 1)
    _fill(padded.seq_lens, inputs.seq_lens, 1)
    _fill(padded.logits_indices, inputs.logits_indices, 0)
    if padded.sampling is not None:
        padded.sampling[num_rows:] = 0
        if inputs.sampling is not None:
            padded.sampling[:num_rows] = inputs.sampling


def _fill(padded: NDArray[np.int32], values: NDArray[np.int32], rest: int) -> None:
    padded[: len(values)] = values
    padded[len(values) :] = rest
