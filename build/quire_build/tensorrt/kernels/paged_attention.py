"""Attention over a paged KV cache for a packed batch of variable-length queries.

One launch serves decode rows, prefill chunks and any mixture. A tile holds up to ``ROWS // GROUP`` tokens of
one sequence, times the ``GROUP`` query heads that share a KV head, so that grouped heads read K and V once.
A tile with few rows, a decode row above all, takes a path of its own with as few rows as the tensor cores
allow and longer strips of keys: such a tile waits for memory and nothing else.

The context may be split over the launch's third axis; then the program that finishes a tile last combines the
splits, always in the same order, so that the result does not depend on who that was. The programs of a tile
count themselves in the engine's state: the counters start at zero and are left at zero.

A pool of one-byte elements holds e4m3 with scale 1. They are widened on their way to the matrix unit.

K and V of the step are already in the pool when this kernel runs. Whatever the integers in its inputs are,
nothing outside the inputs is read, nothing outside the outputs is written, and it ends.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quire_build.tensorrt.kernels.pool import block_start, pool_blocks, pool_offsets

LARGEST_HALF = tl.constexpr(65504.0)
"""The largest number of float16."""
WARPGROUP_ROWS = tl.constexpr(64)
"""Rows from which on Hopper multiplies by warp groups, whose K and V come from shared memory."""


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "blocks_per_table", "num_splits", "few_splits", "layer"]
)
def paged_attention(
    query,
    block_tables,
    query_start_loc,
    seq_lens,
    kv_cache,
    engine_state,
    num_tokens,
    num_seqs,
    blocks_per_table,
    num_splits,
    few_splits,
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
    NUM_POOLS: tl.constexpr,
    BLOCKS_PER_POOL: tl.constexpr,
    POOL_OFFSETS_BYTE: tl.constexpr,
    COUNTERS_BYTE: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_KEYS: tl.constexpr,
    ROW_STAGES: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    FEW_KEYS: tl.constexpr,
    FEW_STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    LONG_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    COMBINED_ROWS: tl.constexpr,
    COMBINED_SPLITS: tl.constexpr,
):
    """Attend one tile of queries of one KV head to one split of its sequence's context.

    Grid: (num_seqs + (num_tokens - num_seqs) // (ROWS // GROUP), NUM_KV_HEADS, num_splits).

    Args:
        query: [num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM], rotated.
        block_tables: int32 [num_seqs, blocks_per_table].
        query_start_loc: int32 [num_seqs + 1]; only the last sequences may be without tokens, as padding is.
        seq_lens: int32 [num_seqs].
        kv_cache: the pool's first part, laid out as [block][layer][K, V][kv head][offset][HEAD_DIM], in the
            query's type or e4m3.
        engine_state: int64, see `quire.execution.engine_state`.
        num_splits: at most MAX_SPLITS; above 1 only where there are counters for all tiles.
        few_splits: how many a context is split into before its splits are longer than LONG_SPLIT.
        layer: which layer's K and V of each block to read.
        out: out, [num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM].
        partial_out: scratch, float32 [num_tokens, num_splits, NUM_KV_HEADS * GROUP, HEAD_DIM]; unused without
            splits.
        partial_lse: scratch, float32 [num_tokens, num_splits, NUM_KV_HEADS * GROUP], base 2; likewise.
        BLOCK_ELEMENTS: elements of one block over all layers.
        MAX_BLOCKS: no pool of this plan has more blocks.
        WINDOW: a query sees this many positions up to its own; 0 for all.
        SCALE_LOG2: softmax scale times log2(e).
        ROWS: rows of a full tile; ROW_KEYS keys at a time, fetched ROW_STAGES - 1 ahead.
        FEW_ROWS: up to so many rows are few; FEW_KEYS and FEW_STAGES are for them.
        WHOLE: keys up to which a context is not split.
        MIN_SPLIT: keys, the fewest worth a split.
        COMBINED_ROWS: rows, and COMBINED_SPLITS splits, combined at a time.
    """
    TOKENS_PER_TILE: tl.constexpr = ROWS // GROUP
    HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    # The last tiles are the long ones, when chunks follow decode rows: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

    # Sequence s owns the tiles from s + (query_start_loc[s] - s) // TOKENS_PER_TILE. While every sequence
    # before has one token, that is s itself; only a tile behind a longer one has to look for its sequence.
    seq = tl.minimum(tile, num_seqs - 1)
    query_start = tl.load(query_start_loc + seq)
    query_end = tl.load(query_start_loc + seq + 1)
    seq_len = tl.load(seq_lens + seq)
    num_blocks = pool_blocks(engine_state, MAX_BLOCKS)
    # The blocks of the context's first keys, before it is known whether they are needed.
    few = tl.arange(0, FEW_KEYS) // BLOCK_SIZE
    first_blocks = tl.load(
        block_tables + seq.to(tl.int64) * blocks_per_table + few,
        mask=few < tl.where(split == 0, blocks_per_table, 0),
        other=0,
    )
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
        query_end = tl.load(query_start_loc + seq + 1)
        seq_len = tl.load(seq_lens + seq)
    query_start = tl.minimum(tl.maximum(query_start, 0), num_tokens)
    query_len = tl.minimum(tl.maximum(query_end, query_start), num_tokens) - query_start
    first_token = (tile - (seq + (query_start - seq) // TOKENS_PER_TILE)) * TOKENS_PER_TILE
    if (first_token < 0) | (first_token >= query_len):
        return
    num_rows = tl.minimum(query_len - first_token, TOKENS_PER_TILE) * GROUP

    # The keys this tile needs at all, then this split's share of them.
    seq_len = tl.minimum(tl.maximum(seq_len, 0), blocks_per_table * BLOCK_SIZE)
    seq_len = tl.where(num_blocks > 0, seq_len, 0)
    first_position = seq_len - query_len + first_token
    key_end = tl.maximum(first_position + num_rows // GROUP, 0)
    key_start = 0
    if WINDOW > 0:
        key_start = tl.maximum(first_position - (WINDOW - 1), 0) // BLOCK_SIZE * BLOCK_SIZE
    num_keys = key_end - key_start
    share = tl.minimum(tl.cdiv(num_keys, few_splits), LONG_SPLIT)
    share = tl.maximum(tl.maximum(share, tl.cdiv(num_keys, num_splits)), MIN_SPLIT)
    share = tl.maximum(share, tl.where(num_keys <= WHOLE, num_keys, 0))
    share = tl.cdiv(share, FEW_KEYS) * FEW_KEYS
    splits_used = tl.maximum(tl.cdiv(num_keys, share), 1)
    if split >= splits_used:
        return
    begin = key_start + split * share
    end = tl.minimum(begin + share, key_end)

    first_row = (query_start + first_token).to(tl.int64) * HEADS + kv_head * GROUP
    partial_row = (query_start + first_token).to(tl.int64) * num_splits * HEADS + kv_head * GROUP
    PLANE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM  # K, or V, of one layer of one block
    keys = kv_cache + layer.to(tl.int64) * (2 * PLANE) + kv_head * (BLOCK_SIZE * HEAD_DIM)
    table = block_tables + seq.to(tl.int64) * blocks_per_table
    if num_rows <= FEW_ROWS:
        _attend(
            query + first_row * HEAD_DIM,
            table,
            first_blocks,
            (seq == tile) & (split == 0) & (begin == 0),
            keys,
            engine_state,
            out + first_row * HEAD_DIM,
            partial_out + (partial_row + split * HEADS) * HEAD_DIM,
            partial_lse + partial_row + split * HEADS,
            num_rows,
            num_blocks,
            first_position,
            begin,
            end,
            num_splits,
            splits_used,
            HEAD_DIM,
            HEAD_DIM_PADDED,
            HEADS,
            GROUP,
            BLOCK_SIZE,
            BLOCK_ELEMENTS,
            NUM_POOLS,
            BLOCKS_PER_POOL,
            POOL_OFFSETS_BYTE,
            PLANE,
            WINDOW,
            SCALE_LOG2,
            FEW_ROWS,
            FEW_KEYS,
            FEW_STAGES,
        )
    else:
        row_blocks = tl.zeros([ROW_KEYS], tl.int32)
        _attend(
            query + first_row * HEAD_DIM,
            table,
            row_blocks,
            False,
            keys,
            engine_state,
            out + first_row * HEAD_DIM,
            partial_out + (partial_row + split * HEADS) * HEAD_DIM,
            partial_lse + partial_row + split * HEADS,
            num_rows,
            num_blocks,
            first_position,
            begin,
            end,
            num_splits,
            splits_used,
            HEAD_DIM,
            HEAD_DIM_PADDED,
            HEADS,
            GROUP,
            BLOCK_SIZE,
            BLOCK_ELEMENTS,
            NUM_POOLS,
            BLOCKS_PER_POOL,
            POOL_OFFSETS_BYTE,
            PLANE,
            WINDOW,
            SCALE_LOG2,
            ROWS,
            ROW_KEYS,
            ROW_STAGES,
        )
    if splits_used == 1:
        return

    tl.debug_barrier()  # every thread's stores come before the count
    counters = engine_state.to(tl.pointer_type(tl.int32), bitcast=True) + COUNTERS_BYTE // 4
    counter = counters + tile * NUM_KV_HEADS + kv_head
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived != splits_used - 1:
        return
    tl.store(counter, 0)
    tl.debug_barrier()
    _combine(
        partial_out + partial_row * HEAD_DIM,
        partial_lse + partial_row,
        out + first_row * HEAD_DIM,
        num_rows,
        num_splits,
        splits_used,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        HEADS,
        GROUP,
        MAX_SPLITS,
        COMBINED_ROWS,
        COMBINED_SPLITS,
    )


@triton.jit
def _attend(
    query,
    table,
    first_blocks,
    are_known,
    keys,
    engine_state,
    out,
    partial_out,
    partial_lse,
    num_rows,
    num_blocks,
    first_position,
    begin,
    end,
    num_splits,
    splits_used,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    NUM_POOLS: tl.constexpr,
    BLOCKS_PER_POOL: tl.constexpr,
    POOL_OFFSETS_BYTE: tl.constexpr,
    PLANE: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend a tile's rows to the keys from begin to end; pointers are those of the tile's first row.

    Where they ``are_known``, ``first_blocks`` are the blocks of the first BLOCK_N keys.
    """
    row = tl.arange(0, BLOCK_M)
    row_mask = row < num_rows
    token = row // GROUP
    dim = tl.arange(0, HEAD_DIM_PADDED)
    place = (token * HEADS + row % GROUP) * HEAD_DIM
    tile_mask = row_mask[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(query + place[:, None] + dim[None, :], mask=tile_mask, other=0.0)
    NARROW: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth == 8
    # Few rows wait for how fast operands are made. Of single bytes that is slow, so pairs are fetched,
    # and those of even dimensions and those of odd ones are operands of their own.
    PAIRED: tl.constexpr = NARROW and BLOCK_M < WARPGROUP_ROWS
    ELEMENTS: tl.constexpr = 2 if PAIRED else 1  # fetched as one
    UNITS: tl.constexpr = HEAD_DIM_PADDED // ELEMENTS
    unit = tl.arange(0, UNITS)
    unit_mask = unit < HEAD_DIM // ELEMENTS
    acc = tl.zeros([BLOCK_M, UNITS], tl.float32)
    if NARROW and q.dtype == tl.bfloat16:
        # GPUs widen e4m3 to float16, and from there to bfloat16 one by one. Both hold every e4m3 exactly.
        q = tl.clamp(q.to(tl.float32), -LARGEST_HALF, LARGEST_HALF, tl.PropagateNan.ALL).to(tl.float16)
    if PAIRED:
        keys = keys.to(tl.pointer_type(tl.int16), bitcast=True)
        q, q_odd = tl.split(tl.reshape(q, [BLOCK_M, UNITS, 2]))
        acc_odd = tl.zeros([BLOCK_M, UNITS], tl.float32)
    position = first_position + token

    column = tl.arange(0, BLOCK_N)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    offsets = pool_offsets(engine_state, POOL_OFFSETS_BYTE)
    # The blocks of the next keys are known one step before the keys themselves are fetched.
    unknown = begin + column < tl.where(are_known, begin, end)
    block = tl.load(table + (begin + column) // BLOCK_SIZE, mask=unknown, other=first_blocks)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = start + column
        key_mask = key < end
        block = tl.where((block < 0) | (block >= num_blocks), 0, block)
        offset = (key % BLOCK_SIZE) * HEAD_DIM + block_start(
            block, offsets, BLOCK_ELEMENTS, NUM_POOLS, BLOCKS_PER_POOL
        )
        block = tl.load(table + (key + BLOCK_N) // BLOCK_SIZE, mask=key + BLOCK_N < end, other=0)

        # Slots beyond the sequence may hold anything, NaN included, and 0 * NaN is NaN: hence the mask on V.
        source = keys + (offset // ELEMENTS)[:, None] + unit[None, :]
        source_mask = key_mask[:, None] & unit_mask[None, :]
        if PAIRED:
            k = tl.load(source, mask=source_mask, other=0)
            scores = tl.dot(q, tl.trans(_even(k, q.dtype)), input_precision="ieee")
            scores = tl.dot(q_odd, tl.trans(_odd(k, q.dtype)), scores, input_precision="ieee") * SCALE_LOG2
        else:
            k = tl.load(source, mask=source_mask, other=0.0).to(q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE_LOG2
        visible = key_mask[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))

        new_max = tl.maximum(running_max, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum; any finite one keeps exp2 away from inf - inf.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(running_max - shift)
        running_sum = running_sum * decay + tl.sum(weights, 1)
        running_max = new_max

        acc = acc * decay[:, None]
        weights = weights.to(q.dtype)
        if PAIRED:
            v = tl.load(source + PLANE // ELEMENTS, mask=source_mask, other=0)
            acc = tl.dot(weights, _even(v, q.dtype), acc, input_precision="ieee")
            acc_odd = tl.dot(weights, _odd(v, q.dtype), acc_odd * decay[:, None], input_precision="ieee")
        else:
            v = tl.load(source + PLANE, mask=source_mask, other=0.0).to(q.dtype)
            acc = tl.dot(weights, v, acc, input_precision="ieee")

    if PAIRED:
        acc = tl.interleave(acc, acc_odd)
    seen = running_sum > 0.0
    acc = acc / tl.where(seen, running_sum, 1.0)[:, None]
    if splits_used == 1:
        tl.store(out + place[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=tile_mask)
    else:
        lse = tl.where(seen, running_max + tl.log2(tl.where(seen, running_sum, 1.0)), float("-inf"))
        partial = token * num_splits * HEADS + row % GROUP
        tl.store(partial_out + partial[:, None] * HEAD_DIM + dim[None, :], acc, mask=tile_mask)
        tl.store(partial_lse + partial, lse, mask=row_mask)


@triton.jit
def _even(pairs, dtype: tl.constexpr):
    """The first e4m3 of each int16, widened."""
    return pairs.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(dtype)


@triton.jit
def _odd(pairs, dtype: tl.constexpr):
    """The second."""
    return (pairs >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(dtype)


@triton.jit
def _combine(
    partial_out,
    partial_lse,
    out,
    num_rows,
    num_splits,
    splits_used,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    COMBINED_ROWS: tl.constexpr,
    COMBINED_SPLITS: tl.constexpr,
):
    """Sum a tile's splits, each by its share of the softmax; pointers are those of the tile's first row."""
    dim = tl.arange(0, HEAD_DIM_PADDED)
    dim_mask = dim < HEAD_DIM
    every = tl.arange(0, MAX_SPLITS)
    some = tl.arange(0, COMBINED_SPLITS)
    for first in range(0, num_rows, COMBINED_ROWS):
        row = first + tl.arange(0, COMBINED_ROWS)
        row_mask = row < num_rows
        partial = row // GROUP * num_splits * HEADS + row % GROUP
        lse = tl.load(
            partial_lse + partial[None, :] + every[:, None] * HEADS,
            mask=row_mask[None, :] & (every < splits_used)[:, None],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        largest = tl.max(lse, 0)
        largest = tl.where(largest > float("-inf"), largest, 0.0)
        total = tl.sum(tl.exp2(lse - largest[None, :]), 0)
        combined = tl.zeros([COMBINED_ROWS, HEAD_DIM_PADDED], tl.float32)
        for start in range(0, splits_used, COMBINED_SPLITS):
            split = start + some
            place = partial[None, :] + split[:, None] * HEADS
            mask = row_mask[None, :] & (split < splits_used)[:, None]
            some_lse = tl.load(partial_lse + place, mask=mask, other=float("-inf"), cache_modifier=".cg")
            share = tl.exp2(some_lse - largest[None, :])
            part = tl.load(
                partial_out + place[:, :, None] * HEAD_DIM + dim[None, None, :],
                mask=mask[:, :, None] & dim_mask[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            combined += tl.sum(part * share[:, :, None], 0)
        combined = combined / tl.where(total > 0.0, total, 1.0)[:, None]
        target = out + (row // GROUP * HEADS + row % GROUP)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(target, combined.to(out.dtype.element_ty), mask=row_mask[:, None] & dim_mask[None, :])
