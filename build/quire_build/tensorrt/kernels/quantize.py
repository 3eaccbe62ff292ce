"""Rows as numbers of eight bits with one scale a row, rotated before: what a layer of eight bits reads.

Rotation is the product of up to CHUNK inputs with a Hadamard matrix (`quire_build.quantization` says why).
That matrix is the Kronecker product of two of at most SIDE rows, so a chunk is laid out as a square, and
multiplied with one of them from the right and with the other from the left.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806, SIM102
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quire_build.tensorrt.kernels.step_size import used

SIDE = tl.constexpr(16)
CHUNK = tl.constexpr(SIDE.value * SIDE.value)
"""Inputs of a square of SIDE lines, and so the most that are rotated together."""
SMALLEST = tl.constexpr(1e-30)
"""The least that a row's largest number counts as, so that its inverse is a number."""
ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2**23: added and taken away again, it rounds to whole numbers, ties to even."""


@triton.jit
def _hadamard(ORDER: tl.constexpr, dtype: tl.constexpr):
    """[SIDE, SIDE]: Hadamard matrices of ORDER rows along the diagonal."""
    i = tl.arange(0, SIDE)[:, None]
    j = tl.arange(0, SIDE)[None, :]
    common = i & j & (ORDER - 1)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    entry = tl.where(i // ORDER == j // ORDER, 1 - 2 * (common & 1), 0)
    return entry.to(dtype)


@triton.jit
def _rotated(x, ROTATION: tl.constexpr):
    """Rotate [chunks * SIDE, SIDE], rows of squares; the result is of squares with sides exchanged."""
    LINES: tl.constexpr = x.shape[0]
    RIGHT: tl.constexpr = ROTATION if ROTATION < SIDE else SIDE
    LEFT: tl.constexpr = ROTATION // RIGHT
    half = tl.dot(x, _hadamard(RIGHT, x.dtype), input_precision="ieee")
    half = tl.reshape(tl.permute(tl.reshape(half, [LINES // SIDE, SIDE, SIDE]), (0, 2, 1)), [LINES, SIDE])
    # A sum is no number of half precision, but the sum of two.
    high = half.to(x.dtype)
    low = (half - high.to(tl.float32)).to(x.dtype)
    matrix = _hadamard(LEFT, x.dtype)
    return tl.dot(low, matrix, tl.dot(high, matrix, input_precision="ieee"), input_precision="ieee")


@triton.jit
def _piece(x_row, first, K: tl.constexpr, ROTATION: tl.constexpr, PIECE: tl.constexpr):
    """A row's inputs from ``first`` on, rotated and float32, zeros behind its end; and which they are."""
    if ROTATION > 1:
        line = tl.arange(0, PIECE // SIDE)[:, None]
        column = tl.arange(0, SIDE)[None, :]
        k = first + line * SIDE + column
        values = _rotated(tl.load(x_row + k, mask=k < K, other=0.0), ROTATION)
        k = first + line // SIDE * CHUNK + column * SIDE + line % SIDE
    else:
        k = first + tl.arange(0, PIECE)
        values = tl.load(x_row + k, mask=k < K, other=0.0).to(tl.float32)
    return values, k


@triton.jit
def _larger(first, second):
    """The larger of the two; not a number if one is none."""
    return tl.maximum(first, second, tl.PropagateNan.ALL)


@triton.jit
def _largest(values, FLOAT: tl.constexpr):
    """The largest absolute value; for int8, which cannot say so itself, not a number if one is none."""
    magnitudes = tl.reshape(tl.abs(values), [values.numel])
    return tl.max(magnitudes) if FLOAT else tl.reduce(magnitudes, 0, _larger)


@triton.jit
def _store(values, k, inverse, numbers, K: tl.constexpr, FLOAT: tl.constexpr):
    """Write a piece times ``inverse`` in eight bits."""
    scaled = values * inverse
    if not FLOAT:
        scaled = (scaled + ROUNDING) - ROUNDING
    tl.store(numbers + k, scaled.to(numbers.dtype.element_ty), mask=k < K)


@triton.jit(do_not_specialize=["num_rows"])
def quantize(
    x,
    engine_state,
    num_rows,
    numbers,
    scales,
    K: tl.constexpr,
    ROTATION: tl.constexpr,
    LARGEST: tl.constexpr,
    NORM: tl.constexpr,
    FLOAT: tl.constexpr,
    COUNTED: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Quantise one row.

    Grid: (num_rows,).

    Args:
        x: [num_rows, K].
        engine_state: says how many rows the step has.
        numbers: out, [num_rows, K] of eight bits, four to an int32.
        scales: out, float32 [num_rows]; numbers times it are the rotated rows.
        ROTATION: inputs that are rotated together, a power of two up to CHUNK that divides K; 1 for none.
        LARGEST: the number that a row's largest becomes.
        NORM: 1 / sqrt(ROTATION).
        FLOAT: whether numbers are e4m3 and not int8.
        COUNTED: what a row is, for `step_size.used`. Rows of padding are left out.
        PIECE: inputs that are worked on at once, a power of two and a multiple of CHUNK.
    """
    tl.static_assert(ROTATION <= CHUNK)
    row = tl.program_id(0)
    # The first row is always there, and doesn't wait for their number.
    if row > 0:
        if row >= used(engine_state, COUNTED, num_rows):
            return
    x_row = x + row.to(tl.int64) * K
    narrow: tl.constexpr = tl.float8e4nv if FLOAT else tl.int8
    row_numbers = numbers.to(tl.pointer_type(narrow), bitcast=True) + row.to(tl.int64) * K
    if PIECE >= K:
        values, k = _piece(x_row, 0, K, ROTATION, PIECE)
        amax = _larger(_largest(values, FLOAT), SMALLEST)
        _store(values, k, LARGEST / amax, row_numbers, K, FLOAT)
    else:
        amax = SMALLEST
        for first in range(0, K, PIECE):
            values, _ = _piece(x_row, first, K, ROTATION, PIECE)
            amax = _larger(amax, _largest(values, FLOAT))
        for first in range(0, K, PIECE):
            values, k = _piece(x_row, first, K, ROTATION, PIECE)
            _store(values, k, LARGEST / amax, row_numbers, K, FLOAT)
    tl.store(scales + row, amax * (NORM / LARGEST))
