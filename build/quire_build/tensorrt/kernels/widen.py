"""Products with weights of eight bits and rows of the model's type: the weights are widened on their way.

Reading the weights is what takes the time of few rows, so widening must cost less than that. Two numbers are
made of 16 bits by a few operations on whole registers (`quire_build.tensorrt.pairs`), and multiplied without
a way through shared memory, unless they are scaled first: Hopper's matrix unit takes its first operand from
registers, so the weights are the first, and the result is turned over at the end.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806
# mypy: disable-error-code="assignment, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quire_build.tensorrt import pairs

BLOCK_CHANNELS = tl.constexpr(pairs.BLOCK_CHANNELS)
FIRST_MASK = tl.constexpr(pairs.FIRST_MASK - 0x10000)
BFLOAT16_FACTOR, BFLOAT16_UNIT = tl.constexpr(pairs.BFLOAT16.factor), tl.constexpr(pairs.BFLOAT16.unit)
FLOAT16_FACTOR, FLOAT16_UNIT = tl.constexpr(pairs.FLOAT16.factor), tl.constexpr(pairs.FLOAT16.unit)


@triton.jit
def widened(pair, dtype: tl.constexpr, FLOAT: tl.constexpr):
    """Both numbers of pairs, int16, in the rows' type, over `unit`."""
    if FLOAT:
        first = pair.to(tl.int8).to(tl.float8e4nv, bitcast=True)
        second = (pair >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True)
        if dtype != tl.float16:
            # GPUs widen e4m3 to float16, and from there to bfloat16 straight is slow.
            first, second = first.to(tl.float16).to(tl.float32), second.to(tl.float16).to(tl.float32)
        first, second = first.to(dtype), second.to(dtype)
    else:
        half: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
        FACTOR: tl.constexpr = BFLOAT16_FACTOR if dtype == tl.bfloat16 else FLOAT16_FACTOR
        exchanged = ((pair >> 8) & 0xFF) | (pair << 8)
        first = (pair & FIRST_MASK).to(half, bitcast=True).to(dtype) * FACTOR
        second = (exchanged & FIRST_MASK).to(half, bitcast=True).to(dtype) * FACTOR
    return first, second


@triton.jit
def unit(dtype: tl.constexpr, FLOAT: tl.constexpr):
    """What widened numbers are multiplied with to be those that were kept."""
    return 1.0 if FLOAT else (BFLOAT16_UNIT if dtype == tl.bfloat16 else FLOAT16_UNIT)


@triton.jit
def _read_scales(place, group, mask, WIDTH: tl.constexpr, GROUPS: tl.constexpr, LAST: tl.constexpr):
    """The scales of so many groups of inputs from one on, a tuple; ``place`` is where the first's are."""
    scales = ()
    for ahead in tl.static_range(GROUPS):
        scales += (tl.load(place + min(group + ahead, LAST) * WIDTH, mask=mask, other=0.0),)
    return scales


@triton.jit
def widened_product(
    x,
    weight,
    scales,
    row,
    num_rows,
    channel,
    channel_mask,
    begin,
    end,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    FLOAT: tl.constexpr,
    SCALED_FIRST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows times channels of a weight over some of the inputs, float32 [rows, channels].

    Args:
        x: [num_rows, K].
        weight: `pairs.paired`, bound as int32.
        scales: [groups of K, CHANNELS].
        row, channel: which ones, the latter with a mask.
        begin, end: of the inputs, in tiles of BLOCK_K.
        SCALED_FIRST: multiply weights by their scales before the product, rounded to the rows' type, and not
            the sums of each group behind it, which takes as many registers again as the result.
        BLOCK_K: a multiple of WEIGHT_GROUP.
    """
    tl.static_assert(BLOCK_K % WEIGHT_GROUP == 0)
    GROUPS: tl.constexpr = BLOCK_K // WEIGHT_GROUP
    ALL_GROUPS: tl.constexpr = (K + WEIGHT_GROUP - 1) // WEIGHT_GROUP
    PAIRS: tl.constexpr = WEIGHT_GROUP // 2
    k = tl.arange(0, PAIRS)
    rows_x = x + row.to(tl.int64)[:, None] * K + k[None, :]
    row_mask = (row < num_rows)[:, None]
    block = channel.to(tl.int64) // BLOCK_CHANNELS * (ALL_GROUPS * BLOCK_CHANNELS) + channel % BLOCK_CHANNELS
    rows_w = weight.to(tl.pointer_type(tl.int16), bitcast=True) + block[:, None] * PAIRS + k[None, :]
    UNIT: tl.constexpr = unit(x.dtype.element_ty, FLOAT)

    acc = tl.zeros([channel.shape[0], row.shape[0]], tl.float32)
    # A tile ahead, since nothing else hides how long this takes.
    next_scales = _read_scales(
        scales + channel, begin * GROUPS, channel_mask, CHANNELS, GROUPS, ALL_GROUPS - 1
    )
    for tile in range(begin, end):
        of_tile = next_scales
        next_scales = _read_scales(
            scales + channel, (tile + 1) * GROUPS, channel_mask, CHANNELS, GROUPS, ALL_GROUPS - 1
        )
        for place in tl.static_range(GROUPS):
            group = tile * GROUPS + place
            start = group * WEIGHT_GROUP
            of_w = group
            first_mask = row_mask
            second_mask = row_mask
            if K % BLOCK_K != 0:
                # Behind the last group it is multiplied with zeros.
                of_w = min(group, ALL_GROUPS - 1)
                first_mask = row_mask & (start + k < K)[None, :]
                second_mask = row_mask & (start + PAIRS + k < K)[None, :]
            w = tl.load(
                rows_w + of_w * (BLOCK_CHANNELS * PAIRS), mask=channel_mask[:, None], other=0,
                eviction_policy="evict_first",
            )  # fmt: skip
            a = tl.load(rows_x + start, mask=first_mask, other=0.0)
            b = tl.load(rows_x + start + PAIRS, mask=second_mask, other=0.0)
            first, second = widened(w, a.dtype, FLOAT)
            scale = of_tile[place].to(tl.float32)[:, None] * UNIT
            if SCALED_FIRST:
                factor = scale.to(a.dtype)
                acc = tl.dot(first * factor, tl.trans(a), acc, input_precision="ieee")
                acc = tl.dot(second * factor, tl.trans(b), acc, input_precision="ieee")
            else:
                sums = tl.dot(first, tl.trans(a), input_precision="ieee")
                sums = tl.dot(second, tl.trans(b), sums, input_precision="ieee")
                acc += sums * scale
    return tl.trans(acc)
