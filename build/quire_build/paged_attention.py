"""`quire::paged_attention`: the one operator that the decoder needs beyond standard ones.

The torch implementation here is the operator's specification: each runtime brings its own kernel for the
ONNX operator `PagedAttention` of domain `quire` and is tested against it. Two forms: the functional one is
what `torch.export` can trace, the in-place one is what runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DOMAIN = "quire"
DOMAIN_VERSION = 1
OPERATOR = "PagedAttention"


def paged_attention_in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    num_heads: int,
    num_kv_heads: int,
    sliding_window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the step's keys and values into the cache, then let every query attend to its sequence.

    T tokens of S sequences, sequence after sequence. Every write comes before any read, because sequences
    may share blocks that are filled in this very step.

    Args:
        query: [T, num_heads * head_dim], rotated.
        key: [T, num_kv_heads * head_dim], rotated.
        value: [T, num_kv_heads * head_dim].
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim]; written in place, rounded to its type.
        value_cache: the same.
        slot_mapping: int32 [T], block id * block_size + offset of each token.
        block_tables: int32 [S, B], block ids of each sequence.
        query_start_loc: int32 [S + 1], where each sequence's tokens start.
        seq_lens: int32 [S], tokens of each sequence in the cache after the write; its last ones are the
            step's.
        scale: what the scores are multiplied with before the softmax.
        num_heads: heads of the query; consecutive ones share a KV head.
        num_kv_heads: heads of key and value.
        sliding_window: positions that a query sees, its own included; 0 for all up to its own.

    Returns:
        [T, num_heads * head_dim], and both caches.
    """
    num_tokens = query.shape[0]
    head_dim = query.shape[1] // num_heads
    block_size = key_cache.shape[2]
    blocks, offsets = slot_mapping.long() // block_size, slot_mapping.long() % block_size
    key_cache[blocks, :, offsets] = _saturated(key, key_cache.dtype).view(num_tokens, num_kv_heads, head_dim)
    value_cache[blocks, :, offsets] = _saturated(value, value_cache.dtype).view(
        num_tokens, num_kv_heads, head_dim
    )

    output = torch.empty_like(query)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for sequence, length in enumerate(lengths):
        start, end = starts[sequence], starts[sequence + 1]
        table = block_tables[sequence, : -(-length // block_size)].long()
        keys = key_cache[table].to(query.dtype).transpose(0, 1).flatten(1, 2)[:, :length]
        values = value_cache[table].to(query.dtype).transpose(0, 1).flatten(1, 2)[:, :length]
        queries = query[start:end].view(end - start, num_heads, head_dim).transpose(0, 1)
        visible = _visible(end - start, length, sliding_window, query.device)
        attended = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=visible, scale=scale, enable_gqa=True
        )
        output[start:end] = attended[0].transpose(0, 1).flatten(1)
    return output, key_cache, value_cache


def _saturated(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another floating-point type; what is beyond its range becomes the largest number."""
    limit = torch.finfo(dtype).max
    return tensor if tensor.dtype == dtype else tensor.clamp(-limit, limit).to(dtype)


def _visible(num_queries: int, length: int, sliding_window: int, device: torch.device) -> Tensor:
    """Bool [num_queries, length]: which positions each of a sequence's last tokens sees."""
    positions = torch.arange(length, device=device)
    own = positions[length - num_queries :, None]
    visible = positions <= own
    if sliding_window:
        visible &= positions > own - sliding_window
    return visible


@torch.library.custom_op(f"{DOMAIN}::paged_attention", mutates_args=())
def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    num_heads: int,
    num_kv_heads: int,
    sliding_window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`paged_attention_in_place` on copies of the caches: a function of its inputs alone."""
    return paged_attention_in_place(
        query,
        key,
        value,
        key_cache.clone(),
        value_cache.clone(),
        slot_mapping,
        block_tables,
        query_start_loc,
        seq_lens,
        scale,
        num_heads,
        num_kv_heads,
        sliding_window,
    )


@paged_attention.register_fake
def _shapes(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key_cache), torch.empty_like(value_cache)
