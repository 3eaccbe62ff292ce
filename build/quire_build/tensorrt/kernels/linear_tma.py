"""The linear layer of `linear.py` for many rows, on GPUs with a tensor memory accelerator.

The accelerator moves whole tiles by itself, by a descriptor of the tensor that lies in memory, so that the
threads have nothing to do but feed the matrix unit. One program runs on each multiprocessor and computes
tiles one after another.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806, SIM102
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quire_build.tensorrt.kernels.linear import (
    finish,
    halves,
    multiplied,
    read_beside,
    row_scale,
    scaled,
)
from quire_build.tensorrt.kernels.step_size import used

ROW_TILES_PER_GROUP = tl.constexpr(4)
"""Row tiles that go through the columns together. Where it divides PROGRAMS, a program keeps its rows."""
LARGEST_EPILOGUE = tl.constexpr(128 * 128)
"""Elements of a result that a program has registers for, with what is read beside them; a larger tile is
finished in two parts, unless it is gated and reads nothing. So is a tile of two widths, whatever its size.

Where the columns are heads, whose cosines and sines want registers as well, the largest tiles spill a few
bytes.
"""


@triton.jit
def _scale_and_finish(
    tile,
    scale,
    beside,
    row,
    first_column,
    num_rows,
    residual,
    next_norm,
    bias,
    scales,
    x_scales,
    to_pool,
    out,
    normed,
    out_squares,
    N: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    NARROW_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    READ_EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`finish` a product as it leaves the matrix unit: the up projection's columns right of the gate's.

    What belongs beside it has been read when READ_EARLY, and is then ``beside``.
    """
    if not READ_EARLY:
        beside = read_beside(
            row, first_column, num_rows, residual, next_norm, to_pool, N, RESIDUAL, HEADS, BLOCK_N
        )
    if NARROW_ROWS:
        of_tile = tl.arange(0, tile.shape[1])
        n = first_column + of_tile % BLOCK_N
        tile = scaled(tile, x_scales, row, num_rows, scales + of_tile // BLOCK_N * N + n, n < N)
    up = tile
    if GATED:
        tile, up = halves(tile)
    finish(
        tile, up, scale, beside, row, first_column, num_rows, bias, to_pool, out, normed, out_squares, N,
        NORMED, GATED, RESIDUAL, BIAS, HEADS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "layer"])
def linear_tma(
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
    WEIGHT_FLOAT: tl.constexpr,
    NARROW_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    COUNTED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MORE_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute every PROGRAMS-th tile of ``out``.

    Grid: (PROGRAMS,). Parameters and constants are those of `linear`, but for these:

    Args:
        x, narrow_x, weight: the rows of those that are read take multiples of 16 bytes. Weights have eight
            bits when NARROW_ROWS and only then.
        partial: not used, but the outputs of the operator are passed in order.
        PROGRAMS: as many as there are multiprocessors.
        BLOCK_N, MORE_N: columns of a tile together, each a power of two; MORE_N may be 0. When RESIDUAL,
            the parts that a tile is finished in are multiples of SQUARES_WIDTH.
    """
    WIDTH: tl.constexpr = BLOCK_N + MORE_N
    COLUMNS: tl.constexpr = (N + WIDTH - 1) // WIDTH
    # The up projection's rows come behind the gate's, in one product with them.
    MATRICES: tl.constexpr = 2 if GATED else 1
    EXACT: tl.constexpr = NARROW_ROWS and not WEIGHT_FLOAT
    WHOLE: tl.constexpr = MORE_N == 0 and (GATED or BLOCK_M * BLOCK_N <= LARGEST_EPILOGUE)
    LEFT_N: tl.constexpr = BLOCK_N if WHOLE or MORE_N else BLOCK_N // 2
    if NARROW_ROWS:
        narrow: tl.constexpr = tl.float8e4nv if WEIGHT_FLOAT else tl.int8
        weight = weight.to(tl.pointer_type(narrow), bitcast=True)
        x = narrow_x.to(tl.pointer_type(narrow), bitcast=True)
    x_tiles = tl.make_tensor_descriptor(x, [num_rows, K], [K, 1], [BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(weight, [MATRICES, N, K], [N * K, K, 1], [MATRICES, BLOCK_N, BLOCK_K])
    if MORE_N:
        more_tiles = tl.make_tensor_descriptor(
            weight, [MATRICES, N, K], [N * K, K, 1], [MATRICES, MORE_N, BLOCK_K]
        )
    to_pool = (cos_sin, positions, slot_mapping, kv_cache, engine_state, layer)
    row_tiles = tl.cdiv(used(engine_state, COUNTED, num_rows), BLOCK_M)

    known = -1
    scale = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(tl.program_id(0), row_tiles * COLUMNS, PROGRAMS):
        first_of_group = tile // (ROW_TILES_PER_GROUP * COLUMNS) * ROW_TILES_PER_GROUP
        place_in_group = tile - first_of_group * COLUMNS
        group = min(row_tiles - first_of_group, ROW_TILES_PER_GROUP)
        row_tile = first_of_group + place_in_group % group
        first_column = place_in_group // group * WIDTH
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        if NORMED:
            if row_tile != known:
                scale = row_scale(squares, row, num_rows, K, EPSILON)
                known = row_tile
        beside = (row,)
        if WHOLE:
            # On its way while the product is computed.
            beside = read_beside(
                row, first_column, num_rows, residual, next_norm, to_pool, N, RESIDUAL, HEADS, BLOCK_N
            )

        acc = tl.zeros([BLOCK_M, MATRICES * BLOCK_N], tl.int32 if EXACT else tl.float32)
        if MORE_N:
            more = tl.zeros([BLOCK_M, MATRICES * MORE_N], tl.int32 if EXACT else tl.float32)
        for start in range(0, K, BLOCK_K):
            a = x_tiles.load([row_tile * BLOCK_M, start])
            w = w_tiles.load([0, first_column, start]).reshape(MATRICES * BLOCK_N, BLOCK_K)
            acc = multiplied(a, w, acc, EXACT, NARROW_ROWS)
            if MORE_N:
                w = more_tiles.load([0, first_column + BLOCK_N, start]).reshape(MATRICES * MORE_N, BLOCK_K)
                more = multiplied(a, w, more, EXACT, NARROW_ROWS)

        left = acc
        if not WHOLE:
            if MORE_N:
                right = more
            else:
                left, right = halves(acc)
        _scale_and_finish(
            left, scale, beside, row, first_column, num_rows, residual, next_norm, bias, scales, x_scales,
            to_pool, out, normed, out_squares, N, NORMED, GATED, RESIDUAL, BIAS, NARROW_ROWS, HEADS, WHOLE,
            BLOCK_M, LEFT_N,
        )  # fmt: skip
        if not WHOLE:
            _scale_and_finish(
                right, scale, beside, row, first_column + LEFT_N, num_rows, residual, next_norm, bias, scales,
                x_scales, to_pool, out, normed, out_squares, N, NORMED, GATED, RESIDUAL, BIAS, NARROW_ROWS,
                HEADS, WHOLE, BLOCK_M, WIDTH - LEFT_N,
            )  # fmt: skip
