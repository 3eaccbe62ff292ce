"""A linear layer with what surrounds it in a LLaMA block.

That is RMSNorm before it; SwiGLU, the residual sum, or RoPE and the way to the KV pool after it.

A decode step is a stream of weights past a few rows, and everything else should hide behind that stream. So
RMSNorm is not a step of its own: the layer that adds to the residual stream also leaves the new rows times
the next norm's weight, and the sums of their squares; the next layer multiplies with the former and scales
its result by the latter, which a norm's division commutes with. Where the tiles are too few to fill the GPU,
K is split; the program that finishes a tile last adds the splits up, always in the same order, and counts in
the engine's state.

Weights of eight bits halve the stream, and are widened on their way to the matrix unit (`kernels/widen.py`).
Where the rows come in eight bits as well (`kernels/quantize.py`), nothing is widened, and the matrix unit is
twice as fast: int8 sums up in int32, exactly, and both scales come behind the product.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806, SIM102
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quire.execution.engine_state import COUNTERS_BYTE
from quire_build.tensorrt.kernels.kv_write import read_places, store_heads
from quire_build.tensorrt.kernels.step_size import used
from quire_build.tensorrt.kernels.widen import widened_product

COUNTERS_OFFSET = tl.constexpr(COUNTERS_BYTE // 4)
"""Where the counters of split tiles start in the engine's state, in int32."""
SQUARES_WIDTH = tl.constexpr(32)
"""Columns of one sum of squares: the same whatever BLOCK_N is, so that BLOCK_N does not change a result."""
SUMS_AT_ONCE = tl.constexpr(64)
"""Sums of squares of a row that are read together."""
ROW_TILES_PER_GROUP = tl.constexpr(8)
"""Row tiles that go through the columns together, so that memory is read once for all of them."""
SMALL_TILE = tl.constexpr(64 * 64)
"""Elements of a tile up to which what it meets behind the product is read before it."""
HALVED_FROM = tl.constexpr(128 * 128)
"""Elements from which on a tile is finished by halves: its way to memory leads through shared memory."""


@triton.jit
def halves(tile):
    """The left and the right half of the columns."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def _store_partial(plane, acc, first_column, rows, N: tl.constexpr, GATED: tl.constexpr):
    """Write one split of a tile to its plane of scratch; if GATED, the right half to the plane behind it."""
    left, right = halves(acc)
    WIDTH: tl.constexpr = left.shape[1]
    ROWS: tl.constexpr = acc.shape[0]
    row = tl.arange(0, ROWS)[:, None]
    n = first_column + tl.arange(0, WIDTH)[None, :]
    tl.store(plane + row * N + n, left, mask=(row < rows) & (n < N))
    if GATED:
        plane += ROWS * N
    else:
        n += WIDTH
    tl.store(plane + row * N + n, right, mask=(row < rows) & (n < N))


@triton.jit
def multiplied(a, w, acc, EXACT: tl.constexpr, NARROW_ROWS: tl.constexpr):
    """``acc`` plus rows [BLOCK_M, BLOCK_K] times weights [columns, BLOCK_K] of the same type."""
    if EXACT:
        acc = tl.dot(a, tl.trans(w), acc, out_dtype=tl.int32)
    elif NARROW_ROWS:
        # Hopper's matrix unit keeps too few bits of sums of e4m3: they leave it after each tile.
        acc = tl.dot(a, tl.trans(w), acc, max_num_imprecise_acc=a.shape[1])
    else:
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def scaled(acc, x_scales, row, num_rows, scale_of_tile, w_mask):
    """A product of numbers of eight bits, times the scales of its rows and of its columns."""
    of_row = tl.load(x_scales + row, mask=row < num_rows, other=0.0)
    of_column = tl.load(scale_of_tile, mask=w_mask, other=0.0).to(tl.float32)
    return acc.to(tl.float32) * of_row[:, None] * of_column[None, :]


@triton.jit
def row_scale(squares, row, num_rows, K: tl.constexpr, EPSILON: tl.constexpr):
    """What a norm multiplies each row with, float32 [rows]: one over its root mean square."""
    SUMS: tl.constexpr = K // SQUARES_WIDTH
    row_mask = row < num_rows
    total = tl.zeros(row.shape, tl.float32)
    for first in tl.static_range(0, SUMS, SUMS_AT_ONCE):
        place_of_sum = first + tl.arange(0, SUMS_AT_ONCE)
        total += tl.sum(
            tl.load(
                squares + row[:, None] * SUMS + place_of_sum[None, :],
                mask=row_mask[:, None] & (place_of_sum < SUMS)[None, :],
                other=0.0,
            ),
            1,
        )
    return tl.rsqrt(total / K + EPSILON)


@triton.jit
def read_beside(
    row,
    first_column,
    num_rows,
    residual,
    next_norm,
    to_pool,
    N: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What `finish` reads beside the product, for the columns from ``first_column`` on.

    A tuple: when RESIDUAL the rows that the result is added to [BLOCK_M, BLOCK_N] and the next norm's weight
    [BLOCK_N], with HEADS what `read_places` says, and else nothing of use.
    """
    if RESIDUAL:
        n = first_column + tl.arange(0, BLOCK_N)
        mask = (row < num_rows)[:, None] & (n < N)[None, :]
        before = tl.load(residual + row.to(tl.int64)[:, None] * N + n[None, :], mask=mask, other=0.0)
        beside = (before, tl.load(next_norm + n, mask=n < N, other=0.0))
    elif HEADS is not None:
        beside = read_places(row, first_column, num_rows, to_pool, HEADS, BLOCK_N)
    else:
        beside = (row, row)
    return beside


@triton.jit
def finish(
    acc,
    up,
    scale,
    beside,
    row,
    first_column,
    num_rows,
    bias,
    to_pool,
    out,
    normed,
    out_squares,
    N: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Everything behind the product, for the columns from ``first_column`` on.

    Args:
        acc: float32 [BLOCK_M, BLOCK_N], the product; the gate's columns when GATED.
        up: as large, the up projection's columns; not used unless GATED.
        scale: `row_scale`; not used unless NORMED.
        beside: `read_beside`.
    """
    row_mask = row < num_rows
    n = first_column + tl.arange(0, BLOCK_N)
    n_mask = n < N
    mask = row_mask[:, None] & n_mask[None, :]
    if NORMED:
        acc = acc * scale[:, None]
        up = up * scale[:, None]
    if BIAS:
        acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + N + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    if RESIDUAL:
        acc += beside[0].to(tl.float32)
    if HEADS is not None:
        store_heads(acc, beside, row, first_column, N, num_rows, to_pool, out, HEADS, BLOCK_M, BLOCK_N)
    else:
        target = row.to(tl.int64)[:, None] * N + n[None, :]
        result = acc.to(out.dtype.element_ty)
        tl.store(out + target, result, mask=mask)
    if RESIDUAL:
        kept = tl.where(mask, result.to(tl.float32), 0.0)
        gained = kept * beside[1].to(tl.float32)[None, :]
        tl.store(normed + target, gained.to(normed.dtype.element_ty), mask=mask)
        PARTS: tl.constexpr = BLOCK_N // SQUARES_WIDTH
        sums = tl.sum(tl.reshape(kept * kept, [BLOCK_M, PARTS, SQUARES_WIDTH]), 2)
        part = first_column // SQUARES_WIDTH + tl.arange(0, PARTS)
        tl.store(
            out_squares + row[:, None] * (N // SQUARES_WIDTH) + part[None, :],
            sums,
            mask=row_mask[:, None] & (part < N // SQUARES_WIDTH)[None, :],
        )


@triton.jit
def _read_and_finish(
    acc,
    up,
    beside,
    row,
    first_column,
    num_rows,
    squares,
    residual,
    next_norm,
    bias,
    to_pool,
    out,
    normed,
    out_squares,
    K: tl.constexpr,
    N: tl.constexpr,
    NORMED: tl.constexpr,
    EPSILON: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`finish`, and before it what was not read early."""
    scale = row
    if NORMED:
        scale = row_scale(squares, row, num_rows, K, EPSILON)
    if BLOCK_M * BLOCK_N > SMALL_TILE:
        beside = read_beside(
            row, first_column, num_rows, residual, next_norm, to_pool, N, RESIDUAL, HEADS, BLOCK_N
        )
    finish(
        acc, up, scale, beside, row, first_column, num_rows, bias, to_pool, out, normed, out_squares, N,
        NORMED, GATED, RESIDUAL, BIAS, HEADS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_splits", "layer"])
def linear(
    x,
    weight,
    squares,
    residual,
    next_norm,
    bias,
    scales,
    narrow_x,
    x_scales,
    cos_sin,
    positions,
    slot_mapping,
    kv_cache,
    engine_state,
    num_rows,
    num_splits,
    layer,
    out,
    normed,
    out_squares,
    partial,
    K: tl.constexpr,
    N: tl.constexpr,
    NORMED: tl.constexpr,
    EPSILON: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    WEIGHT_FLOAT: tl.constexpr,
    NARROW_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    COUNTED: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile of ``out``, or one split of it.

    Grid: (cdiv(N, BLOCK_N), cdiv(num_rows, BLOCK_M), num_splits).

    Args:
        x: [num_rows, K]; when NORMED, rows times the norm's weight, not divided by their root mean square.
            Not read when NARROW_ROWS.
        weight: [N, K]; when GATED [2 * N, K], the gate's rows first. With a WEIGHT_GROUP of eight bits, four
            to an int32, and unless NARROW_ROWS arranged by `pairs.paired`.
        squares: float32 [num_rows, K / SQUARES_WIDTH], sums of squares of the rows before the norm's weight;
            not read unless NORMED.
        residual: [num_rows, N], added to the result; not read unless RESIDUAL.
        next_norm: [N], weight of the norm that follows; not read unless RESIDUAL.
        bias: [N], or [2 * N] when GATED; not read unless BIAS.
        scales: [ceil(K / WEIGHT_GROUP), N], twice as wide when GATED: of the weight, by groups of inputs; not
            read unless there is a WEIGHT_GROUP.
        narrow_x: ``x`` in the weight's type, four to an int32; not read unless NARROW_ROWS.
        x_scales: float32 [num_rows], of the rows of ``narrow_x``; likewise.
        cos_sin, positions, slot_mapping, kv_cache, layer: see `kv_write`; None without HEADS.
        engine_state: says how many rows the step has, and lends each tile a counter while there are splits.
        num_splits: parts of K, at most SPLITS.
        out: out, [num_rows, N]: silu(gate) * up when GATED. With HEADS the rotated queries alone; keys
            and values go to the pool.
        normed: out when RESIDUAL, [num_rows, N], ``out`` times ``next_norm``.
        out_squares: out when RESIDUAL, float32 [num_rows, N / SQUARES_WIDTH].
        partial: scratch, float32 [row tiles * num_splits, BLOCK_M, N], twice that when GATED; unused without
            splits.
        WEIGHT_GROUP: inputs of a weight that share a scale: K when NARROW_ROWS, else BLOCK_K is a multiple; 0
            where weights have the rows' type.
        WEIGHT_FLOAT: whether numbers of eight bits are floats (e4m3) and not integers.
        NARROW_ROWS: whether rows have eight bits, as weights then do.
        HEADS: a `kv_write.Heads` where the columns are queries, keys and values; else None.
        COUNTED: what a row is, for `step_size.used`. Tiles of padding alone are left out; the rows of padding
            in others are computed.
        SCALED_FIRST: see `widened_product`.
        BLOCK_N: a multiple of SQUARES_WIDTH when RESIDUAL.
    """
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_tiles = tl.num_programs(1)
    place_in_launch = tl.program_id(1) * COLUMNS + tl.program_id(0)
    first_of_group = place_in_launch // (ROW_TILES_PER_GROUP * COLUMNS) * ROW_TILES_PER_GROUP
    place_in_group = place_in_launch - first_of_group * COLUMNS
    group = min(row_tiles - first_of_group, ROW_TILES_PER_GROUP)
    row_tile = first_of_group + place_in_group % group
    column = place_in_group // group
    split = tl.program_id(2)

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < num_rows
    n_mask = n < N

    K_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    begin = 0
    end = K_TILES
    splits_used = 1
    if SPLITS > 1:
        tiles_per_split = tl.cdiv(K_TILES, num_splits)
        splits_used = tl.cdiv(K_TILES, tiles_per_split)
        if split >= splits_used:
            return
        begin = split * tiles_per_split
        end = min(begin + tiles_per_split, K_TILES)
    # The up projection's rows come behind the gate's, in one product with them.
    PARTS: tl.constexpr = 2 if GATED else 1
    of_tile = tl.arange(0, PARTS * BLOCK_N)
    w_n = column * BLOCK_N + of_tile % BLOCK_N
    if NARROW_ROWS:
        tl.static_assert(WEIGHT_GROUP == K)
        narrow: tl.constexpr = tl.float8e4nv if WEIGHT_FLOAT else tl.int8
        weight = weight.to(tl.pointer_type(narrow), bitcast=True)
        x = narrow_x.to(tl.pointer_type(narrow), bitcast=True)
    # The first tile always has rows, and doesn't wait for their number.
    if row_tile > 0:
        if row_tile * BLOCK_M >= used(engine_state, COUNTED, num_rows):
            return
    w_row = of_tile // BLOCK_N * N + w_n
    to_pool = (cos_sin, positions, slot_mapping, kv_cache, engine_state, layer)
    beside = (row,)
    if BLOCK_M * BLOCK_N <= SMALL_TILE:
        # On its way while the product is computed.
        beside = read_beside(
            row, column * BLOCK_N, num_rows, residual, next_norm, to_pool, N, RESIDUAL, HEADS, BLOCK_N
        )

    EXACT: tl.constexpr = NARROW_ROWS and not WEIGHT_FLOAT
    if WEIGHT_GROUP > 0 and not NARROW_ROWS:
        acc = widened_product(
            x, weight, scales, row, num_rows, w_row, w_n < N, begin, end, K, PARTS * N, WEIGHT_GROUP,
            WEIGHT_FLOAT, SCALED_FIRST, BLOCK_K,
        )  # fmt: skip
    else:
        k = tl.arange(0, BLOCK_K)
        x_tile = x + row.to(tl.int64)[:, None] * K + k[None, :]
        w_tile = weight + w_row.to(tl.int64)[:, None] * K + k[None, :]
        acc = tl.zeros([BLOCK_M, PARTS * BLOCK_N], tl.int32 if EXACT else tl.float32)
        for tile in range(begin, end):
            start = tile * BLOCK_K
            x_mask = row_mask[:, None]
            w_mask = (w_n < N)[:, None]
            if K % BLOCK_K != 0:
                x_mask = x_mask & (start + k < K)[None, :]
                w_mask = w_mask & (start + k < K)[None, :]
            w = tl.load(w_tile + start, mask=w_mask, other=0.0, eviction_policy="evict_first")
            a = tl.load(x_tile + start, mask=x_mask, other=0.0)
            acc = multiplied(a, w, acc, EXACT, NARROW_ROWS)
    if NARROW_ROWS:
        acc = scaled(acc, x_scales, row, num_rows, scales + w_row, w_n < N)

    if SPLITS > 1:
        if splits_used > 1:
            mask = row_mask[:, None] & n_mask[None, :]
            place = tl.arange(0, BLOCK_M)[:, None] * N + n[None, :]
            PLANE: tl.constexpr = PARTS * BLOCK_M * N
            # As many splits as leave room for what is read of them in registers.
            FEW: tl.constexpr = 2 if BLOCK_M * BLOCK_N < 8192 else 1
            AT_ONCE: tl.constexpr = SPLITS if SPLITS * BLOCK_M * BLOCK_N <= 8192 else FEW
            planes = partial + row_tile * num_splits * PLANE
            rows = num_rows - row_tile * BLOCK_M
            _store_partial(planes + split * PLANE, acc, column * BLOCK_N, rows, N, GATED)
            tl.debug_barrier()  # every thread's stores come before the count
            counters = engine_state.to(tl.pointer_type(tl.int32), bitcast=True) + COUNTERS_OFFSET
            counter = counters + row_tile * COLUMNS + column
            arrived = tl.atomic_add(counter, 1, sem="acq_rel")
            if arrived != splits_used - 1:
                return
            tl.store(counter, 0)
            tl.debug_barrier()
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first in range(0, splits_used, AT_ONCE):
                for offset in tl.static_range(AT_ONCE):
                    other = first + offset
                    part = planes + other * PLANE + place
                    there = mask & (row < tl.where(other < splits_used, num_rows, 0))[:, None]
                    total += tl.load(part, mask=there, other=0.0, cache_modifier=".cg")
                    if GATED:
                        up_total += tl.load(part + BLOCK_M * N, mask=there, other=0.0, cache_modifier=".cg")
            _read_and_finish(
                total, up_total, beside, row, column * BLOCK_N, num_rows, squares, residual, next_norm, bias,
                to_pool, out, normed, out_squares, K, N, NORMED, EPSILON, GATED, RESIDUAL, BIAS, HEADS,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            return

    if not GATED and BLOCK_M * BLOCK_N >= HALVED_FROM:
        left, right = halves(acc)
        _read_and_finish(
            left, left, beside, row, column * BLOCK_N, num_rows, squares, residual, next_norm, bias, to_pool,
            out, normed, out_squares, K, N, NORMED, EPSILON, GATED, RESIDUAL, BIAS, HEADS, BLOCK_M,
            BLOCK_N // 2,
        )  # fmt: skip
        _read_and_finish(
            right, right, beside, row, column * BLOCK_N + BLOCK_N // 2, num_rows, squares, residual,
            next_norm, bias, to_pool, out, normed, out_squares, K, N, NORMED, EPSILON, GATED, RESIDUAL, BIAS,
            HEADS, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        up = acc
        if GATED:
            acc, up = halves(acc)
        _read_and_finish(
            acc, up, beside, row, column * BLOCK_N, num_rows, squares, residual, next_norm, bias, to_pool,
            out, normed, out_squares, K, N, NORMED, EPSILON, GATED, RESIDUAL, BIAS, HEADS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
