"""Attention over the paged context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire_build.tensorrt.kernels.paged_attention import paged_attention
from quire_build.tensorrt.operators.launch import MODEL, Arithmetic, Launch, Shape, power_of_two

PROGRAMS_WANTED = 256
"""The context is split until about this many programs run: two on nearly each of a Hopper GPU's 132 SMs."""


@dataclass(frozen=True)
class PagedAttend:
    """Attend to the paged context, the step's own tokens included, which `KvWrite` has put there.

    Inputs: query [T, num_heads, head_dim]; block_tables int32 [S, B]; query_start_loc int32 [S + 1]; seq_lens
    int32 [S]; kv_cache, the pool. Outputs: [T, num_heads * head_dim], and two scratch tensors for splits.

    ``tile_rows`` is how many rows of queries share a key tile: 16 for decode rows, 64 where prefill prevails;
    either is right for any step. ``window`` is 0 or how many positions a query sees.
    """

    layer: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_blocks: int
    window: int
    scale: float
    tile_rows: int

    INPUTS: ClassVar[tuple[str, ...]] = ("query", "block_tables", "query_start_loc", "seq_lens", "kv_cache")
    NUM_OUTPUTS: ClassVar[int] = 3

    @property
    def num_tactics(self) -> int:
        """One way."""
        return 1

    @property
    def _tokens_per_tile(self) -> int:
        return self.tile_rows // (self.num_heads // self.num_kv_heads)

    @property
    def _most_splits(self) -> int:
        """Splits of a launch with one tile; tiles times splits never exceed it, unless nothing is split."""
        return max(1, PROGRAMS_WANTED // self.num_kv_heads)

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """The attended values, and scratch for as many rows as any split step has."""
        rows = self._tokens_per_tile * self._most_splits
        return (
            ((shapes[0][0], self.num_heads * self.head_dim), MODEL),
            ((rows, self.num_heads, self.head_dim), "fp32"),
            ((rows, self.num_heads), "fp32"),
        )

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """A program for each query tile, KV head and split."""
        tokens, (seqs, blocks_per_table) = shapes[0][0], shapes[1]
        tiles = seqs + (tokens - seqs) // self._tokens_per_tile
        splits = arithmetic.larger(arithmetic.constant(self._most_splits) // tiles, 1)
        return Launch(
            kernel=paged_attention,
            types={
                "query": f"*{MODEL}",
                "block_tables": "*i32",
                "query_start_loc": "*i32",
                "seq_lens": "*i32",
                "kv_cache": f"*{MODEL}",
                "num_seqs": "i32",
                "blocks_per_table": "i32",
                "num_splits": "i32",
                "layer": "i32",
                "out": f"*{MODEL}",
                "partial_out": "*fp32",
                "partial_lse": "*fp32",
            },
            constants={
                "HEAD_DIM": self.head_dim,
                "HEAD_DIM_PADDED": power_of_two(self.head_dim),
                "NUM_KV_HEADS": self.num_kv_heads,
                "GROUP": self.num_heads // self.num_kv_heads,
                "BLOCK_SIZE": self.block_size,
                "BLOCK_ELEMENTS": self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim,
                "MAX_BLOCKS": self.max_blocks,
                "WINDOW": self.window,
                "SCALE_LOG2": self.scale * math.log2(math.e),
                "BLOCK_M": self.tile_rows,
                "BLOCK_N": 64 if self.tile_rows == 16 else 32,
            },
            grid=(tiles, self.num_kv_heads, splits),
            integers=(seqs, blocks_per_table, splits, self.layer),
            num_stages=2,
        )
