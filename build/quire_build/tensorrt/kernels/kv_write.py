"""Rotating queries and keys, and putting keys and values where the step's slots say.

The linear layer that makes them does it with its tiles (`linear.py`); only where each head is normed before
it is rotated, which takes whole heads, a kernel of its own does.

RoPE turns pairs of dimensions, as Hugging Face's LLaMA has them dimension d of a head's first half and of its
second. Here the two lie side by side, so that any tile has both: the rows of the weights are in that order,
and so are queries, and keys in the pool. Attention does not see it, since scores are sums over dimensions.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from quire_build.quantization import LARGEST
from quire_build.tensorrt.kernels.pool import block_start, pool_blocks, pool_offsets
from quire_build.tensorrt.kernels.step_size import is_noted

LARGEST_E4M3 = tl.constexpr(LARGEST["fp8"])


class Heads(NamedTuple):
    """What a row's columns are, and the pool that a part of them goes to: constants of a kernel.

    Attributes:
        num_heads: heads of queries, whose columns come first.
        num_kv_heads: heads of keys, which come next, and of values.
        head_dim: columns of a head.
        max_positions: rows of the table of cosines and sines.
        block_size: tokens in a block of the pool.
        block_elements: elements of a block over all layers.
        max_blocks: no pool of this plan has more blocks.
        num_pools, blocks_per_pool: the pool's parts.
        pool_offsets_byte: where the engine's state says how far apart they are.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    block_size: int
    block_elements: int
    max_blocks: int
    num_pools: int
    blocks_per_pool: int
    pool_offsets_byte: int


@triton.jit
def read_places(row, first_column, num_rows, to_pool, HEADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a tile's rows and columns from ``first_column`` on are turned by, and where in the pool they go.

    Args:
        to_pool: the tuple (cos_sin, positions, slot_mapping, kv_cache, engine_state, layer) of `kv_write`.

    Returns:
        Cosines and sines of the pairs, float32 [rows, BLOCK_N / 2], 1 and 0 for values, which are turned by
        them too; elements from the pool's pointer to a row's place in the layer, int64 [rows]; whether there
        is one, [rows]: there is none in the null block, outside the pool, and before the first step.
    """
    cos_sin, positions, slot_mapping, _, engine_state, layer = to_pool
    HALF: tl.constexpr = HEADS.head_dim // 2
    PLANE: tl.constexpr = HEADS.num_kv_heads * HEADS.block_size * HEADS.head_dim
    is_row = row < num_rows
    pair = first_column // 2 + tl.arange(0, BLOCK_N // 2)
    turns = is_row[:, None] & (pair < (HEADS.num_heads + HEADS.num_kv_heads) * HALF)[None, :]
    position = tl.load(positions + row, mask=is_row, other=0)
    position = tl.minimum(tl.maximum(position, 0), HEADS.max_positions - 1)
    angle = cos_sin + position[:, None] * HEADS.head_dim + (pair % HALF)[None, :]
    cos = tl.load(angle, mask=turns, other=1.0)
    sin = tl.load(angle + HALF, mask=turns, other=0.0)

    num_blocks = tl.where(is_noted(engine_state), pool_blocks(engine_state, HEADS.max_blocks), 0)
    offsets = pool_offsets(engine_state, HEADS.pool_offsets_byte)
    slot = tl.load(slot_mapping + row, mask=is_row, other=0)
    block = slot // HEADS.block_size
    is_stored = (block > 0) & (block < num_blocks)
    block = tl.where(is_stored, block, 0)
    place = (
        block_start(block, offsets, HEADS.block_elements, HEADS.num_pools, HEADS.blocks_per_pool)
        + layer.to(tl.int64) * (2 * PLANE)
        + (slot % HEADS.block_size) * HEADS.head_dim
    )
    return cos, sin, place, is_stored


@triton.jit
def store_heads(
    tile,
    places,
    row,
    first_column,
    end_column,
    num_rows,
    to_pool,
    query,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Turn a tile of queries, keys and values, and store it.

    Args:
        tile: float32 [BLOCK_M, BLOCK_N].
        places: what `read_places` returned for it.
        first_column: even.
        end_column: columns from there on are padding.
        to_pool: see `read_places`.
        query: see `kv_write`.
    """
    cos, sin, place, is_stored = places
    _, _, _, kv_cache, _, _ = to_pool
    SIZE: tl.constexpr = HEADS.head_dim
    KEYS: tl.constexpr = HEADS.num_heads * SIZE
    n = first_column + tl.arange(0, BLOCK_N)
    low, high = tl.split(tl.reshape(tile, [BLOCK_M, BLOCK_N // 2, 2]))
    turned = tl.join(low * cos - high * sin, high * cos + low * sin)
    tile = tl.reshape(turned, [BLOCK_M, BLOCK_N])
    if first_column < KEYS:
        mask = (row < num_rows)[:, None] & ((n < KEYS) & (n < end_column))[None, :]
        target = query + row.to(tl.int64)[:, None] * KEYS + n[None, :]
        tl.store(target, tile.to(query.dtype.element_ty), mask=mask)
    if first_column + BLOCK_N > KEYS:
        mask = is_stored[:, None] & ((n >= KEYS) & (n < end_column))[None, :]
        # Keys of all heads, then values of all heads, are the planes of a layer in this order.
        plane = (n - KEYS) // SIZE * (HEADS.block_size * SIZE)
        target = kv_cache + place[:, None] + (plane + (n - KEYS) % SIZE)[None, :]
        if kv_cache.dtype.element_ty.primitive_bitwidth == 8:
            tile = tl.clamp(tile, -LARGEST_E4M3, LARGEST_E4M3, tl.PropagateNan.ALL)
        tl.store(target, tile.to(kv_cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "layer"])
def kv_write(
    qkv,
    head_norms,
    cos_sin,
    positions,
    slot_mapping,
    kv_cache,
    engine_state,
    num_rows,
    layer,
    query,
    HEADS: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Norm one head of BLOCK_M tokens unless it is one of values, rotate it, and write K and V into the pool.

    Slots of the null block, and slots outside the pool, are skipped.

    Grid: (cdiv(num_rows, BLOCK_M), num_heads + 2 * num_kv_heads).

    Args:
        qkv: [num_rows, (num_heads + 2 * num_kv_heads) * head_dim], a token's queries, then keys, then values;
            the dimensions of queries and keys in pairs, as the module says.
        head_norms: [2, head_dim], weights of the RMSNorm of each query head and of each key head, in pairs.
        cos_sin: float32 [max_positions, head_dim], cosines of the head_dim / 2 frequencies, then sines.
        positions: int32 [num_rows].
        slot_mapping: int32 [num_rows], block * block_size + offset.
        kv_cache: the pool's first part, laid out as [block][layer][K, V][kv head][offset][head_dim]. In a
            pool of e4m3 the scale is 1, and what is beyond its range becomes its largest number.
        engine_state: int64, see `quire.execution.engine_state`.
        layer: which layer's K and V to write.
        query: out, [num_rows, num_heads, head_dim], rotated, in pairs.
        HEADS: a `Heads`.
        BLOCK_N: head_dim, rounded up to a power of two.
    """
    SIZE: tl.constexpr = HEADS.head_dim
    WIDTH: tl.constexpr = (HEADS.num_heads + 2 * HEADS.num_kv_heads) * SIZE
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_N)
    to_pool = (cos_sin, positions, slot_mapping, kv_cache, engine_state, layer)
    places = read_places(row, head * SIZE, num_rows, to_pool, HEADS, BLOCK_N)
    source = qkv + row.to(tl.int64)[:, None] * WIDTH + (head * SIZE + dim)[None, :]
    mask = (row < num_rows)[:, None] & (dim < SIZE)[None, :]
    tile = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if head < HEADS.num_heads + HEADS.num_kv_heads:
        gain = head_norms + tl.where(head < HEADS.num_heads, 0, SIZE) + dim
        scale = tl.rsqrt(tl.sum(tile * tile, 1) / SIZE + EPSILON)
        tile = tile * scale[:, None] * tl.load(gain, mask=dim < SIZE, other=0.0).to(tl.float32)[None, :]
    end = (head + 1) * SIZE
    store_heads(tile, places, row, head * SIZE, end, num_rows, to_pool, query, HEADS, BLOCK_M, BLOCK_N)
