"""Attention over the paged context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire.execution.engine_state import COUNTERS_BYTE, POOL_OFFSETS_BYTE
from quire_build.tensorrt.kernels.paged_attention import Attention, paged_attention
from quire_build.tensorrt.operators.assign_splits import WHOLE, num_spare, tile_rows, tokens_per_tile
from quire_build.tensorrt.operators.launch import MODEL, Arithmetic, Launch, Shape, pool_type, power_of_two
from quire_build.tensorrt.operators.pool_layer import PoolLayer

PROGRAMS_AT_A_TIME = 528
"""That many run at once, four on each of a Hopper GPU's 132 SMs; fewer where MAX_REGISTERS is no limit."""
MAX_REGISTERS = 128
"""Of a thread: four programs then run on one SM. Heads too long for full tiles would not fit."""


@dataclass(frozen=True)
class PagedAttend(PoolLayer):
    """Attend to the paged context, the step's own tokens included, which are there already.

    Inputs: query [T, num_heads, head_dim]; block_tables int32 [S, B]; query_start_loc int32 [S + 1]; seq_lens
    int32 [S]; spare_tiles and seq_spares, see `AssignSplits`; kv_cache, the pool's first part; engine_state.
    Outputs: [T, num_heads * head_dim], and two scratch tensors for splits.

    ``window`` is 0 or how many positions a query sees.
    """

    window: int
    scale: float

    INPUTS: ClassVar[tuple[str, ...]] = (
        "query",
        "block_tables",
        "query_start_loc",
        "seq_lens",
        "spare_tiles",
        "seq_spares",
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
    def _tokens_per_tile(self) -> int:
        return tokens_per_tile(self.head_dim, self._group)

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """The attended values, and scratch for a first split of each tile besides its spare ones."""
        rows = 2 * num_spare(self.num_kv_heads) * self._tokens_per_tile
        return (
            ((shapes[0][0], self.num_heads * self.head_dim), MODEL),
            ((rows, self.num_heads, self.head_dim), "fp32"),
            ((rows, self.num_heads), "fp32"),
        )

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """A program for each query tile or spare split, and KV head."""
        tokens, (seqs, blocks_per_table) = shapes[0][0], shapes[1]
        spare = num_spare(self.num_kv_heads)
        tiles = seqs + (tokens - seqs) // self._tokens_per_tile
        padded = self._head_dim_padded
        group = power_of_two(self._group)
        combined_rows = min(8, group)
        few_rows = max(16, group)
        # Three small fetches on their way are better than two large ones; numbers of one byte are small.
        few_keys, few_stages = (64, 2) if self.kv_element_bytes == 1 else (32, 3)
        return Launch(
            kernel=paged_attention,
            types={
                "query": f"*{MODEL}",
                "block_tables": "*i32",
                "query_start_loc": "*i32",
                "seq_lens": "*i32",
                "spare_tiles": "*i32",
                "seq_spares": "*i32",
                "kv_cache": f"*{pool_type(self.kv_element_bytes)}",
                "engine_state": "*i64",
                "num_tokens": "i32",
                "num_seqs": "i32",
                "blocks_per_table": "i32",
                "layer": "i32",
                "out": f"*{MODEL}",
                "partial_out": "*fp32",
                "partial_lse": "*fp32",
            },
            constants={
                "ATTENTION": Attention(
                    num_kv_heads=self.num_kv_heads,
                    group=self._group,
                    head_dim=self.head_dim,
                    head_dim_padded=padded,
                    window=self.window,
                    scale_log2=self.scale * math.log2(math.e),
                    block_size=self.block_size,
                    block_elements=self.block_elements,
                    max_blocks=self.max_blocks,
                    num_pools=self.num_pools,
                    blocks_per_pool=self.blocks_per_pool,
                    pool_offsets_byte=POOL_OFFSETS_BYTE,
                    counters_byte=COUNTERS_BYTE,
                ),
                "ROWS": tile_rows(self.head_dim, self._group),
                "ROW_KEYS": max(16, min(32, 4096 // padded)),
                "ROW_STAGES": 2,
                "FEW_ROWS": few_rows,
                "FEW_KEYS": max(16, min(few_keys, 128 * few_keys // padded)),
                "FEW_STAGES": few_stages,
                "AT_A_TIME": PROGRAMS_AT_A_TIME,
                "MOST_HEADS": power_of_two(few_rows // self._group + 1) // 2,
                "WHOLE": WHOLE,
                "NUM_SPARE": spare,
                "COMBINED_ROWS": combined_rows,
                "COMBINED_SPLITS": 32 // combined_rows,
            },
            grid=((tiles + spare) * self.num_kv_heads,),
            integers=(tokens, seqs, blocks_per_table, self.layer),
            num_stages=2,
            max_registers=MAX_REGISTERS if padded <= 128 else None,
        )
