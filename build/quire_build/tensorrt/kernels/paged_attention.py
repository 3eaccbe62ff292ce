"""Attention over a paged KV cache for a packed batch of variable-length queries.

One launch serves decode rows, prefill chunks and any mixture. A tile holds up to ``ROWS // GROUP`` tokens of
one sequence, times the ``GROUP`` query heads that share a KV head, so that grouped heads read K and V once.
A tile with few rows, a decode row above all, takes a path of its own with as few rows as the tensor cores
allow and longer strips of keys: such a tile waits for memory and nothing else.

A decode row of one KV head leaves most of the smallest tile empty. Where contexts are short and many, a tile
therefore holds the rows of several KV heads, whose keys come one head after another: a program waits for its
first keys about as long as reading 200 keys takes.

`assign_splits` says which tiles' contexts are split. The program that finishes such a tile last combines the
splits, always in the same order, so that the result does not depend on who that was. The programs of a tile
count themselves in the engine's state: the counters start at zero and are left at zero, if the splits are
those that were assigned to the same step.

A pool of one-byte elements holds e4m3 with scale 1. They are widened on their way to the matrix unit.

K and V of the step are already in the pool when this kernel runs. Whatever the integers in its inputs are,
nothing outside the inputs is read, nothing outside the outputs is written, and it ends.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from quire_build.tensorrt.kernels.assign_splits import SPARES_RADIX
from quire_build.tensorrt.kernels.pool import block_start, pool_blocks, pool_offsets

LARGEST_HALF = tl.constexpr(65504.0)
"""The largest number of float16."""
WARPGROUP_ROWS = tl.constexpr(64)
"""Rows from which on Hopper multiplies by warp groups, whose K and V come from shared memory."""


class Attention(NamedTuple):
    """What a model's attention and its pool look like: constants of a kernel.

    Attributes:
        num_kv_heads: heads of keys and values.
        group: query heads that share one of them.
        head_dim: numbers of a head; head_dim_padded is a power of two that the matrix unit takes.
        window: positions that a query sees, its own the last; 0 for all.
        scale_log2: softmax scale times log2(e).
        block_size: tokens in a block of the pool.
        block_elements: elements of a block over all layers.
        max_blocks: no pool of this plan has more blocks.
        num_pools, blocks_per_pool: the pool's parts.
        pool_offsets_byte: where the engine's state says how far apart they are.
        counters_byte: where its counters are.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    head_dim_padded: int
    window: int
    scale_log2: float
    block_size: int
    block_elements: int
    max_blocks: int
    num_pools: int
    blocks_per_pool: int
    pool_offsets_byte: int
    counters_byte: int


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "blocks_per_table", "layer"])
def paged_attention(
    query,
    block_tables,
    query_start_loc,
    seq_lens,
    spare_tiles,
    seq_spares,
    kv_cache,
    engine_state,
    num_tokens,
    num_seqs,
    blocks_per_table,
    layer,
    out,
    partial_out,
    partial_lse,
    ATTENTION: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_KEYS: tl.constexpr,
    ROW_STAGES: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    FEW_KEYS: tl.constexpr,
    FEW_STAGES: tl.constexpr,
    AT_A_TIME: tl.constexpr,
    MOST_HEADS: tl.constexpr,
    WHOLE: tl.constexpr,
    NUM_SPARE: tl.constexpr,
    COMBINED_ROWS: tl.constexpr,
    COMBINED_SPLITS: tl.constexpr,
):
    """Attend one tile of queries to one split of its sequence's context.

    Grid: ((NUM_SPARE + num_seqs + (num_tokens - num_seqs) // (tokens of a tile)) * KV heads,): NUM_SPARE
    tiles' worth for splits beyond a tile's first. They come first, as those of long contexts, or last where
    all other programs run at once: idle ones in front would delay them.

    Args:
        query: [num_tokens, query heads, head size], rotated.
        block_tables: int32 [num_seqs, blocks_per_table].
        query_start_loc: int32 [num_seqs + 1]; only the last sequences may be without tokens, as padding is.
        seq_lens: int32 [num_seqs].
        spare_tiles: int32 [NUM_SPARE], and seq_spares, int32 [num_seqs]: see `assign_splits`. No tile has
            more than NUM_SPARE splits.
        kv_cache: the pool's first part, laid out as [block][layer][K, V][kv head][offset][head size], in the
            query's type or e4m3.
        engine_state: int64, see `quire.execution.engine_state`.
        layer: which layer's K and V of each block to read.
        out: out, [num_tokens, query heads, head size].
        partial_out: scratch, float32 [tokens of a tile, 2 * NUM_SPARE, query heads, head size].
        partial_lse: scratch, float32 [tokens of a tile, 2 * NUM_SPARE, query heads], base 2.
        ATTENTION: see `Attention`.
        ROWS: rows of a full tile; ROW_KEYS keys at a time, fetched ROW_STAGES - 1 ahead.
        FEW_ROWS: up to so many rows are few; FEW_KEYS and FEW_STAGES are for them.
        AT_A_TIME: programs that the GPU runs at a time.
        MOST_HEADS: KV heads that share a tile, at most; their query heads are FEW_ROWS at most.
        WHOLE: keys up to which a context is not split, and KV heads may share a tile.
        COMBINED_ROWS: rows, and COMBINED_SPLITS splits, combined at a time.
    """
    NUM_KV_HEADS: tl.constexpr = ATTENTION.num_kv_heads
    GROUP: tl.constexpr = ATTENTION.group
    BLOCK_SIZE: tl.constexpr = ATTENTION.block_size
    TOKENS_PER_TILE: tl.constexpr = ROWS // GROUP
    HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    SPARE_PROGRAMS: tl.constexpr = NUM_SPARE * NUM_KV_HEADS
    tile_programs = tl.num_programs(0) - SPARE_PROGRAMS
    num_tiles = tile_programs // NUM_KV_HEADS
    first_of_tiles = tl.where(tl.num_programs(0) <= AT_A_TIME + SPARE_PROGRAMS, 0, SPARE_PROGRAMS)
    program = tl.program_id(0) - first_of_tiles
    is_spare = (program < 0) | (program >= tile_programs)
    # The last tiles are the long ones, when chunks follow decode rows: they start first.
    tile = num_tiles - 1 - program % num_tiles
    kv_head = program // num_tiles
    spare = 0
    if is_spare:
        spare = tl.where(program < 0, tl.program_id(0), program - tile_programs) // NUM_KV_HEADS
        kv_head = tl.program_id(0) % NUM_KV_HEADS
        tile = tl.load(spare_tiles + spare)
        if (tile < 0) | (tile >= num_tiles):
            return

    # Sequence s owns the tiles from s + (query_start_loc[s] - s) // TOKENS_PER_TILE. While every sequence
    # before has one token, that is s itself; only a tile behind a longer one has to look for its sequence.
    seq = tl.minimum(tile, num_seqs - 1)
    query_start = tl.load(query_start_loc + seq)
    query_end = tl.load(query_start_loc + seq + 1)
    seq_len = tl.load(seq_lens + seq)
    spares = tl.load(seq_spares + seq)
    num_blocks = pool_blocks(engine_state, ATTENTION.max_blocks)
    # The blocks of the context's first keys, before it is known whether they are needed.
    few = tl.arange(0, FEW_KEYS) // BLOCK_SIZE
    first_blocks = tl.load(
        block_tables + seq.to(tl.int64) * blocks_per_table + few,
        mask=few < tl.where(is_spare, 0, blocks_per_table),
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
        spares = tl.load(seq_spares + seq)
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
    begin = 0
    if ATTENTION.window > 0:
        begin = tl.maximum(first_position - (ATTENTION.window - 1), 0) // BLOCK_SIZE * BLOCK_SIZE
    end = key_end
    kv_heads = 1
    first_spare = spares // SPARES_RADIX + first_token // TOKENS_PER_TILE * (spares % SPARES_RADIX)
    num_splits = 1 + spares % SPARES_RADIX
    if (
        (num_splits < 2)
        | (num_splits > NUM_SPARE)
        | (first_spare < 0)
        | (first_spare + num_splits > NUM_SPARE + 1)
    ):
        first_spare = 0
        num_splits = 1
    if key_end - begin > WHOLE:
        split = 0
        if is_spare:
            split = spare - first_spare + 1
            if (split < 1) | (split >= num_splits):
                return
        share = tl.cdiv(tl.cdiv(key_end - begin, num_splits), FEW_KEYS) * FEW_KEYS
        begin += split * share
        end = tl.minimum(begin + share, key_end)
    else:
        if is_spare:
            return
        num_splits = 1
        if query_len == 1:
            kv_heads = heads_together(num_tokens, NUM_KV_HEADS, AT_A_TIME, MOST_HEADS)
            kv_head *= kv_heads
            if kv_head >= NUM_KV_HEADS:
                return
            kv_heads = tl.minimum(kv_heads, NUM_KV_HEADS - kv_head)
            num_rows *= kv_heads

    first_row = (query_start + first_token) * HEADS + kv_head * GROUP
    HEAD: tl.constexpr = BLOCK_SIZE * ATTENTION.head_dim  # K, or V, of one head in one block
    keys = kv_cache + layer.to(tl.int64) * (2 * NUM_KV_HEADS * HEAD) + kv_head * HEAD
    table = block_tables + seq.to(tl.int64) * blocks_per_table
    are_known = (seq == tile) & (begin == 0)
    tensors = (query, table, keys, engine_state, out, partial_out, partial_lse)
    place_of_split = tl.where(is_spare, spare, NUM_SPARE + first_spare)
    part = (first_row, place_of_split, num_rows, num_blocks, first_position, begin, end, num_splits)
    # One of these. Were they nested, the compiler would give each shared memory of its own.
    if num_rows > FEW_ROWS:
        no_blocks = tl.zeros([ROW_KEYS], tl.int32)
        _attend(*tensors, *part, no_blocks, False, 1, ATTENTION, NUM_SPARE, False, ROWS, ROW_KEYS, ROW_STAGES)
    if (num_rows <= FEW_ROWS) & (kv_heads == 1):
        _attend(
            *tensors, *part, first_blocks, are_known, 1,
            ATTENTION, NUM_SPARE, False, FEW_ROWS, FEW_KEYS, FEW_STAGES,
        )  # fmt: skip
    if kv_heads > 1:
        _attend(
            *tensors, *part, first_blocks, are_known, kv_heads,
            ATTENTION, NUM_SPARE, True, FEW_ROWS, FEW_KEYS, FEW_STAGES,
        )  # fmt: skip
    if num_splits == 1:
        return

    tl.debug_barrier()  # every thread's stores come before the count
    counters = engine_state.to(tl.pointer_type(tl.int32), bitcast=True) + ATTENTION.counters_byte // 4
    counter = counters + first_spare * NUM_KV_HEADS + kv_head
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived != num_splits - 1:
        return
    tl.store(counter, 0)
    tl.debug_barrier()
    _combine(
        partial_out,
        partial_lse,
        out,
        first_row,
        kv_head * GROUP,
        num_rows,
        first_spare,
        num_splits,
        ATTENTION,
        NUM_SPARE,
        COMBINED_ROWS,
        COMBINED_SPLITS,
    )


@triton.jit
def heads_together(rows, KV_HEADS: tl.constexpr, AT_A_TIME: tl.constexpr, MOST: tl.constexpr):
    """KV heads that share a tile, for so many decode rows: a power of two, at most MOST, which is one too.

    As many as may be, of those with which the GPU runs nearly as many programs in its last round as in the
    others; where there is no such number, as few as make one round of all.
    """
    together = MOST
    idle = 1
    while (together > 0) & (idle > 0):
        programs = rows * tl.cdiv(KV_HEADS, together)
        places = tl.cdiv(programs, AT_A_TIME) * AT_A_TIME
        idle = tl.where((places - programs) * 10 > places, 1, 0)
        together = tl.where(idle > 0, together // 2, together)
    if together == 0:
        together = 1
        while (together < MOST) & (rows * tl.cdiv(KV_HEADS, together) > AT_A_TIME):
            together *= 2
    return together


@triton.jit
def _attend(
    query,
    table,
    keys,
    engine_state,
    out,
    partial_out,
    partial_lse,
    first_row,
    place_of_split,
    num_rows,
    num_blocks,
    first_position,
    begin,
    end,
    num_splits,
    first_blocks,
    are_known,
    kv_heads,
    ATTENTION: tl.constexpr,
    NUM_SPARE: tl.constexpr,
    HEADS_TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend a tile's rows to the keys from begin to end.

    ``first_row`` is the tile's first in queries and results; a split has a place in scratch.
    Where they ``are_known``, ``first_blocks`` are the blocks of the first BLOCK_N keys. The rows are those of
    ``kv_heads`` KV heads, whose keys come one head after another; a row sees those of its own. Without
    HEADS_TOGETHER there is one. What comes out is the result where ``num_splits`` is 1, elsewhere a part.
    """
    GROUP: tl.constexpr = ATTENTION.group
    HEADS: tl.constexpr = ATTENTION.num_kv_heads * GROUP
    HEAD_DIM: tl.constexpr = ATTENTION.head_dim
    HEAD_DIM_PADDED: tl.constexpr = ATTENTION.head_dim_padded
    BLOCK_SIZE: tl.constexpr = ATTENTION.block_size
    PLANE: tl.constexpr = ATTENTION.num_kv_heads * BLOCK_SIZE * HEAD_DIM  # K, or V, of one layer of one block
    row = tl.arange(0, BLOCK_M)
    row_mask = row < num_rows
    token = row // (GROUP * kv_heads)
    head = row % (GROUP * kv_heads)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    place = (first_row + token * HEADS + head).to(tl.int64) * HEAD_DIM
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
    offsets = pool_offsets(engine_state, ATTENTION.pool_offsets_byte)
    # The blocks of the next keys are known one step before the keys themselves are fetched.
    unknown = begin + column < tl.where(are_known, begin, end)
    block = tl.load(table + (begin + column) // BLOCK_SIZE, mask=unknown, other=first_blocks)
    start = begin
    kv_head = 0
    for _ in tl.range(0, tl.cdiv(end - begin, BLOCK_N) * kv_heads, num_stages=STAGES):
        key = start + column
        key_mask = key < end
        block = tl.where((block < 0) | (block >= num_blocks), 0, block)
        offset = (kv_head * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM + block_start(
            block, offsets, ATTENTION.block_elements, ATTENTION.num_pools, ATTENTION.blocks_per_pool
        )
        of_head = head // GROUP == kv_head
        start += BLOCK_N
        if HEADS_TOGETHER:
            kv_head = tl.where(start < end, kv_head, kv_head + 1)
            start = tl.where(start < end, start, begin)
        block = tl.load(table + (start + column) // BLOCK_SIZE, mask=start + column < end, other=0)

        # Slots beyond the sequence may hold anything, NaN included, and 0 * NaN is NaN: hence the mask on V.
        source = keys + (offset // ELEMENTS)[:, None] + unit[None, :]
        source_mask = key_mask[:, None] & unit_mask[None, :]
        if PAIRED:
            k = tl.load(source, mask=source_mask, other=0)
            scores = tl.dot(q, tl.trans(_even(k, q.dtype)), input_precision="ieee")
            scores = (
                tl.dot(q_odd, tl.trans(_odd(k, q.dtype)), scores, input_precision="ieee")
                * ATTENTION.scale_log2
            )
        else:
            k = tl.load(source, mask=source_mask, other=0.0).to(q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * ATTENTION.scale_log2
        visible = key_mask[None, :] & (key[None, :] <= position[:, None])
        if HEADS_TOGETHER:
            visible = visible & of_head[:, None]
        if ATTENTION.window > 0:
            visible = visible & (key[None, :] > position[:, None] - ATTENTION.window)
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
    if num_splits == 1:
        place = (first_row + token * HEADS + head).to(tl.int64) * HEAD_DIM
        tl.store(out + place[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=tile_mask)
    else:
        partial = place_of_split * HEADS + first_row % HEADS + token * (2 * NUM_SPARE * HEADS) + head
        lse = tl.where(seen, running_max + tl.log2(tl.where(seen, running_sum, 1.0)), float("-inf"))
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
    first_row,
    first_head,
    num_rows,
    first_spare,
    num_splits,
    ATTENTION: tl.constexpr,
    NUM_SPARE: tl.constexpr,
    COMBINED_ROWS: tl.constexpr,
    COMBINED_SPLITS: tl.constexpr,
):
    """Sum a tile's splits, each by its share of the softmax.

    ``first_row`` is the tile's first among the results, ``first_head`` its query head.
    """
    GROUP: tl.constexpr = ATTENTION.group
    HEADS: tl.constexpr = ATTENTION.num_kv_heads * GROUP
    HEAD_DIM: tl.constexpr = ATTENTION.head_dim
    HEAD_DIM_PADDED: tl.constexpr = ATTENTION.head_dim_padded
    dim = tl.arange(0, HEAD_DIM_PADDED)
    dim_mask = dim < HEAD_DIM
    every = tl.arange(0, NUM_SPARE)
    every_row = tl.where(every == 0, NUM_SPARE + first_spare, first_spare + every - 1) * HEADS
    for first in range(0, num_rows, COMBINED_ROWS):
        row = first + tl.arange(0, COMBINED_ROWS)
        row_mask = row < num_rows
        place = first_head + row // GROUP * (2 * NUM_SPARE * HEADS) + row % GROUP
        lse = tl.load(
            partial_lse + place[None, :] + every_row[:, None],
            mask=row_mask[None, :] & (every < num_splits)[:, None],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        largest = tl.max(lse, 0)
        largest = tl.where(largest > float("-inf"), largest, 0.0)
        total = tl.sum(tl.exp2(lse - largest[None, :]), 0)
        combined = tl.zeros([COMBINED_ROWS, HEAD_DIM_PADDED], tl.float32)
        for start in range(0, num_splits, COMBINED_SPLITS):
            split = start + tl.arange(0, COMBINED_SPLITS)
            split_row = tl.where(split == 0, NUM_SPARE + first_spare, first_spare + split - 1) * HEADS
            partial = place[None, :] + split_row[:, None]
            mask = row_mask[None, :] & (split < num_splits)[:, None]
            some_lse = tl.load(partial_lse + partial, mask=mask, other=float("-inf"), cache_modifier=".cg")
            share = tl.exp2(some_lse - largest[None, :])
            part = tl.load(
                partial_out + partial[:, :, None] * HEAD_DIM + dim[None, None, :],
                mask=mask[:, :, None] & dim_mask[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            combined += tl.sum(part * share[:, :, None], 0)
        combined = combined / tl.where(total > 0.0, total, 1.0)[:, None]
        target = (first_row + row // GROUP * HEADS + row % GROUP).to(tl.int64) * HEAD_DIM
        tl.store(
            out + target[:, None] + dim[None, :],
            combined.to(out.dtype.element_ty),
            mask=row_mask[:, None] & dim_mask[None, :],
        )
