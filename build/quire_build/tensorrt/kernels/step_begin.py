"""What a step needs before its first layer: token ids, and what the host wants to hear about the pool."""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803, N806
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quire_build.tensorrt.kernels.step_size import ROWS, TOKENS, note


@triton.jit(do_not_specialize=["num_tokens"])
def step_begin(
    input_ids,
    step,
    engine_state,
    kv_cache_0,
    kv_cache_1,
    kv_cache_2,
    kv_cache_3,
    kv_cache_4,
    kv_cache_5,
    kv_cache_6,
    kv_cache_7,
    num_tokens,
    token_ids,
    pool_info,
    step_done,
    VOCAB_SIZE: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    MAX_NUM_SEQS: tl.constexpr,
    NUM_POOLS: tl.constexpr,
    KV_ELEMENT_BYTES: tl.constexpr,
    POOL_HEADER_BYTES: tl.constexpr,
    EPOCH_BYTE: tl.constexpr,
    POOL_OFFSETS_BYTE: tl.constexpr,
    SAMPLED_IDS_BYTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Replace ids that stand for sampled tokens, and note the step, its size, and the pool's epoch and parts.

    Grid: (cdiv(num_tokens, BLOCK_T),); the first program also does what is not about tokens.

    Args:
        input_ids: int32 [num_tokens]; -(r + 1) stands for the token that the step before sampled in row r.
        step: int32 [5], the step's number, the epoch that a new pool gets, STEP_MARK, and how many tokens and
            rows of logits the step has.
        engine_state: int64, see `quire.execution.engine_state`.
        kv_cache_0: and the others, the pool's parts; only their addresses are used, of the first NUM_POOLS.
        token_ids: out, int32 [num_tokens], all within the vocabulary.
        pool_info: out, int32 [2], number of blocks and epoch.
        step_done: out, int32 [1], the step's number.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = token < num_tokens
    given = tl.load(input_ids + token, mask=mask, other=0)
    row = tl.minimum(tl.maximum(-(given + 1), 0), MAX_NUM_SEQS - 1)
    sampled_ids = engine_state.to(tl.pointer_type(tl.int32), bitcast=True) + SAMPLED_IDS_BYTE // 4
    sampled = tl.load(sampled_ids + row, mask=mask & (given < 0), other=0)
    chosen = tl.where(given < 0, sampled, given)
    tl.store(token_ids + token, tl.minimum(tl.maximum(chosen, 0), VOCAB_SIZE - 1), mask=mask)

    if tl.program_id(0) == 0:
        stored_epoch = engine_state.to(tl.pointer_type(tl.int32), bitcast=True) + EPOCH_BYTE // 4
        epoch = tl.load(stored_epoch)
        epoch = tl.where(epoch == 0, tl.load(step + 1), epoch)
        tl.store(stored_epoch, epoch)
        num_blocks = tl.minimum(tl.maximum(tl.load(engine_state), 0), MAX_BLOCKS)
        tl.store(pool_info, num_blocks.to(tl.int32))
        tl.store(pool_info + 1, epoch)
        tl.store(step_done, tl.load(step))
        mark = tl.load(step + 2)
        note(engine_state, TOKENS, mark, tl.load(step + 3))
        note(engine_state, ROWS, mark, tl.load(step + 4))

        offsets = engine_state + POOL_OFFSETS_BYTE // 8
        first = kv_cache_0.to(tl.int64, bitcast=True)
        tl.store(offsets, 0)
        HEADER: tl.constexpr = POOL_HEADER_BYTES
        UNIT: tl.constexpr = KV_ELEMENT_BYTES
        if NUM_POOLS > 1:
            tl.store(offsets + 1, (kv_cache_1.to(tl.int64, bitcast=True) + HEADER - first) // UNIT)
        if NUM_POOLS > 2:
            tl.store(offsets + 2, (kv_cache_2.to(tl.int64, bitcast=True) + HEADER - first) // UNIT)
        if NUM_POOLS > 3:
            tl.store(offsets + 3, (kv_cache_3.to(tl.int64, bitcast=True) + HEADER - first) // UNIT)
        if NUM_POOLS > 4:
            tl.store(offsets + 4, (kv_cache_4.to(tl.int64, bitcast=True) + HEADER - first) // UNIT)
        if NUM_POOLS > 5:
            tl.store(offsets + 5, (kv_cache_5.to(tl.int64, bitcast=True) + HEADER - first) // UNIT)
        if NUM_POOLS > 6:
            tl.store(offsets + 6, (kv_cache_6.to(tl.int64, bitcast=True) + HEADER - first) // UNIT)
        if NUM_POOLS > 7:
            tl.store(offsets + 7, (kv_cache_7.to(tl.int64, bitcast=True) + HEADER - first) // UNIT)
