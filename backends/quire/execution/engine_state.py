"""What a TensorRT plan keeps between steps besides the KV pool: one small buffer, `engine_state`.

The buffer belongs to whoever binds the inputs, like the pool; the plan's kernels read and write it in
place. Its first element, the number of the pool's blocks, is written by the binder before every step; the
rest starts as zeros and is the kernels' own. The kernels take their offsets from here.
"""

from __future__ import annotations

MAX_POOLS = 8
"""Tensors that a pool may be cut into: a tensor has fewer than 2**31 elements, of 8 bytes each."""
POOL_HEADER_BYTES = 64
"""What precedes the blocks in every pool tensor but the first, where the null block serves: whoever hosts the
plan may overwrite the first element of an input."""

NUM_BLOCKS_BYTE = 0
"""int64: blocks in the pool, the null block included. No plan believes more than it was built for."""
EPOCH_BYTE = 8
"""int32: the pool's epoch, 0 until the first step has put the binder's candidate there."""
STEP_SIZE_BYTE = 16
"""int64 [2]: how many tokens and rows of logits the step has, its inputs being padded; written by every step,
with STEP_MARK in the upper half. Whatever else stands there means: as many as the inputs have."""
STEP_MARK = 0x51754972
"""An int32 that nobody writes by chance: TensorRT times kernels on whatever its memory holds."""
STEP_ELEMENTS = 5
"""Of the plan's input `step`, which brings the mark, see `padding.step_row`."""
POOL_OFFSETS_BYTE = 64
"""int64 [MAX_POOLS]: where pool i starts, in elements of the KV type from pool 0; written by every step."""
COUNTERS_BYTE = 128
"""int32 [NUM_COUNTERS]: how many splits of a tile are done; zero between kernels."""
NUM_COUNTERS = 16384
SAMPLED_IDS_BYTE = COUNTERS_BYTE + 4 * NUM_COUNTERS
"""int32 [max_num_seqs]: the tokens that the last step sampled, by row of its logits."""


def engine_state_elements(max_num_seqs: int) -> int:
    """Size of the buffer in int64 elements."""
    return (SAMPLED_IDS_BYTE + 4 * max_num_seqs + 7) // 8
