"""What the operators share that read or write one layer of the pool."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolLayer:
    """One layer's heads, and its place in the pool."""

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

    @property
    def block_elements(self) -> int:
        """Elements of a block over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim
