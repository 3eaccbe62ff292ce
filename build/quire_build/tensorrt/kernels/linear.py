"""A linear layer with what surrounds it in a LLaMA block: RMSNorm before, SwiGLU or the residual sum after.

A decode step is a stream of weights past a few rows, and everything else should hide behind that stream. So
RMSNorm is not a step of its own: the layer that adds to the residual stream also leaves the new rows times
the next norm's weight, and the sums of their squares; the next layer multiplies with the former and scales
its result by the latter, which a norm's division commutes with. Where the tiles are too few to fill the GPU,
K is split; the program that finishes a tile last adds the splits up, always in the same order, and counts in
the pool's null block, as `paged_attention.py` describes.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

COUNTERS_OFFSET = tl.constexpr(16)
"""Where the counters of split tiles start in the null block, in int32."""
SQUARES_WIDTH = tl.constexpr(32)
"""Columns of one sum of squares: the same whatever BLOCK_N is, so that BLOCK_N does not change a result."""


@triton.jit(do_not_specialize=["num_rows"])
def linear(
    x,
    weight,
    squares,
    residual,
    next_norm,
    bias,
    kv_cache,
    num_rows,
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
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile of ``out``, or one split of it.

    Grid: (cdiv(N, BLOCK_N), cdiv(num_rows, BLOCK_M), SPLITS).

    Args:
        x: [num_rows, K]; when NORMED, rows times the norm's weight, not divided by their root mean square.
        weight: [N, K]; when GATED [2 * N, K], the gate's rows first.
        squares: float32 [num_rows, K / SQUARES_WIDTH], sums of squares of the rows before the norm's weight;
            not read unless NORMED.
        residual: [num_rows, N], added to the result; not read unless RESIDUAL.
        next_norm: [N], weight of the norm that follows; not read unless RESIDUAL.
        bias: [N], or [2 * N] when GATED; not read unless BIAS.
        kv_cache: the pool; its null block lends the counters.
        out: out, [num_rows, N]: silu(gate) * up when GATED.
        normed: out when RESIDUAL, [num_rows, N], ``out`` times ``next_norm``.
        out_squares: out when RESIDUAL, float32 [num_rows, N / SQUARES_WIDTH].
        partial: scratch, float32 [SPLITS, BLOCK_M, N], twice that when GATED; unused without splits.
        SPLITS: parts of K; more than one only while num_rows <= BLOCK_M.
        BLOCK_N: a multiple of SQUARES_WIDTH when RESIDUAL.
    """
    column = tl.program_id(0)
    split = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_mask = row < num_rows
    n_mask = n < N

    PER_SPLIT: tl.constexpr = ((K + SPLITS - 1) // SPLITS + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    begin = split * PER_SPLIT
    x_tile = x + row.to(tl.int64)[:, None] * K + k[None, :]
    w_tile = weight + n.to(tl.int64)[:, None] * K + k[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, min(begin + PER_SPLIT, K), BLOCK_K):
        k_mask = start + k < K
        w = tl.load(
            w_tile + start, mask=n_mask[:, None] & k_mask[None, :], other=0.0, eviction_policy="evict_first"
        )
        a = tl.load(x_tile + start, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
        if GATED:
            w_up = tl.load(
                w_tile + N * K + start,
                mask=n_mask[:, None] & k_mask[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            up = tl.dot(a, tl.trans(w_up), up, input_precision="ieee")

    mask = row_mask[:, None] & n_mask[None, :]
    if SPLITS > 1:
        place = tl.arange(0, BLOCK_M)[:, None] * N + n[None, :]
        PLANE: tl.constexpr = BLOCK_M * N
        tl.store(partial + split * PLANE + place, acc, mask=mask)
        if GATED:
            tl.store(partial + (SPLITS + split) * PLANE + place, up, mask=mask)
        tl.debug_barrier()  # every thread's stores come before the count
        counter = kv_cache.to(tl.pointer_type(tl.int32), bitcast=True) + COUNTERS_OFFSET + column
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived != SPLITS - 1:
            return
        tl.store(counter, 0)
        tl.debug_barrier()
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for other in tl.static_range(SPLITS):
            acc += tl.load(partial + other * PLANE + place, mask=mask, other=0.0, cache_modifier=".cg")
            if GATED:
                up += tl.load(
                    partial + (SPLITS + other) * PLANE + place, mask=mask, other=0.0, cache_modifier=".cg"
                )

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
