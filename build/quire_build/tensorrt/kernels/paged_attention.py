"""Attention over a paged KV cache for a packed batch of variable-length queries.

One launch serves decode rows, prefill chunks and any mixture: a query tile holds ``BLOCK_M // GROUP`` tokens
of one sequence times the ``GROUP`` query heads that share a KV head, so that grouped heads read K and V once.
The context may be split over the launch's third axis; then the program that finishes a tile last combines the
splits, always in the same order, so that the result does not depend on who that was. The programs of a tile
count themselves in the pool's null block, behind the element that holds the number of blocks: the counters
start at zero and are left at zero.

K and V of the step are already in the pool when this kernel runs.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

COUNTERS_OFFSET = tl.constexpr(16)
"""Where the counters of split tiles start in the null block, in int32."""


@triton.jit(do_not_specialize=["num_seqs", "blocks_per_table", "num_splits", "layer"])
def paged_attention(
    query,
    block_tables,
    query_start_loc,
    seq_lens,
    kv_cache,
    num_seqs,
    blocks_per_table,
    num_splits,
    layer,
    out,
    partial_out,
    partial_lse,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend one query tile of one KV head to one split of its sequence's context.

    Grid: (num_seqs + (T - num_seqs) // (BLOCK_M // GROUP), NUM_KV_HEADS, num_splits).

    Args:
        query: [T, NUM_KV_HEADS * GROUP, HEAD_DIM], rotated.
        block_tables: int32 [num_seqs, blocks_per_table].
        query_start_loc: int32 [num_seqs + 1]; every sequence has at least one token.
        seq_lens: int32 [num_seqs].
        kv_cache: the pool; its first eight bytes hold the number of blocks in it, and the int32 from
            COUNTERS_OFFSET on are zero.
        layer: which layer's K and V of each block to read.
        out: out, [T, NUM_KV_HEADS * GROUP, HEAD_DIM].
        partial_out: scratch, float32 [T, num_splits, NUM_KV_HEADS * GROUP, HEAD_DIM]; unused without splits.
        partial_lse: scratch, float32 [T, num_splits, NUM_KV_HEADS * GROUP], base 2; unused without splits.
        BLOCK_ELEMENTS: elements of one block over all layers.
        MAX_BLOCKS: no pool of this plan has more blocks, whatever its first element says.
        WINDOW: a query sees this many positions up to its own; 0 for all.
        SCALE_LOG2: softmax scale times log2(e).
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    TOKENS_PER_TILE: tl.constexpr = BLOCK_M // GROUP

    # Sequence s owns the tiles from s + (query_start_loc[s] - s) // TOKENS_PER_TILE. While every sequence
    # before has one token, that is s itself; only a tile behind a longer one has to look for its sequence.
    seq = tl.minimum(tile, num_seqs - 1)
    query_start = tl.load(query_start_loc + seq)
    if query_start != tile:
        seq = 0
        beyond = num_seqs
        while beyond - seq > 1:
            middle = (seq + beyond) // 2
            first_tile = middle + (tl.load(query_start_loc + middle) - middle) // TOKENS_PER_TILE
            if first_tile <= tile:
                seq = middle
            else:
                beyond = middle
        query_start = tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - query_start
    first_token = (tile - (seq + (query_start - seq) // TOKENS_PER_TILE)) * TOKENS_PER_TILE
    if first_token >= query_len:
        return

    seq_len = tl.load(seq_lens + seq)
    num_blocks = tl.minimum(tl.load(kv_cache.to(tl.pointer_type(tl.int64), bitcast=True)), MAX_BLOCKS).to(
        tl.int32
    )

    row = tl.arange(0, BLOCK_M)
    token = first_token + row // GROUP
    row_mask = (row < TOKENS_PER_TILE * GROUP) & (token < query_len)
    head = kv_head * GROUP + row % GROUP
    position = seq_len - query_len + token

    # The keys this tile needs at all, then this split's share of them, in whole key tiles.
    last_token = tl.minimum(first_token + TOKENS_PER_TILE, query_len) - 1
    key_end = seq_len - query_len + last_token + 1
    key_start = 0
    if WINDOW > 0:
        key_start = tl.maximum(seq_len - query_len + first_token - (WINDOW - 1), 0) // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(key_end - key_start, BLOCK_N)
    tiles_per_split = tl.cdiv(tiles, num_splits)
    splits_used = tl.cdiv(tiles, tiles_per_split)
    if split >= splits_used:
        return
    begin = key_start + split * tiles_per_split * BLOCK_N
    end = tl.minimum(begin + tiles_per_split * BLOCK_N, key_end)

    dim = tl.arange(0, HEAD_DIM_PADDED)
    dim_mask = dim < HEAD_DIM
    query_row = (query_start + token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head
    q = tl.load(
        query + query_row[:, None] * HEAD_DIM + dim[None, :],
        mask=row_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )

    PLANE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM  # K, or V, of one layer of one block
    key_base = kv_cache + layer.to(tl.int64) * (2 * PLANE) + kv_head * (BLOCK_SIZE * HEAD_DIM)
    table = block_tables + seq.to(tl.int64) * blocks_per_table
    column = tl.arange(0, BLOCK_N)

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM_PADDED], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + column
        key_mask = key < end
        block = tl.load(table + key // BLOCK_SIZE, mask=key_mask, other=0)
        block = tl.where((block < 0) | (block >= num_blocks), 0, block)
        offset = block.to(tl.int64) * BLOCK_ELEMENTS + (key % BLOCK_SIZE) * HEAD_DIM

        k = tl.load(
            key_base + offset[None, :] + dim[:, None], mask=key_mask[None, :] & dim_mask[:, None], other=0.0
        )
        visible = key_mask[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.dot(q, k, input_precision="ieee") * SCALE_LOG2
        scores = tl.where(visible, scores, float("-inf"))

        new_max = tl.maximum(running_max, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum; any finite one keeps exp2 away from inf - inf.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(running_max - shift)
        running_sum = running_sum * decay + tl.sum(weights, 1)
        running_max = new_max

        # Slots beyond the sequence may hold anything, NaN included, and 0 * NaN is NaN: hence the mask on V.
        v = tl.load(
            key_base + PLANE + offset[:, None] + dim[None, :],
            mask=key_mask[:, None] & dim_mask[None, :],
            other=0.0,
        )
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

    seen = running_sum > 0.0
    acc = acc / tl.where(seen, running_sum, 1.0)[:, None]
    out_mask = row_mask[:, None] & dim_mask[None, :]
    target = out + query_row[:, None] * HEAD_DIM + dim[None, :]
    if splits_used == 1:
        tl.store(target, acc.to(out.dtype.element_ty), mask=out_mask)
        return

    HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    first_row = (query_start + token).to(tl.int64) * num_splits * HEADS + head
    lse = tl.where(seen, running_max + tl.log2(tl.where(seen, running_sum, 1.0)), float("-inf"))
    own_row = first_row + split * HEADS
    tl.store(partial_out + own_row[:, None] * HEAD_DIM + dim[None, :], acc, mask=out_mask)
    tl.store(partial_lse + own_row, lse, mask=row_mask)

    tl.debug_barrier()  # every thread's stores come before the count
    counter = (
        kv_cache.to(tl.pointer_type(tl.int32), bitcast=True) + COUNTERS_OFFSET + tile * NUM_KV_HEADS + kv_head
    )
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived != splits_used - 1:
        return
    tl.store(counter, 0)
    tl.debug_barrier()

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    combined = tl.zeros([BLOCK_M, HEAD_DIM_PADDED], tl.float32)
    for other in range(0, splits_used):
        other_row = first_row + other * HEADS
        other_lse = tl.load(partial_lse + other_row, mask=row_mask, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            partial_out + other_row[:, None] * HEAD_DIM + dim[None, :],
            mask=out_mask,
            other=0.0,
            cache_modifier=".cg",
        )
        new_largest = tl.maximum(largest, other_lse)
        shift = tl.where(new_largest > float("-inf"), new_largest, 0.0)
        share = tl.exp2(other_lse - shift)
        decay = tl.exp2(largest - shift)
        combined = combined * decay[:, None] + part * share[:, None]
        total = total * decay + share
        largest = new_largest
    combined = combined / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(target, combined.to(out.dtype.element_ty), mask=out_mask)
