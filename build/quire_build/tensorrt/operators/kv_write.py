"""Norming and rotating a step's queries and keys, and writing keys and values into the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire_build.tensorrt.kernels.kv_write import kv_write
from quire_build.tensorrt.operators.launch import MODEL, Arithmetic, Launch, Shape, in_order, power_of_two
from quire_build.tensorrt.operators.writes_kv import WritesKv

TOKENS_PER_PROGRAM = 8
"""Tokens of which a program takes one head."""


@dataclass(frozen=True)
class KvWrite(WritesKv):
    """Norm and rotate a step's queries and keys, put keys and values into the pool, pass the queries on.

    Inputs: qkv [T, (num_heads + 2 * num_kv_heads) * head_dim]; head_norms [2, head_dim], weights of RMSNorms
    over each query head and each key head; cos_sin float32 [max_positions, head_dim]; positions, slot_mapping
    int32 [T]; kv_cache, the pool's first part; engine_state. The dimensions of queries, keys and norms are in
    the order of `in_pairs`.
    Output: [T, num_heads, head_dim], in the same order.
    """

    epsilon: float

    INPUTS: ClassVar[tuple[str, ...]] = (
        "qkv",
        "head_norms",
        "cos_sin",
        "positions",
        "slot_mapping",
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
        """A program for one head of a few tokens."""
        rows = shapes[0][0]
        return Launch(
            kernel=kv_write,
            types=in_order(
                kv_write,
                self.kv_types
                | {"qkv": f"*{MODEL}", "head_norms": f"*{MODEL}", "num_rows": "i32", "query": f"*{MODEL}"},
            ),
            constants={
                "HEADS": self.heads,
                "EPSILON": self.epsilon,
                "BLOCK_M": TOKENS_PER_PROGRAM,
                "BLOCK_N": power_of_two(self.head_dim),
            },
            grid=(arithmetic.ceil_div(rows, TOKENS_PER_PROGRAM), self.width // self.head_dim),
            integers=(rows, self.layer),
        )
