"""Norm and rotate queries and keys, put keys and values where the step's slots say."""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quire_build.quantization import LARGEST
from quire_build.tensorrt.kernels.pool import block_start, pool_blocks, pool_offsets

LARGEST_E4M3 = tl.constexpr(LARGEST["fp8"])


@triton.jit(do_not_specialize=["layer"])
def kv_write(
    qkv,
    cos_sin,
    positions,
    slot_mapping,
    head_norms,
    kv_cache,
    engine_state,
    layer,
    query,
    HEAD_DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    NUM_POOLS: tl.constexpr,
    BLOCKS_PER_POOL: tl.constexpr,
    POOL_OFFSETS_BYTE: tl.constexpr,
    MAX_POSITIONS: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Apply RoPE (halves, as in Hugging Face's LLaMA) and write K and V of one layer into the pool.

    Slots of the null block, and slots outside the pool, are skipped.

    Grid: (T, cdiv(NUM_HEADS + 2 * NUM_KV_HEADS, HEADS_PER_PROGRAM)).

    Args:
        qkv: [T, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM], a token's queries, then keys, then values.
        cos_sin: float32 [MAX_POSITIONS, HEAD_DIM], cosines of the HEAD_DIM / 2 frequencies, then sines.
        positions: int32 [T].
        slot_mapping: int32 [T], block * BLOCK_SIZE + offset.
        head_norms: [2, HEAD_DIM], weights of the RMSNorm of each query head and of each key head; not read
            unless HEAD_NORM.
        kv_cache: the pool's first part, laid out as [block][layer][K, V][kv head][offset][HEAD_DIM]. In a
            pool of e4m3 the scale is 1, and what is beyond its range becomes its largest number.
        engine_state: int64, see `quire.execution.engine_state`.
        layer: which layer's K and V to write.
        query: out, [T, NUM_HEADS, HEAD_DIM], rotated.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    KEYS_END: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    HEADS: tl.constexpr = KEYS_END + NUM_KV_HEADS
    PLANE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM

    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_PER_PROGRAM + tl.arange(0, HEADS_PER_PROGRAM)
    dim = tl.arange(0, HALF_PADDED)
    mask = (head < HEADS)[:, None] & (dim < HALF)[None, :]

    source = qkv + token * (HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dim[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)

    is_value = (head >= KEYS_END)[:, None]
    if HEAD_NORM:
        mean_square = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM
        scale = tl.where(is_value, 1.0, tl.rsqrt(mean_square + EPSILON)[:, None])
        gain = head_norms + tl.where(head < NUM_HEADS, 0, HEAD_DIM)[:, None] + dim[None, :]
        low = low * scale * tl.where(is_value, 1.0, tl.load(gain, mask=mask, other=0.0).to(tl.float32))
        high = (
            high * scale * tl.where(is_value, 1.0, tl.load(gain + HALF, mask=mask, other=0.0).to(tl.float32))
        )

    position = tl.minimum(tl.maximum(tl.load(positions + token), 0), MAX_POSITIONS - 1)
    cos = tl.load(cos_sin + position * HEAD_DIM + dim, mask=dim < HALF, other=1.0)
    sin = tl.load(cos_sin + position * HEAD_DIM + HALF + dim, mask=dim < HALF, other=0.0)
    rotated_low = tl.where(is_value, low, low * cos[None, :] - high * sin[None, :])
    rotated_high = tl.where(is_value, high, high * cos[None, :] + low * sin[None, :])

    is_query = (head < NUM_HEADS)[:, None]
    target = query + token * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, rotated_low.to(query.dtype.element_ty), mask=mask & is_query)
    tl.store(target + HALF, rotated_high.to(query.dtype.element_ty), mask=mask & is_query)

    num_blocks = pool_blocks(engine_state, MAX_BLOCKS)
    offsets = pool_offsets(engine_state, POOL_OFFSETS_BYTE)
    slot = tl.load(slot_mapping + token)
    block = slot // BLOCK_SIZE
    target_block = block + tl.zeros_like(
        head
    )  # one per head: the interpreter splats integers rightly, masks not
    stored = mask & ((head >= NUM_HEADS) & (target_block > 0) & (target_block < num_blocks))[:, None]
    plane = tl.where(head < KEYS_END, 0, PLANE)
    kv_head = tl.where(head < KEYS_END, head - NUM_HEADS, head - KEYS_END)
    place = (
        kv_cache
        + block_start(target_block, offsets, BLOCK_ELEMENTS, NUM_POOLS, BLOCKS_PER_POOL)[:, None]
        + layer.to(tl.int64) * (2 * PLANE)
        + (plane + kv_head * (BLOCK_SIZE * HEAD_DIM))[:, None]
        + (slot % BLOCK_SIZE) * HEAD_DIM
        + dim[None, :]
    )
    if kv_cache.dtype.element_ty.primitive_bitwidth == 8:
        rotated_low = tl.clamp(rotated_low, -LARGEST_E4M3, LARGEST_E4M3, tl.PropagateNan.ALL)
        rotated_high = tl.clamp(rotated_high, -LARGEST_E4M3, LARGEST_E4M3, tl.PropagateNan.ALL)
    tl.store(place, rotated_low.to(kv_cache.dtype.element_ty), mask=stored)
    tl.store(place + HALF, rotated_high.to(kv_cache.dtype.element_ty), mask=stored)
