"""Combine the splits of ``paged_attention`` into one attention output per token and head."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_splits"])
def reduce_splits(  # type: ignore[no-untyped-def]
    partial_out,
    partial_lse,
    query,
    block_tables,
    num_splits,
    out,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
):
    """Weight each split by the softmax mass it saw. Grid: (T, NUM_HEADS).

    Args:
        partial_out: float32 [T, num_splits, NUM_HEADS, HEAD_DIM]; rows of splits that saw nothing are not read.
        partial_lse: float32 [T, num_splits, NUM_HEADS], base 2.
        query, block_tables: not read; TensorRT computes the grid and num_splits from their shapes.
        num_splits: how far the context was split.
        out: [T, NUM_HEADS, HEAD_DIM].
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    dim_mask = dim < HEAD_DIM

    largest = float("-inf")
    total = 0.0
    acc = tl.zeros([HEAD_DIM_PADDED], tl.float32)
    for start in range(0, num_splits, SPLITS_AT_ONCE):
        split = start + tl.arange(0, SPLITS_AT_ONCE)
        row = (token * num_splits + split) * NUM_HEADS + head
        lse = tl.load(partial_lse + row, mask=split < num_splits, other=float("-inf"))
        seen = lse > float("-inf")
        part = tl.load(
            partial_out + row[:, None] * HEAD_DIM + dim[None, :],
            mask=seen[:, None] & dim_mask[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(lse, 0))
        shift = tl.where(new_largest > float("-inf"), new_largest, 0.0)
        weight = tl.where(seen, tl.exp2(lse - shift), 0.0)
        decay = tl.exp2(largest - shift)
        acc = acc * decay + tl.sum(part * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        largest = new_largest
    combined = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out + (token * NUM_HEADS + head) * HEAD_DIM + dim, combined.to(out.dtype.element_ty), mask=dim_mask)
