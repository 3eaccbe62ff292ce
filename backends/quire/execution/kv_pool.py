"""How many blocks the KV pool gets."""

from __future__ import annotations

from quire.errors import SettingsError
from quire.execution.machine import available_memory_bytes
from quire.execution.manifest import Manifest

FREE_MEMORY_FRACTION = 0.5
"""Share of the free memory that the pool takes at most when its size is not set."""
DEFAULT_CAP_BYTES = 1 << 30
"""A pool whose size is not set stays below this, unless one request of full length needs more."""


def num_pool_blocks(manifest: Manifest, kv_cache_bytes: int, max_model_len: int) -> int:
    """Blocks of a pool, the null block included, that can hold at least one request of full length.

    Args:
        manifest: of the engine that the pool is for.
        kv_cache_bytes: size of the pool; 0 takes a share of the free memory.
        max_model_len: tokens of one request.

    Raises:
        SettingsError: the pool would be too small for one request of `max_model_len` tokens.
    """
    free_bytes = available_memory_bytes()
    blocks_of_one_request = 1 + -(-max_model_len // manifest.block_size)
    needed_bytes = blocks_of_one_request * manifest.kv_bytes_per_block
    if kv_cache_bytes:
        allowed_bytes, origin = kv_cache_bytes, f"kv_cache_bytes is {kv_cache_bytes}"
    else:
        share = int(free_bytes * FREE_MEMORY_FRACTION)
        allowed_bytes = min(share, max(DEFAULT_CAP_BYTES, needed_bytes))
        origin = f"half of the free memory is {share} bytes"
    if needed_bytes > allowed_bytes:
        raise SettingsError(
            f"{origin}, but one request of max_model_len {max_model_len} tokens takes {needed_bytes} bytes "
            "of KV cache; raise --kv-cache-bytes or lower --max-model-len"
        )
    if allowed_bytes > free_bytes:
        raise SettingsError(
            f"kv_cache_bytes is {kv_cache_bytes}, but only {free_bytes} bytes of memory are free"
        )
    return allowed_bytes // manifest.kv_bytes_per_block
