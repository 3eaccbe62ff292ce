"""Attention over the paged context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire.execution.engine_state import COUNTERS_BYTE, POOL_OFFSETS_BYTE
from quire_build.tensorrt.kernels.paged_attention import paged_attention
from quire_build.tensorrt.operators.launch import MODEL, Arithmetic, Launch, Shape, pool_type, power_of_two
from quire_build.tensorrt.operators.pool_layer import PoolLayer

PROGRAMS_WANTED = 264
"""Few tiles are split until about this many programs run: two on each of a Hopper GPU's 132 SMs."""
MAX_SPLITS = 64
MANY_SPLITS = 6
"""Splits that even many tiles may have, where a context is so long that others would wait for it. Each costs
every tile a program, if only to see that there is nothing to do."""
SPLIT_PROGRAMS = 8192
"""Programs of a launch that splits many tiles, at most: 16,384, most with nothing to do, cost 6 to 10%. A
tile and KV head has a counter, and two splits at least, so half as many counters are enough."""
SPLIT_ROWS = 1024
"""Tokens times splits, at most, for which scratch is kept."""
LONG_SPLIT = 2048
"""Keys of one split that is worth cutting again for the sake of balance."""
WHOLE = 256
"""Keys that one program reads sooner than two agree on who combines what they read."""
MIN_SPLIT = 128
"""Keys, the fewest worth a split of a longer context."""
MAX_REGISTERS = 128
"""Of a thread: four programs then run on one SM. Heads too long for full tiles would not fit."""


@dataclass(frozen=True)
class PagedAttend(PoolLayer):
    """Attend to the paged context, the step's own tokens included, which are there already.

    Inputs: query [T, num_heads, head_dim]; block_tables int32 [S, B]; query_start_loc int32 [S + 1]; seq_lens
    int32 [S]; kv_cache, the pool's first part; engine_state. Outputs: [T, num_heads * head_dim], and two
    scratch tensors for splits.

    ``window`` is 0 or how many positions a query sees.
    """

    window: int
    scale: float

    INPUTS: ClassVar[tuple[str, ...]] = (
        "query",
        "block_tables",
        "query_start_loc",
        "seq_lens",
        "kv_cache",
        "engine_state",
    )
    NUM_OUTPUTS: ClassVar[int] = 3

    @property
    def num_tactics(self) -> int:
        """One way, which takes decode rows and chunks as each wants to be taken.

        TensorRT would choose between several with inputs that are no step at all.
        """
        return 1

    @property
    def _group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def _head_dim_padded(self) -> int:
        """The matrix unit takes 16 numbers at least, and of e4m3 every second one by itself."""
        return max(32 if self.kv_element_bytes == 1 else 16, power_of_two(self.head_dim))

    @property
    def _rows(self) -> int:
        """Of a full tile; where a row is long, registers and shared memory have no room for many."""
        return max(64 if self._head_dim_padded <= 128 else 16, power_of_two(self._group))

    @property
    def _few_splits(self) -> int:
        """Splits of a launch with one tile."""
        return min(max(1, PROGRAMS_WANTED // self.num_kv_heads), MAX_SPLITS)

    @property
    def _split_rows(self) -> int:
        """Tokens times splits, at most, of any launch with splits.

        Half of it is the most tokens, and so the most tiles, that are split: each has a counter.
        """
        return min(SPLIT_ROWS, SPLIT_PROGRAMS // self.num_kv_heads)

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """The attended values, and scratch for as many rows as any split step has."""
        rows = max(self._split_rows, self._rows // self._group * self._few_splits)
        return (
            ((shapes[0][0], self.num_heads * self.head_dim), MODEL),
            ((rows, self.num_heads, self.head_dim), "fp32"),
            ((rows, self.num_heads), "fp32"),
        )

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """A program for each query tile, KV head and split."""
        tokens, (seqs, blocks_per_table) = shapes[0][0], shapes[1]
        tiles = seqs + (tokens - seqs) // (self._rows // self._group)
        few_splits = arithmetic.larger(arithmetic.constant(self._few_splits) // tiles, 1)
        many_splits = arithmetic.constant(self._split_rows) // tokens
        many_splits = many_splits - arithmetic.larger(many_splits - MANY_SPLITS, 0)
        # The larger of the two, in what symbolic arithmetic has.
        splits = few_splits + arithmetic.larger(many_splits - few_splits, 0)
        padded = self._head_dim_padded
        group = power_of_two(self._group)
        combined_rows = min(8, group)
        # Three small fetches on their way are better than two large ones; numbers of one byte are small.
        few_keys, few_stages = (64, 2) if self.kv_element_bytes == 1 else (32, 3)
        return Launch(
            kernel=paged_attention,
            types={
                "query": f"*{MODEL}",
                "block_tables": "*i32",
                "query_start_loc": "*i32",
                "seq_lens": "*i32",
                "kv_cache": f"*{pool_type(self.kv_element_bytes)}",
                "engine_state": "*i64",
                "num_tokens": "i32",
                "num_seqs": "i32",
                "blocks_per_table": "i32",
                "num_splits": "i32",
                "few_splits": "i32",
                "layer": "i32",
                "out": f"*{MODEL}",
                "partial_out": "*fp32",
                "partial_lse": "*fp32",
            },
            constants={
                "HEAD_DIM": self.head_dim,
                "HEAD_DIM_PADDED": padded,
                "NUM_KV_HEADS": self.num_kv_heads,
                "GROUP": self._group,
                "BLOCK_SIZE": self.block_size,
                "BLOCK_ELEMENTS": self.block_elements,
                "MAX_BLOCKS": self.max_blocks,
                "NUM_POOLS": self.num_pools,
                "BLOCKS_PER_POOL": self.blocks_per_pool,
                "POOL_OFFSETS_BYTE": POOL_OFFSETS_BYTE,
                "COUNTERS_BYTE": COUNTERS_BYTE,
                "WINDOW": self.window,
                "SCALE_LOG2": self.scale * math.log2(math.e),
                "ROWS": self._rows,
                "ROW_KEYS": max(16, min(32, 4096 // padded)),
                "ROW_STAGES": 2,
                "FEW_ROWS": max(16, group),
                "FEW_KEYS": max(16, min(few_keys, 128 * few_keys // padded)),
                "FEW_STAGES": few_stages,
                "WHOLE": WHOLE,
                "MIN_SPLIT": MIN_SPLIT,
                "LONG_SPLIT": LONG_SPLIT,
                "MAX_SPLITS": MAX_SPLITS,
                "COMBINED_ROWS": combined_rows,
                "COMBINED_SPLITS": 32 // combined_rows,
            },
            grid=(tiles, self.num_kv_heads, splits),
            integers=(tokens, seqs, blocks_per_table, splits, few_splits, self.layer),
            num_stages=2,
            max_registers=MAX_REGISTERS if padded <= 128 else None,
        )
