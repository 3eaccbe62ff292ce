"""Where a block of the KV pool lies, for the kernels that read and write it."""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool_blocks(engine_state, MAX_BLOCKS: tl.constexpr):
    """Blocks in the pool, the null block included, as int32: never more than the plan was built for."""
    return tl.minimum(tl.maximum(tl.load(engine_state), 0), MAX_BLOCKS).to(tl.int32)


@triton.jit
def pool_offsets(engine_state, POOL_OFFSETS_BYTE: tl.constexpr):
    """Where each part of the pool starts, in elements from the first one's pointer; see `step_begin`.

    All of them, read before any block is looked up: a read that depended on the block would have to be waited
    for. Those that `block_start` does not use are not read at all.
    """
    first = engine_state + POOL_OFFSETS_BYTE // 8
    return (
        tl.load(first),
        tl.load(first + 1),
        tl.load(first + 2),
        tl.load(first + 3),
        tl.load(first + 4),
        tl.load(first + 5),
        tl.load(first + 6),
        tl.load(first + 7),
    )


@triton.jit
def block_start(
    block, offsets, BLOCK_ELEMENTS: tl.constexpr, NUM_POOLS: tl.constexpr, BLOCKS_PER_POOL: tl.constexpr
):
    """Elements from the first pool's pointer to a block, as int64; the block must be one of the pool's."""
    if NUM_POOLS == 1:
        start = block.to(tl.int64) * BLOCK_ELEMENTS
    else:
        start = (block % BLOCKS_PER_POOL).to(tl.int64) * BLOCK_ELEMENTS
        for pool in tl.static_range(1, NUM_POOLS):
            start += tl.where(block // BLOCKS_PER_POOL == pool, offsets[pool], 0)
    # Pools and blocks start at multiples of 16 elements; unless the compiler knows, it reads bit by bit.
    return tl.multiple_of(start, 16)
