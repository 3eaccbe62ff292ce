"""A linear layer with what surrounds it in a LLaMA block: RMSNorm before, SwiGLU or the residual sum after.

A decode step is a stream of weights past a few rows, and everything else should hide behind that stream. So
RMSNorm is not a step of its own: the layer that adds to the residual stream also leaves the new rows times
the next norm's weight, and the sums of their squares; the next layer multiplies with the former and scales
its result by the latter, which a norm's division commutes with. Where the tiles are too few to fill the GPU,
K is split; the program that finishes a tile last adds the splits up, always in the same order, and counts in
the engine's state. So that the memory does not idle while one launch ends, the next begins and attention
comes between them, a launch can ask the L2 cache for the beginning of the next layer's weight.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806, SIM102
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quire.execution.engine_state import COUNTERS_BYTE

COUNTERS_OFFSET = tl.constexpr(COUNTERS_BYTE // 4)
"""Where the counters of split tiles start in the engine's state, in int32."""
SQUARES_WIDTH = tl.constexpr(32)
"""Columns of one sum of squares: the same whatever BLOCK_N is, so that BLOCK_N does not change a result."""
ROW_TILES_PER_GROUP = tl.constexpr(8)
"""Row tiles that go through the columns together, so that memory is read once for all of them."""
CACHE_LINE_BYTES = tl.constexpr(128)
LINES_PER_PREFETCH = tl.constexpr(128)
"""Cache lines that a program asks for at once, one a thread."""
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""The interpreter has no inline assembly; a prefetch changes nothing that it could see."""


@triton.jit
def _prefetch(weight, program, programs, BYTES: tl.constexpr):
    """Ask the L2 cache for one program's share of the first BYTES of ``weight``."""
    LINES: tl.constexpr = BYTES // CACHE_LINE_BYTES
    lines = tl.cdiv(LINES, programs * LINES_PER_PREFETCH) * LINES_PER_PREFETCH
    base = weight.to(tl.pointer_type(tl.int8), bitcast=True)
    for first in range(program * lines, min((program + 1) * lines, LINES), LINES_PER_PREFETCH):
        line = tl.minimum(first + tl.arange(0, LINES_PER_PREFETCH), LINES - 1).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [base + line * CACHE_LINE_BYTES],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def linear(
    x,
    weight,
    squares,
    residual,
    next_norm,
    bias,
    engine_state,
    next_weight,
    num_rows,
    num_splits,
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
    PREFETCH_BYTES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile of ``out``, or one split of it.

    Grid: (cdiv(N, BLOCK_N), cdiv(num_rows, BLOCK_M), num_splits).

    Args:
        x: [num_rows, K]; when NORMED, rows times the norm's weight, not divided by their root mean square.
        weight: [N, K]; when GATED [2 * N, K], the gate's rows first.
        squares: float32 [num_rows, K / SQUARES_WIDTH], sums of squares of the rows before the norm's weight;
            not read unless NORMED.
        residual: [num_rows, N], added to the result; not read unless RESIDUAL.
        next_norm: [N], weight of the norm that follows; not read unless RESIDUAL.
        bias: [N], or [2 * N] when GATED; not read unless BIAS.
        engine_state: lends a counter for each tile while there are splits.
        next_weight: PREFETCH_BYTES or more of what the next layer reads; only prefetched.
        num_splits: parts of K, at most SPLITS.
        out: out, [num_rows, N]: silu(gate) * up when GATED.
        normed: out when RESIDUAL, [num_rows, N], ``out`` times ``next_norm``.
        out_squares: out when RESIDUAL, float32 [num_rows, N / SQUARES_WIDTH].
        partial: scratch, float32 [row tiles * num_splits, BLOCK_M, N], twice that when GATED; unused without
            splits.
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
    k = tl.arange(0, BLOCK_K)
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
    x_tile = x + row.to(tl.int64)[:, None] * K + k[None, :]
    w_tile = weight + n.to(tl.int64)[:, None] * K + k[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(begin, end):
        start = tile * BLOCK_K
        x_mask = row_mask[:, None]
        w_mask = n_mask[:, None]
        if K % BLOCK_K != 0:
            k_mask = start + k < K
            x_mask = x_mask & k_mask[None, :]
            w_mask = w_mask & k_mask[None, :]
        w = tl.load(w_tile + start, mask=w_mask, other=0.0, eviction_policy="evict_first")
        a = tl.load(x_tile + start, mask=x_mask, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
        if GATED:
            w_up = tl.load(w_tile + N * K + start, mask=w_mask, other=0.0, eviction_policy="evict_first")
            up = tl.dot(a, tl.trans(w_up), up, input_precision="ieee")

    if PREFETCH_BYTES > 0 and not INTERPRETED:
        program = place_in_launch + split * row_tiles * COLUMNS
        _prefetch(next_weight, program, row_tiles * COLUMNS * tl.num_programs(2), PREFETCH_BYTES)

    mask = row_mask[:, None] & n_mask[None, :]
    if SPLITS > 1:
        if splits_used > 1:
            place = tl.arange(0, BLOCK_M)[:, None] * N + n[None, :]
            PLANE: tl.constexpr = BLOCK_M * N * (2 if GATED else 1)
            planes = partial + row_tile * num_splits * PLANE
            tl.store(planes + split * PLANE + place, acc, mask=mask)
            if GATED:
                tl.store(planes + split * PLANE + BLOCK_M * N + place, up, mask=mask)
            tl.debug_barrier()  # every thread's stores come before the count
            counters = engine_state.to(tl.pointer_type(tl.int32), bitcast=True) + COUNTERS_OFFSET
            counter = counters + row_tile * COLUMNS + column
            arrived = tl.atomic_add(counter, 1, sem="acq_rel")
            if arrived != splits_used - 1:
                return
            tl.store(counter, 0)
            tl.debug_barrier()
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for other in tl.static_range(SPLITS):
                part = planes + other * PLANE + place
                there = mask & (row < tl.where(splits_used > other, num_rows, 0))[:, None]
                acc += tl.load(part, mask=there, other=0.0, cache_modifier=".cg")
                if GATED:
                    up += tl.load(part + BLOCK_M * N, mask=there, other=0.0, cache_modifier=".cg")

    if NORMED:
        SUMS: tl.constexpr = K // SQUARES_WIDTH
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, SUMS, 32):
            place_of_sum = first + tl.arange(0, 32)
            total += tl.sum(
                tl.load(
                    squares + row[:, None] * SUMS + place_of_sum[None, :],
                    mask=row_mask[:, None] & (place_of_sum < SUMS)[None, :],
                    other=0.0,
                ),
                1,
            )
        scale = tl.rsqrt(total / K + EPSILON)[:, None]
        acc = acc * scale
        up = up * scale
    if BIAS:
        acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + N + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    target = row.to(tl.int64)[:, None] * N + n[None, :]
    if RESIDUAL:
        acc += tl.load(residual + target, mask=mask, other=0.0).to(tl.float32)
    result = acc.to(out.dtype.element_ty)
    tl.store(out + target, result, mask=mask)
    if RESIDUAL:
        kept = tl.where(mask, result.to(tl.float32), 0.0)
        gain = tl.load(next_norm + n, mask=n_mask, other=0.0).to(tl.float32)
        tl.store(normed + target, (kept * gain[None, :]).to(normed.dtype.element_ty), mask=mask)
        PARTS: tl.constexpr = BLOCK_N // SQUARES_WIDTH
        sums = tl.sum(tl.reshape(kept * kept, [BLOCK_M, PARTS, SQUARES_WIDTH]), 2)
        part = column * PARTS + tl.arange(0, PARTS)
        tl.store(
            out_squares + row[:, None] * (N // SQUARES_WIDTH) + part[None, :],
            sums,
            mask=row_mask[:, None] & (part < N // SQUARES_WIDTH)[None, :],
        )
