"""What the operators share that rotate a step's heads and write keys and values into the pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.execution.engine_state import POOL_OFFSETS_BYTE
from quire_build.tensorrt.kernels.kv_write import Heads
from quire_build.tensorrt.operators.launch import pool_type
from quire_build.tensorrt.operators.pool_layer import PoolLayer


@dataclass(frozen=True)
class WritesKv(PoolLayer):
    """A `PoolLayer`, and the table that its heads are rotated by."""

    max_positions: int

    @property
    def width(self) -> int:
        """Columns of a token's queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def heads(self) -> Heads:
        """The same for a kernel."""
        return Heads(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_positions=self.max_positions,
            block_size=self.block_size,
            block_elements=self.block_elements,
            max_blocks=self.max_blocks,
            num_pools=self.num_pools,
            blocks_per_pool=self.blocks_per_pool,
            pool_offsets_byte=POOL_OFFSETS_BYTE,
        )

    @property
    def kv_types(self) -> dict[str, str]:
        """Types of a kernel's parameters that all this takes."""
        return {
            "cos_sin": "*fp32",
            "positions": "*i32",
            "slot_mapping": "*i32",
            "kv_cache": f"*{pool_type(self.kv_element_bytes)}",
            "engine_state": "*i64",
            "layer": "i32",
        }


def in_pairs(head_dim: int) -> Tensor:
    """The dimensions of a head, int64 [head_dim], those that RoPE turns together side by side.

    Hugging Face's LLaMA turns dimension d of the first half of a head with dimension d of the second.
    """
    return torch.arange(head_dim).view(2, -1).T.flatten()
