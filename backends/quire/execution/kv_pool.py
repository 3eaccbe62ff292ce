"""How many blocks the KV pool gets, in main memory and in a GPU's."""

from __future__ import annotations

from quire.errors import SettingsError
from quire.execution.machine import available_memory_bytes
from quire.execution.manifest import Manifest

FREE_MEMORY_FRACTION = 0.5
"""Share of the free memory that the pool takes at most when its size is not set."""
DEFAULT_CAP_BYTES = 1 << 30
"""A pool whose size is not set stays below this, unless one request of full length needs more."""


def num_pool_blocks(manifest: Manifest, kv_cache_bytes: int, max_model_len: int) -> int:
    """Blocks of a pool in main memory, the null block included; it can hold one request of full length.

    Args:
        manifest: of the engine that the pool is for.
        kv_cache_bytes: size of the pool; 0 takes a share of the free memory.
        max_model_len: tokens of one request.

    Raises:
        SettingsError: the pool would be too small for one request of `max_model_len` tokens.
    """
    free_bytes = available_memory_bytes()
    if kv_cache_bytes:
        return _blocks_of_set_size(manifest, kv_cache_bytes, free_bytes, max_model_len)
    share = int(free_bytes * FREE_MEMORY_FRACTION)
    allowed_bytes = min(share, max(DEFAULT_CAP_BYTES, _request_bytes(manifest, max_model_len)))
    origin = f"half of the free memory is {share} bytes"
    return _blocks(manifest, allowed_bytes, max_model_len, origin, "raise --kv-cache-bytes")


def num_gpu_pool_blocks(
    manifest: Manifest,
    kv_cache_bytes: int,
    max_model_len: int,
    *,
    total_bytes: int,
    free_bytes: int,
    reserved_bytes: int,
    utilization_percent: int,
    max_blocks: int,
) -> int:
    """Blocks of a pool in a GPU's memory, the null block included; it can hold one request of full length.

    Args:
        manifest: of the engine that the pool is for.
        kv_cache_bytes: size of the pool; 0 takes what `utilization_percent` leaves.
        max_model_len: tokens of one request.
        total_bytes: the GPU's memory.
        free_bytes: what is free of it, with everything loaded but the pool.
        reserved_bytes: what will be taken of it after the pool.
        utilization_percent: share of the GPU's memory that may be in use in the end, other processes' use
            included.
        max_blocks: that the plan can address.

    Raises:
        SettingsError: the pool would be too small for one request of `max_model_len` tokens, or too large.
    """
    free_bytes = max(0, free_bytes - reserved_bytes)
    if kv_cache_bytes:
        blocks = _blocks_of_set_size(manifest, kv_cache_bytes, free_bytes, max_model_len)
    else:
        used_bytes = total_bytes - free_bytes
        allowed_bytes = max(0, total_bytes * utilization_percent // 100 - used_bytes)
        origin = (
            f"{utilization_percent}% of the GPU's {total_bytes} bytes leave {allowed_bytes} bytes, because "
            f"{used_bytes} are in use"
        )
        remedy = "raise --gpu-memory-utilization"
        blocks = _blocks(manifest, allowed_bytes, max_model_len, origin, remedy)
    most_bytes = min(blocks, max_blocks) * manifest.kv_bytes_per_block
    origin = f"the plan was built for a pool of at most {max_blocks} blocks"
    return _blocks(manifest, most_bytes, max_model_len, origin, "build it again with a larger pool")


def _blocks_of_set_size(manifest: Manifest, kv_cache_bytes: int, free_bytes: int, max_model_len: int) -> int:
    origin = f"kv_cache_bytes is {kv_cache_bytes}"
    blocks = _blocks(manifest, kv_cache_bytes, max_model_len, origin, "raise --kv-cache-bytes")
    if kv_cache_bytes > free_bytes:
        raise SettingsError(f"{origin}, but only {free_bytes} bytes of memory are free")
    return blocks


def _blocks(manifest: Manifest, allowed_bytes: int, max_model_len: int, origin: str, remedy: str) -> int:
    """Whole blocks in `allowed_bytes`, whose `origin` and `remedy` the error tells if they are too few."""
    needed_bytes = _request_bytes(manifest, max_model_len)
    if needed_bytes > allowed_bytes:
        raise SettingsError(
            f"{origin}, but one request of max_model_len {max_model_len} tokens takes {needed_bytes} bytes "
            f"of KV cache; {remedy} or lower --max-model-len"
        )
    return allowed_bytes // manifest.kv_bytes_per_block


def _request_bytes(manifest: Manifest, max_model_len: int) -> int:
    """What one request of full length takes, with the null block."""
    return (1 + -(-max_model_len // manifest.block_size)) * manifest.kv_bytes_per_block
