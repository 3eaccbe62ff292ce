"""Rotating a step's queries and keys, and writing keys and values into the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire.execution.engine_state import POOL_OFFSETS_BYTE
from quire_build.tensorrt.kernels.kv_write import kv_write
from quire_build.tensorrt.operators.launch import MODEL, Arithmetic, Launch, Shape, pool_type, power_of_two


@dataclass(frozen=True)
class KvWrite:
    """Rotate a step's queries and keys, put keys and values into the pool, pass the queries on.

    Inputs: qkv [T, (num_heads + 2 * num_kv_heads) * head_dim]; cos_sin float32 [max_positions, head_dim];
    positions, slot_mapping int32 [T]; head_norms [2, head_dim], weights of RMSNorms over each query head and
    each key head, read when ``head_normed``; kv_cache, the pool's first part; engine_state.
    Output: [T, num_heads, head_dim].
    """

    layer: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_blocks: int
    num_pools: int
    blocks_per_pool: int
    kv_element_bytes: int
    max_positions: int
    head_normed: int
    epsilon: float

    INPUTS: ClassVar[tuple[str, ...]] = (
        "qkv",
        "cos_sin",
        "positions",
        "slot_mapping",
        "head_norms",
        "kv_cache",
        "engine_state",
    )
    NUM_OUTPUTS: ClassVar[int] = 1

    @property
    def num_tactics(self) -> int:
        """One way."""
        return 1

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """The rotated queries."""
        return (((shapes[0][0], self.num_heads, self.head_dim), MODEL),)

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """A program for each token and up to 16 of its heads."""
        heads = self.num_heads + 2 * self.num_kv_heads
        heads_per_program = min(16, power_of_two(heads))
        return Launch(
            kernel=kv_write,
            types={
                "qkv": f"*{MODEL}",
                "cos_sin": "*fp32",
                "positions": "*i32",
                "slot_mapping": "*i32",
                "head_norms": f"*{MODEL}",
                "kv_cache": f"*{pool_type(self.kv_element_bytes)}",
                "engine_state": "*i64",
                "layer": "i32",
                "query": f"*{MODEL}",
            },
            constants={
                "HEAD_DIM": self.head_dim,
                "HALF_PADDED": power_of_two(self.head_dim // 2),
                "NUM_HEADS": self.num_heads,
                "NUM_KV_HEADS": self.num_kv_heads,
                "BLOCK_SIZE": self.block_size,
                "BLOCK_ELEMENTS": self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim,
                "MAX_BLOCKS": self.max_blocks,
                "NUM_POOLS": self.num_pools,
                "BLOCKS_PER_POOL": self.blocks_per_pool,
                "POOL_OFFSETS_BYTE": POOL_OFFSETS_BYTE,
                "MAX_POSITIONS": self.max_positions,
                "HEADS_PER_PROGRAM": heads_per_program,
                "HEAD_NORM": bool(self.head_normed),
                "EPSILON": self.epsilon,
            },
            grid=(shapes[0][0], -(-heads // heads_per_program)),
            integers=(self.layer,),
        )
