"""One step's tensors, packed: the engine contract's inputs as numpy arrays.

`ModelInputs` is what an executor gets. How it is filled from the scheduler's decisions, in buffers that
are reused from step to step, is `InputBatch`'s business, below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class ModelInputs:
    """T tokens of S sequences over a paged KV cache, with N rows of logits wanted.

    Every array is int32 and C-contiguous. The arrays may be views of buffers that the next step but one
    reuses.
    """

    step: int
    """Number of the step; an engine behind a queue returns it, so that steps cannot be confused."""
    input_ids: NDArray[np.int32]
    """[T] tokens, sequence after sequence."""
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
