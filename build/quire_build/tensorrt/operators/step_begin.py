"""The beginning of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire.execution.engine_state import (
    EPOCH_BYTE,
    MAX_POOLS,
    POOL_HEADER_BYTES,
    POOL_OFFSETS_BYTE,
    SAMPLED_IDS_BYTE,
)
from quire_build.tensorrt.kernels.step_begin import step_begin
from quire_build.tensorrt.operators.launch import Arithmetic, Launch, Shape

TOKENS_PER_PROGRAM = 128


@dataclass(frozen=True)
class StepBegin:
    """Token ids of the step, and what the host wants to hear about the pool.

    Inputs: input_ids int32 [T], where -(r + 1) stands for the token that the step before sampled in row r;
    step int32 [STEP_ELEMENTS], see `padding.step_row`; engine_state; the pool's parts, the
    first one again where there are fewer. Outputs: token_ids int32 [T], all within the vocabulary; pool_info
    int32 [2], number of blocks and epoch; step_done int32 [1], the step's number.

    It also notes in engine_state how large the step is and where the pool's parts are, for every operator
    after it.
    """

    vocab_size: int
    num_pools: int
    kv_element_bytes: int
    max_blocks: int
    max_num_seqs: int

    INPUTS: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "step",
        "engine_state",
        *(f"kv_cache_{i}" for i in range(MAX_POOLS)),
    )
    NUM_OUTPUTS: ClassVar[int] = 3

    @property
    def num_tactics(self) -> int:
        """One way."""
        return 1

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """Token ids, the pool's number of blocks and epoch, the step's number."""
        return (((shapes[0][0],), "i32"), ((2,), "i32"), ((1,), "i32"))

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """Programs for all tokens; the first one does the rest."""
        tokens = shapes[0][0]
        return Launch(
            kernel=step_begin,
            types={
                "input_ids": "*i32",
                "step": "*i32",
                "engine_state": "*i64",
                **{f"kv_cache_{i}": "*i64" for i in range(MAX_POOLS)},
                "num_tokens": "i32",
                "token_ids": "*i32",
                "pool_info": "*i32",
                "step_done": "*i32",
            },
            constants={
                "VOCAB_SIZE": self.vocab_size,
                "MAX_BLOCKS": self.max_blocks,
                "MAX_NUM_SEQS": self.max_num_seqs,
                "NUM_POOLS": self.num_pools,
                "KV_ELEMENT_BYTES": self.kv_element_bytes,
                "POOL_HEADER_BYTES": POOL_HEADER_BYTES,
                "EPOCH_BYTE": EPOCH_BYTE,
                "POOL_OFFSETS_BYTE": POOL_OFFSETS_BYTE,
                "SAMPLED_IDS_BYTE": SAMPLED_IDS_BYTE,
                "BLOCK_T": TOKENS_PER_PROGRAM,
            },
            grid=(arithmetic.ceil_div(tokens, TOKENS_PER_PROGRAM),),
            integers=(tokens,),
            num_warps=4,
        )
